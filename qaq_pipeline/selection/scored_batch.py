"""The stored tables of one batch from its scores to its decisions.

Belongs here: whether the tables belong together, and the calls that rank a batch and judge its pairs. Does not belong
here: strata, ranks, verdicts and decisions themselves, and how the result is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import GateSettings, RankingSettings
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection import disagreement_scores, rank_reference
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.stored_reference import Scores, identities, require_comparable
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.storage.origin import OriginError, batch_of, by_model, require_inputs
from qaq_pipeline.storage.tables import StoredTable


@dataclass(frozen=True)
class ScoredBatch:
    """The tables from which the rows of a batch are decided.

    Raises:
        OriginError: the tables do not go back to one delivery, or the ranks to these scores.
    """

    raw_data: StoredTable
    screened_data: StoredTable
    rmi_scores: Scores
    disagreement_scores: StoredTable

    def __post_init__(self) -> None:
        rows = {"raw_data": self.raw_data, "screened_data": self.screened_data}
        ranked = by_model("rmi_scores", self.rmi_scores)
        require_inputs("screened_data", self.screened_data, {"raw_data": self.raw_data})
        for name, table in ranked.items():
            require_inputs(name, table, rows, table.provenance["scored_from"])
        require_inputs("disagreement_scores", self.disagreement_scores, ranked)

    @property
    def inputs(self) -> dict[str, StoredTable]:
        """The tables by the names that provenance gives to inputs."""
        return {
            "raw_data": self.raw_data,
            "screened_data": self.screened_data,
            "disagreement_scores": self.disagreement_scores,
            **by_model("rmi_scores", self.rmi_scores),
        }

    @cached_property
    def candidates(self) -> pl.DataFrame:
        """Scores and ranks of every distinct pair, as `candidates.candidates`."""
        return candidates(self.disagreement_scores.frame, {role: one.frame for role, one in self.rmi_scores.items()})

    def gate(self, limits: GateSettings) -> Gate | None:
        """The stored verdict on the batch. Raises gates.StaleVerdictError."""
        made_of = {role: table.provenance for role, table in self.rmi_scores.items()}
        return gates.of_batch(batch_of(self.raw_data), self.screened_data.provenance, made_of, limits)

    def facts(self, selections: Sequence[Selection], gate: Gate | None) -> dict[str, Any]:
        """The part of the decisions' provenance that their inputs do not show."""
        ranked = self.disagreement_scores.provenance
        return {
            "settings_hash": settings_hash(selections),
            "published_hash": settings_hash(selections[0]),
            "pool_id": ranked["pool_id"],
            "ranking_hash": ranked["ranking_hash"],
            **gates.as_provenance(gate),
            "files": self.raw_data.provenance["files"],
            "models": identities(self.rmi_scores),
            "scored_by": {
                role: {key: table.provenance[key] for key in ("frame", "template", "end_ids", "scored_with")}
                for role, table in self.rmi_scores.items()
            },
        }

    def verdicts(self, selections: Sequence[Selection], frozen: StoredTable | None) -> pl.DataFrame:
        """The verdict of every named selection on every pair, by the cuts of the batch or of the reference."""
        roles = list(self.rmi_scores)
        of_reference = None if frozen is None else rank_reference.reference_candidates(frozen.frame, roles)
        return select_all(self.candidates, selections, of_reference)


def rank(
    scores: Scores, ranking: RankingSettings, pool_id: str, frozen: StoredTable | None
) -> tuple[pl.DataFrame, list[str]]:
    """DisagreementScores of a batch, in its own pool or against a reference, and warnings as sentences.

    Raises:
        OriginError: the models were asked under different settings, or otherwise than those of the reference.
    """
    _require_same_scoring(scores)
    frames = {role: table.frame for role, table in scores.items()}
    if frozen is None:
        frame, warnings = disagreement_scores.disagreement_scores(frames, ranking, pool_id)
    else:
        require_comparable(frozen, scores)
        frame, warnings = rank_reference.disagreement_scores(frames, frozen.frame, ranking, pool_id), []
    return frame, [*warnings, *_frame_warnings(scores)]


def _require_same_scoring(scores: Scores) -> None:
    """Ranks of models that were asked under different settings cannot be compared."""
    scoring = {role: table.provenance["scoring"] for role, table in scores.items()}
    first, *others = scoring
    for other in others:
        if scoring[other] != scoring[first]:
            raise OriginError(
                f"disagreement_scores: {first} was scored with {scoring[first]}, {other} with {scoring[other]}; "
                "materialise logprobs and rmi_scores of both models"
            )


def _frame_warnings(scores: Scores) -> list[str]:
    """A warning where the models are asked in different frames: the gap then measures the frame too."""
    frames = {role: table.provenance["frame"] for role, table in scores.items()}
    if len(set(frames.values())) < 2:
        return []
    said = ", ".join(f"{role}: {frame}" for role, frame in sorted(frames.items()))
    return [f"the models' frames differ ({said}): the gap measures the frame too"]
