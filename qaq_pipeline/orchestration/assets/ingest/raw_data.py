"""The asset raw_data[batch]."""

from collections.abc import Iterator
from functools import partial

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import landing, records
from qaq_pipeline.orchestration.materialisation import LANDED_TAG, footer_before, table_result, unless_same
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.reports.table_numbers import of_raw_data
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import RawData
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import empty

VERSION = "5"


def build_raw_data(settings: Settings) -> dg.AssetsDefinition:
    """raw_data[batch]: the delivery's immutable copy, row by row."""

    @asset(settings, VERSION, reads=[settings.records], output_required=False)
    def raw_data(
        context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]
    ) -> Iterator[dg.MaterializeResult]:
        before = footer_before(context, storage)
        delivery = landing.receive(storage, context.partition_key)
        sizes, read = storage.deliveries.sizes(delivery), partial(storage.deliveries.read, delivery)
        reading, verdicts = records.NOTHING, [empty(RawData).select("status", "reason")]
        with storage.tables.begin("raw_data", Partition(delivery.batch)) as rows:
            for part in records.delivery_parts(sizes, read, delivery.batch, settings.records, delivery.limit):
                rows.append(part.frame)
                verdicts.append(part.frame.select("status", "reason"))
                reading = reading.followed_by(part.without_rows())
            for sentence in records.not_read(reading.facts):
                context.log.warning(sentence)
            metadata = of_raw_data(pl.concat(verdicts), delivery.files, reading.unread)
            made_of = {"delivery": delivery.content_hash, "files": dict(delivery.files), **reading.facts}
            result = table_result(context, rows, {}, metadata, **made_of)
        yield from unless_same(context, result, before, LANDED_TAG)

    return raw_data
