"""The asset signatures[batch]."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import code_version, definition
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.results import table_result
from qaq_pipeline.screening import duplicates
from qaq_pipeline.storage.tables import StoredTable


def build_signatures(_: Settings) -> dg.AssetsDefinition:
    """signatures[batch]: what duplicates of its rows, here and in newer batches, are found by."""

    @dg.asset(
        **definition("signatures"),
        group_name="ingest",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(duplicates.SIGNATURE_VERSION),
    )
    def signatures(context: dg.AssetExecutionContext, raw_data: StoredTable) -> dg.MaterializeResult:
        frame = duplicates.signatures(raw_data.frame)
        metadata = {"distinct_contents": frame["content_hash"].n_unique()}
        return table_result(
            context, frame, {"raw_data": raw_data}, metadata, signature_version=duplicates.SIGNATURE_VERSION
        )

    return signatures
