"""The pairs that a stand-in for a model scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.scoring.logprobs import ScoringReport
from qaq_pipeline.scoring.pairs import TEXTS, Pairs, pairs_of


def in_memory(pairs: Pairs) -> list[Pair]:
    """All pairs, by pair_id."""
    found = [pair for part in pairs.read(*TEXTS) for pair in pairs_of(part)]
    return sorted(found, key=lambda pair: pair.pair_id)


@dataclass(frozen=True)
class RowsInMemory:
    """The rows of a frame, as a scoring gives its own."""

    frame: pl.DataFrame

    def parts(self) -> Iterator[pl.DataFrame]:
        yield self.frame.sort("pair_id")


def report_of(num_pairs: int) -> ScoringReport:
    """The report of a scoring of a sequence for each pair in a second."""
    return ScoringReport(
        num_pairs=num_pairs,
        num_scored_quantities=num_pairs,
        num_scored_pairs=num_pairs,
        num_sequences=num_pairs,
        num_tokens=1,
        num_computed_tokens=1,
        seconds=1.0,
    )
