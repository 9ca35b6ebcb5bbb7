"""The stored tables of one batch from its planted rows to its calibration.

Belongs here: whether the tables belong together, and the call that judges them. Does not belong here: the statistics
(`calibration`), and the draw of the planted rows (`planting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qaq_pipeline.calibration.calibration import Judged, judge
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import GateSettings, RankingSettings
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection.stored_reference import Scores, differently_scored, require_pool, scored_by
from qaq_pipeline.storage.origin import OriginError, batch_of, by_model, require_inputs
from qaq_pipeline.storage.tables import StoredTable


@dataclass(frozen=True)
class PlantedBatch:
    """The tables from which the scores of a batch are validated.

    Raises:
        OriginError: the planted rows were not drawn from the rows that were scored, or were scored otherwise.
    """

    planted_rows: StoredTable
    planted_scores: Scores
    rmi_scores: Scores
    disagreement_scores: StoredTable

    def __post_init__(self) -> None:
        scores, drawn_from = by_model("rmi_scores", self.rmi_scores), self.planted_rows.provenance["inputs"]
        require_inputs("disagreement_scores", self.disagreement_scores, scores)
        if others := [name for name, table in scores.items() if table.provenance["scored_from"] != drawn_from]:
            raise OriginError(
                f"planted_rows of batch {batch_of(self.planted_rows)} were not drawn from the rows that "
                f"{', '.join(others)} scored; materialise planted_rows and logprobs of this batch first (or `qaq run` "
                "the batch again)"
            )
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
            "planted_rows": self.planted_rows,
            "disagreement_scores": self.disagreement_scores,
            **by_model("planted_scores", self.planted_scores),
            **by_model("rmi_scores", self.rmi_scores),
        }

    def gate(self, limits: GateSettings) -> Gate | None:
        """The stored verdict on the batch. Raises gates.StaleVerdictError."""
        made_of = {role: table.provenance for role, table in self.rmi_scores.items()}
        return gates.of_batch(batch_of(self.planted_rows), self.planted_rows.provenance, made_of, limits)

    def judge(
        self, ranking: RankingSettings, selections: Sequence[Selection], frozen: StoredTable | None
    ) -> Judged | None:
        """Ranks and verdicts of the planted pairs beside those of the batch; None: nothing was planted, or is ranked.

        Raises:
            OriginError: the batch is ranked in another pool than the reference.
        """
        if frozen is not None:
            require_pool(self.disagreement_scores, ranking, frozen)
        is_ranked = frozen is not None or self.disagreement_scores.frame["gap"].is_not_null().any()
        if self.planted_rows.frame.is_empty() or not is_ranked:
            return None
        return judge(
            self.planted_rows.frame,
            {role: table.frame for role, table in self.planted_scores.items()},
            {role: table.frame for role, table in self.rmi_scores.items()},
            self.disagreement_scores.frame,
            ranking,
            selections,
            None if frozen is None else frozen.frame,
        )
