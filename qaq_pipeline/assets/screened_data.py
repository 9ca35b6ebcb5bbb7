"""The asset screened_data[batch]."""

from collections.abc import Mapping
from dataclasses import dataclass

import dagster as dg
import polars as pl

from qaq_pipeline import benchmarks, contamination, duplicates, gates, schema, screening
from qaq_pipeline.assets.shared import (
    BATCHES,
    code_version,
    count_by,
    definition,
    gate_metadata,
    require_inputs,
    stored_gate,
    table_result,
)
from qaq_pipeline.config import ContaminationSettings, Settings
from qaq_pipeline.schema import Status
from qaq_pipeline.storage import Storage, StorageError, StoredTable, empty, hash_json

VERSION = "2"


def build_screened_data(settings: Settings) -> dg.AssetsDefinition:
    """screened_data[batch]: what is found out before any GPU time is spent."""

    @dg.asset(
        **definition("screened_data"),
        group_name="ingest",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(VERSION, settings.screening, settings.gates.max_rejected_share),
    )
    def screened_data(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        signatures: StoredTable,
    ) -> dg.MaterializeResult:
        batch = context.partition_key
        require_inputs("signatures", signatures, {"raw_data": raw_data}, signatures.provenance["inputs"])
        found, hashes = _contamination(storage, batch, raw_data, settings.screening.contamination)
        # One batch at a time: each is compared with all before it, and the next must find this one's rows.
        with storage.lock("screened_data", waits=True):
            before = storage.batches_before(batch)
            older = _older(storage, before) if settings.screening.duplicates.across_batches else {}
            related = {name: duplicates.related(one.signatures, signatures.frame) for name, one in older.items()}
            raws = [
                raw_data.frame,
                *(older[name].raw(storage) for name, rows in related.items() if not rows.is_empty()),
            ]
            frame = screening.screen(
                raw_data.frame,
                signatures.frame,
                found,
                list(related.values()),
                screening.texts_of(raws),
                settings.screening,
            )
            gate = gates.before_scoring(frame, settings.gates)
            if gate is not None:
                context.log.warning("batch %s is gated: %s", batch, gate.sentence)
            inputs = {"raw_data": raw_data, "signatures": signatures}
            result = table_result(
                context,
                frame,
                inputs,
                {
                    "rows_by_status": count_by(frame, "status"),
                    "rows_by_reason": count_by(frame, "reason"),
                    "compared_with_batches": list(older),
                    "benchmarks": hashes,
                    **gate_metadata(gate),
                },
                compared_with={name: one.version for name, one in older.items()},
                benchmarks=hashes,
                **stored_gate(gate),
            )
            assert result.value is not None
            storage.write_table(result.value, "screened_data", batch)
        return result

    return screened_data


@dataclass(frozen=True)
class _OlderBatch:
    """Of an older batch, the rows that may stand for others."""

    batch: str
    signatures: pl.DataFrame
    version: str
    """Of its screened_data."""

    def raw(self, storage: Storage) -> pl.DataFrame:
        return storage.read_table("raw_data", self.batch).frame


def _older(storage: Storage, batches: list[str]) -> dict[str, _OlderBatch]:
    """The older batches as they stand; one that is being made anew is left out, and says so by its absence."""
    older = {}
    for batch in batches:
        try:
            signed, screened = (storage.read_table(name, batch) for name in ("signatures", "screened_data"))
        except StorageError:
            continue
        if screened.provenance["inputs"]["signatures"] != signed.data_version:
            continue
        if signed.provenance["signature_version"] != duplicates.SIGNATURE_VERSION:
            raise dg.Failure(
                f"signatures of batch {batch} are of another version; materialise signatures of all batches first",
                allow_retries=False,
            )
        accepted = screened.frame.filter(pl.col("status") == Status.ACCEPTED.value)
        if gates.of_provenance(screened.provenance) is not None:
            accepted = accepted.clear()
        standing = signed.frame.join(accepted, on=schema.ROW_KEY, how="semi", maintain_order="left")
        older[batch] = _OlderBatch(batch, standing, screened.data_version)
    return older


def _contamination(
    storage: Storage, batch: str, raw_data: StoredTable, settings: ContaminationSettings
) -> tuple[pl.DataFrame, Mapping[str, str]]:
    """What the batch holds of the benchmarks, and the hash of each file; what was checked before is not again."""
    accepted = raw_data.frame.filter(pl.col("status") == Status.ACCEPTED.value)
    found, hashes = [empty(schema.Contamination)], {}
    for source in settings.benchmarks:
        try:
            benchmark = benchmarks.load_benchmark(source.name, source.path)
        except benchmarks.BenchmarkError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        how = settings.model_dump(mode="json", exclude={"benchmarks", "action"})
        made_of = [raw_data.data_version, source.name, benchmark.sha256, how, contamination.VERSION]
        key = hash_json(made_of)
        known = storage.read_contamination(batch, key)
        if known is None:
            known = contamination.find(accepted, benchmark, settings)
            storage.write_contamination(known, batch, key)
        found.append(known)
        hashes[source.name] = benchmark.sha256
    return pl.concat(found), hashes
