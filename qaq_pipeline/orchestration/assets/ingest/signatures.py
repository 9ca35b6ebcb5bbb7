"""The asset signatures[batch]."""

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.screening import duplicates
from qaq_pipeline.screening.duplicates import SIGNATURE_VERSION, TEXTS
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable


def build_signatures(settings: Settings) -> dg.AssetsDefinition:
    """signatures[batch]: MinHash signatures, by which duplicates are found here and in newer batches."""

    @asset(settings, SIGNATURE_VERSION)
    def signatures(
        context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage], raw_data: StoredTable
    ) -> dg.MaterializeResult:
        contents = [pl.Series(dtype=pl.String)]
        with storage.tables.begin("signatures", Partition(context.partition_key)) as rows:
            for part in raw_data.parts(*ROW_KEY, "pair_id", "status", *TEXTS):
                signed = duplicates.signatures(part)
                rows.append(signed)
                contents.append(signed["content_hash"])
            metadata = {"distinct_contents": pl.concat(contents).n_unique()}
            return table_result(context, rows, {"raw_data": raw_data}, metadata, signature_version=SIGNATURE_VERSION)

    return signatures
