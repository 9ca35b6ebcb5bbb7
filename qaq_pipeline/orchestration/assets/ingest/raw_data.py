"""The asset raw_data[batch]."""

from collections.abc import Iterator

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import landing, records
from qaq_pipeline.orchestration.materialisation import LANDED_TAG, footer_before, table_result, unless_same
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.reports.table_numbers import of_raw_data
from qaq_pipeline.storage.storage import Storage

VERSION = "4"


def build_raw_data(settings: Settings) -> dg.AssetsDefinition:
    """raw_data[batch]: the delivery's immutable copy, row by row."""

    @asset(settings, VERSION, reads=[settings.records], output_required=False)
    def raw_data(
        context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]
    ) -> Iterator[dg.MaterializeResult]:
        before = footer_before(context, storage)
        delivery = landing.receive(storage, context.partition_key)
        contents, files = storage.deliveries.read(delivery), dict(delivery.files)
        reading = records.read_delivery(contents, delivery.batch, settings.records, delivery.limit)
        metadata = of_raw_data(reading.frame, files, reading.unread)
        for sentence in records.not_read(reading.facts):
            context.log.warning(sentence)
        made_of = {"delivery": delivery.content_hash, "files": files, **reading.facts}
        result = table_result(context, reading.frame, {}, metadata, **made_of)
        yield from unless_same(context, result, before, LANDED_TAG)

    return raw_data
