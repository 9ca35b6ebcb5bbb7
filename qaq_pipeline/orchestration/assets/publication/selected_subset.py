"""The asset selected_subset[batch]."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import code_version, definition
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.results import table_result
from qaq_pipeline.selection.decisions import selected_rows
from qaq_pipeline.storage.tables import StoredTable

VERSION = "1"


def build_selected_subset(settings: Settings) -> dg.AssetsDefinition:
    """selected_subset[batch]: the rows that the published selection takes."""

    @dg.asset(
        **definition("selected_subset"),
        group_name="publication",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(VERSION, settings.published.name),
    )
    def selected_subset(
        context: dg.AssetExecutionContext, raw_data: StoredTable, decisions: StoredTable
    ) -> dg.MaterializeResult:
        frame = selected_rows(settings.published.name, raw_data.frame, decisions.frame)
        share = {} if raw_data.frame.is_empty() else {"share_of_rows_in": frame.height / raw_data.frame.height}
        metadata = {"selection": settings.published.name, "rows_in": raw_data.frame.height, **share}
        return table_result(
            context, frame, {"raw_data": raw_data, "decisions": decisions}, metadata, selection=settings.published.name
        )

    return selected_subset
