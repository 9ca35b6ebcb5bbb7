"""causal_lm: scores equal the model's own logits over architectures, by the fastest correct runner; memory, loading.

The models and their tolerances are those of `test_runners`: 1e-4 against the naive result, 1e-5 between two batches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import causal_lm, devices, lm_head
from qaq_pipeline.lm.batching import BatchTooLargeError
from qaq_pipeline.lm.causal_lm import BATCH_TOKENS_CPU, CausalLM, GpuCausalLM, load_model, loaders
from qaq_pipeline.lm.devices import lease_devices
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.runners import PackedRunner, PaddedRunner, UnsupportedModelError, model_context
from qaq_pipeline.lm.workers import AheadScorer, BrokenDeviceError
from qaq_pipeline_tests.conftest import TinyModel, byte_tokenizer
from qaq_pipeline_tests.lm.test_runners import (
    PACKED,
    PADDED,
    TINY,
    assert_same,
    mixed_sequences,
    naive_mixed,
    naive_score,
    scaled_llama,
    sequence,
    tiny,
    unshared,
)
from qaq_pipeline_tests.support.naive import BOS, naive_logprobs, text
from qaq_pipeline_tests.support.sentences import Check

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed speed: its measurement takes longer than everything else, ten seconds in float16."""
    monkeypatch.setattr(devices, "peak_flops_per_second", lambda _dtype, _device: 1e9)


def files(folder: Path) -> ModelFiles:
    return ModelFiles("tiny", folder, "files:0")


def model_settings(**values: Any) -> ModelSettings:
    return ModelSettings.model_validate({"directory": "tiny", "device": "cpu", "dtype": "float32"} | values)


# --- the model's own log-probabilities -------------------------------------------------------------------------------


def tensors(scores: Sequence[Sequence[np.ndarray]]) -> list[list[torch.Tensor]]:
    return [[torch.from_numpy(values) for values in targets] for targets in scores]


@pytest.mark.parametrize("family", PACKED)
def test_scores_equal_the_models_own_full_logits_one_sequence_at_a_time(family: str) -> None:
    scorer = CausalLM(tiny(family), family)
    assert (scorer.facts.runner, scorer.facts.is_padded) == ("packed", False)
    for sequences in (mixed_sequences(), unshared(mixed_sequences())):
        assert_same(tensors(scorer.score(sequences)), naive_mixed(family))


@pytest.mark.parametrize("family", PADDED)
def test_what_cannot_be_packed_is_scored_in_padded_batches(family: str) -> None:
    scorer = CausalLM(tiny(family), family)
    assert (scorer.facts.runner, scorer.facts.is_padded) == ("padded", True)
    assert_same(tensors(scorer.score(mixed_sequences())), naive_mixed(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_scales_its_logits_in_code_is_scored_by_its_own_logits(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = scaled_llama(dtype)
    scorer = CausalLM(model, "some/scaled")
    assert (scorer.facts.runner, scorer.facts.is_padded) == ("own_logits", False)
    assert "some/scaled (ScaledLlama): scored with the model's own logits, one sequence at a time" in caplog.text
    sequences = mixed_sequences()
    for one, values in zip(sequences, tensors(scorer.score(sequences)), strict=True):
        for target, value in zip(one.targets, values, strict=True):
            naive = naive_score(model, one.token_ids, target)
            # With logits of the targets only, instead of all tokens, bfloat16 may round differently in its 8th bit.
            assert_same(value, naive, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_a_gpu_starts_a_batch_whose_scores_are_the_same() -> None:
    on_cpu, on_gpu = CausalLM(tiny("llama"), "tiny"), GpuCausalLM(tiny("llama"), "tiny")
    assert isinstance(on_gpu, AheadScorer)
    assert not isinstance(on_cpu, AheadScorer)
    first, second = (on_gpu.begin(sequences) for sequences in (mixed_sequences(), mixed_sequences()[:3]))
    assert_same(tensors(second()), naive_mixed("llama")[:3])
    assert_same(tensors(first()), tensors(on_cpu.score(mixed_sequences())), atol=1e-5)


def test_a_device_that_fails_while_it_computes_is_named_when_its_scores_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = GpuCausalLM(tiny("llama"), "tiny")

    def fail(_: devices.Copy) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(devices.Copy, "wait", fail)
    begun = scorer.begin(mixed_sequences())
    with pytest.raises(BrokenDeviceError, match=r"^cpu: CUDA error: an illegal memory access"):
        begun()


def test_a_score_is_an_array_of_fp32_for_each_target() -> None:
    sequences = mixed_sequences()
    for dtype in (torch.float32, torch.bfloat16):
        scores = CausalLM(tiny("llama", dtype), "tiny").score(sequences)
        for one, values in zip(sequences, scores, strict=True):
            assert all(isinstance(value, np.ndarray) and value.dtype == np.float32 for value in values)
            assert [value.shape for value in values] == [(target.stop - target.start,) for target in one.targets]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param({"weight": torch.nan}, "log-probabilities are not finite: .*`dtype: float32`", id="NaN weights"),
        pytest.param({"is_causal": False}, "not a causal model: tokens to the right change", id="bidirectional"),
    ],
)
def test_a_model_that_gives_no_ground_for_a_score_is_refused_by_name(spoil: dict[str, Any], reason: str) -> None:
    model = tiny("gemma3_text")
    if "weight" in spoil:
        with torch.no_grad():
            model.lm_head.weight[5] = spoil["weight"]
    else:
        model.config.use_bidirectional_attention = True
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match=f"^some/model: .*{reason}"):
        CausalLM(model, "some/model")


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_neither_order_nor_company_nor_padding_moves_a_score(family: str) -> None:
    scorer = CausalLM(tiny(family), family)
    sequences = mixed_sequences()
    together = tensors(scorer.score(sequences))
    assert_same(tensors(scorer.score(sequences[::-1]))[::-1], together, atol=1e-5)
    assert_same([tensors(scorer.score([one]))[0] for one in sequences], together, atol=1e-5)
    assert_same(tensors(scorer.score(unshared(sequences))), together, atol=1e-5)


def test_fault_4_the_models_head_sees_target_rows_only_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "ROWS_PER_CHUNK_CPU", 8)
    model = tiny("llama")
    scorer = CausalLM(model, "tiny")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[0]))
    sequences = mixed_sequences()
    scorer.score(sequences)
    num_targets = sum(target.stop - target.start for one in sequences for target in one.targets)
    assert max(rows) <= 8
    assert sum(rows) == num_targets
    rows.clear()
    scorer.score([sequence(list(range(1, 51)), (45, 50))])
    assert rows == [5]


@pytest.mark.parametrize("is_training", [True, False])
def test_a_model_left_in_training_scores_without_dropout_or_gradients(is_training: bool) -> None:
    model = tiny("gpt2")
    assert model.config.resid_pdrop > 0
    scorer = CausalLM(model.train(is_training), "tiny")
    assert_same(tensors(scorer.score(mixed_sequences())), naive_mixed("gpt2"))
    assert not any(weight.requires_grad for weight in model.parameters())


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "num_tokens"), [("llama", 60 + 3), ("bloom", 60 + 60)])
def test_a_batch_that_free_memory_does_not_hold_is_refused_before_it_runs(
    family: str, num_tokens: int, check_sentence: Check
) -> None:
    model = tiny(family)
    scorer = CausalLM(model, family, free_bytes=lambda: 0)
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the batch ran"))
    batch = [sequence(list(range(60)), (1, 60)), sequence([1, 2, 3], (1, 3))]
    with pytest.raises(BatchTooLargeError) as error:
        scorer.score(batch)
    check_sentence(error.value)


@pytest.mark.parametrize(("runner", "num_squares"), [(PackedRunner, 1), (PaddedRunner, 8)])
def test_attention_scores_are_counted_for_each_sequence_of_a_padded_batch(
    runner: type[PackedRunner | PaddedRunner], num_squares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "choose_runner", lambda model, *_, **__: runner(model))
    model = tiny("gemma2")  # Its soft-capping materialises the scores.
    scorer = CausalLM(model, "tiny", free_bytes=lambda: 0)
    squares = num_squares * 500**2 * causal_lm._bytes_per_square(model)
    num_bytes = 8 * 500 * causal_lm._bytes_per_token(model) + squares
    with pytest.raises(BatchTooLargeError, match=f"^4000 tokens need {num_bytes / 1e6:.2f} MB"):
        scorer.score([sequence([1] * 500, (1, 500))] * 8)
    assert squares > 1e7


def test_a_shared_prefix_takes_its_memory_once_and_its_keys_for_each_sequence() -> None:
    model = tiny("llama")
    scorer = CausalLM(model, "tiny", free_bytes=lambda: 0)
    per_token, per_key = causal_lm._bytes_per_token(model), causal_lm._bytes_per_key(model)
    batch = [sequence([1] * 25 + [number] * 10, (25, 35), num_shared=20) for number in range(40)]
    batch.append(sequence([2] * 30, (29, 30), num_shared=20))
    num_tokens = 40 * 15 + 10 + 2 * 20
    num_bytes = num_tokens * per_token + 41 * 20 * per_key
    with pytest.raises(BatchTooLargeError, match=f"^{num_tokens} tokens need {num_bytes / 1e6:.2f} MB"):
        scorer.score(batch)
    assert per_key == 4 * TINY["num_key_value_heads"] * TINY["head_dim"] * 4 < per_token / 10


def test_free_memory_is_asked_for_before_every_batch(check_sentence: Check) -> None:
    free = [1e12, 1e12, 0.0, 1e12]  # The facts use the first value.
    scorer = CausalLM(tiny("llama"), "tiny", free_bytes=functools.partial(free.pop, 0))
    batch = mixed_sequences()
    first = scorer.score(batch)
    with pytest.raises(BatchTooLargeError) as error:
        scorer.score(batch)
    check_sentence(error.value)
    np.testing.assert_array_equal(scorer.score(batch)[0][0], first[0][0])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["cpu", "cuda", "accelerator", "cublas", "python"],
)
def test_memory_that_runs_out_on_the_way_is_a_batch_too_large(error: Exception, check_sentence: Check) -> None:
    model = tiny("llama")
    scorer = CausalLM(model, "tiny")
    batch = [sequence(list(range(60)), (1, 60)), sequence([1, 2, 3], (1, 3))]
    expected = scorer.score(batch)

    def run_out(*_: Any) -> None:
        raise error

    hook = model.base_model.register_forward_pre_hook(run_out)
    with pytest.raises(BatchTooLargeError) as caught:
        scorer.score(batch)
    check_sentence(caught.value)
    # The traceback of the first error would keep the failed batch's tensors alive.
    assert caught.value.__context__ is caught.value.__cause__ is None
    hook.remove()
    np.testing.assert_array_equal(scorer.score(batch)[0][0], expected[0][0])


def scorer_that_raises(error: Exception) -> CausalLM:
    """A model that fails in every forward pass."""
    model = tiny("llama")
    scorer = CausalLM(model, "tiny")

    def fail(*_: Any) -> None:
        raise error

    model.base_model.register_forward_pre_hook(fail)
    return scorer


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
def test_a_device_that_fails_is_named_as_broken(error: Exception) -> None:
    scorer = scorer_that_raises(error)
    with pytest.raises(BrokenDeviceError, match=f"^cpu: {error}$"):
        scorer.score(mixed_sequences())


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("can't allocate memory")])
def test_any_other_error_passes_through(error: Exception) -> None:
    scorer = scorer_that_raises(error)
    with pytest.raises(type(error)) as caught:
        scorer.score(mixed_sequences())
    assert caught.value is error


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_work_of_a_token_is_counted_without_embeddings_and_head(family: str) -> None:
    facts = CausalLM(tiny(family), family).facts
    hidden, inner, keys = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_key_value_heads"] * TINY["head_dim"]
    of_a_layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    assert facts.flops_per_token == 2 * TINY["num_hidden_layers"] * of_a_layer
    assert facts.flops_per_target == 2 * TINY["vocab_size"] * hidden
    assert facts.flops_per_attended == TINY["num_hidden_layers"] * 4 * TINY["num_attention_heads"] * TINY["head_dim"]
    assert (
        facts.flops(10, 3, 55)
        == 10 * facts.flops_per_token + 3 * facts.flops_per_target + 55 * facts.flops_per_attended
    )
    assert facts.peak_flops_per_second == 1e9


def test_a_batch_on_a_cpu_is_small_and_smaller_where_memory_is_short() -> None:
    sizes = [CausalLM(tiny("llama"), "tiny", free_bytes=lambda free=free: free).facts for free in (1e12, 1e6, 0)]
    ample, short, none = (facts.batch_tokens for facts in sizes)
    assert ample == BATCH_TOKENS_CPU > short > none == 1


@pytest.mark.slow
def test_a_batch_of_the_size_it_names_fits_into_the_memory_it_was_told_of() -> None:
    scorer = CausalLM(tiny("llama"), "tiny", free_bytes=lambda: 1e6)
    fitting = scorer.facts.batch_tokens
    scorer.score([sequence([1] * fitting, (1, 2))])
    with pytest.raises(BatchTooLargeError):
        scorer.score([sequence([1] * (fitting + 1), (1, 2))])


# --- loading ---------------------------------------------------------------------------------------------------------


def saved(model: Any, folder: Path) -> None:
    """The model on disk, with the byte tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer(TinyModel()).save_pretrained(folder)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[int]]]:
    """Each model loaded in the test, and the sample of its self-test."""
    seen: list[tuple[Any, list[int]]] = []
    choose = causal_lm.choose_runner

    def spied(model: Any, name: str, sample_ids: list[int], max_tokens: int, **others: Any) -> Any:
        seen.append((model, sample_ids))
        return choose(model, name, sample_ids, max_tokens, **others)

    monkeypatch.setattr(causal_lm, "choose_runner", spied)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_in_the_dtype_asked_for(
    dtype: str, tiny_model_dir: Callable[..., Path], loaded: list[tuple[Any, list[int]]]
) -> None:
    sample = text(causal_lm.SAMPLE_TEXT)
    scorer = load_model(model_settings(dtype=dtype), files(tiny_model_dir()), min_context=512, sample_ids=sample)
    ((model, sample_ids),) = loaded
    assert (model.dtype, model.device) == (getattr(torch, dtype), CPU)
    assert sample_ids == sample
    assert model_context(model) == 512
    assert scorer.facts.runner == "packed"
    ((value,),) = scorer.score([sequence([BOS, *text("print(1)")], (1, 9))])
    assert value.dtype == np.float32
    assert np.isfinite(value).all()


@pytest.mark.parametrize(("device", "placed"), [("cpu", None), ("cuda:1", {"": torch.device("cuda:1")})])
def test_weights_go_from_their_files_straight_to_a_gpu(
    device: str, placed: dict[str, torch.device] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        causal_lm.AutoModelForCausalLM, "from_pretrained", lambda _folder, **options: asked.append(options)
    )
    causal_lm.load_weights(files(tmp_path), torch.bfloat16, torch.device(device))
    (options,) = asked
    assert options["device_map"] == placed


def test_a_model_whose_attention_sdpa_cannot_compute_is_loaded_all_the_same(tmp_path: Path) -> None:
    model = tiny("gemma2")
    saved(model, tmp_path)
    scorer = load_model(model_settings(), files(tmp_path))
    ids = list(range(3, 50))
    ((value,),) = scorer.score([sequence(ids, (20, 47))])
    assert_same(torch.from_numpy(value), naive_logprobs(model, ids[:20], ids[20:]))


def test_a_sequence_alone_waits_for_memory_before_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(causal_lm.time, "sleep", waited.append)
    alone = [sequence([1, 2, 3], (1, 3))]
    free = iter([1e12, 0.0, 0.0, 1e12])
    assert CausalLM(tiny("llama"), "tiny", free_bytes=lambda: next(free)).score(alone)
    assert waited == [1, 1]
    with pytest.raises(BatchTooLargeError) as error:
        CausalLM(tiny("llama"), "tiny", free_bytes=lambda: 0).score(alone)
    check_sentence(error.value)
    assert len(waited) == 2 + causal_lm.PATIENCE_SECONDS


@pytest.mark.parametrize("num_processes", [1, 2])
def test_of_several_processes_each_has_one_thread(
    num_processes: int, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    load_model(model_settings(), files(tiny_model_dir()), num_processes=num_processes)
    assert given == ([1] if num_processes > 1 else [])


@pytest.mark.parametrize(
    ("most", "num_cores", "available", "expected"),
    [
        pytest.param(8, 3, 64e9, 3, id="one for each core"),
        pytest.param(2, 3, 64e9, 2, id="at most so many"),
        pytest.param(8, 1, 64e9, 1, id="one core"),
        pytest.param(8, 8, 6.1e9, 6, id="no more than memory holds"),
        pytest.param(8, 8, 0.1e9, 1, id="but one"),
    ],
)
def test_on_a_cpu_there_are_as_many_models_as_cores_and_memory_hold(
    most: int, num_cores: int, available: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "num_cores", lambda: num_cores)
    monkeypatch.setattr(devices, "available_memory", lambda: available)
    monkeypatch.setattr(causal_lm, "load_model", lambda *arguments, sample_ids: (*arguments, sample_ids))
    settings, model = model_settings(), files(Path("tiny"))
    with loaders(settings, model, 77, most, [5]) as loads:
        assert [load() for load in loads] == [(settings, model, 77, expected, [5])] * expected


@pytest.mark.parametrize(
    ("device", "held", "most", "expected"),
    [
        ("cuda", [], 8, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", [], 2, ["cuda:0", "cuda:1"]),
        ("cuda", [0], 8, ["cuda:1", "cuda:2"]),
        ("cuda:1", [], 8, ["cuda:1"]),
    ],
)
def test_there_is_a_model_for_each_gpu_that_nobody_holds(
    device: str, held: list[int], most: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"id-{index}"))
    monkeypatch.setattr(devices, "LEASES", tmp_path)
    monkeypatch.setattr(causal_lm, "load_model", lambda settings, *_, **__: settings.device)
    with contextlib.ExitStack() as others:
        for index in held:
            others.enter_context(lease_devices({"x": f"gpu-id-{index}"}, tmp_path, limit=1, timeout=0))
        with loaders(model_settings(device=device), files(Path("tiny")), 0, most) as loads:
            assert [load() for load in loads] == expected


def test_a_window_wider_than_the_models_is_an_error_that_names_the_remedy(
    tiny_model_dir: Callable[..., Path], check_sentence: Check
) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        load_model(model_settings(), files(tiny_model_dir()), min_context=513)
    check_sentence(error.value)


def test_a_model_that_states_no_longest_sequence_is_taken_at_any_window(tmp_path: Path) -> None:
    model = tiny("bloom")
    saved(model, tmp_path)
    assert model_context(model) is None
    assert load_model(model_settings(), files(tmp_path), min_context=1_000_000).facts.runner == "padded"
