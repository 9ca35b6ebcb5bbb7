"""Pairs as training examples, and the optimizer steps that contain them.

Belongs here: token ids, the order and the size of steps, and their tensors. Does not belong here: the training
(`training`), and which pairs are trained on (`trial.arms`).

A step is one row of pairs without padding. Positions start again at 0 with every pair, by which transformers masks the
attention between pairs.

    token       bos  q1  q2  a1  a2 end | bos  q1  a1 end
    position      0   1   2   3   4   5 |   0   1   2   3
    label         -   -   -  a1  a2 end |   -   -  a1 end
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qaq_pipeline.lm.prompts import Pair, PairEncoder
from qaq_pipeline.schema.vocabularies import Quantity

_NOT_TRAINED = -100
"""Label of a token that has no loss."""

_WINDOW = 256
"""Pairs that are encoded together."""

Unit = Literal["tokens", "rows"]


@dataclass(frozen=True, slots=True)
class Example:
    """A pair as it is trained on: its prompt, then its answer and an end token."""

    pair_id: str
    token_ids: tuple[int, ...]
    num_prompt: int

    @property
    def num_trained(self) -> int:
        """Number of tokens with a loss."""
        return len(self.token_ids) - self.num_prompt


@dataclass(frozen=True, slots=True)
class Work:
    """The amount of training, the same for every arm of a trial."""

    unit: Unit
    """What is equal: trained tokens, or rows."""
    amount: int
    num_steps: int

    def size(self, example: Example) -> int:
        """The part of the amount that an example is."""
        return example.num_trained if self.unit == "tokens" else 1


def encode(encoder: PairEncoder, pairs: Sequence[Pair]) -> list[Example]:
    """The examples of those pairs that fit into the window; the answer of a truncated pair has no end token."""
    found = []
    for one in encoder.encode(pairs, {Quantity.A_GIVEN_Q}):
        for sequence in one.sequences:
            (target,) = sequence.targets
            end = () if one.is_truncated or encoder.end_of_answer is None else (encoder.end_of_answer,)
            found.append(Example(one.pair_id, (*sequence.token_ids, *end), target.start))
    return found


def draw(
    encode: Callable[[Sequence[Pair]], list[Example]], pairs: Sequence[Pair], work: Work, seed: int
) -> list[Example]:
    """The examples in the order of the training: passes over the pairs in random order, up to `work.amount`.

    If the pairs have less, they repeat, in a new order each time. Only the pairs that are used are encoded.

    Raises:
        ValueError: there is no pair, or none fits into the window.
    """
    order, found, done = random.Random(seed), [], 0  # noqa: S311
    while True:
        for window in _windows(order.sample(pairs, len(pairs))):
            for example in encode(window):
                found.append(example)
                done += work.size(example)
                if done >= work.amount:
                    return found
        if not found:
            raise ValueError("there is no row to train on that fits into scoring.max_tokens")


def _windows(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    return (pairs[start : start + _WINDOW] for start in range(0, len(pairs), _WINDOW))


def split(examples: Sequence[Example], work: Work) -> list[list[Example]]:
    """The examples in `work.num_steps` steps of about equal size, none of them empty.

    If there are fewer examples than steps, each is a step. A step ends before the example that would exceed its share
    of the total.
    """
    num_steps = min(work.num_steps, len(examples))
    ends = list(itertools.accumulate(map(work.size, examples)))
    found, start = [], 0
    for left in range(num_steps - 1, -1, -1):
        stop, share = start + 1, ends[-1] * (num_steps - left) / num_steps
        while stop < len(examples) - left and ends[stop] <= share:
            stop += 1
        found.append(list(examples[start:stop]))
        start = stop
    return found


def packed(step: Sequence[Example]) -> dict[str, torch.Tensor]:
    """The tensors [T] of a step: token ids, positions from 0 in every pair, and labels."""
    chained = itertools.chain.from_iterable
    labels = ([_NOT_TRAINED] * one.num_prompt + list(one.token_ids[one.num_prompt :]) for one in step)
    return {
        "input_ids": torch.tensor(list(chained(one.token_ids for one in step))),
        "position_ids": torch.tensor(list(chained(range(len(one.token_ids)) for one in step))),
        "labels": torch.tensor(list(chained(labels))),
    }
