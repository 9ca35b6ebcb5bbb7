"""Runners: the ways to compute the log-probabilities of target tokens with a causal LM.

Belongs here: packed rows, padded batches, the model's own logits; the self-test that chooses between them.
Does not belong here: loading a model (`causal_lm`), the choice of batches (`batching`), the attention of packed rows
(`attention`), and the arithmetic of the output head (`lm_head`).

    packed        rows without padding; a shared prefix is computed once.
    padded        right padding without a mask, transformers' own attention.
    own_logits    one sequence at a time through the model's own forward pass. Slow; correct for every causal model.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from qaq_pipeline.lm import attention, devices, gpu_speed, lm_head, mixed_precision
from qaq_pipeline.lm.attention import AttentionUnsupportedError, PackedRow, Segment, SharedPrefix
from qaq_pipeline.lm.model_error import ModelError, first_line
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.schema.vocabularies import Quantity

SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest mean difference from the model's own logits in the self-test, in nats per token, by dtype. Batches of another
shape round differently (measured: at most 0.03 in bfloat16); a wrong head or mask differs by more."""

MIXED_TOLERANCE = 0.03
"""The same in mixed precision, whose logits are not rounded."""

KEPT_PREFIXES = 8
TESTED_TOKENS = 32
"""Number of tokens compared in the self-test: the last ones of each sequence, whose sliding window hides the first."""

_ROPE_BY_LENGTH = frozenset({"longrope", "dynamic"})
"""Rotary embeddings that depend on the longest sequence of a forward pass."""

_PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})

logger = logging.getLogger(__name__)


class UnsupportedModelError(ModelError):
    """The model cannot be scored correctly. The text names the model, the fault and the remedy."""


class Runner(ABC):
    """One way to score sequences with a model."""

    name: str
    is_padded: bool
    """Whether a forward pass of n sequences costs n times its longest one."""
    shares_prefixes: bool
    """Whether a shared prefix is computed once."""

    @abstractmethod
    def logprobs(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """Log-probabilities [N] of all target tokens, ordered as `lm_head.target_positions`: fp32, on the device."""

    def score(self, sequences: Sequence[TokenSequence]) -> list[list[torch.Tensor]]:
        """For each sequence and each of its targets, ln p of the target's tokens: fp32, on the CPU, in nats."""
        return lm_head.by_target(self.logprobs(sequences).cpu(), sequences)


class FastRunner(Runner):
    """Computes hidden states and the head apart."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = body_of(model), lm_head.head_of(model)
        self.changes: list[str] = []
        """Names of the changes that make it faster."""


Change = Callable[[FastRunner, Any], Callable[[], None]]
"""Changes a runner of a model, and returns how to undo it."""


class PackedRunner(FastRunner):
    """Puts sequences one after another into one row, and computes shared prefixes once.

    Args:
        model: a transformers causal LM on its device.
        at_once: whether a kernel attends to all sequences of a row at once. Default: on a GPU.

    Raises:
        AttentionUnsupportedError: a layer of the model has neither plain causal nor sliding attention.
    """

    name = "packed"
    is_padded = False
    shares_prefixes = True

    def __init__(self, model: Any, *, at_once: bool | None = None) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS
        if kinds or getattr(config, "attention_chunk_size", None):
            raise AttentionUnsupportedError(f"it has layers of {', '.join(sorted(kinds)) or 'chunked attention'}")
        model.set_attn_implementation(attention.PACKED)
        if model.config._attn_implementation != attention.PACKED:
            raise AttentionUnsupportedError("its attention does not use transformers' interface")
        self._model = model
        self._at_once = model.device.type == "cuda" if at_once is None else at_once
        super().__init__(model)
        self._prefixes: OrderedDict[tuple[int, ...], SharedPrefix] = OrderedDict()

    def logprobs(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """See `Runner`. The row omits each sequence's shared prefix and its last token, which predicts nothing."""
        prefixes = self._shared(sequences)
        skipped = [prefix.length if prefix else 0 for prefix in prefixes]
        lengths = [len(one.token_ids) - 1 - skip for one, skip in zip(sequences, skipped, strict=True)]
        stops = list(accumulate(lengths))
        starts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
        segments = tuple(Segment(*bounds) for bounds in zip(starts, stops, prefixes, strict=True))
        firsts = [start - skip for start, skip in zip(starts, skipped, strict=True)]
        ids = chain.from_iterable(one.token_ids[skip:-1] for one, skip in zip(sequences, skipped, strict=True))
        ids_F, places_F, positions_N, targets_NK, *arrays = devices.upload(
            self._model.device,
            torch.from_numpy(np.fromiter(ids, np.int64, stops[-1])),
            torch.from_numpy(np.arange(stops[-1]) - np.repeat(firsts, lengths)),
            lm_head.target_positions(sequences, firsts),
            lm_head.target_ids(sequences),
            *(attention.varlen_arrays(segments) if self._at_once else ()),
        )
        row = PackedRow(segments, varlen=attention.varlen_layout(segments, *arrays) if arrays else None)
        hidden_FD = self._hidden(ids_F, places_F, row)
        return lm_head.row_logprobs(hidden_FD, self.head.logprobs, positions_N, targets_NK)

    def _shared(self, sequences: Sequence[TokenSequence]) -> list[SharedPrefix | None]:
        """The prefix of each sequence if it is known or shared by several of these sequences, else None."""
        keys = [tuple(one.token_ids[: one.num_shared]) for one in sequences]
        for key, count in Counter(keys).items():
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
            elif key and count > 1:
                self._prefixes[key] = self._compute_prefix(key)
        shared = [self._prefixes.get(key) for key in keys]
        while len(self._prefixes) > KEPT_PREFIXES:
            self._prefixes.popitem(last=False)
        return shared

    def _compute_prefix(self, ids: tuple[int, ...]) -> SharedPrefix:
        prefix, segments = SharedPrefix(len(ids)), (Segment(0, len(ids)),)
        ids_F, places_F, *arrays = devices.upload(
            self._model.device,
            torch.tensor(ids),
            torch.arange(len(ids)),
            *(attention.varlen_arrays(segments) if self._at_once else ()),
        )
        varlen = attention.varlen_layout(segments, *arrays) if arrays else None
        self._hidden(ids_F, places_F, PackedRow(segments, prefix, varlen))
        return prefix

    def _hidden(self, ids_F: torch.Tensor, places_F: torch.Tensor, row: PackedRow) -> torch.Tensor:
        """Hidden states [F, D] of one packed row, whose tokens are at these places of their sequences."""
        output = self.body(input_ids=ids_F[None], position_ids=places_F[None], use_cache=False, packed_row=row)
        return output.last_hidden_state[0]


class PaddedRunner(FastRunner):
    """Pads sequences on the right, and uses transformers' own attention and masks.

    Under causal attention no token sees the tokens to its right, so padding needs no attention mask and its id does
    not matter.
    """

    name = "padded"
    is_padded = True
    shares_prefixes = False

    def __init__(self, model: Any) -> None:
        self._device = model.device
        super().__init__(model)

    def logprobs(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """See `Runner`."""
        ids_BT = pad_right(sequences)
        firsts = range(0, ids_BT.numel(), ids_BT.shape[1])
        ids_BT, positions_N, targets_NK = devices.upload(
            self._device, ids_BT, lm_head.target_positions(sequences, firsts), lm_head.target_ids(sequences)
        )
        hidden_BTD = self.body(input_ids=ids_BT, use_cache=False).last_hidden_state
        return lm_head.row_logprobs(hidden_BTD.flatten(0, 1), self.head.logprobs, positions_N, targets_NK)


class OwnLogitsRunner(Runner):
    """Runs the model's own forward pass and head on one sequence at a time, with everything it does to its logits."""

    name = "own_logits"
    is_padded = False
    shares_prefixes = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._can_select = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logprobs(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """See `Runner`."""
        return torch.cat([self._logprobs_of(sequence) for sequence in sequences])

    def _logprobs_of(self, sequence: TokenSequence) -> torch.Tensor:
        ids_1T, positions_N, targets_NK = devices.upload(
            self._model.device,
            torch.tensor([sequence.token_ids]),
            lm_head.target_positions([sequence], [0]),
            lm_head.target_ids([sequence]),
        )
        if self._can_select:
            logits_NV = self._model(input_ids=ids_1T, use_cache=False, logits_to_keep=positions_N - 1).logits[0]
        else:
            logits_NV = self._model(input_ids=ids_1T, use_cache=False).logits[0][positions_N - 1]
        return lm_head.token_logprobs(logits_NV, targets_NK)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed rows are the fastest there. On a GPU a kernel for them exists in half precision only."""
    return device.type == "cpu" or (device.type == "cuda" and dtype in (torch.float16, torch.bfloat16))


def pad_right(sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Token ids [B, T], padded on the right with 0."""
    longest = max(len(sequence.token_ids) for sequence in sequences)
    ids_BT = np.zeros((len(sequences), longest), np.int64)
    for row, sequence in zip(ids_BT, sequences, strict=True):
        row[: len(sequence.token_ids)] = sequence.token_ids
    return torch.from_numpy(ids_BT)


def body_of(model: Any) -> Any:
    """The model without its head. Raises `AttentionUnsupportedError` if the architecture does not separate them."""
    if model.base_model is model:
        raise AttentionUnsupportedError("the architecture does not separate the body from the head")
    return model.base_model


@torch.inference_mode()
def choose_runner(
    model: Any,
    name: str,
    sample_ids: Sequence[int] = (),
    max_tokens: int = 2048,
    wanted: Sequence[type[PackedRunner | PaddedRunner]] | None = None,
    changes: Mapping[str, Change] | None = None,
    *,
    is_mixed: bool = False,
) -> Runner:
    """The fastest runner that reproduces the model's own log-probabilities, within the rounding of its dtype.

    If the packed runner is chosen, it replaces the model's attention.

    Args:
        model: a transformers causal LM on its device.
        name: name of the model, for messages.
        sample_ids: at least 32 token ids of an ordinary text: in half precision its log-probabilities are stable, while
            those of a random text are mostly rounding. Default: a pattern, for models without a tokenizer.
        max_tokens: largest length of a sequence; the self-test uses no longer ones.
        wanted: runners to try, best first; default: by the device.
        changes: what may make the runner faster; default: `gpu_speed.CHANGES` on a GPU, else nothing.
        is_mixed: whether the model, in bfloat16, computes in mixed precision from now on.

    Raises:
        UnsupportedModelError: the model's log-probabilities are not finite, or depend on tokens to the right, or are
            others in mixed precision.
    """
    own, tolerance = OwnLogitsRunner(model), MIXED_TOLERANCE if is_mixed else SELF_TEST_TOLERANCE[model.dtype]
    sequences = _test_sequences(model, sample_ids, max_tokens)
    expected = own.score(sequences)
    if is_mixed:
        expected = _mixed(own, model, sequences, expected, name)
    _check_model(own, sequences, expected, name, tolerance)
    label, attention_before = f"{name} ({type(model).__name__})", model.config._attn_implementation
    fastest_first = [PackedRunner, PaddedRunner] if can_pack(model.device, model.dtype) else [PaddedRunner]
    for kind in wanted or fastest_first:
        try:
            _check_positions(model, max_tokens)
            runner = kind(model)
            test = functools.partial(_difference_of, runner, sequences, expected)
            difference = test()
            if difference <= tolerance:
                _speed_up(runner, model, label, test, tolerance, changes)
                return runner
            reason = f"its log-probabilities differ by {difference:.2g} nats from the model's own"
        # An architecture's code may raise any of these when it is used in a way that it does not support.
        except (RuntimeError, TypeError, ValueError) as error:
            if devices.is_of_machine(error):
                raise
            reason = str(error)
        model.set_attn_implementation(attention_before)
        logger.warning("%s: the runner '%s' cannot be used: %s", label, kind.name, reason)
    logger.warning("%s: scored with the model's own logits, one sequence at a time, which is slow", label)
    return own


def _speed_up(
    runner: FastRunner,
    model: Any,
    label: str,
    test: Callable[[], float],
    tolerance: float,
    changes: Mapping[str, Change] | None,
) -> None:
    """Make the changes after which the runner still gives the model's own log-probabilities."""
    if changes is None:
        changes = gpu_speed.CHANGES if model.device.type == "cuda" else {}
    for name, change in changes.items():
        undo: Callable[[], None] | None = None
        try:
            undo = change(runner, model)
            found = test()
            if found <= tolerance:
                runner.changes.append(name)
                continue
            reason = f"log-probabilities differ by {found:.2g} nats from the model's own"
        except Exception as error:  # Compilers raise errors of any kind.
            if devices.is_of_machine(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
        if undo is not None:
            undo()
        logger.warning("%s: %s cannot be used, which is slower: %s", label, name, reason)


def _mixed(
    own: OwnLogitsRunner,
    model: Any,
    sequences: Sequence[TokenSequence],
    plain: list[list[torch.Tensor]],
    name: str,
) -> list[list[torch.Tensor]]:
    """The model's own log-probabilities in mixed precision, in which it computes from now on."""
    try:
        mixed_precision.use(model)
        expected = own.score(sequences)
    except (RuntimeError, TypeError, ValueError) as error:  # An architecture's code may raise any of these.
        if devices.is_of_machine(error):
            raise
        raise UnsupportedModelError(
            f"{name}: cannot be computed in mixed precision ({first_line(error)}); set `dtype: bfloat16`"
        ) from error
    difference = _mean_difference(expected, plain)
    if difference > SELF_TEST_TOLERANCE[model.dtype]:
        raise UnsupportedModelError(
            f"{name}: its log-probabilities in mixed precision differ by {difference:.2g} nats from those in bfloat16; "
            "set `dtype: bfloat16`"
        )
    return expected


def _difference_of(runner: Runner, sequences: Sequence[TokenSequence], expected: list[list[torch.Tensor]]) -> float:
    return _mean_difference(runner.score(sequences), expected)


def _check_positions(model: Any, max_tokens: int) -> None:
    """Raise `AttentionUnsupportedError` if a long sequence would change the positions of others in its batch."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # One set of parameters for all layers, or one per kind of layer.
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
        if kind in _ROPE_BY_LENGTH and max_tokens > (original or 0):
            raise AttentionUnsupportedError(
                f"{kind} positions depend on the longest sequence of a forward pass, so sequences cannot be scored "
                f"together; to allow it, set scoring.max_tokens to {original} or less"
            )


def _test_sequences(model: Any, sample_ids: Sequence[int], max_tokens: int) -> list[TokenSequence]:
    """Three sequences with the same beginning. One exceeds the attention's window, if `max_tokens` does."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    num_words = model.get_output_embeddings().weight.shape[0]
    sample = list(sample_ids) or [(7 * i * i + 3 * i + 5) % num_words for i in range(64)]
    num_shared = 9
    beginning, rest = sample[:num_shared], sample[num_shared:]
    longest = max(window + TESTED_TOKENS if window < max_tokens else 0, len(rest) - 2)
    lengths = (4, 9, min(longest, max_tokens - num_shared, (model_context(model) or max_tokens) - num_shared))
    endings = [(rest * (n // len(rest) + 2))[number : number + n] for number, n in enumerate(lengths)]
    return [_test_sequence(beginning, ending) for ending in endings]


def _test_sequence(beginning: list[int], ending: list[int]) -> TokenSequence:
    length = len(beginning) + len(ending)
    target = Target(Quantity.Q, max(length - TESTED_TOKENS, len(beginning)), length)
    return TokenSequence("", beginning + ending, (target,), num_shared=len(beginning) - 1)


def model_context(model: Any) -> int | None:
    """Longest sequence that the model supports, in tokens; None if its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def _check_model(
    own: OwnLogitsRunner,
    sequences: Sequence[TokenSequence],
    expected: list[list[torch.Tensor]],
    name: str,
    tolerance: float,
) -> None:
    """Raise if the model's own log-probabilities are not finite, or if it sees the tokens that it predicts."""
    if not all(torch.isfinite(values).all() for (values,) in expected):
        raise UnsupportedModelError(
            f"{name}: its log-probabilities are not finite: its weights are damaged, or its activations exceed the "
            "range of this dtype; try `dtype: float32`"
        )
    longest = max(sequences, key=lambda one: len(one.token_ids))
    (target,) = longest.targets
    half = (target.start + target.stop) // 2  # The middle of the compared tokens.
    cut = TokenSequence("", longest.token_ids[:half], (Target(Quantity.Q, target.start, half),))
    (whole,) = expected[sequences.index(longest)]
    difference = _mean_difference(own.score([cut]), [[whole[: half - target.start]]])
    if difference > tolerance:
        raise UnsupportedModelError(
            f"{name}: not a causal model: tokens to the right change a token's log-probability by {difference:.2g} "
            "nats; choose a causal language model"
        )


def _mean_difference(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> float:
    """Mean absolute difference over all tokens; infinite if one is NaN."""
    values, others = (torch.cat([values for (values,) in scores]) for scores in (one, other))
    difference = float((values - others).abs().mean())
    return math.inf if math.isnan(difference) else difference
