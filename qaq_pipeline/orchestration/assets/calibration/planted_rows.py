"""The asset planted_rows[batch]: drawn before the batch is scored, so that both are scored in one run."""

import dagster as dg

from qaq_pipeline.calibration import defects, planting
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, gate_metadata
from qaq_pipeline.reports.table_numbers import count_by
from qaq_pipeline.schema.tables import PlantedRows
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.scoring.pairs import TEXTS, accepted_parts
from qaq_pipeline.screening import gates
from qaq_pipeline.storage.origin import require_inputs
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty

VERSION = "2"


def build_planted_rows(settings: Settings) -> dg.AssetsDefinition:
    """planted_rows[batch]: some pairs of the batch with a planted defect. Nothing of a batch gated at screening."""
    drawn_by = settings.calibration.model_dump(include={"defects", "mismatches", "rows_per_defect", "seed"})

    @asset(settings, VERSION, reads=[defects.VERSION, drawn_by])
    def planted_rows(
        context: dg.AssetExecutionContext, raw_data: StoredTable, screened_data: StoredTable
    ) -> dg.MaterializeResult:
        require_inputs("screened_data", screened_data, {"raw_data": raw_data})
        gate = gates.of_provenance(screened_data.provenance)
        pairs = accepted_parts(raw_data, screened_data, *TEXTS, "language")
        frame = empty(PlantedRows) if gate else planting.plant(pairs, settings.calibration)
        num_accepted = screened_data.select("status").filter(status=Status.ACCEPTED.value).height
        numbers = {"accepted_pairs": num_accepted, "planted_by_defect": count_by(frame["defect"])}
        inputs = {"raw_data": raw_data, "screened_data": screened_data}
        metadata = {**numbers, **gate_metadata(gate)}
        return table_result(context, frame, inputs, metadata, **gates.as_provenance(gate))

    return planted_rows
