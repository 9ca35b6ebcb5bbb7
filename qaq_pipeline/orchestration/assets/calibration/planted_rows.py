"""The asset planted_rows[batch]."""

import dagster as dg

from qaq_pipeline.calibration import defects, planting
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, gate_metadata
from qaq_pipeline.reports.table_numbers import count_by
from qaq_pipeline.schema.tables import PlantedRows
from qaq_pipeline.screening import gates
from qaq_pipeline.selection.scored_batch import ScoredBatch
from qaq_pipeline.storage.tables import StoredTable, empty

VERSION = "1"


def build_planted_rows(settings: Settings) -> dg.AssetsDefinition:
    """planted_rows[batch]: some pairs of the batch with a planted defect. Nothing of a gated batch."""
    drawn_by = settings.calibration.model_dump(include={"defects", "max_rows_per_defect", "max_planted_share", "seed"})

    @asset(settings, VERSION, reads=[defects.VERSION, drawn_by, settings.gates.min_scorable_share])
    def planted_rows(
        context: dg.AssetExecutionContext,
        raw_data: StoredTable,
        screened_data: StoredTable,
        rmi_scores: dict[str, StoredTable],
        disagreement_scores: StoredTable,
    ) -> dg.MaterializeResult:
        batch = ScoredBatch(raw_data, screened_data, rmi_scores, disagreement_scores)
        gate = batch.gate(settings.gates)
        pairs = planting.scorable_pairs(raw_data.frame, screened_data.frame, disagreement_scores.frame)
        frame = empty(PlantedRows) if gate else planting.plant(pairs, settings.calibration)
        numbers = {"scorable_pairs": pairs.height, "planted_by_defect": count_by(frame["defect"])}
        metadata = {**numbers, **gate_metadata(gate)}
        return table_result(context, frame, batch.inputs, metadata, **gates.as_provenance(gate))

    return planted_rows
