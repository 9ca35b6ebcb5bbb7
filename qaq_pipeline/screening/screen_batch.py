"""Screening of a stored batch against older batches, benchmarks and withdrawals, and then by its gate.

Belongs here: reading what a batch is compared with. Does not belong here: the order of the verdicts about a row
(`screen`), the search for duplicates and benchmark text, and the choice of the older batches (`freshness`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import ContaminationSettings, GateSettings, HeldOutSettings, ScreeningSettings
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY, may_be_in
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening import (
    benchmarks,
    contamination,
    contamination_cache,
    duplicates,
    forbidden,
    gates,
    held_out,
    screen,
    withdrawals,
)
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.screening.held_out import HoldOut
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundBenchmarks:
    """Benchmark tasks that a batch contains."""

    rows: pl.DataFrame
    """Contamination."""
    hashes: Mapping[str, str]
    """sha256 of each benchmark's file, by name."""


@dataclass(frozen=True)
class Neighbours:
    """The other batches that a batch is compared with."""

    older: Sequence[str] = ()
    """Batches whose rows may represent rows of this one, oldest first."""
    newer: Sequence[str] = ()
    """Batches whose rows are on a side already; not looked at unless rows are held out."""


@dataclass(frozen=True)
class ScreenedBatch:
    """ScreenedData of a batch, and its verdict."""

    frame: pl.DataFrame
    gate: Gate | None
    facts: Mapping[str, Any]
    """The part of the table's provenance that its inputs do not show: what the batch was compared with."""


def screen_batch(
    storage: Storage,
    raw_data: StoredTable,
    signatures: StoredTable,
    others: Neighbours,
    found: FoundBenchmarks,
    settings: ScreeningSettings,
    limits: GateSettings,
    hold_out: HeldOutSettings,
) -> ScreenedBatch:
    """Screen a batch and judge its gate. Call it under the lock of the batches' order.

    Args:
        storage: contains older batches and withdrawals.
        raw_data: RawData of the batch.
        signatures: Signatures of the batch.
        others: the other batches.
        found: the benchmark tasks that the batch contains.
        settings: which checks run.
        limits: when a batch is gated.
        hold_out: which rows are held out.

    Raises:
        OriginError: another version of the code made the signatures of an older batch.
    """
    batch, contents = raw_data.provenance["partition"][0], signatures.select(*ROW_KEY, "content_hash")
    withdrawn = withdrawals.read(storage).of_batch(batch, contents)
    related_to = functools.cache(lambda: duplicates.Related(signatures.select("query_hash", "bands")))
    compared = {name: _read_other(storage, name, related_to) for name in others.older}
    related = {name: rows for name, (rows, _) in compared.items() if not rows.is_empty()}
    newer = _read_newer(storage, others.newer, related_to) if hold_out.share else {}
    raws = [storage.tables.read("raw_data", Partition(name)) for name in (*related, *newer)]
    gone = [screen.withdrawn_rows(contents, withdrawn)]
    del contents
    gone += [forbidden.find(part, settings) for part in raw_data.parts(*ROW_KEY, *forbidden.READS)]
    frame = screen.screen(
        raw_data.select(*ROW_KEY, "pair_id", "status", "reason", "detail"),
        signatures,
        found.rows,
        pl.concat(gone),
        list(related.values()),
        screen.texts_of([raw_data, *raws]),
        settings,
        HoldOut(hold_out, _sides_before(storage, batch) if hold_out.share else None, list(newer.values())),
    )
    gate = _judge(batch, frame, withdrawn, limits)
    facts = {
        "across_batches": settings.duplicates.across_batches,
        "compared_with": {name: version for name, (_, version) in compared.items()},
        "benchmarks": found.hashes,
        "withdrawn": withdrawn,
        **gates.as_provenance(gate),
    }
    return ScreenedBatch(frame.with_columns(batch_gate=pl.lit(gate and gate.reason.value, pl.String)), gate, facts)


def _judge(batch: str, screened: pl.DataFrame, withdrawn: Mapping[str, str], limits: GateSettings) -> Gate | None:
    reason = withdrawn.get(withdrawals.key_of_batch(batch))
    return gates.before_scoring(screened, limits) if reason is None else gates.withdrawn(reason)


def _sides_before(storage: Storage, batch: str) -> pl.DataFrame | None:
    """Read the sides of a batch's pairs from its stored screening; None if it has none, or was gated."""
    footer = storage.tables.readable_footer("screened_data", Partition(batch))
    if footer is None or gates.of_provenance(footer.provenance) is not None:
        return None
    columns = [*ROW_KEY, "pair_id", "status", "duplicate_of"]
    try:
        stored = pl.concat(storage.tables.scan("screened_data", Partition(batch), columns))
    except StorageError as error:
        logger.warning("%s; rows that it accepted may be held out now", error)
        return None
    return held_out.sides_before(stored)


def _read_newer(
    storage: Storage, batches: Sequence[str], related_to: Callable[[], duplicates.Related]
) -> dict[str, pl.DataFrame]:
    """Read the Signatures of newer batches' rows that are on a side and may be similar to own rows."""
    is_on_a_side = pl.col("status") != Status.BETWEEN.value
    related = {name: _read_other(storage, name, related_to)[0].filter(is_on_a_side) for name in batches}
    return {name: rows for name, rows in related.items() if not rows.is_empty()}


def _read_other(storage: Storage, batch: str, related_to: Callable[[], duplicates.Related]) -> tuple[pl.DataFrame, str]:
    """Read the Signatures of another batch that may be similar to own rows, and its screened_data's data version.

    Each row has its status and cluster.
    """
    signed, screened = (storage.tables.read(name, Partition(batch)) for name in ("signatures", "screened_data"))
    if signed.provenance["signature_version"] != duplicates.SIGNATURE_VERSION:
        raise OriginError(
            f"the signatures of batch {batch} were made by another version of the code; in the UI, materialise "
            "signatures of every batch, then screened_data of every batch, the oldest batch first"
        )
    related = pl.concat([empty(tables.Signatures), *map(related_to().among, signed.parts())])
    sides = [
        part.filter(pl.col("status").is_in(tables.DISTINCT)).join(may_be_in(related, part), on=ROW_KEY, how="semi")
        for part in screened.parts(*ROW_KEY, "status", "cluster")
    ]
    distinct = pl.concat([empty(tables.ScreenedData).select(*ROW_KEY, "status", "cluster"), *sides])
    return related.join(distinct, on=ROW_KEY, maintain_order="left", validate="1:1"), screened.data_version


def find_benchmarks(
    storage: Storage, batch: str, raw_data: StoredTable, settings: ContaminationSettings
) -> FoundBenchmarks:
    """Find the benchmark tasks that the accepted rows of a batch contain; reuse cached results.

    Raises:
        benchmarks.BenchmarkError: a benchmark cannot be read.
    """
    found, hashes = [empty(tables.Contamination)], {}
    how = settings.model_dump(mode="json", exclude={"benchmarks", "action"})
    for source in settings.benchmarks:
        benchmark = benchmarks.load_benchmark(source)
        read_as = source.model_dump(mode="json", exclude={"path"})
        key = hash_json([raw_data.data_version, read_as, benchmark.sha256, how, contamination.VERSION])
        known = contamination_cache.read_contamination(storage, batch, key)
        if known is None:
            parts = raw_data.parts(*ROW_KEY, "status", *contamination.READS)
            accepted = (part.filter(status=Status.ACCEPTED.value) for part in parts)
            known = contamination.find(accepted, benchmark, settings)
            contamination_cache.write_contamination(storage, known, batch, key)
        found.append(known)
        hashes[source.name] = benchmark.sha256
    return FoundBenchmarks(pl.concat(found), hashes)
