"""The output head: computes log-probabilities of target tokens from hidden states.

Belongs here: the token shift, the output head on target rows only, log-softmax in fp32.
Does not belong here: loading a model, attention, prompts, files.

Shape suffixes: F tokens of all rows of a batch in sequence (flat), D hidden size, N target tokens of the batch,
K tokens of which any may be at a target's position, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from qaq_pipeline.lm.prompts import TokenSequence

ROWS_PER_CHUNK_CPU = 256
ROWS_PER_CHUNK_GPU = 2048
CACHED_FLOATS = 1 << 20

TokenLogprobs = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From hidden states [N, D] and ids [N, K] of target tokens to ln p [N] of any of these: fp32, in nats."""


def target_positions(sequences: Sequence[TokenSequence], starts: Sequence[int]) -> torch.Tensor:
    """Flat positions [N] of all target tokens, sequence by sequence, target by target.

    The token shift: the hidden state at position p predicts the token at p + 1.

        position    0     1     2     3     4
        token      bos   pre    q1    q2    q3        target [2, 5) = q1 q2 q3
        hidden      h0    h1    h2    h3    h4
        predicts   pre    q1    q2    q3     -        rows of the head: h1 h2 h3

    So the hidden state at p - 1 predicts a target token at p.

    Args:
        sequences: token sequences with their targets.
        starts: flat position of each sequence's first token. If the sequence begins with a shared prefix, it lies
            before the sequence's row.

    Raises:
        ValueError: a target begins at position 0, and no token before it predicts it.
    """
    targets = [(start, target) for start, one in zip(starts, sequences, strict=True) for target in one.targets]
    if any(target.start < 1 for _, target in targets):
        raise ValueError("a target begins at position 0: its first token has no left context that predicts it")
    firsts = np.array([start + target.start for start, target in targets], np.int64)
    lengths = np.array([target.stop - target.start for _, target in targets], np.int64)
    # Each target counts on from its first position.
    before = np.repeat(firsts - np.cumsum(lengths) + lengths, lengths)
    return torch.from_numpy(before + np.arange(len(before)))


def target_ids(sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Ids [N, K] whose probability is wanted at each position of `target_positions`; -1 fills shorter rows.

    K is 1 unless a target asks for any of several tokens.
    """
    spans = [(one.token_ids, target) for one in sequences for target in one.targets]
    tokens = np.fromiter(chain.from_iterable(ids[target.start : target.stop] for ids, target in spans), np.int64)
    most = max((len(target.any_of) for _, target in spans), default=0)
    ids_NK = np.full((len(tokens), max(most, 1)), -1, np.int64)
    ids_NK[:, 0] = tokens
    rows = accumulate((target.stop - target.start for _, target in spans), initial=0)
    # A list for each of thousands of tokens would take longer than all the rest; few targets ask for several.
    any_of = {row: target.any_of for row, (_, target) in zip(rows, spans, strict=False) if target.any_of}
    if any_of:
        ids_NK[list(any_of)] = [[*ids, *[-1] * (most - len(ids))] for ids in any_of.values()]
    return torch.from_numpy(ids_NK)


def row_logprobs(
    hidden_FD: torch.Tensor, logprobs: TokenLogprobs, positions_N: torch.Tensor, targets_NK: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities [N] of the target tokens: fp32, on the device, in nats.

    Equals, sequence by sequence, `log_softmax(head(hidden)[start - 1 : stop - 1])` at the ids [start : stop).
    The head processes target rows only, in chunks, so the logits of a whole batch are never in memory.

    Args:
        hidden_FD: hidden states of all rows of a batch.
        logprobs: of the head, such as `Head.logprobs`.
        positions_N: `target_positions`, on the device.
        targets_NK: `target_ids`, on the device.
    """
    rows = ROWS_PER_CHUNK_CPU if hidden_FD.device.type == "cpu" else ROWS_PER_CHUNK_GPU
    chunks = zip(hidden_FD[positions_N - 1].split(rows), targets_NK.split(rows), strict=True)
    return torch.cat([logprobs(hidden_ND, ids_NK) for hidden_ND, ids_NK in chunks])


def by_target(logprobs_N: torch.Tensor, sequences: Sequence[TokenSequence]) -> list[list[torch.Tensor]]:
    """The log-probabilities of each sequence and each of its targets."""
    per_target = iter(logprobs_N.split([target.stop - target.start for one in sequences for target in one.targets]))
    return [[next(per_target) for _ in one.targets] for one in sequences]


def token_logprobs(logits_NV: torch.Tensor, targets_NK: torch.Tensor) -> torch.Tensor:
    """The log-probability that token n is one of `targets_NK[n]`, where an id outside the vocabulary is no token.

    With one token in each row: `log_softmax(logits_NV.float(), -1)[n, targets_NK[n, 0]]`: fp32 [N], in nats.
    """
    inside_NK = targets_NK.clamp(0, logits_NV.shape[-1] - 1)
    chosen_NK = logits_NV.gather(-1, inside_NK).float()
    chosen_N = chosen_NK.masked_fill(inside_NK != targets_NK, -math.inf).logsumexp(-1)
    return chosen_N - logsumexp_fp32(logits_NV)


def logsumexp_fp32(logits_NV: torch.Tensor) -> torch.Tensor:
    """`logits_NV.float().logsumexp(-1)`: fp32 [N].

    On a CPU it processes a few rows at a time, in place, in one buffer that stays in the CPU's cache. With a vocabulary
    of 262,144 this takes a third of the time, most of which would go into allocating memory.
    """
    if logits_NV.device.type != "cpu":
        return logits_NV.float().logsumexp(-1)
    rows = max(1, CACHED_FLOATS // logits_NV.shape[1])
    buffer = torch.empty(rows, logits_NV.shape[1], dtype=torch.float32)
    sums = []
    for block in logits_NV.split(rows):
        values = buffer[: block.shape[0]].copy_(block)
        maxima = values.amax(-1, keepdim=True)
        sums.append(values.sub_(maxima).exp_().sum(-1).log_().add_(maxima.squeeze(-1)))
    return torch.cat(sums)


@dataclass(frozen=True)
class Head:
    """The output head, including the architecture's changes to its logits."""

    layer: Callable[[torch.Tensor], torch.Tensor]
    """A linear layer over the vocabulary."""
    factor: float = 1.0
    softcap: float | None = None
    """Bound of the logits, applied by tanh after the factor."""
    kernel: Callable[..., torch.Tensor] | None = None
    """As `head_kernel.token_logprobs`; None: torch's operations."""

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The logits [N, V] of hidden states."""
        logits_NV = self.layer(hidden_ND)
        if self.factor != 1:
            logits_NV = logits_NV * self.factor
        return logits_NV if self.softcap is None else torch.tanh(logits_NV / self.softcap) * self.softcap

    def logprobs(self, hidden_ND: torch.Tensor, targets_NK: torch.Tensor) -> torch.Tensor:
        """`token_logprobs` of the logits."""
        if self.kernel is not None:
            return self.kernel(self.layer(hidden_ND), targets_NK, self.factor, self.softcap)
        return token_logprobs(self(hidden_ND), targets_NK)


def head_of(model: Any) -> Head:
    """The head of a model.

    Supported: soft-capping (Gemma 2), a factor (Cohere) and a divisor (Granite). The self-test detects any other.
    """
    config = model.config
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(model.get_output_embeddings(), factor, getattr(config, "final_logit_softcapping", None))
