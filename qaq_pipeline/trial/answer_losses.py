"""The loss of answers under a trained model, by the scoring engine.

Belongs here: from a loaded model and pairs to -ln p(A | Q), and the table of these losses. Does not belong here: the
training of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from qaq_pipeline.lm.batching import BatchQueue
from qaq_pipeline.lm.prompts import Pair, PairEncoder, TokenSequence
from qaq_pipeline.lm.workers import SequenceScorer, score_batches
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import NullReason, Quantity


@dataclass(frozen=True)
class AnswerLoss:
    """-ln p(A | Q) under a trained model."""

    item: str
    """pair_id of a held-out pair, or id of a benchmark's task."""
    num_tokens: int
    nll: float
    """Sum over the tokens of A, in nats."""


def answer_losses(scorer: SequenceScorer, encoder: PairEncoder, pairs: Sequence[Pair]) -> list[AnswerLoss]:
    """-ln p(A | Q) of each pair that fits into the window, in the order of the pairs.

    Raises:
        MemoryError: a single pair does not fit into memory.
    """
    encoded = encoder.encode(pairs, {Quantity.A_GIVEN_Q})
    found = _sums(scorer, [sequence for one in encoded for sequence in one.sequences])
    return [AnswerLoss(one.pair_id, one.num_a_tokens, found[one.pair_id]) for one in encoded if one.pair_id in found]


def losses_table(trained: Iterable[tuple[str, int, Mapping[str, Sequence[AnswerLoss]]]]) -> pl.DataFrame:
    """TrainingTrial, from the arm, the seed and the losses by measure of every training."""
    rows = [
        (measure, arm, seed, loss.item, loss.num_tokens, loss.nll)
        for arm, seed, losses in trained
        for measure, found in losses.items()
        for loss in found
    ]
    return pl.DataFrame(rows, schema=tables.dtypes(tables.TrainingTrial), orient="row")


def _sums(scorer: SequenceScorer, sequences: Sequence[TokenSequence]) -> dict[str, float]:
    """By pair_id, the NLL of the only target of its sequence."""
    facts, found = scorer.facts, {}
    queue = BatchQueue(
        [sequences], facts.batch_tokens, is_padded=facts.is_padded, shares_prefixes=facts.shares_prefixes
    )
    for batch, outcome in score_batches(scorer, queue):
        if not isinstance(outcome, NullReason):
            found |= {one.pair_id: -float(logprobs.sum()) for one, (logprobs,) in zip(batch, outcome, strict=True)}
        elif not queue.split(batch):
            raise MemoryError(f"pair {batch[0].pair_id} does not fit into memory; set a smaller scoring.max_tokens")
    return found
