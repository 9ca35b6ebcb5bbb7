"""The asset screened_data[batch]."""

import dagster as dg

from qaq_pipeline import screening
from qaq_pipeline.assets.shared import BATCHES, code_version, count_by, definition, table_result
from qaq_pipeline.config import Settings
from qaq_pipeline.storage import StoredTable

VERSION = "1"


def build_screened_data(_: Settings) -> dg.AssetsDefinition:
    """screened_data[batch]: what is found out before any GPU time is spent."""

    @dg.asset(
        **definition("screened_data"),
        group_name="ingest",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(VERSION),
    )
    def screened_data(context: dg.AssetExecutionContext, raw_data: StoredTable) -> dg.MaterializeResult:
        frame = screening.screen(raw_data.frame)
        metadata = {"rows_by_status": count_by(frame, "status"), "rows_by_reason": count_by(frame, "reason")}
        return table_result(context, frame, {"raw_data": raw_data}, metadata)

    return screened_data
