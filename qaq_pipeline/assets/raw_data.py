"""The asset raw_data[batch]."""

import dagster as dg
import polars as pl

from qaq_pipeline import records, schema
from qaq_pipeline.assets.shared import BATCHES, code_version, count_by, definition, table_result
from qaq_pipeline.config import Settings
from qaq_pipeline.storage import Delivery, Storage, empty

VERSION = "1"


def build_raw_data(settings: Settings) -> dg.AssetsDefinition:
    """raw_data[batch]: the delivery's immutable copy, row by row."""

    @dg.asset(
        **definition("raw_data"),
        group_name="ingest",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(VERSION, settings.records),
    )
    def raw_data(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        delivery = storage.current_delivery(context.partition_key)
        frame = read_delivery(storage.read_delivery(delivery), delivery, settings)
        metadata = {
            "accepted": int((frame["status"] == "accepted").sum()),
            "rejected": int((frame["status"] == "rejected").sum()),
            "rejected_by_reason": count_by(frame, "reason"),
            "files": dict(delivery.files),
        }
        return table_result(context, frame, {}, metadata, delivery=delivery.content_hash, files=dict(delivery.files))

    return raw_data


def read_delivery(contents: dict[str, bytes], delivery: Delivery, settings: Settings) -> pl.DataFrame:
    """All rows of the delivered files, in file order; of a limited delivery, those of its first rows."""
    frames = [records.read_file(data, name, delivery.batch, settings.records) for name, data in contents.items()]
    rows = pl.concat([empty(schema.RawData), *frames])
    if delivery.limit is None:
        return rows
    first = rows.select("source_file", "source_row").unique(maintain_order=True).head(delivery.limit)
    return rows.join(first, on=["source_file", "source_row"], how="semi", maintain_order="left")
