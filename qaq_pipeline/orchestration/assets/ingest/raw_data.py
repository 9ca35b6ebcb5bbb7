"""The asset raw_data[batch]."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import landing, records
from qaq_pipeline.orchestration.metadata import code_version, definition
from qaq_pipeline.orchestration.partitions import BATCHES, LANDED_TAG
from qaq_pipeline.orchestration.results import footer_before, table_result, unless_same
from qaq_pipeline.reports.check_metrics import count_by
from qaq_pipeline.schema import tables
from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import empty

VERSION = "1"


def build_raw_data(settings: Settings) -> dg.AssetsDefinition:
    """raw_data[batch]: the delivery's immutable copy, row by row."""

    @dg.asset(
        **definition("raw_data"),
        group_name="ingest",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(VERSION, settings.records),
        output_required=False,
    )
    def raw_data(
        context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]
    ) -> Iterator[dg.MaterializeResult]:
        before = footer_before(context, storage)
        try:
            delivery = landing.receive(storage, context.partition_key)
        except landing.LandingError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        frame = read_delivery(storage.deliveries.read(delivery), delivery, settings)
        metadata = {
            "accepted": int((frame["status"] == "accepted").sum()),
            "rejected": int((frame["status"] == "rejected").sum()),
            "rejected_by_reason": count_by(frame["reason"]),
            "files": dict(delivery.files),
        }
        result = table_result(context, frame, {}, metadata, delivery=delivery.content_hash, files=dict(delivery.files))
        yield from unless_same(context, result, before, LANDED_TAG)

    return raw_data


def read_delivery(contents: dict[str, bytes], delivery: Delivery, settings: Settings) -> pl.DataFrame:
    """All rows of the delivered files, in file order; of a limited delivery, those of its first rows.

    A file that cannot be cut into rows is one rejected row, by which the batch is gated.
    """
    frames = [_read_file(data, name, delivery.batch, settings) for name, data in contents.items()]
    rows = pl.concat([empty(tables.RawData), *frames])
    if delivery.limit is None:
        return rows
    first = rows.select("source_file", "source_row").unique(maintain_order=True).head(delivery.limit)
    return rows.join(first, on=["source_file", "source_row"], how="semi", maintain_order="left")


def _read_file(data: bytes, name: str, batch: str, settings: Settings) -> pl.DataFrame:
    try:
        return records.read_file(data, name, batch, settings.records)
    except records.UnreadableFileError as error:
        return records.unreadable_file(error, name, batch)
