"""A Hugging Face causal LM on its device, which returns the log-probabilities of target tokens.

Belongs here: loading a model, the number of processes that load it, the memory and the operations of its batches.
Does not belong here: runners and their self-test (`runners`), devices (`devices`), tokenizers (`tokenizer`), and the
choice of sequences.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import devices, lm_head
from qaq_pipeline.lm.batching import BatchTooLargeError
from qaq_pipeline.lm.model_files import ModelFiles, ModelNotFoundError, unreadable
from qaq_pipeline.lm.prompts import TokenSequence
from qaq_pipeline.lm.runners import Runner, UnsupportedModelError, can_pack, choose_runner, model_context
from qaq_pipeline.lm.workers import BrokenDeviceError, Load, ScorerFacts, Scores

Result = TypeVar("Result")

BATCH_TOKENS_CPU = 1024
BATCH_TOKENS_GPU = 32_768
"""Default number of tokens of one forward pass, if memory allows: few suit a CPU's caches, many a GPU."""

PATIENCE_SECONDS = 10
"""Time that a sequence waits for memory before it counts as too large."""

PROCESS_BYTES = 700e6
"""Memory of a scoring process without its weights: Python, torch, transformers."""

SAMPLE_TEXT = (
    "Write a function that returns the sum of the squares of the first n natural numbers.\n\nAnswer:\n"
    "def sum_of_squares(n):\n    total = 0\n    for i in range(1, n + 1):\n        total += i * i\n    return total\n"
)
"""Ordinary text for the self-test."""


class CausalLM:
    """A causal language model that scores token sequences with the fastest runner that passes its self-test.

    Args:
        model: a transformers causal LM, on its device, in its dtype.
        name: name of the model, for messages.
        sample_ids: token ids of an ordinary text, which the self-test scores.
        max_tokens: largest length of a sequence.
        is_mixed: whether it computes in mixed precision from now on; its dtype is bfloat16.
        free_bytes: returns the memory that a batch may use; called before every batch. Default: of the model's device.
        choose: chooses the runner; default: `choose_runner`.

    Raises:
        UnsupportedModelError: the model's log-probabilities cannot be used for scores.
        BrokenDeviceError: the device has failed, and this process can use it no more.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        sample_ids: Sequence[int] = (),
        max_tokens: int = 2048,
        is_mixed: bool = False,
        free_bytes: Callable[[], float] | None = None,
        choose: Callable[..., Runner] | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._free_bytes = free_bytes or functools.partial(devices.free_memory, model.device)
        try:
            self._runner = (choose or choose_runner)(self._model, name, sample_ids, max_tokens, is_mixed=is_mixed)
        except RuntimeError as error:
            if devices.has_failed(error):
                raise BrokenDeviceError(f"{devices.name_of(model.device)}: {error}") from error
            raise
        self._bytes_per_token = _bytes_per_token(model)
        self._bytes_per_key = _bytes_per_key(model)
        self._bytes_per_square = _bytes_per_square(model)
        self.facts = self._facts()

    def score(self, sequences: Sequence[TokenSequence]) -> Scores:
        """For each sequence and each of its targets, ln p of the target's tokens: fp32, in nats.

        Raises:
            BatchTooLargeError: the batch does not fit into memory. On a CPU this is estimated before, since the kernel
                would kill the process.
            BrokenDeviceError: the device has failed, and this process can use it no more.
        """
        return self._begun(sequences)()

    def _begun(self, sequences: Sequence[TokenSequence]) -> Callable[[], Scores]:
        """The batch is computed, or a GPU computes it; the result waits for its scores and returns them.

        Raises:
            Exception: both, as `score`.
        """
        lengths = [len(sequence.token_ids) for sequence in sequences]
        num_tokens = max(lengths) * len(lengths) if self._runner.is_padded else sum(lengths)
        num_squares = max(lengths) ** 2 * (len(lengths) if self._runner.is_padded else 1)
        num_bytes = num_squares * self._bytes_per_square
        if self._runner.shares_prefixes:
            num_repeated = sum(one.num_shared for one in sequences)
            prefixes = {tuple(one.token_ids[: one.num_shared]) for one in sequences}
            num_bytes += num_repeated * self._bytes_per_key
            num_tokens += sum(map(len, prefixes)) - num_repeated
        num_bytes += num_tokens * self._bytes_per_token
        # A single sequence cannot be split: it waits until other processes free memory.
        if not self._is_room(num_bytes, PATIENCE_SECONDS if len(sequences) == 1 else 0):
            raise BatchTooLargeError(f"{num_tokens} tokens need {num_bytes / 1e6:,.2f} MB, more than is free")
        copy = self._on_device(num_tokens, lambda: devices.Copy(self._runner.logprobs(sequences)))

        def scores() -> Scores:
            found = lm_head.by_target(self._on_device(num_tokens, copy.wait), sequences)
            return [[values.numpy() for values in targets] for targets in found]

        return scores

    @torch.inference_mode()
    def _on_device(self, num_tokens: int, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not devices.is_out_of_memory(error):
                if devices.has_failed(error):
                    raise BrokenDeviceError(f"{self.facts.device}: {error}") from error
                raise
        # Outside the except block, because its traceback keeps the failed batch's tensors alive.
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        raise BatchTooLargeError(f"{num_tokens} tokens did not fit into memory")

    def _is_room(self, num_bytes: float, patience: int) -> bool:
        """Whether `num_bytes` are free now or within `patience` seconds."""
        for _ in range(patience):
            if num_bytes <= self._free_bytes():
                return True
            time.sleep(1)
        return num_bytes <= self._free_bytes()

    def _facts(self) -> ScorerFacts:
        largest = BATCH_TOKENS_CPU if self._model.device.type == "cpu" else BATCH_TOKENS_GPU
        return ScorerFacts(
            runner=", ".join([self._runner.name, *getattr(self._runner, "changes", ())]),
            is_padded=self._runner.is_padded,
            shares_prefixes=self._runner.shares_prefixes,
            batch_tokens=max(1, min(largest, int(self._free_bytes() / self._bytes_per_token))),
            flops_per_token=_flops_per_token(self._model),
            flops_per_target=_flops_per_target(self._model),
            flops_per_attended=_flops_per_attended(self._model),
            peak_flops_per_second=devices.peak_flops_per_second(self._model.dtype, self._model.device),
            device=devices.name_of(self._model.device),
        )


class GpuCausalLM(CausalLM):
    """A model whose device computes a batch while the process prepares the next one."""

    def begin(self, sequences: Sequence[TokenSequence]) -> Callable[[], Scores]:
        """Start a batch. The result waits for its scores and returns them.

        Raises:
            Exception: here and by the result, as `score`.
        """
        return self._begun(sequences)


def unloaded_facts(files: ModelFiles, dtype: torch.dtype, device: torch.device) -> ScorerFacts:
    """The facts of a model without its weights, from its config and a measured matrix product."""
    model = _unloaded(files)
    return ScorerFacts(
        runner="",
        is_padded=not can_pack(device, dtype),
        shares_prefixes=can_pack(device, dtype),
        batch_tokens=0,
        flops_per_token=_flops_per_token(model),
        flops_per_target=_flops_per_target(model),
        flops_per_attended=_flops_per_attended(model),
        peak_flops_per_second=devices.peak_flops_per_second(dtype, device),
        device=devices.name_of(device),
    )


def _unloaded(files: ModelFiles) -> Any:
    """The model without memory for its weights. Raises `ModelNotFoundError` if its config describes no causal LM."""
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of any kind.
        raise unreadable(files.folder, "config.json", error) from error
    model.tie_weights()
    return model


def check_weights(files: ModelFiles) -> None:
    """Compare the shapes of the weights, which are not loaded, with those of the config.

    Quantised weights have shapes of their own and are not compared.

    Raises:
        ModelNotFoundError: they differ, or one of the files cannot be read.
    """
    model = _unloaded(files)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    is_quantised = getattr(model.config, "quantization_config", None) is not None
    for file in sorted(files.folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise unreadable(file, "weights", error) from error
        for name, shape in () if is_quantised else shapes.items():
            if shape != expected.get(name, shape):
                raise ModelNotFoundError(
                    f"{files.name}: its weights and its config.json are not of one model: {name} has the shape {shape} "
                    f"in {file.name}, and {expected[name]} by the config; fetch the model again, or name another"
                )


def load_weights(files: ModelFiles, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with its weights, which go to a device straight from their files.

    Raises:
        ModelNotFoundError: the weights cannot be read, or are not those of the config.
    """
    # transformers chooses the attention: SDPA, or eager if an architecture needs it (Gemma 2's soft-capping).
    try:
        return AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            device_map=None if device.type == "cpu" else {"": device},
        )
    except Exception as error:  # transformers raises errors of any kind.
        if devices.is_out_of_memory(error):
            raise
        check_weights(files)
        raise unreadable(files.folder, "weights", error) from error


def _flops_per_token(model: Any) -> float:
    """Floating-point operations of one token in the body, without attention.

    Every token is multiplied with all matrices of the model except the embeddings and the head.
    """
    head = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)} | {id(head)}
    return 2.0 * sum(weight.numel() for weight in model.parameters() if weight.dim() == 2 and id(weight) not in tables)


def _flops_per_target(model: Any) -> float:
    """Floating-point operations of one target in the head."""
    return 2.0 * model.get_output_embeddings().weight.numel()


def _flops_per_attended(model: Any) -> float:
    """Floating-point operations of attention for one token and one that it attends to, in all layers together.

    A product of a query and a key, and one of a weight and a value. Too many for layers without attention.
    """
    config = model.config.get_text_config()
    heads, size = _heads_of(config)
    return 4.0 * config.num_hidden_layers * heads * size


def _heads_of(config: Any) -> tuple[int, int]:
    """Number of attention heads and size of each; 0 if the architecture has none."""
    heads = getattr(config, "num_attention_heads", 0)
    return heads, getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)


def _bytes_per_token(model: Any) -> float:
    """Upper bound of the memory of one token of a batch, in bytes: activations of one layer, and the head's rows.

    Counted from the architecture: residual, norms, queries, keys, values and their outputs, and the three products of
    the feed-forward, each in the model's dtype and some in fp32. Logits of a chunk are divided among its tokens.
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = inner if isinstance(inner, int) else max(inner)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    itemsize = model.dtype.itemsize
    logits = vocabulary * (itemsize + 4) if model.device.type != "cpu" else vocabulary * itemsize
    return (16 * hidden + 4 * inner) * itemsize + 4 * hidden + logits / 2


def _bytes_per_key(model: Any) -> float:
    """Memory of a key and a value of one layer that stand beside a sequence, in bytes: as they were, and gathered."""
    config = model.config.get_text_config()
    heads, size = _heads_of(config)
    return 4.0 * (getattr(config, "num_key_value_heads", None) or heads) * size * model.dtype.itemsize


def _bytes_per_square(model: Any) -> float:
    """Memory of the attention scores per pair of tokens, in bytes. Scores are materialised only if they are capped."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is None:
        return 0.0
    return config.num_attention_heads * (2 * model.dtype.itemsize + 8)


def load_model(
    model: ModelSettings,
    files: ModelFiles,
    min_context: int = 0,
    num_processes: int = 1,
    sample_ids: Sequence[int] = (),
) -> CausalLM:
    """The model on its device, in its dtype, tested against its own logits.

    Args:
        model: settings of the model.
        files: files of the model.
        min_context: length of the longest sequence to score, in tokens.
        num_processes: number of processes that score on this device. On a CPU, if there are several, this process uses
            one thread from now on.
        sample_ids: token ids of an ordinary text, which the self-test scores.

    Raises:
        devices.DeviceNotFoundError: this machine does not have the device.
        ModelNotFoundError: the weights cannot be read, or are not those of the config.
        UnsupportedModelError: the model supports fewer than `min_context` tokens, or its own log-probabilities cannot
            be used for scores.
    """
    device = devices.resolve_device(model.device)
    devices.prepare(device)
    if num_processes > 1 and device.type == "cpu":
        torch.set_num_threads(1)
    dtype = devices.resolve_dtype(model.dtype, device)
    loaded = load_weights(files, devices.weights_dtype(dtype), device)
    context = model_context(loaded)
    if context is not None and context < min_context:
        raise UnsupportedModelError(
            f"{files.name}: supports {context} tokens, fewer than scoring.max_tokens ({min_context}); "
            f"set scoring.max_tokens to {context} or less"
        )
    free_bytes = functools.partial(devices.free_memory, device, num_processes)
    kind = GpuCausalLM if device.type == "cuda" else CausalLM
    return kind(loaded, files.name, sample_ids, min_context or 2048, dtype == "mixed", free_bytes)


def num_bytes_to_load(files: ModelFiles) -> int:
    """Memory that a process takes to load a model on a CPU.

    Weights exist in the files' dtype and in the model's while they are loaded: 1.5 times their size covers both.
    """
    return int(1.5 * files.num_weight_bytes() + PROCESS_BYTES)


@contextmanager
def loaders(
    model: ModelSettings, files: ModelFiles, min_context: int, limit: int, sample_ids: Sequence[int] = ()
) -> Iterator[list[Load]]:
    """One loader per scoring process: for each free GPU or each core, at most `limit`.

    Within the context the GPUs are leased. On a CPU, memory limits the number of processes too. If there are several,
    each has one thread, so that none waits for another.

    Raises:
        devices.DeviceBusyError: other processes hold the GPUs.
    """
    device = devices.resolve_device(model.device)
    load = functools.partial(load_model, sample_ids=sample_ids)
    if device.type == "cuda":
        with devices.lease_gpus(device, limit) as gpus:
            settings = [model.model_copy(update={"device": gpu}) for gpu in gpus]
            yield [functools.partial(load, gpu, files, min_context) for gpu in settings]
        return
    room = devices.FREE_SHARE * devices.available_memory() / num_bytes_to_load(files)
    number = max(1, min(limit, devices.num_cores(), math.floor(room))) if device.type == "cpu" else 1
    yield [functools.partial(load, model, files, min_context, number)] * number
