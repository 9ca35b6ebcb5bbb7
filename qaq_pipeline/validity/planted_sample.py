"""The stored tables of one batch from which cuts are chosen.

Belongs here: whether the tables belong together, and the sample that they hold. Does not belong here: the choice of the
cuts (`judgement`).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from qaq_pipeline.scoring.pairs import accepted_parts
from qaq_pipeline.scoring.stored_scores import Scores, differently_scored, scored_by
from qaq_pipeline.storage.origin import OriginError, batch_of, by_model, require_inputs
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity.judgement import Sample, beside_scores, judged_planted, shown_by
from qaq_pipeline.validity.signals.catalogue import SCORES_READ

_NO_TEXTS = pl.DataFrame(schema=dict.fromkeys(("pair_id", "query", "answer"), pl.String))


@dataclass(frozen=True)
class PlantedSample:
    """The pairs of a batch and its planted rows, with the scores of both.

    Raises:
        OriginError: the planted rows were not drawn from the rows that were scored, or were scored otherwise.
    """

    raw_data: StoredTable
    screened_data: StoredTable
    rmi_scores: Scores
    planted_rows: StoredTable
    planted_scores: Scores

    def __post_init__(self) -> None:
        rows = {"raw_data": self.raw_data, "screened_data": self.screened_data}
        require_inputs("screened_data", self.screened_data, {"raw_data": self.raw_data})
        scores, drawn_from = by_model("rmi_scores", self.rmi_scores), self.planted_rows.provenance["inputs"]
        if others := [name for name, table in scores.items() if table.provenance["scored_from"] != drawn_from]:
            raise OriginError(
                f"planted_rows of batch {batch_of(self.planted_rows)} were not drawn from the rows that "
                f"{', '.join(others)} scored; materialise planted_rows and logprobs of this batch first (or `qaq run` "
                "the batch again)"
            )
        require_inputs("planted_rows", self.planted_rows, rows)
        for name, table in by_model("planted_scores", self.planted_scores).items():
            require_inputs(name, table, {"planted_rows": self.planted_rows})
        if differing := differently_scored(scored_by(self.rmi_scores), self.planted_scores):
            raise OriginError(
                f"planted_scores of batch {batch_of(self.planted_rows)} were made by other models than its rmi_scores, "
                f"or asked differently, as {differing}; materialise logprobs and rmi_scores of the batch, then "
                "planted_rows and planted_scores"
            )

    @property
    def inputs(self) -> dict[str, StoredTable]:
        """The tables by the names that provenance gives to inputs."""
        return {
            "raw_data": self.raw_data,
            "screened_data": self.screened_data,
            "planted_rows": self.planted_rows,
            **by_model("rmi_scores", self.rmi_scores),
            **by_model("planted_scores", self.planted_scores),
        }

    @property
    def pairs(self) -> pl.DataFrame:
        """The pairs of the batch, as the signals read them."""
        return pairs_of_batch(self.raw_data, self.screened_data, self.rmi_scores)

    @property
    def planted(self) -> pl.DataFrame:
        """The planted rows, as the signals read them, with `defect`."""
        scores = {role: table.frame for role, table in self.planted_scores.items()}
        return judged_planted(scores, self.planted_rows.frame)

    @property
    def sample(self) -> Sample:
        """The frames from which cuts are chosen."""
        return Sample(self.pairs, self.planted, (batch_of(self.raw_data),))


def pairs_of_batch(raw_data: StoredTable, screened_data: StoredTable, scores: Scores) -> pl.DataFrame:
    """The distinct pairs of a batch, as the signals read them. The texts are read some thousand at a time."""
    parts = accepted_parts(raw_data, screened_data, "query", "answer")
    shown = pl.concat([shown_by(_NO_TEXTS), *map(shown_by, parts)])
    return beside_scores({role: table.select("pair_id", *SCORES_READ) for role, table in scores.items()}, shown)
