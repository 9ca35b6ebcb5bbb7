"""The asset signatures[batch]."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.screening import duplicates
from qaq_pipeline.screening.duplicates import SIGNATURE_VERSION
from qaq_pipeline.storage.stored_table import StoredTable


def build_signatures(settings: Settings) -> dg.AssetsDefinition:
    """signatures[batch]: MinHash signatures, by which duplicates are found here and in newer batches."""

    @asset(settings, SIGNATURE_VERSION)
    def signatures(context: dg.AssetExecutionContext, raw_data: StoredTable) -> dg.MaterializeResult:
        frame = duplicates.signatures(raw_data.frame)
        metadata = {"distinct_contents": frame["content_hash"].n_unique()}
        return table_result(context, frame, {"raw_data": raw_data}, metadata, signature_version=SIGNATURE_VERSION)

    return signatures
