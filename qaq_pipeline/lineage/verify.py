"""The comparison of every file of a version, and of everything it was made from, with its hash. No Dagster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qaq_pipeline.lineage.lineage import Batch, Lineage, Shards, Table
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.publication import versions
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.storage import Storage


@dataclass(frozen=True, slots=True)
class Finding:
    """A file that has changed, or is missing."""

    path: str
    fault: str
    """The difference, and its consequence."""
    remedy: str

    @property
    def sentence(self) -> str:
        """Path, fault and remedy in one sentence."""
        return f"{self.path}: {self.fault}; {self.remedy}"


# --- the comparison -------------------------------------------------------------------------------------------------

_TABLE_REMEDY = "restore it from a backup, or remove it and run `qaq refresh`, which rebuilds it"
_SHARD_REMEDY = "leave it: the next scoring sets it aside and computes its scores again"


def verify(storage: Storage, lineage: Lineage) -> Iterator[Finding]:
    """Every file of a lineage that has changed or is missing; files are read one at a time.

    A version's own files and the delivered ones are compared with their sha256, tables and shards with the hash that
    they hold or are named by. Any changed byte is found. A table that was rebuilt since is compared with its new hash.
    """
    yield from _verify_files(storage, lineage)
    seen: set[str] = set()
    for batch in lineage.batches:
        for table in batch.tables:
            if table.path not in seen:
                yield from _verify_table(storage, table, batch)
        for shards in batch.scores:
            if shards.path not in seen:
                yield from _verify_shards(storage, shards)
        seen |= {table.path for table in batch.tables} | {shards.path for shards in batch.scores}
        yield from _verify_delivery(storage, batch)
        yield from _verify_provenance(storage, batch)


def _verify_files(storage: Storage, lineage: Lineage) -> Iterator[Finding]:
    remedy = (
        "do not train on this version; either restore the file from a backup, or remove the version's manifest.json "
        "and run `qaq refresh`, which publishes the current state (under the same hash if the content is the same)"
    )
    for file in lineage.files if lineage.is_kept else ():
        fault = _differs(storage, file.sha256, *versions.place(lineage.version, file.name))
        if fault:
            yield Finding(file.path, f"{fault}: it is not what was published as {lineage.version}", remedy)
    if lineage.is_kept and lineage.is_whole:
        known = {versions.MANIFEST, *(file.name for file in lineage.files)}
        for name in sorted(set(storage.files.files_below(*versions.place(lineage.version))) - known):
            path = storage.files.url(*versions.place(lineage.version, name))
            yield Finding(path, f"it is no file of version {lineage.version}", "move it elsewhere, or remove it")


def _verify_table(storage: Storage, table: Table, batch: Batch) -> Iterator[Finding]:
    is_of_reference = table.name in PIPELINE.tables(Purpose.REFERENCE)
    remedy = _reference_remedy(table.name) if is_of_reference else _TABLE_REMEDY
    try:
        fault = storage.tables.fault(table.name, table.partition)
    except StorageError:
        yield Finding(table.path, f"it is missing: the lineage of batch {batch.name} breaks off here", remedy)
        return
    if fault:
        yield Finding(table.path, f"{fault}: what was made from it cannot be traced through it", remedy)
    elif table.name == "decisions" and table.stored == table.entered:
        found = storage.tables.footer(table.name, table.partition).provenance
        if hash_json(found) != batch.provenance_id:
            yield Finding(
                table.path, f"its provenance differs from the provenance published with batch {batch.name}", remedy
            )


def _reference_remedy(name: str) -> str:
    return f"restore it from a backup, or remove it and materialise {name}, which rebuilds it from the same scores"


def _verify_shards(storage: Storage, shards: Shards) -> Iterator[Finding]:
    for name in shards.names:
        try:
            fault = storage.scores.fault(shards.digest, name)
        except StorageError:  # Set aside, or pruned, since the walk.
            continue
        if fault:
            yield Finding(f"{shards.path}/{name}", f"{fault}: its scores cannot be trusted", _SHARD_REMEDY)


def _verify_provenance(storage: Storage, batch: Batch) -> Iterator[Finding]:
    try:
        storage.provenance.read(batch.provenance_id)
    except StorageError:
        path = storage.files.url(*storage.provenance.place(batch.provenance_id))
        fault = "it was changed since it was written, and cannot be trusted"
        yield Finding(path, fault, _TABLE_REMEDY)


def _verify_delivery(storage: Storage, batch: Batch) -> Iterator[Finding]:
    remedy = f"deliver the same files again (`qaq run FILE --batch {batch.name}`), which repairs the copy"
    if batch.delivery.path is None:
        where = storage.files.url(*storage.deliveries.place(batch.name))
        yield Finding(where, f"no copy of {', '.join(file.name for file in batch.delivery.files)} is here", remedy)
        return
    folder = batch.delivery.path.rsplit("/", 1)[-1]
    for file in batch.delivery.files:
        fault = _differs(storage, file.sha256, *storage.deliveries.place(batch.name, folder, *file.name.split("/")))
        if fault:
            yield Finding(file.path, f"{fault}: it is not what was delivered as batch {batch.name}", remedy)


def _differs(storage: Storage, sha256: str, *parts: str) -> str | None:
    try:
        found = storage.files.sha256(*parts)
    except StorageError:
        return "it is missing"
    return None if found == sha256 else f"its sha256 is {found}, not {sha256}"
