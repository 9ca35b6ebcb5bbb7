"""The model runtime: a Hugging Face causal LM on its device, which gives log-probabilities of target tokens.

Belongs here: the tokenizer and model adapters, dtype and device choice, memory, how many processes load it.
Does not belong here: the way through the model and its self-test (runner), or which sequences are scored.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm.batching import BatchTooLargeError
from qaq_pipeline.lm.devices import (
    FREE_SHARE,
    LEASE_SECONDS,
    LEASES,
    available_memory,
    free_memory,
    num_cores,
    peak_flops_per_second,
    resolve_device,
    resolve_dtype,
)
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.prompts import TokenSequence
from qaq_pipeline.lm.runners import UnsupportedModelError, choose_runner, model_context
from qaq_pipeline.lm.tokenizer import HfTokenizer
from qaq_pipeline.lm.workers import Load, ScorerFacts, lease_devices

BATCH_TOKENS_CPU = 1024
BATCH_TOKENS_GPU = 32_768
"""Tokens of a batch where the settings name none and memory allows them: a CPU's caches want few, a GPU many."""

PATIENCE_SECONDS = 10
"""How long a sequence that does not fit waits for memory before it is given up."""

PROCESS_BYTES = 700e6
"""What a scoring process takes beside its weights: Python, torch, transformers."""

SAMPLE_TEXT = (
    "Write a function that returns the sum of the squares of the first n natural numbers.\n\nAnswer:\n"
    "def sum_of_squares(n):\n    total = 0\n    for i in range(1, n + 1):\n        total += i * i\n    return total\n"
)
"""An ordinary text, for the self-test."""


class CausalLM:
    """A causal language model that scores token sequences, by the fastest runner that is right for it.

    Args:
        model: a transformers causal LM, on its device, in its dtype.
        name: of the model, for messages.
        sample_ids: token ids of an ordinary text, which the self-test scores.
        max_tokens: that a sequence may have.
        free_bytes: memory that a batch may take, asked for before every batch; default: of the model's device.

    Raises:
        UnsupportedModelError: its log-probabilities are no ground for a score.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        sample_ids: Sequence[int] = (),
        max_tokens: int = 2048,
        free_bytes: Callable[[], float] | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._free_bytes = free_bytes or functools.partial(free_memory, model.device)
        self._runner = choose_runner(self._model, name, sample_ids, max_tokens)
        self._bytes_per_token = _bytes_per_token(model)
        self._bytes_per_square = _bytes_per_square(model)
        self.facts = self._facts()

    @property
    def max_context(self) -> int | None:
        """Longest sequence the model was made for, in tokens; None where it states none."""
        return model_context(self._model)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self._model.dtype

    @torch.inference_mode()
    def score(self, sequences: Sequence[TokenSequence]) -> list[list[np.ndarray]]:
        """For each sequence and each of its targets, ln p of the target's tokens: fp32, in nats.

        Raises:
            BatchTooLargeError: the batch does not fit into memory; on a CPU before the kernel's killer is woken.
        """
        lengths = [len(sequence.token_ids) for sequence in sequences]
        num_tokens = max(lengths) * len(lengths) if self._runner.is_padded else sum(lengths)
        num_bytes = num_tokens * self._bytes_per_token + max(lengths) ** 2 * self._bytes_per_square
        # A sequence alone cannot be made smaller: it waits for others to free what it needs.
        if not self._is_room(num_bytes, PATIENCE_SECONDS if len(sequences) == 1 else 0):
            raise BatchTooLargeError(f"{num_tokens} tokens need {num_bytes / 1e6:.0f} MB, more than is free")
        try:
            scores = self._runner.score(sequences)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        else:
            return [[values.numpy() for values in targets] for targets in scores]
        # Outside the except block, whose traceback would keep the failed batch's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise BatchTooLargeError(f"{num_tokens} tokens did not fit into memory")

    def _is_room(self, num_bytes: float, patience: int) -> bool:
        """Whether so many bytes are free, now or within so many seconds."""
        for _ in range(patience):
            if num_bytes <= self._free_bytes():
                return True
            time.sleep(1)
        return num_bytes <= self._free_bytes()

    def _facts(self) -> ScorerFacts:
        most = BATCH_TOKENS_CPU if self.device.type == "cpu" else BATCH_TOKENS_GPU
        return ScorerFacts(
            runner=self._runner.name,
            is_padded=self._runner.is_padded,
            shares_prefixes=self._runner.shares_prefixes,
            batch_tokens=max(1, min(most, int(self._free_bytes() / self._bytes_per_token))),
            **_work(self._model),
            peak_flops_per_second=peak_flops_per_second(self.dtype, self.device),
        )


def unloaded_facts(files: ModelFiles, dtype: torch.dtype, device: torch.device) -> ScorerFacts:
    """What the model would say of itself, without its weights: from its config, and a matrix product."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.folder))
    model.tie_weights()
    return ScorerFacts(
        runner="",
        is_padded=device.type != "cpu",
        shares_prefixes=device.type == "cpu",
        batch_tokens=0,
        **_work(model),
        peak_flops_per_second=peak_flops_per_second(dtype, device),
    )


def _work(model: Any) -> dict[str, float]:
    """Floating-point operations of a token in the body, without attention, and of a target in the head.

    Every token is multiplied with the model's matrices, less embeddings and head.
    """
    head = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)} | {id(head)}
    body = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2 and id(weight) not in tables)
    return {"flops_per_token": 2.0 * body, "flops_per_target": 2.0 * head.numel()}


def _bytes_per_token(model: Any) -> float:
    """Memory that a token of a batch takes at the most, in bytes: activations of one layer, and the head's rows.

    Counted from the architecture: residual, norms, queries, keys, values and their outputs, the three products of
    the feed-forward, each in the model's dtype and some in fp32; of the head, a chunk's logits spread over it.
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = inner if isinstance(inner, int) else max(inner)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    itemsize = model.dtype.itemsize
    logits = vocabulary * (itemsize + 4) if model.device.type != "cpu" else vocabulary * itemsize
    return (16 * hidden + 4 * inner) * itemsize + 4 * hidden + logits / 2


def _bytes_per_square(model: Any) -> float:
    """Memory of the attention for a pair of tokens of the longest sequence: scores exist where they are capped."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is None:
        return 0.0
    return config.num_attention_heads * (2 * model.dtype.itemsize + 8)


def _is_out_of_memory(error: BaseException) -> bool:
    is_torch = isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or is_torch or "can't allocate memory" in str(error)


def load_model(
    model: ModelSettings,
    files: ModelFiles,
    min_context: int = 0,
    num_processes: int = 1,
    sample_ids: Sequence[int] | None = None,
) -> CausalLM:
    """The model on its device, in its dtype, tested against its own logits.

    Args:
        model: its settings.
        files: its files.
        min_context: tokens that the longest sequence may have.
        num_processes: that score on this device at once; of several on a CPU each has one thread from now on.
        sample_ids: token ids of `SAMPLE_TEXT`; None: by the files' tokenizer, whose loading may take longer than the
            weights'.

    Raises:
        UnsupportedModelError: the device is missing, the model was made for sequences shorter than `min_context`
            tokens, or its own log-probabilities are no ground for a score.
    """
    device = resolve_device(model.device)
    if num_processes > 1 and device.type == "cpu":
        torch.set_num_threads(1)
    # The attention is transformers' choice: SDPA, but eager where an architecture needs it (Gemma 2's soft-capping).
    loaded = AutoModelForCausalLM.from_pretrained(
        files.folder, dtype=resolve_dtype(model.dtype, device), trust_remote_code=False
    )
    if sample_ids is None:
        sample_ids = HfTokenizer(AutoTokenizer.from_pretrained(files.folder)).encode_markup(SAMPLE_TEXT)
    free_bytes = functools.partial(free_memory, device, num_processes)
    scorer = CausalLM(loaded.to(device), files.name, sample_ids, min_context or 2048, free_bytes)
    if scorer.max_context is not None and scorer.max_context < min_context:
        raise UnsupportedModelError(
            f"{files.name}: made for {scorer.max_context} tokens, fewer than scoring.max_tokens ({min_context}); "
            f"set scoring.max_tokens to {scorer.max_context} or less"
        )
    return scorer


@contextmanager
def loaders(
    model: ModelSettings, files: ModelFiles, min_context: int, most: int, sample_ids: Sequence[int] | None = None
) -> Iterator[list[Load]]:
    """How to load the model in each of several processes: one for each free GPU or each core, at most so many.

    Within the context the GPUs are held. On a CPU there are no more processes than memory holds; of several each has
    one thread: a core of its own, and no barriers between them.

    Raises:
        workers.DeviceBusyError: other processes hold the GPUs.
    """
    device = resolve_device(model.device)
    load = functools.partial(load_model, sample_ids=sample_ids)
    if device.type == "cuda":
        indices = range(torch.cuda.device_count()) if device.index is None else [device.index]
        locks = {f"cuda:{index}": f"gpu-{torch.cuda.get_device_properties(index).uuid}" for index in indices}
        with lease_devices(locks, LEASES, most, LEASE_SECONDS) as gpus:
            settings = [model.model_copy(update={"device": gpu}) for gpu in gpus]
            yield [functools.partial(load, gpu, files, min_context) for gpu in settings]
        return
    # Weights are read in the files' dtype and held in the model's: half as much again is room for both.
    room = FREE_SHARE * available_memory() / (1.5 * files.num_weight_bytes() + PROCESS_BYTES)
    number = max(1, min(most, num_cores(), math.floor(room))) if device.type == "cpu" else 1
    yield [functools.partial(load, model, files, min_context, number)] * number
