"""The asset validity[batch]: each distinct pair, and the signal that declares it invalid."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.reports.table_numbers import of_validity
from qaq_pipeline.storage.origin import by_model, require_inputs
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity.judgement import judge
from qaq_pipeline.validity.planted_sample import pairs_of_batch

VERSION = "1"


def build_validity(settings: Settings) -> dg.AssetsDefinition:
    """validity[batch]: the evidence of every signal for every pair."""
    signals = settings.validity

    @asset(settings, VERSION, reads=[signals])
    def validity(
        context: dg.AssetExecutionContext,
        raw_data: StoredTable,
        screened_data: StoredTable,
        rmi_scores: dict[str, StoredTable],
        validity_cuts: StoredTable,
    ) -> dg.MaterializeResult:
        rows = {"raw_data": raw_data, "screened_data": screened_data}
        scores = by_model("rmi_scores", rmi_scores)
        require_inputs("validity_cuts", validity_cuts, rows | scores)
        frame = judge(pairs_of_batch(raw_data, screened_data, rmi_scores), validity_cuts.frame, signals)
        inputs = rows | scores | {"validity_cuts": validity_cuts}
        return table_result(context, frame, inputs, of_validity(frame))

    return validity
