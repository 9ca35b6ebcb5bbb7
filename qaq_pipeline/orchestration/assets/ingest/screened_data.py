"""The asset screened_data[batch], where the gate before scoring is judged."""

from collections.abc import Iterator

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness import eligibility
from qaq_pipeline.orchestration.materialisation import RESCREENING_TAG, footer_before, table_result, unless_same
from qaq_pipeline.orchestration.metadata import asset, gate_metadata
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.run_log import report_gate
from qaq_pipeline.reports.table_numbers import of_screened_data
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import batch_order, contamination, gates, screen_batch
from qaq_pipeline.screening.screen_batch import Neighbours
from qaq_pipeline.storage.origin import require_inputs
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable

VERSION = "4"


def build_screened_data(settings: Settings) -> dg.AssetsDefinition:
    """screened_data[batch]: the verdict on each row before any GPU time is spent."""
    screening, limits, hold_out = settings.screening, settings.gates, settings.held_out

    @asset(
        settings,
        VERSION,
        reads=[contamination.VERSION, screening, limits.max_rejected_share, hold_out],
        output_required=False,
    )
    def screened_data(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        signatures: StoredTable,
    ) -> Iterator[dg.MaterializeResult]:
        batch, before = context.partition_key, footer_before(context, storage)
        require_inputs("signatures", signatures, {"raw_data": raw_data})
        found = screen_batch.find_benchmarks(storage, batch, raw_data, screening.contamination)
        # One batch at a time: each is compared with all before it, and the next must find this one's rows.
        with storage.locks.hold("batch_order", waits=True):
            others = _others(context, storage) if screening.duplicates.across_batches else Neighbours()
            made = screen_batch.screen_batch(storage, raw_data, signatures, others, found, screening, limits, hold_out)
            metadata = of_screened_data(made.frame, others.older, found.hashes) | gate_metadata(made.gate)
            inputs = {"raw_data": raw_data, "signatures": signatures}
            result = table_result(context, made.frame, inputs, metadata, **made.facts)
            assert result.value is not None
            storage.tables.write(result.value, "screened_data", Partition(batch))
            if made.gate is None:
                batch_order.take_place(storage, batch)
        yield from unless_same(context, result, before, RESCREENING_TAG, "compared_with", "withdrawn")
        is_new = gates.is_new(made.gate, None if before is None else before.provenance)
        report_gate(context, settings.alerts, made.gate, is_new=is_new)

    return screened_data


def _others(context: dg.AssetExecutionContext, storage: Storage) -> Neighbours:
    """The comparable batches before and after this one; the log names the older ones that are left out."""
    older = batch_order.batches_before(storage, context.partition_key)
    registered = set(context.instance.get_dynamic_partitions(str(BATCHES.name)))
    comparable = eligibility.comparable_batches(storage, older, registered)
    for batch in older:
        if batch not in comparable:
            context.log.warning("not compared with batch %s: it is gated, incomplete, stale, or gone", batch)
    newer = batch_order.batches_after(storage, context.partition_key)
    return Neighbours(list(comparable), list(eligibility.comparable_batches(storage, newer, registered)))
