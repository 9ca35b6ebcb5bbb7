"""The asset selected_subset[batch]."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.reports.table_numbers import of_selected_subset
from qaq_pipeline.selection.decisions import selected_rows
from qaq_pipeline.storage.stored_table import StoredTable

VERSION = "1"


def build_selected_subset(settings: Settings) -> dg.AssetsDefinition:
    """selected_subset[batch]: the rows that the published selection takes."""
    selection = settings.published.name

    @asset(settings, VERSION, reads=[selection])
    def selected_subset(
        context: dg.AssetExecutionContext, raw_data: StoredTable, decisions: StoredTable
    ) -> dg.MaterializeResult:
        frame = selected_rows(selection, raw_data, decisions)
        inputs = {"raw_data": raw_data, "decisions": decisions}
        metadata = of_selected_subset(frame.height, raw_data.num_rows, selection)
        return table_result(context, frame, inputs, metadata, selection=selection)

    return selected_subset
