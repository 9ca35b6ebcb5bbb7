"""The ways through a causal LM: sequences in, log-probabilities of their targets out.

Belongs here: packed rows, padded batches, the model's own logits; the self-test that chooses between them.
Does not belong here: loading a model, which sequences go together, the output head's arithmetic.

    packed        rows without padding; a shared prefix is computed once. Fastest on a CPU.
    padded        right padding without a mask, transformers' own attention. Fastest on a GPU.
    own_logits    one sequence at a time through the model's own forward. Slow; right for every causal model.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from qaq_pipeline.lm import attention, lm_head
from qaq_pipeline.lm.attention import AttentionUnsupportedError, PackedRow, Segment, SharedPrefix
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.schema.vocabularies import Quantity

SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Mean difference from the model's own logits that the self-test allows, in nats per token, by dtype: a batch of
another shape rounds differently (0.03 in bfloat16 at the most, measured), a wrong head or mask is off by more."""

KEPT_PREFIXES = 8
TESTED_TOKENS = 32
"""Of each sequence of the self-test its last tokens are compared: those that a window hides the beginning from."""

_ROPE_BY_LENGTH = frozenset({"longrope", "dynamic"})
"""Rotary embeddings that depend on the longest sequence of a forward pass."""

_PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})

logger = logging.getLogger(__name__)


class UnsupportedModelError(ValueError):
    """The model cannot be scored right. The text names the model, what differs, and the remedy."""


class Runner(Protocol):
    """One way through a model."""

    name: str
    is_padded: bool
    """Whether a batch costs its longest sequence as often as it has sequences."""
    shares_prefixes: bool
    """Whether a shared prefix is computed once."""

    def score(self, sequences: Sequence[TokenSequence]) -> list[list[torch.Tensor]]:
        """For each sequence and each of its targets, ln p of the target's tokens: fp32, on the CPU, in nats."""
        ...


class PackedRunner:
    """Sequences one after another in one row, their shared prefixes computed once.

    Raises:
        AttentionUnsupportedError: some layer of the model is not plain causal or sliding attention.
    """

    name = "packed"
    is_padded = False
    shares_prefixes = True

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS
        if kinds or getattr(config, "attention_chunk_size", None):
            raise AttentionUnsupportedError(f"layers of {', '.join(sorted(kinds)) or 'chunked attention'}")
        model.set_attn_implementation(attention.PACKED)
        if model.config._attn_implementation != attention.PACKED:
            raise AttentionUnsupportedError("attention that does not go through transformers' interface")
        self._model = model
        self._body, self._head = body_of(model), lm_head.head_of(model)
        self._prefixes: OrderedDict[tuple[int, ...], SharedPrefix] = OrderedDict()

    def score(self, sequences: Sequence[TokenSequence]) -> list[list[torch.Tensor]]:
        """See `Runner`. The row holds every sequence less its shared prefix and its last token, which predicts none."""
        prefixes = self._shared(sequences)
        skipped = [prefix.length if prefix else 0 for prefix in prefixes]
        lengths = [len(one.token_ids) - 1 - skip for one, skip in zip(sequences, skipped, strict=True)]
        stops = list(accumulate(lengths))
        starts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
        segments = tuple(Segment(*bounds) for bounds in zip(starts, stops, prefixes, strict=True))
        ids = [token for one, skip in zip(sequences, skipped, strict=True) for token in one.token_ids[skip:-1]]
        positions = [p for skip, length in zip(skipped, lengths, strict=True) for p in range(skip, skip + length)]
        hidden_FD = self._hidden(ids, positions, PackedRow(segments))
        firsts = [start - skip for start, skip in zip(starts, skipped, strict=True)]
        return lm_head.batch_logprobs(hidden_FD, self._head, sequences, firsts)

    def _shared(self, sequences: Sequence[TokenSequence]) -> list[SharedPrefix | None]:
        """The prefix that each sequence continues: one that is known, or that several of these begin with."""
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
        prefix = SharedPrefix(len(ids))
        row = PackedRow((Segment(0, len(ids)),), record=prefix)
        self._hidden(list(ids), list(range(len(ids))), row)
        return prefix

    def _hidden(self, ids: list[int], positions: list[int], row: PackedRow) -> torch.Tensor:
        """Hidden states [F, D] of one packed row."""
        device = self._model.device
        output = self._body(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            packed_row=row,
        )
        return output.last_hidden_state[0]


class PaddedRunner:
    """Sequences side by side, padded on the right; the attention and its masks are transformers' own.

    Under causal attention no real token can see what stands to its right, so padding needs no attention mask and
    its id does not matter.
    """

    name = "padded"
    is_padded = True
    shares_prefixes = False

    def __init__(self, model: Any) -> None:
        self._device = model.device
        self._body, self._head = body_of(model), lm_head.head_of(model)

    def score(self, sequences: Sequence[TokenSequence]) -> list[list[torch.Tensor]]:
        """See `Runner`."""
        ids_BT = pad_right(sequences).to(self._device)
        hidden_BTD = self._body(input_ids=ids_BT, use_cache=False).last_hidden_state
        firsts = range(0, ids_BT.numel(), ids_BT.shape[1])
        return lm_head.batch_logprobs(hidden_BTD.flatten(0, 1), self._head, sequences, firsts)


class OwnLogitsRunner:
    """The model's own forward and head, one sequence at a time: whatever it does to its logits is done."""

    name = "own_logits"
    is_padded = False
    shares_prefixes = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._can_select = "logits_to_keep" in inspect.signature(model.forward).parameters

    def score(self, sequences: Sequence[TokenSequence]) -> list[list[torch.Tensor]]:
        """See `Runner`."""
        return [self._score_one(sequence) for sequence in sequences]

    def _score_one(self, sequence: TokenSequence) -> list[torch.Tensor]:
        ids_1T = torch.tensor([sequence.token_ids], device=self._model.device)
        positions_N = lm_head.target_positions([sequence], [0]).to(ids_1T.device)
        if self._can_select:
            logits_NV = self._model(input_ids=ids_1T, use_cache=False, logits_to_keep=positions_N - 1).logits[0]
        else:
            logits_NV = self._model(input_ids=ids_1T, use_cache=False).logits[0][positions_N - 1]
        logprobs_N = lm_head.token_logprobs(logits_NV, ids_1T[0, positions_N]).cpu()
        return list(logprobs_N.split([target.stop - target.start for target in sequence.targets]))


def pad_right(sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Token ids [B, T], padded on the right with 0."""
    length = max(len(sequence.token_ids) for sequence in sequences)
    rows = [sequence.token_ids + [0] * (length - len(sequence.token_ids)) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.long)


def body_of(model: Any) -> Any:
    """The model less its head. Raises `AttentionUnsupportedError` where the architecture has no body of its own."""
    if model.base_model is model:
        raise AttentionUnsupportedError("a body that cannot be had without the head")
    return model.base_model


@torch.inference_mode()
def choose_runner(
    model: Any,
    name: str,
    sample_ids: Sequence[int] = (),
    max_tokens: int = 2048,
    wanted: Sequence[type[PackedRunner | PaddedRunner]] | None = None,
) -> Runner:
    """The fastest runner that gives the model's own log-probabilities, within the rounding of its dtype.

    The packed runner, where it is chosen, replaces the model's attention.

    Args:
        model: a transformers causal LM on its device.
        name: of the model, for messages.
        sample_ids: token ids of some ordinary text, at least 32: in half precision a model's numbers for it are firm,
            while those for a random text are mostly rounding. Default: a pattern, for models without a tokenizer.
        max_tokens: that a sequence may have: what only longer ones would show is not tested.
        wanted: runners to try, the best first; default: by the device.

    Raises:
        UnsupportedModelError: the model's log-probabilities are not finite, or it sees what stands to the right.
    """
    own = OwnLogitsRunner(model)
    sequences = _test_sequences(model, sample_ids, max_tokens)
    expected = own.score(sequences)
    _check_model(own, sequences, expected, name, SELF_TEST_TOLERANCE[model.dtype])
    label, attention_before = f"{name} ({type(model).__name__})", model.config._attn_implementation
    for kind in wanted or _fastest_first(model.device):
        try:
            _check_positions(model, max_tokens)
            runner = kind(model)
            difference = _mean_difference(runner.score(sequences), expected)
            if difference <= SELF_TEST_TOLERANCE[model.dtype]:
                return runner
            reason = f"its log-probabilities would differ by {difference:.2g} nats from the model's own"
        # Code of any architecture, asked for what it may not do.
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error)
        model.set_attn_implementation(attention_before)
        logger.warning("%s: not scored %s: %s", label, kind.name, reason)
    logger.warning("%s: scored by its own logits, one sequence at a time, which is slow", label)
    return own


def _check_positions(model: Any, max_tokens: int) -> None:
    """Raises `AttentionUnsupportedError` where a long sequence would move the positions of those beside it."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # One set for all layers, or one for each kind of layer.
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
        if kind in _ROPE_BY_LENGTH and max_tokens > (original or 0):
            raise AttentionUnsupportedError(
                f"{kind} positions depend on the longest sequence of a batch; with scoring.max_tokens of {original} at "
                "most they do not"
            )


def _fastest_first(device: torch.device) -> list[type[PackedRunner | PaddedRunner]]:
    return [PackedRunner, PaddedRunner] if device.type == "cpu" else [PaddedRunner]


def _test_sequences(model: Any, sample_ids: Sequence[int], max_tokens: int) -> list[TokenSequence]:
    """Three sequences with one beginning; one is longer than the attention's window, where sequences may be."""
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
    """Longest sequence the model was made for, in tokens; None where it states none."""
    return getattr(model.config, "max_position_embeddings", None)


def _check_model(
    own: OwnLogitsRunner,
    sequences: Sequence[TokenSequence],
    expected: list[list[torch.Tensor]],
    name: str,
    tolerance: float,
) -> None:
    """Nothing can be scored with a model whose own numbers are none, or that has seen what it is to predict."""
    if not all(torch.isfinite(values).all() for (values,) in expected):
        raise UnsupportedModelError(
            f"{name}: its log-probabilities are not finite: its weights are damaged, or its numbers too large for "
            "this dtype; try `dtype: float32`"
        )
    longest = max(sequences, key=lambda one: len(one.token_ids))
    (target,) = longest.targets
    half = (target.start + target.stop) // 2  # Of what is compared.
    cut = TokenSequence("", longest.token_ids[:half], (Target(Quantity.Q, target.start, half),))
    (whole,) = expected[sequences.index(longest)]
    difference = _mean_difference(own.score([cut]), [[whole[: half - target.start]]])
    if difference > tolerance:
        raise UnsupportedModelError(
            f"{name}: what stands to the right of a token moves its log-probability by {difference:.2g} nats: no "
            "causal model; name one that is"
        )


def _mean_difference(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> float:
    """Mean over all tokens of the absolute difference; infinite where one is NaN."""
    values, others = (torch.cat([values for (values,) in scores]) for scores in (one, other))
    difference = float((values - others).abs().mean())
    return math.inf if math.isnan(difference) else difference
