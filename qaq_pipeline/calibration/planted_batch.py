"""The stored tables of one batch from its planted rows to its calibration.

Belongs here: whether the tables belong together, and the call that judges them. Does not belong here: the statistics
(`calibration`), and the draw of the planted rows (`planting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qaq_pipeline.calibration.calibration import JUDGED, Judged, judge
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import GateSettings, RankingSettings, ValiditySettings
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection.candidates import RANKS_READ
from qaq_pipeline.selection.scored_batch import JudgedBatch, read_scores
from qaq_pipeline.selection.stored_reference import require_pool
from qaq_pipeline.storage.origin import batch_of, by_model, require_inputs
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity import judgement
from qaq_pipeline.validity.planted_sample import PlantedSample


@dataclass(frozen=True)
class PlantedBatch:
    """The tables from which the scores of a batch are validated.

    Raises:
        OriginError: ranks or validity were not made from these scores.
    """

    sample: PlantedSample
    disagreement_scores: StoredTable
    judged: JudgedBatch

    def __post_init__(self) -> None:
        scores = by_model("rmi_scores", self.sample.rmi_scores)
        require_inputs("disagreement_scores", self.disagreement_scores, scores)
        require_inputs("validity", self.judged.validity, scores | {"validity_cuts": self.judged.cuts})

    @property
    def inputs(self) -> dict[str, StoredTable]:
        """The tables by the names that provenance gives to inputs."""
        return self.sample.inputs | {
            "disagreement_scores": self.disagreement_scores,
            **self.judged.inputs,
        }

    def gate(self, limits: GateSettings) -> Gate | None:
        """The stored verdict on the batch. Raises gates.StaleVerdictError."""
        made_of = {role: table.provenance for role, table in self.sample.rmi_scores.items()}
        planted = self.sample.planted_rows
        return gates.of_batch(batch_of(planted), planted.provenance, made_of, limits)

    def judge(
        self,
        ranking: RankingSettings,
        selections: Sequence[Selection],
        signals: ValiditySettings,
        frozen: StoredTable | None,
    ) -> Judged | None:
        """Ranks and verdicts of the planted pairs beside those of the batch; None: nothing was planted, or is ranked.

        Raises:
            OriginError: the batch is ranked in another pool than the reference.
        """
        if frozen is not None:
            require_pool(self.disagreement_scores, ranking, frozen)
        is_ranked = frozen is not None or self.disagreement_scores.select("gap").to_series().is_not_null().any()
        rows = self.sample.planted_rows.frame
        if rows.is_empty() or not is_ranked:
            return None
        of_planted = judgement.judge(self.sample.planted, self.judged.cuts.frame, signals)
        return judge(
            rows,
            {role: table.frame for role, table in self.sample.planted_scores.items()},
            {role: read_scores(table) for role, table in self.sample.rmi_scores.items()},
            self.disagreement_scores.select(*RANKS_READ),
            (self.judged.validity.select(*JUDGED), of_planted.select(JUDGED)),
            ranking,
            selections,
            None if frozen is None else frozen.frame,
        )
