"""Screening of a stored batch against older batches, benchmarks and withdrawals, and then by its gate.

Belongs here: reading what a batch is compared with. Does not belong here: the order of the verdicts about a row
(`screen`), the search for duplicates and benchmark text, and the choice of the older batches (`freshness`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import ContaminationSettings, GateSettings, ScreeningSettings
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening import (
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
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable, empty


@dataclass(frozen=True)
class FoundBenchmarks:
    """Benchmark tasks that a batch contains."""

    rows: pl.DataFrame
    """Contamination."""
    hashes: Mapping[str, str]
    """sha256 of each benchmark's file, by name."""


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
    older: Sequence[str],
    found: FoundBenchmarks,
    settings: ScreeningSettings,
    limits: GateSettings,
) -> ScreenedBatch:
    """Screen a batch and judge its gate. Call it under the lock of the batches' order.

    Args:
        storage: contains older batches and withdrawals.
        raw_data: RawData of the batch.
        signatures: Signatures of the batch.
        older: batches whose rows may represent rows of this one, oldest first.
        found: the benchmark tasks that the batch contains.
        settings: which checks run.
        limits: when a batch is gated.

    Raises:
        OriginError: another version of the code made the signatures of an older batch.
    """
    batch = raw_data.provenance["partition"][0]
    withdrawn = withdrawals.read(storage).of_batch(batch, signatures.frame)
    compared = {name: _read_older(storage, name, signatures.frame) for name in older}
    related = {name: rows for name, (rows, _) in compared.items() if not rows.is_empty()}
    raws = [storage.tables.read("raw_data", Partition(name)).frame for name in related]
    texts = screen.texts_of([raw_data.frame, *raws])
    frame = screen.screen(
        raw_data.frame, signatures.frame, found.rows, list(related.values()), texts, settings, withdrawn
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


def _read_older(storage: Storage, batch: str, own: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Read the Signatures of an older batch that may represent own rows, and its screened_data's data version."""
    signed, screened = (storage.tables.read(name, Partition(batch)) for name in ("signatures", "screened_data"))
    if signed.provenance["signature_version"] != duplicates.SIGNATURE_VERSION:
        raise OriginError(
            f"the signatures of batch {batch} were made by another version of the code; in the UI, materialise "
            "signatures of every batch, then screened_data of every batch, the oldest batch first"
        )
    accepted = screened.frame.filter(pl.col("status") == Status.ACCEPTED.value)
    standing = signed.frame.join(accepted, on=ROW_KEY, how="semi", maintain_order="left")
    return duplicates.related(standing, own), screened.data_version


def find_benchmarks(
    storage: Storage, batch: str, raw_data: StoredTable, settings: ContaminationSettings
) -> FoundBenchmarks:
    """Find the benchmark tasks that the accepted rows of a batch contain; reuse cached results.

    Raises:
        benchmarks.BenchmarkError: a benchmark cannot be read.
    """
    accepted = raw_data.frame.filter(pl.col("status") == Status.ACCEPTED.value)
    found, hashes = [empty(tables.Contamination)], {}
    how = settings.model_dump(mode="json", exclude={"benchmarks", "action"})
    for source in settings.benchmarks:
        benchmark = benchmarks.load_benchmark(source.name, source.path)
        key = hash_json([raw_data.data_version, source.name, benchmark.sha256, how, contamination.VERSION])
        known = contamination_cache.read_contamination(storage, batch, key)
        if known is None:
            known = contamination.find(accepted, benchmark, settings)
            contamination_cache.write_contamination(storage, known, batch, key)
        found.append(known)
        hashes[source.name] = benchmark.sha256
    return FoundBenchmarks(pl.concat(found), hashes)
