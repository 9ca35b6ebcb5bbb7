"""The asset screened_data[batch]."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import ContaminationSettings, Settings
from qaq_pipeline.freshness import eligibility
from qaq_pipeline.orchestration.metadata import code_version, definition, gate_metadata
from qaq_pipeline.orchestration.partitions import BATCHES, RESCREENING_TAG
from qaq_pipeline.orchestration.results import (
    footer_before,
    is_new_verdict,
    report_gate,
    require_inputs,
    stored_gate,
    table_result,
    unless_same,
)
from qaq_pipeline.reports.check_metrics import count_by
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening import (
    batch_order,
    benchmarks,
    contamination,
    contamination_cache,
    duplicates,
    gates,
    screen,
    withdrawals,
)
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.storage.files import hash_json
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable, empty

VERSION = "2"


def build_screened_data(settings: Settings) -> dg.AssetsDefinition:
    """screened_data[batch]: what is found out before any GPU time is spent."""

    @dg.asset(
        **definition("screened_data"),
        group_name="ingest",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(
            VERSION, contamination.VERSION, settings.screening, settings.gates.max_rejected_share
        ),
        output_required=False,
    )
    def screened_data(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        signatures: StoredTable,
    ) -> Iterator[dg.MaterializeResult]:
        batch, stored = context.partition_key, footer_before(context, storage)
        require_inputs("signatures", signatures, {"raw_data": raw_data}, signatures.provenance["inputs"])
        found = _contamination(storage, batch, raw_data, settings.screening.contamination)
        # One batch at a time: each is compared with all before it, and the next must find this one's rows.
        with storage.locks.hold("batch_order", waits=True):
            result, gate = _screen(context, storage, settings, raw_data, signatures, found)
            assert result.value is not None
            storage.tables.write(result.value, "screened_data", Partition(batch))
            if gate is None:
                batch_order.take_place(storage, batch)
        yield from unless_same(context, result, stored, RESCREENING_TAG, "compared_with", "withdrawn")
        report_gate(context, settings.alerts, gate, is_new=is_new_verdict(gate, stored))

    return screened_data


@dataclass(frozen=True)
class _Found:
    """What a batch holds of the benchmarks, and the hash of each benchmark's file."""

    rows: pl.DataFrame
    benchmarks: Mapping[str, str]


def _screen(
    context: dg.AssetExecutionContext,
    storage: Storage,
    settings: Settings,
    raw_data: StoredTable,
    signatures: StoredTable,
    found: _Found,
) -> tuple[dg.MaterializeResult, Gate | None]:
    """What is made of the batch beside the older ones, and whether it goes any further."""
    batch, duplicates_of = context.partition_key, settings.screening.duplicates
    withdrawn = withdrawals.read(storage).of_batch(batch, signatures.frame)
    before = batch_order.batches_before(storage, batch) if duplicates_of.across_batches else []
    older = _older(context, storage, before, signatures.frame)
    related = {name: one.related for name, one in older.items()}
    raws = [
        storage.tables.read("raw_data", Partition(name)).frame for name, rows in related.items() if not rows.is_empty()
    ]
    frame = screen.screen(
        raw_data.frame,
        signatures.frame,
        found.rows,
        list(related.values()),
        screen.texts_of([raw_data.frame, *raws]),
        settings.screening,
        withdrawn,
    )
    gate = _gate(batch, frame, withdrawn, settings)
    if gate is not None:
        frame = frame.with_columns(batch_gate=pl.lit(gate.reason.value))
    metadata = {
        "rows_by_status": count_by(frame["status"]),
        "rows_by_reason": count_by(frame["reason"]),
        "compared_with_batches": list(older),
        "benchmarks": found.benchmarks,
        **gate_metadata(gate),
    }
    result = table_result(
        context,
        frame,
        {"raw_data": raw_data, "signatures": signatures},
        metadata,
        across_batches=duplicates_of.across_batches,
        compared_with={name: one.version for name, one in older.items()},
        benchmarks=found.benchmarks,
        withdrawn=withdrawn,
        **stored_gate(gate),
    )
    return result, gate


def _gate(batch: str, screened: pl.DataFrame, withdrawn: Mapping[str, str], settings: Settings) -> Gate | None:
    reason = withdrawn.get(withdrawals.key_of_batch(batch))
    return gates.before_scoring(screened, settings.gates) if reason is None else gates.withdrawn(reason)


@dataclass(frozen=True)
class _OlderBatch:
    """Of an older batch, the rows that may stand for rows of this one."""

    related: pl.DataFrame
    """Signatures of those that have one in common."""
    version: str
    """Of its screened_data."""


def _older(
    context: dg.AssetExecutionContext, storage: Storage, batches: list[str], own: pl.DataFrame
) -> dict[str, _OlderBatch]:
    """The older batches whose rows may stand for rows of these signatures; one that is left out is named in the log."""
    older = {}
    registered = set(context.instance.get_dynamic_partitions(str(BATCHES.name)))
    for batch in eligibility.comparable_batches(storage, batches, registered):
        signed, screened = (storage.tables.read(name, Partition(batch)) for name in ("signatures", "screened_data"))
        if signed.provenance["signature_version"] != duplicates.SIGNATURE_VERSION:
            raise dg.Failure(
                f"signatures of batch {batch} are of another version; materialise signatures, then screened_data, of "
                "every batch, the oldest first",
                allow_retries=False,
            )
        accepted = screened.frame.filter(pl.col("status") == Status.ACCEPTED.value)
        standing = signed.frame.join(accepted, on=ROW_KEY, how="semi", maintain_order="left")
        older[batch] = _OlderBatch(duplicates.related(standing, own), screened.data_version)
    for batch in batches:
        if batch not in older:
            context.log.warning("not compared with batch %s: it is gated, incomplete, being made anew, or gone", batch)
    return older


def _contamination(storage: Storage, batch: str, raw_data: StoredTable, settings: ContaminationSettings) -> _Found:
    """What the batch holds of the benchmarks; what was checked before is not again."""
    accepted = raw_data.frame.filter(pl.col("status") == Status.ACCEPTED.value)
    found, hashes = [empty(tables.Contamination)], {}
    for source in settings.benchmarks:
        try:
            benchmark = benchmarks.load_benchmark(source.name, source.path)
        except benchmarks.BenchmarkError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        how = settings.model_dump(mode="json", exclude={"benchmarks", "action"})
        made_of = [raw_data.data_version, source.name, benchmark.sha256, how, contamination.VERSION]
        key = hash_json(made_of)
        known = contamination_cache.read_contamination(storage, batch, key)
        if known is None:
            known = contamination.find(accepted, benchmark, settings)
            contamination_cache.write_contamination(storage, known, batch, key)
        found.append(known)
        hashes[source.name] = benchmark.sha256
    return _Found(pl.concat(found), hashes)
