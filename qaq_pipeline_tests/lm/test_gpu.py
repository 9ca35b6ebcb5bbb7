"""The same path on a CUDA device: scores equal the CPU's, a batch that does not fit is halved, a GPU has one holder.

`pytest -m gpu` runs these tests on a machine with a GPU; `make test` does not collect them.
Tolerance: 1e-3 nats per token in fp32 without TF32 (another order of the same sums), 0.05 on the mean in bfloat16,
0.03 in mixed precision and 0.01 in float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import causal_lm, gpu_speed
from qaq_pipeline.lm.batching import BatchQueue, BatchTooLargeError
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.lm.workers import Load, open_processes, score_batches
from qaq_pipeline.schema.vocabularies import NullReason, Quantity
from qaq_pipeline_tests.support.naive import text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def settings(device: str, dtype: str = "float32") -> ModelSettings:
    return ModelSettings.model_validate({"directory": "tiny", "device": device, "dtype": dtype})


def sequences(number: int = 40) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    prefix = random.integers(0, 256, 20).tolist()
    drawn = [prefix + random.integers(0, 256, length).tolist() for length in random.integers(2, 200, number)]
    return [TokenSequence(f"{n:032x}", ids, (Target(Quantity.Q, 20, len(ids)),), 19) for n, ids in enumerate(drawn)]


def means(model: causal_lm.CausalLM) -> np.ndarray:
    queue = BatchQueue([sequences()], 1000, is_padded=model.facts.is_padded)
    found: dict[str, float] = {}
    for batch, scores in score_batches(model, queue):
        assert not isinstance(scores, NullReason)
        for sequence, (values,) in zip(batch, scores, strict=True):
            found[sequence.pair_id] = float(values.mean())
    return np.array([found[name] for name in sorted(found)])


@pytest.mark.parametrize(
    ("dtype", "tolerance", "runner"),
    [("float32", 1e-3, "padded"), ("bfloat16", 0.05, "packed"), ("float16", 0.01, "packed"), ("mixed", 0.03, "packed")],
)
def test_scores_on_a_gpu_are_those_of_the_cpu(
    dtype: str, tolerance: float, runner: str, tiny_model_dir: Callable[..., Path]
) -> None:
    files = ModelFiles("tiny", tiny_model_dir(), "files:0")
    expected = means(causal_lm.load_model(settings("cpu"), files))
    on_gpu = causal_lm.load_model(settings("cuda:0", dtype), files, sample_ids=text(causal_lm.SAMPLE_TEXT))
    assert on_gpu.facts.runner == ", ".join([runner, *gpu_speed.CHANGES])
    assert on_gpu.facts.peak_flops_per_second > 1e12
    assert np.abs(means(on_gpu) - expected).max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_words", [300, 32_256, 151_936])
def test_the_kernel_of_the_head_is_as_exact_as_torch(num_words: int, dtype: torch.dtype) -> None:
    from qaq_pipeline.lm import head_kernel

    logits = (torch.randn(64, num_words, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 5).to(dtype)
    targets = torch.arange(64, device="cuda")[:, None]
    exact = torch.log_softmax(logits.double(), -1).gather(-1, targets)[:, 0]
    assert float((head_kernel.token_logprobs(logits, targets) - exact).abs().max()) < 1e-5


def test_nothing_waits_for_the_gpu_before_scores_are_asked_for(tiny_model_dir: Callable[..., Path]) -> None:
    files = ModelFiles("tiny", tiny_model_dir(), "files:0")
    model = causal_lm.load_model(settings("cuda:0", "bfloat16"), files, sample_ids=text(causal_lm.SAMPLE_TEXT))
    assert isinstance(model, causal_lm.GpuCausalLM)
    model.score(sequences())
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = model.begin(sequences())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(begun()) == 40


def test_a_batch_that_does_not_fit_leaves_room_for_the_next(tiny_model_dir: Callable[..., Path]) -> None:
    model = causal_lm.load_model(settings("cuda:0"), ModelFiles("tiny", tiny_model_dir(), "files:0"))
    expected = means(model)
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(BatchTooLargeError):
            model.score(sequences(20_000))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(means(model), expected, atol=1e-5)


def test_every_gpu_scores_in_a_process_that_holds_it(tiny_model_dir: Callable[..., Path]) -> None:
    files = ModelFiles("tiny", tiny_model_dir(), "files:0")
    with causal_lm.loaders(settings("cuda"), files, 256, 8) as loads:
        scorers = [functools.partial(SequenceChunkScorer, load) for load in loads]
        with open_processes(scorers) as processes:
            assert len({facts.device for facts in processes.facts}) == torch.cuda.device_count()
            assert {facts.runner for facts in processes.facts} == {", ".join(["padded", *gpu_speed.CHANGES])}
            done = dict(processes.run(OneChunk(sequences())))
    assert sum(done.values()) == 40


class SequenceChunkScorer:
    """Scores chunks of token sequences."""

    def __init__(self, load: Load) -> None:
        self._model = load()
        self.facts = self._model.facts

    def score(self, chunk: Sequence[TokenSequence], _note: Callable[[Any], None]) -> int:
        """Score a chunk, and count its sequences."""
        return sum(len(batch) for batch, _ in score_batches(self._model, BatchQueue([chunk], 1000, is_padded=True)))


class OneChunk:
    """A queue of one chunk."""

    def __init__(self, chunk: Sequence[TokenSequence]) -> None:
        self._chunks = [tuple(chunk)]

    def take(self) -> Sequence[TokenSequence]:
        return self._chunks.pop() if self._chunks else ()

    def after_loss(self, chunk: Sequence[TokenSequence]) -> Sequence[TokenSequence]:
        return chunk
