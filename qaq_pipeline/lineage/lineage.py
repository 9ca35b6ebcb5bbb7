"""From a published version back to what was delivered, file by file, and whether all of it still is what it was.

Belongs here: the walk from a version's manifest over tables and cached scores to the deliveries, the path of one row,
and the comparison of every file with its hash. Does not belong here: what columns are derived from (`column_lineage`),
and how any of this is shown. No Dagster.

Each step back rests on a hash that the step before wrote down: a version is the hash of its manifest, which holds the
sha256 of its files and of the delivered ones, and the data versions of the tables; each table's footer holds those of
its inputs, and the hash of the file it stands in. What was made anew since is no fault: it is said to be another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import polars as pl

from qaq_pipeline.publication.versions import FOLDER
from qaq_pipeline.schema import tables
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Delivery, Footer, Storage, StorageError, file_fault, hash_json, json_bytes

_VERSION = re.compile(r"^[0-9a-f]{32}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_BY_MODEL = ("rmi_scores", "logprobs")
_BACKWARDS = (
    "selected_subset",
    "decisions",
    "disagreement_scores",
    "rank_reference",
    *_BY_MODEL,
    "screened_data",
    "signatures",
    "raw_data",
)
"""Tables from the publication back to the delivery: each one's inputs come after it."""


class LineageError(ValueError):
    """There is no such version or row, or its manifest is not to be trusted. The text names the path and the remedy."""


class State(StrEnum):
    """What became of a table since the version was published."""

    AS_PUBLISHED = "as published"
    SAME_CONTENT = "made anew since, with the same content"
    REPLACED = "replaced since"
    UNKNOWN = "not to be told: what it was made into was replaced since"
    MISSING = "missing, or unreadable"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a version, or of a delivery."""

    name: str
    path: str
    sha256: str
    """Of what it was."""


@dataclass(frozen=True, slots=True)
class Table:
    """A partition of a stored table that a version was made from."""

    name: str
    partition: tuple[str, ...]
    path: str
    entered: str | None
    """Data version that the version was made from; None: not to be told."""
    stored: str | None
    """Data version that is stored now."""
    state: State


@dataclass(frozen=True, slots=True)
class Shards:
    """The score cache of one model, of which the scores of its logprobs are."""

    model: str
    """Its role."""
    digest: str
    path: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeliveredFiles:
    """The copy of what was delivered as a batch; `path` is None where it is gone."""

    path: str | None
    files: tuple[File, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a version was made from of one batch."""

    name: str
    rows_in: int
    rows_selected: int
    provenance_id: str
    """Of its decisions."""
    tables: tuple[Table, ...]
    """From the publication back to the delivery."""
    scores: tuple[Shards, ...]
    delivery: DeliveredFiles


@dataclass(frozen=True, slots=True)
class Lineage:
    """A version and all that it was made from."""

    version: str
    manifest: str
    """Its path."""
    is_kept: bool
    """Whether its files are: of a retired version, the manifest alone is."""
    files: tuple[File, ...]
    batches: tuple[Batch, ...]
    is_whole: bool = True
    """Whether `files` are all of the version's."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A file that is not what it was."""

    path: str
    fault: str
    """What differs, and what that means."""
    remedy: str

    @property
    def sentence(self) -> str:
        """All of it, in words."""
        return f"{self.path}: {self.fault}; {self.remedy}"


# --- the walk -------------------------------------------------------------------------------------------------------


def walk(storage: Storage, version: str) -> Lineage:
    """What the version was made from, by manifest and footers: no table and no delivered byte is read.

    Raises:
        LineageError: its manifest is missing, or is not the one that was published.
    """
    is_kept = storage.exists(FOLDER, version, "manifest.json")
    parts = (FOLDER, version, "manifest.json") if is_kept else (FOLDER, "retired", f"{version}.json")
    manifest = _read_manifest(storage, version, parts)
    files = tuple(
        File(name, storage.url(FOLDER, version, *name.split("/")), sha256) for name, sha256 in manifest["files"].items()
    )
    batches = tuple(_batch(storage, entry) for entry in manifest["batches"])
    return Lineage(version, storage.url(*parts), is_kept, files, batches)


def only(lineage: Lineage, name: str) -> Lineage:
    """The lineage of one file of a version.

    Raises:
        LineageError: it has no such file; the text says which it has.
    """
    files = tuple(file for file in lineage.files if file.name == name)
    if not files:
        known = ", ".join(file.name for file in lineage.files)
        raise LineageError(f"version {lineage.version} has no file {name!r}; it has {known}")
    return dataclasses.replace(lineage, files=files, is_whole=False)


def _read_manifest(storage: Storage, version: str, parts: tuple[str, ...]) -> dict[str, Any]:
    path = storage.url(*parts)
    try:
        data = storage.read_bytes(*parts)
        manifest = json.loads(data)
    except StorageError as error:
        raise LineageError(f"{path}: it is missing; {_MANIFEST_REMEDY}") from error
    except ValueError as error:
        raise LineageError(
            f"{path}: it was changed since it was published: it is not JSON ({error}); {_MANIFEST_REMEDY}"
        ) from error
    if hash_json(manifest) != version or json_bytes(manifest) != data:
        raise LineageError(
            f"{path}: it is not the manifest of version {version}, which is its hash: it was changed since it was "
            f"published, and nothing it says can be trusted; {_MANIFEST_REMEDY}"
        )
    return manifest


def _batch(storage: Storage, entry: Mapping[str, Any]) -> Batch:
    footers, tables = _tables(storage, entry)
    return Batch(
        name=entry["batch"],
        rows_in=entry["rows_in"],
        rows_selected=entry["rows_selected"],
        provenance_id=entry["provenance_id"],
        tables=tuple(tables),
        scores=tuple(_shards(storage, role, identity) for role, identity in sorted(entry["models"].items())),
        delivery=_delivery(storage, entry, footers.get("raw_data")),
    )


def _tables(storage: Storage, entry: Mapping[str, Any]) -> tuple[dict[str, Footer], list[Table]]:
    """The tables of a batch, and by key the footers of those that still are of the version.

    The manifest says most of the versions, the footers of these the rest.
    """
    entered, footers, tables = dict(entry["data_versions"]), {}, []
    for key, name, partition in _partitions(entry):
        footer = _footer(storage, name, partition)
        state = _state(footer, entered.get(key))
        if footer is not None and state is State.AS_PUBLISHED:
            inputs = {} if name == "rank_reference" else _inputs(footer, partition)  # It is of several batches.
            if any(entered.setdefault(source, version) != version for source, version in inputs.items()):
                state = State.SAME_CONTENT
            footers[key] = footer
        stored = None if footer is None else footer.data_version
        tables.append(Table(name, partition, storage.table_url(name, *partition), entered.get(key), stored, state))
    return footers, tables


def _partitions(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Key (as provenance has it), table and partition of everything that a batch's selection was made from."""
    for name in _BACKWARDS:
        if name in _BY_MODEL:
            yield from ((f"{name}|{role}", name, (entry["batch"], role)) for role in sorted(entry["models"]))
        elif name != "rank_reference":
            yield name, name, (entry["batch"],)
        elif name in entry["data_versions"]:
            yield name, name, (str(rank_reference.name_in(entry["pool"])),)


def _inputs(footer: Footer, partition: tuple[str, ...]) -> dict[str, str]:
    """Data versions of a table's inputs, by key: what a model's table is made of, of that model, has its name."""
    made_of = footer.provenance.get("inputs", {})
    role = partition[1] if len(partition) > 1 else None
    return {f"{name}|{role}" if role and name in _BY_MODEL else name: version for name, version in made_of.items()}


def _state(footer: Footer | None, entered: str | None) -> State:
    if footer is None:
        return State.MISSING
    if entered is None:
        return State.UNKNOWN
    return State.AS_PUBLISHED if footer.data_version == entered else State.REPLACED


def _footer(storage: Storage, name: str, partition: tuple[str, ...]) -> Footer | None:
    try:
        return storage.read_footer(name, *partition)
    except StorageError:
        return None


def _shards(storage: Storage, role: str, identity: Mapping[str, Any]) -> Shards:
    digest = ScoreIdentity(**identity).digest()
    names = tuple(name for name in storage.names("score_cache", digest) if name.endswith(".parquet"))
    return Shards(role, digest, storage.url("score_cache", digest), names)


def _delivery(storage: Storage, entry: Mapping[str, Any], raw_data: Footer | None) -> DeliveredFiles:
    """The copy that raw_data names; where that was replaced, the one that holds the files that the manifest names."""
    batch, files = entry["batch"], entry["files"]
    named = None if raw_data is None else raw_data.provenance.get("delivery")
    folder = named or _copy_of(storage, batch, files)
    path = None if folder is None else storage.url("deliveries", batch, folder)
    return DeliveredFiles(path, tuple(File(name, f"{path}/{name}", sha256) for name, sha256 in files.items()))


def _copy_of(storage: Storage, batch: str, files: Mapping[str, str]) -> str | None:
    whole = Delivery(batch, dict(files)).content_hash
    folders = [name for name in storage.names("deliveries", batch) if _VERSION.match(name)]
    for folder in sorted(folders, key=lambda name: name != whole):
        parts = ("deliveries", batch, folder)
        if all(storage.exists(*parts, *name.split("/")) for name in files) and (
            folder == whole or all(_sha256(storage, *parts, *name.split("/")) == files[name] for name in files)
        ):
            return folder
    return None


# --- the comparison -------------------------------------------------------------------------------------------------

_MANIFEST_REMEDY = (
    "restore it from a backup; or remove it, and the next `qaq recurate` publishes what stands now, under the same "
    "hash if that is the same"
)
_TABLE_REMEDY = "restore it from a backup, or remove it and run `qaq recurate`, which makes it anew"
_REFERENCE_REMEDY = (
    "restore it from a backup, or remove it and materialise rank_reference, which makes the same of the same scores"
)
_SHARD_REMEDY = "remove it: the scores in it are made again when a batch needs them"


def verify(storage: Storage, lineage: Lineage) -> Iterator[Finding]:
    """Every file of a lineage that is not what it was; one file at a time is read, whole.

    A version's own files and the delivered ones are compared with their sha256, tables and shards with the hash that
    they hold or are named by. Any changed byte is found. A table that was made anew since must be whole, too.
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
        "do not train on it; restore it from a backup, or remove the version's manifest.json, and the next `qaq "
        "recurate` writes what stands now, under the same hash if that is the same"
    )
    for file in lineage.files if lineage.is_kept else ():
        fault = _differs(storage, file.sha256, FOLDER, lineage.version, *file.name.split("/"))
        if fault:
            yield Finding(file.path, f"{fault}: it is not what was published as {lineage.version}", remedy)
    if lineage.is_kept and lineage.is_whole:
        known = {"manifest.json", *(file.name for file in lineage.files)}
        for name in sorted(set(storage.files_below(FOLDER, lineage.version)) - known):
            path = storage.url(FOLDER, lineage.version, *name.split("/"))
            yield Finding(path, f"it is no file of version {lineage.version}", "move it elsewhere, or remove it")


def _verify_table(storage: Storage, table: Table, batch: Batch) -> Iterator[Finding]:
    remedy = _REFERENCE_REMEDY if table.name == "rank_reference" else _TABLE_REMEDY
    try:
        fault = file_fault(storage.read_bytes(table.name, *table.partition, "table.parquet"))
    except StorageError:
        yield Finding(table.path, f"it is missing: the lineage of batch {batch.name} breaks off here", remedy)
        return
    if fault:
        yield Finding(table.path, f"{fault}: what was made from it cannot be traced through it", remedy)
    elif table.name == "decisions" and table.stored == table.entered:
        found = storage.read_footer(table.name, *table.partition).provenance
        if hash_json(found) != batch.provenance_id:
            yield Finding(table.path, f"what it says it was made of is not what was published of {batch.name}", remedy)


def _verify_shards(storage: Storage, shards: Shards) -> Iterator[Finding]:
    for name in shards.names:
        try:
            fault = _shard_fault(name.removesuffix(".parquet"), storage.read_bytes("score_cache", shards.digest, name))
        except StorageError:  # Set aside, or pruned, since the walk.
            continue
        if fault:
            yield Finding(f"{shards.path}/{name}", f"{fault}: its scores cannot be trusted", _SHARD_REMEDY)


def _shard_fault(stem: str, data: bytes) -> str | None:
    """A shard is named by the sha256 of its bytes; one of before, at random."""
    if _SHA256.match(stem):
        return None if hashlib.sha256(data).hexdigest() == stem else "it was changed since it was written"
    return file_fault(data)


def _verify_provenance(storage: Storage, batch: Batch) -> Iterator[Finding]:
    try:
        storage.read_provenance(batch.provenance_id)
    except StorageError:
        path = storage.url("provenance", f"{batch.provenance_id}.json")
        fault = "it was changed since it was written, and nothing it says can be trusted"
        yield Finding(path, fault, _TABLE_REMEDY)


def _verify_delivery(storage: Storage, batch: Batch) -> Iterator[Finding]:
    remedy = f"deliver the same files again (`qaq run FILE --batch {batch.name}`), which mends the copy"
    if batch.delivery.path is None:
        where = storage.url("deliveries", batch.name)
        yield Finding(where, f"no copy of {', '.join(file.name for file in batch.delivery.files)} is here", remedy)
        return
    folder = batch.delivery.path.rsplit("/", 1)[-1]
    for file in batch.delivery.files:
        fault = _differs(storage, file.sha256, "deliveries", batch.name, folder, *file.name.split("/"))
        if fault:
            yield Finding(file.path, f"{fault}: it is not what was delivered as batch {batch.name}", remedy)


def _differs(storage: Storage, sha256: str, *parts: str) -> str | None:
    try:
        found = _sha256(storage, *parts)
    except StorageError:
        return "it is missing"
    return None if found == sha256 else f"its sha256 is {found}, not {sha256}"


def _sha256(storage: Storage, *parts: str) -> str:
    return hashlib.sha256(storage.read_bytes(*parts)).hexdigest()


# --- one row --------------------------------------------------------------------------------------------------------

_SHOWN = {
    "selected_subset": ("position",),
    "decisions": ("decision", "reason"),
    "disagreement_scores": ("rank_strong", "rank_weak", "gap"),
    "rmi_scores": ("rmi", "log_ppl_q", "log_ppl_q_given_a"),
    "logprobs": ("sum_nll_q", "sum_nll_q_given_a", "num_q_tokens"),
    "screened_data": ("status", "reason", "duplicate_of"),
    "signatures": ("content_hash",),
    "raw_data": ("status", "reason", "record"),
}
"""What is said of a row, of each of its tables."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row's place in a table, from 1, and what the table says of it."""

    table: Table
    number: int
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowPath:
    """The way of one delivered row, or one turn of it, into a version."""

    row: str
    """batch/file:row.turn"""
    pair_id: str | None
    exported: dict[str, int]
    """Its number, from 1, among the records of each exported file that holds it."""
    tables: tuple[TableRow, ...]
    """Of those that still are of the version."""
    shards: tuple[str, ...]
    """Paths of those that hold scores of the pair."""
    delivered: File
    source_row: int


def trace(storage: Storage, lineage: Lineage, row: str) -> list[RowPath]:
    """The paths of the rows that a person means by `batch/file:row`, with or without `.turn`: one for each turn.

    One table at a time is read.

    Raises:
        LineageError: the version has no such batch, or no such row, or its files are not kept.
        StorageError: a file cannot be read.
    """
    name, _, place = row.partition("/")
    batch = next((batch for batch in lineage.batches if batch.name == name), None)
    if batch is None:
        known = ", ".join(one.name for one in lineage.batches) or "none"
        raise LineageError(f"{row!r}: version {lineage.version} has no batch {name!r}; it has {known}")
    if not lineage.is_kept:
        raise LineageError(f"the files of version {lineage.version} were not kept; its manifest alone is")
    scores = _scores(storage, lineage)
    found = row_lookup.find_rows(scores.filter(pl.col("batch") == name), place)
    if found.is_empty():
        raise LineageError(f"{row!r}: batch {name} has no such row; give it as {name}/FILE:ROW or {name}/FILE:ROW.TURN")
    keys = found.select(*tables.ROW_KEY, "pair_id")
    exported = _record_numbers(scores, lineage, keys)
    rows_of_tables = {table: _rows_of(storage, table, keys) for table in batch.tables}
    return [
        _path(storage, batch, key, numbers, {table: rows[place] for table, rows in rows_of_tables.items()})
        for place, (key, numbers) in enumerate(zip(keys.iter_rows(named=True), exported, strict=True))
    ]


def _scores(storage: Storage, lineage: Lineage) -> pl.DataFrame:
    """The version's own ledger, rows in the order of the batches in it."""
    return storage.read_frame(FOLDER, lineage.version, "scores.parquet")


def _record_numbers(scores: pl.DataFrame, lineage: Lineage, keys: pl.DataFrame) -> list[dict[str, int]]:
    """Of each row, its number in each exported file: batches in the manifest's order, each in the selection's."""
    order = {batch.name: number for number, batch in enumerate(lineage.batches)}
    numbers: list[dict[str, int]] = [{} for _ in range(keys.height)]
    for selection in {file.name.partition("/")[0] for file in lineage.files if "/" in file.name}:
        if f"is_selected:{selection}" not in scores.columns:
            continue
        taken = (
            scores.filter(pl.col(f"is_selected:{selection}"))
            .sort(pl.col("batch").replace_strict(order), f"position:{selection}")
            .select(*tables.ROW_KEY, number=pl.int_range(1, pl.len() + 1))
        )
        found = keys.join(taken, on=tables.ROW_KEY, how="left", maintain_order="left")["number"]
        files = [file.name for file in lineage.files if _holds_records(file.name, selection)]
        for row, number in enumerate(found):
            numbers[row] |= {} if number is None else dict.fromkeys(files, number)
    return numbers


def _holds_records(file: str, selection: str) -> bool:
    """Whether a selection's file holds its records: in a folder that `datasets` saved only the Arrow file does."""
    folder, _, name = file.partition("/")
    return folder == selection and ("/" not in name or name.endswith(".arrow"))


def _rows_of(storage: Storage, table: Table, keys: pl.DataFrame) -> list[TableRow | None]:
    """The table's row for each key, where it has one and still is of the version."""
    if table.name not in _SHOWN or table.state not in (State.AS_PUBLISHED, State.SAME_CONTENT):
        return [None] * keys.height
    frame = storage.read_table(table.name, *table.partition).frame
    on, shown = [name for name in tables.ROW_KEY if name in frame.columns] or ["pair_id"], _SHOWN[table.name]
    numbered = frame.select(*on, *shown, number=pl.int_range(1, pl.len() + 1))
    found = keys.select(on).join(numbered, on=on, how="left", maintain_order="left", validate="m:1")
    return [
        None
        if row["number"] is None
        else TableRow(table, row["number"], {name: row[name] for name in _SHOWN[table.name]})
        for row in found.iter_rows(named=True)
    ]


def _path(
    storage: Storage,
    batch: Batch,
    key: Mapping[str, Any],
    exported: dict[str, int],
    rows: Mapping[Table, TableRow | None],
) -> RowPath:
    delivered = next(file for file in batch.delivery.files if file.name == key["source_file"])
    return RowPath(
        row=f"{key['batch']}/{key['source_file']}:{key['source_row']}.{key['turn_index']}",
        pair_id=key["pair_id"],
        exported=exported,
        tables=tuple(row for row in rows.values() if row is not None),
        shards=tuple(_holding(storage, batch.scores, key["pair_id"])),
        delivered=delivered,
        source_row=key["source_row"],
    )


def _holding(storage: Storage, scores: Iterable[Shards], pair_id: str | None) -> Iterator[str]:
    for shards in scores:
        for name in shards.names if pair_id else ():
            held = storage.read_frame("score_cache", shards.digest, name, columns=["pair_id"])["pair_id"]
            if held.is_in([pair_id]).any():
                yield f"{shards.path}/{name}"
