"""Tables, deliveries and cached scores on disk or object store. No Dagster.

Belongs here: paths, atomic writes, schema-checked tables with their provenance in the file's footer, locks.
Does not belong here: what the tables mean, or when they are made.

    <root>/deliveries/<batch>/<hash>/<file>       immutable copy of what was delivered; current.json points to it
    <root>/<table>/<batch>[/<model>]/table.parquet
    <root>/decisions/<batch>/pair_index.parquet   from pair_ids to keys, for one version of the table
    <root>/provenance/<id>.json                   what made decisions, written once; runs/<id>/<run id>.json: when
    <root>/rank_reference/<name>/table.parquet    written once
    <root>/batch_order.json                       the batches in the order in which they were first screened
    <root>/contamination/<batch>/<key>.parquet    what was found of one benchmark
    <root>/score_cache/<identity>/<sha256>.parquet  written once each, never changed; set_aside/ holds what is no shard
    <root>/curated_dataset/<manifest hash>/…       written once each; latest.json points to the newest

Every write is atomic: on local disk a temporary name in the same folder, then `os.replace`; on an object store one
PUT. A pointer is replaced last.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import dataframely as dy
import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.row_lookup import Where

logger = logging.getLogger(__name__)

_FOOTER_KEY = "qaq_pipeline"
_FILE_HASH = "file_hash"
_NO_HASH = "0" * 32
"""Stands in a file for its own hash while that is taken."""
_FOOTER_TAIL_BYTES = 8
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What Polars raises of bytes that are no Parquet file, or a damaged one."""
_NO_SHARD = (*_UNREADABLE, tables.TableError, KeyError, TypeError, ValueError)
"""What reading a shard raises where the file is none, or was changed."""
_NO_FOOTER = (pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""What reading a footer raises where there is none, or it was changed: pyarrow has OSError for some of it."""
_TABLE_FILE = "table.parquet"
_INDEX_FILE = "pair_index.parquet"
_INDEXED = ("decisions",)
_ORDER = ("batch_order.json",)
UNKNOWN_SCORER = {"libraries": "unknown", "device": "unknown"}
"""Of scores that were cached before it was recorded what scored them."""


class StorageError(ValueError):
    """Something stored is missing, torn or foreign. The text names the path and the remedy."""


class PartitionBusyError(RuntimeError):
    """Another process is writing the same partition. The text names it and the remedy."""


@dataclass(frozen=True)
class StoredTable:
    """A frame and what made it: inputs with their versions, settings hash, code version, model identity."""

    frame: pl.DataFrame
    provenance: dict[str, Any] = field(default_factory=dict)
    stored_version: str | None = None
    """The data version under which it was stored: a newer Parquet writer must not change it. None: not stored yet."""

    @cached_property
    def data_version(self) -> str:
        """Hash of the content alone (32 hex digits): equal content has equal versions, whenever it was made."""
        return self.stored_version or _hash_body(_parquet_bytes(self.frame, {}))

    @cached_property
    def provenance_id(self) -> str:
        """Hash of the provenance (32 hex digits); it knows no run id and no time."""
        return hash_json(self.provenance)


@dataclass(frozen=True, slots=True)
class Footer:
    """What made a stored table, the hash of its content, and its size."""

    provenance: dict[str, Any]
    data_version: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class FoundRows:
    """Rows that were looked for, and how."""

    frame: pl.DataFrame
    is_indexed: bool
    """Whether an index led to them; else every row group was looked at."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made some rows, by the id that stands beside them, and which runs made them so."""

    provenance_id: str
    made_of: dict[str, Any] | None
    """None: no record of it is kept."""
    runs: list[dict[str, str]] = field(default_factory=list)
    """run_id and time of each, the first first."""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """What the score cache holds under one identity."""

    digest: str
    identity: dict[str, Any]
    """Fields of the `ScoreIdentity`."""
    num_shards: int
    num_set_aside: int
    num_scores: int
    num_bytes: int
    num_hits: int
    """Scores that runs have taken from it."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What was delivered as one batch: files with their sha256, and how many rows of them are read."""

    batch: str
    files: dict[str, str]
    """sha256 of each file, by its name in the delivery."""
    limit: int | None = None

    @property
    def content_hash(self) -> str:
        """Hash of files, names and limit (32 hex digits): the folder of the copy."""
        return hash_json({"files": self.files, "limit": self.limit})


def hash_json(value: Any) -> str:
    """Hash of a JSON value (32 hex digits)."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_storage(settings: Settings) -> Storage:
    """The storage that the settings name.

    Raises:
        SettingsError: its URL is of an unknown kind, or of one whose fsspec package is not installed.
    """
    try:
        return Storage(settings.storage_root, settings.home / "locks", settings.runtime.lock_timeout_seconds)
    except (ValueError, ImportError) as error:
        raise SettingsError(f"storage.root: {settings.storage_root!r} cannot be used ({error})") from error


def json_bytes(value: Any) -> bytes:
    """A JSON value as it is stored: the one way in which its bytes can be written."""
    return json.dumps(value, indent=2, sort_keys=True).encode()


class Storage:
    """Everything the pipeline keeps, under one root.

    Args:
        root: local path or any fsspec URL.
        lock_directory: local folder of the lock files; locks hold between processes of one machine.
        lock_timeout_seconds: how long a writer waits for another.
    """

    def __init__(self, root: str, lock_directory: Path, lock_timeout_seconds: float = 10.0) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(root)
        self._lock_directory = lock_directory
        self._lock_timeout = lock_timeout_seconds

    def path(self, *parts: str) -> str:
        """Full path of something under the root."""
        return "/".join([self._root.rstrip("/"), *parts])

    def url(self, *parts: str) -> str:
        """The same with its protocol, as other tools want it."""
        return self._fs.unstrip_protocol(self.path(*parts)).removeprefix("file://")

    # --- bytes -------------------------------------------------------------------------------------------------

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write atomically: readers see the old content or the new, never a part of it."""
        path = self.path(*parts)
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, data)
            return
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def read_bytes(self, *parts: str) -> bytes:
        """Raises `StorageError` where there is nothing."""
        try:
            return self._fs.cat_file(self.path(*parts))
        except FileNotFoundError as error:
            raise StorageError(f"{self.url(*parts)}: not stored yet") from error

    def remove(self, *parts: str) -> None:
        """Remove one file."""
        self._fs.rm_file(self.path(*parts))

    def remove_folder(self, *parts: str) -> None:
        """Remove a folder and what lies in it."""
        self._fs.rm(self.path(*parts), recursive=True)

    def exists(self, *parts: str) -> bool:
        """Whether something is stored there."""
        return self._fs.exists(self.path(*parts))

    def read_frame(self, *parts: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """A Parquet file that is no table of ours.

        Raises:
            StorageError: it is missing, or torn.
        """
        data = self.read_bytes(*parts)
        try:
            return pl.read_parquet(io.BytesIO(data), columns=None if columns is None else list(columns), glob=False)
        except pl.exceptions.PolarsError as error:
            raise StorageError(f"{self.url(*parts)}: it cannot be read: {error}; restore it from a backup") from error

    def size(self, *parts: str) -> int:
        """Bytes of a file."""
        return int(self._fs.size(self.path(*parts)))

    def files_below(self, *parts: str) -> list[str]:
        """The files of a folder and of its folders, by their path in it."""
        start = self.path(*parts)
        return sorted(path.removeprefix(start).lstrip("/") for path in self._fs.find(start))

    def names(self, *parts: str) -> list[str]:
        """What lies in a folder, sorted; nothing where there is none."""
        folder = self.path(*parts)
        if not self._fs.exists(folder):
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False))

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON value atomically."""
        self.write_bytes(json_bytes(value), *parts)

    def read_json(self, *parts: str) -> Any:
        """Raises `StorageError` where there is nothing, or something torn."""
        data = self.read_bytes(*parts)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StorageError(f"{self.url(*parts)}: not JSON ({error}); restore the file, or remove it") from error

    # --- tables ------------------------------------------------------------------------------------------------

    def write_table(self, table: StoredTable, name: str, *partition: str) -> None:
        """Write a table of the pipeline, with its provenance in the footer.

        Raises:
            schema.TableError: the frame does not fit; nothing is written.
        """
        frame = tables.enforce(PIPELINE[name].table, table.frame)
        footer = {"provenance": table.provenance, "data_version": table.data_version}
        self.write_bytes(_parquet_bytes(frame, footer), *_table_path(name, partition))
        if name in _INDEXED:
            self.write_pair_index(frame, table.data_version, name, *partition, _INDEX_FILE)

    def read_table(self, name: str, *partition: str) -> StoredTable:
        """Read a table and its provenance.

        Raises:
            StorageError: it is missing, torn, changed since it was written, or has other columns.
        """
        parts = self._stored(name, partition)
        data = self.read_bytes(*parts)
        try:
            footer = json.loads(pl.read_parquet_metadata(io.BytesIO(data))[_FOOTER_KEY])
            table = StoredTable(_read_parquet(data), footer["provenance"], footer["data_version"])
        except (*_UNREADABLE, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{self.url(*parts)}: cannot be read as a table ({error}); materialise it anew"
            ) from error
        if dict(table.frame.schema) != tables.dtypes(PIPELINE[name].table):
            raise StorageError(f"{self.url(*parts)}: written by another version of {name}; materialise it anew")
        if _hash_body(data) != table.data_version:
            raise StorageError(f"{self.url(*parts)}: changed since it was written; materialise it anew")
        return table

    def read_footer(self, name: str, *partition: str) -> Footer:
        """Provenance, data version and number of rows of a stored table, without its rows.

        Raises:
            StorageError: it is missing, or torn.
        """
        parts = self._stored(name, partition)
        try:
            with self._fs.open(self.path(*parts), "rb") as stream:
                footer, num_rows = _footer(stream)
            return Footer(footer["provenance"], footer["data_version"], num_rows)
        except _NO_FOOTER as error:
            raise StorageError(
                f"{self.url(*parts)}: cannot be read as a table ({error}); materialise it anew"
            ) from error

    def table_version(self, name: str, *partition: str) -> str | None:
        """Data version of a stored table, by its footer alone; None where there is none, or none that can be read."""
        try:
            return self.read_footer(name, *partition).data_version
        except StorageError:
            return None

    def has_table(self, name: str, *partition: str) -> bool:
        """Whether the partition of the table is stored."""
        return self.exists(*_table_path(name, partition))

    def table_url(self, name: str, *partition: str) -> str:
        """Where the partition of the table lies."""
        return self.url(*_table_path(name, partition))

    def batches_with(self, name: str) -> list[str]:
        """The batches that have a table, by name."""
        folder = self.path(name)
        if not self._fs.exists(folder):
            return []
        batches = sorted(path.rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False))
        return [batch for batch in batches if self.exists(name, batch, _TABLE_FILE)]

    # --- rows ----------------------------------------------------------------------------------------------------

    def find_in_table(
        self, where: Where, name: str, *partition: str, columns: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Rows of a stored table, without reading the others: quick where it is sorted by what is asked for.

        Raises:
            StorageError: the table is missing, or torn.
        """
        return self.find_in_file(where, *self._stored(name, partition), columns=columns)

    def find_in_file(self, where: Where, *parts: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Rows of any Parquet file under the root, as `find_in_table`."""
        try:
            with self._fs.open(self.path(*parts), "rb") as stream:
                return row_lookup.read_rows(stream, where, columns)
        except (pa.ArrowException, KeyError) as error:
            raise self._unreadable(parts, error) from error

    def _stored(self, name: str, partition: Sequence[str]) -> tuple[str, ...]:
        """Where a table lies, which must be there."""
        parts = _table_path(name, partition)
        if not self.exists(*parts):
            raise StorageError(f"{self.url(*parts)}: not stored yet; materialise {name} first")
        return parts

    def _unreadable(self, parts: Sequence[str], error: Exception) -> StorageError:
        return StorageError(f"{self.url(*parts)}: cannot be read ({error}); make it anew")

    def scan_table(self, name: str, *partition: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Columns of a stored table, some thousand rows at a time.

        Raises:
            StorageError: the table is missing, or torn.
        """
        parts = self._stored(name, partition)
        try:
            with self._fs.open(self.path(*parts), "rb") as stream:
                yield from row_lookup.scan(stream, columns)
        except (pa.ArrowException, KeyError) as error:
            raise self._unreadable(parts, error) from error

    def find_pair_in_table(self, start: str, name: str, *partition: str, most: int | None = None) -> FoundRows:
        """Rows of a table by the first digits of their pair_id: by its index, where that is of the table as it is.

        Args:
            start: the digits.
            name: of the table.
            partition: of the table.
            most: how many rows at most; None: all.

        Raises:
            StorageError: the table is missing, or torn.
        """
        version = self.read_footer(name, *partition).data_version
        parts = _table_path(name, partition)
        return self.find_pair_in_file(start, parts, (*parts[:-1], _INDEX_FILE), version, most)

    def find_pair_in_file(
        self,
        start: str,
        parts: Sequence[str],
        index: Sequence[str],
        version: str,
        most: int | None = None,
        batches: Sequence[str] | None = None,
    ) -> FoundRows:
        """The same of any Parquet file, of that version, and its index; of these batches, or of any."""
        where = row_lookup.of_pair(start)
        of_batch = pl.lit(True) if batches is None else pl.col("batch").is_in(list(batches))
        if self._index_version(*index) != version:
            return FoundRows(self.find_in_file(where, *parts).filter(of_batch)[:most], is_indexed=False)
        keys = self.find_in_file(where, *index).filter(of_batch).select(ROW_KEY)
        found = [self.find_in_file(row_lookup.of_key(key), *parts) for key in keys[:most].rows()]
        return FoundRows(pl.concat(found) if found else pl.DataFrame(), is_indexed=True)

    def write_pair_index(self, rows: pl.DataFrame, version: str, *parts: str) -> None:
        """Write the index of a table of that version, or of another file of ledger rows."""
        self.write_bytes(_parquet_bytes(row_lookup.pair_index(rows), {"data_version": version}), *parts)

    def _index_version(self, *parts: str) -> str | None:
        """The version of the table that an index is of; None: there is no index, or none that can be read."""
        try:
            with self._fs.open(self.path(*parts), "rb") as stream:
                return json.loads((pq.read_metadata(stream).metadata or {})[_FOOTER_KEY.encode()])["data_version"]
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None

    # --- provenance ----------------------------------------------------------------------------------------------

    def write_provenance(self, made_of: Mapping[str, Any], run_id: str) -> str:
        """Keep what makes rows under its hash, once, and beside it that this run made them so; the hash.

        So the id that stands beside a row resolves when the row was long made anew.
        """
        provenance_id = hash_json(made_of)
        if not self.exists("provenance", f"{provenance_id}.json"):
            self.write_json(made_of, "provenance", f"{provenance_id}.json")
        run = {"run_id": run_id, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write_json(run, "provenance", "runs", provenance_id, f"{run_id}.json")
        return provenance_id

    def read_provenance(self, provenance_id: str) -> Provenance:
        """What made the rows that bear the id, as far as it is recorded.

        Raises:
            StorageError: the record is not the one that was written: its hash is the id.
        """
        record, runs = ("provenance", f"{provenance_id}.json"), ("provenance", "runs", provenance_id)
        paths = self._fs.ls(self.path(*runs), detail=False) if self.exists(*runs) else []
        made_of = self.read_json(*record) if self.exists(*record) else None
        if made_of is not None and hash_json(made_of) != provenance_id:
            raise StorageError(
                f"{self.url(*record)}: it was changed since it was written, and nothing it says can be trusted; "
                "restore it from a backup, or remove it: `qaq recurate` writes what stands now"
            )
        made_by = [self.read_json(*runs, path.rsplit("/", 1)[-1]) for path in paths if path.endswith(".json")]
        return Provenance(
            provenance_id,
            made_of,
            sorted(made_by, key=lambda run: run["time"]),
        )

    # --- deliveries --------------------------------------------------------------------------------------------

    def store_delivery(self, batch: str, files: Mapping[str, bytes], limit: int | None = None) -> Delivery:
        """Keep an immutable copy of a delivery; the same content twice is stored once."""
        check_batch_name(batch)
        delivery = Delivery(batch, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}, limit)
        for name, data in files.items():
            copy = ("deliveries", batch, delivery.content_hash, name)
            if not (self.exists(*copy) and self.read_bytes(*copy) == data):  # A damaged copy is written anew.
                self.write_bytes(data, *copy)
        pointer = {"files": delivery.files, "limit": limit}
        self.write_json(pointer, "deliveries", batch, "current.json")
        return delivery

    def has_delivery(self, batch: str) -> bool:
        """Whether the batch was ever delivered."""
        return self.exists("deliveries", check_batch_name(batch), "current.json")

    def current_delivery(self, batch: str) -> Delivery:
        """What the batch was last delivered as. Raises `StorageError` where nothing was."""
        if not self.has_delivery(batch):
            raise StorageError(f"batch {batch!r} was never delivered; register it with `qaq run FILE --batch {batch}`")
        pointer = self.read_json("deliveries", batch, "current.json")
        return Delivery(batch, pointer["files"], pointer["limit"])

    def read_delivery(self, delivery: Delivery) -> dict[str, bytes]:
        """The delivered bytes by file name. Raises `StorageError` where a copy is not what was delivered."""
        check_batch_name(delivery.batch)
        contents = {}
        for name, sha256 in delivery.files.items():
            parts = ("deliveries", delivery.batch, delivery.content_hash, name)
            contents[name] = self.read_bytes(*parts)
            if hashlib.sha256(contents[name]).hexdigest() != sha256:
                raise StorageError(f"{self.url(*parts)}: changed since it was delivered; deliver the batch again")
        return contents

    # --- the order of batches ----------------------------------------------------------------------------------

    def batches_in_order(self) -> list[str]:
        """The batches that were ever screened, the first one first: a batch keeps its place."""
        return self.read_json(*_ORDER) if self.exists(*_ORDER) else []

    def batches_before(self, batch: str) -> list[str]:
        """The batches screened before this one: all, where it has no place yet."""
        known = self.batches_in_order()
        return known[: known.index(batch)] if batch in known else known

    def take_place(self, batch: str) -> None:
        """Give a batch that was screened its place in the order, for good. Call it under a lock."""
        known = self.batches_in_order()
        if batch not in known:
            self.write_json([*known, check_batch_name(batch)], *_ORDER)

    # --- what was found of benchmarks --------------------------------------------------------------------------

    def read_contamination(self, batch: str, key: str) -> pl.DataFrame | None:
        """What was found under that key, or None."""
        parts = ("contamination", check_batch_name(batch), f"{key}.parquet")
        if not self.exists(*parts):
            return None
        try:
            return tables.enforce(tables.Contamination, _read_parquet(self.read_bytes(*parts)))
        except (*_UNREADABLE, tables.TableError) as error:
            logger.warning("%s: cannot be read (%s); the batch is checked again", self.url(*parts), error)
            return None

    def write_contamination(self, found: pl.DataFrame, batch: str, key: str) -> None:
        """Keep what was found, so that a longer list of benchmarks is checked for the new ones only."""
        frame = tables.enforce(tables.Contamination, found)
        self.write_bytes(_parquet_bytes(frame, {}), "contamination", check_batch_name(batch), f"{key}.parquet")

    # --- cached scores -----------------------------------------------------------------------------------------

    def read_scores(self, identity: ScoreIdentity, pair_ids: pl.Series) -> pl.DataFrame:
        """Every cached score of the pairs under the identity, once for each number of tokens, as `CachedScores`.

        Of a score that two writers cached, the lower sum counts, whatever the shards are named. A file that is no
        shard, torn or changed is set aside with a warning and never read: its pairs are scored again.
        """
        return self.read_scores_by_scorer(identity, pair_ids).drop("scored_with")

    def read_scores_by_scorer(self, identity: ScoreIdentity, pair_ids: pl.Series) -> pl.DataFrame:
        """The same with a column `scored_with`: the libraries and the device that scored it, as JSON."""
        key = [*tables.CachedScores.primary_key(), "num_tokens"]
        wanted = pl.col("pair_id").is_in(pair_ids.implode())
        shards = [shard.filter(wanted) for shard in map(self._shard_or_aside, self._shards(identity.digest()))]
        scores = pl.concat([_labelled(empty(tables.CachedScores), UNKNOWN_SCORER), *shards])
        order = [*key, "sum_nll", "scored_with"]
        return scores.sort(order, nulls_last=True).unique(key, keep="first", maintain_order=True)

    def append_scores(
        self, identity: ScoreIdentity, scores: pl.DataFrame, scored_with: Mapping[str, Any] | None = None
    ) -> None:
        """Add a shard of scores to the cache, under the hash of its bytes: an equal one is the same file.

        Shards are never changed, so writers cannot disturb each other.

        Args:
            identity: whose scores they are.
            scores: as `CachedScores`.
            scored_with: the libraries and the device that scored them; None: not known.
        """
        folder = ("score_cache", identity.digest())
        if not self.exists(*folder, "identity.json"):
            fields = {name: getattr(identity, name) for name in identity.__dataclass_fields__}
            self.write_json(fields, *folder, "identity.json")
        frame = tables.enforce(tables.CachedScores, scores)
        footer = {"data_version": StoredTable(frame).data_version, "scored_with": scored_with or UNKNOWN_SCORER}
        data = _parquet_bytes(frame, footer)
        self.write_bytes(data, *folder, f"{hashlib.sha256(data).hexdigest()}.parquet")

    def count_hits(self, identity: ScoreIdentity, number: int) -> None:
        """Add to the count of scores that runs have taken from the cache."""
        parts = ("score_cache", identity.digest(), "hits.json")
        # A statistic: no scoring fails for it.
        with contextlib.suppress(PartitionBusyError), self.lock("score_cache", identity.digest()):
            before = self.read_json(*parts) if self.exists(*parts) else 0
            self.write_json(before + number, *parts)

    def cached_models(self) -> list[CachedModel]:
        """What the score cache holds, by model."""
        folder = self.path("score_cache")
        digests = (
            [path.rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False)]
            if self.exists("score_cache")
            else []
        )
        found = [
            self._cached_model(digest) for digest in digests if self.exists("score_cache", digest, "identity.json")
        ]
        return sorted(found, key=lambda cached: (cached.identity["model"], cached.digest))

    def prune_scores(self, digest: str) -> None:
        """Remove what the score cache holds under an identity."""
        doomed = self.path("score_cache", f".{uuid.uuid4().hex}.pruned")
        with self.lock("score_cache", digest):
            # Out of the way in one step: a shard that is being written goes with it, or starts the folder anew.
            self._fs.mv(self.path("score_cache", digest), doomed, recursive=True)
        self._fs.rm(doomed, recursive=True)

    def _cached_model(self, digest: str) -> CachedModel:
        folder, aside = ("score_cache", digest), self.path("score_cache", digest, "set_aside")
        contents = [self._fs.cat_file(path) for path in self._shards(digest)]
        return CachedModel(
            digest=digest,
            identity=self.read_json(*folder, "identity.json"),
            num_shards=len(contents),
            num_set_aside=len(self._fs.ls(aside, detail=False)) if self._fs.exists(aside) else 0,
            num_scores=sum(_num_rows(data) for data in contents),
            num_bytes=sum(map(len, contents)),
            num_hits=self.read_json(*folder, "hits.json") if self.exists(*folder, "hits.json") else 0,
        )

    def _shards(self, digest: str) -> list[str]:
        folder = self.path("score_cache", digest)
        if not self._fs.exists(folder):
            return []
        return sorted(path for path in self._fs.ls(folder, detail=False) if path.endswith(".parquet"))

    def _shard_or_aside(self, path: str) -> pl.DataFrame:
        """The shard; no scores where the file is none, which is set aside, or is gone since it was listed."""
        try:
            data = self._fs.cat_file(path)
        except FileNotFoundError:
            return _labelled(empty(tables.CachedScores), UNKNOWN_SCORER)
        try:
            return _read_shard(data)
        except _NO_SHARD as error:
            logger.warning("%s: no shard of scores (%s); set aside, its pairs are scored again", path, error)
        folder, name = path.rsplit("/", 1)
        self._fs.makedirs(f"{folder}/set_aside", exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # Another reader was faster.
            self._fs.mv(path, f"{folder}/set_aside/{name}")
        return _labelled(empty(tables.CachedScores), UNKNOWN_SCORER)

    # --- locks -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, name: str, *partition: str, waits: bool = False) -> Iterator[None]:
        """Hold a partition, so that the driver and the daemon never write the same one at once.

        The kernel frees the lock when its holder dies. It may be taken again by its holder. With `waits`, there is no
        time-out: for what another holds as a matter of course, and not by mistake.

        Raises:
            PartitionBusyError: another process holds it for longer than the time-out.
        """
        for part in partition:
            check_batch_name(part)
        self._lock_directory.mkdir(parents=True, exist_ok=True)
        label = "/".join((name, *partition))
        file = self._lock_directory / ("__".join((name, *partition)) + ".lock")
        try:
            with FileLock(file, is_singleton=True).acquire(timeout=-1 if waits else self._lock_timeout):
                yield
        except Timeout as error:
            raise PartitionBusyError(
                f"{label} is being written by another process (lock {file}); wait for it to end, then run again"
            ) from error


def _table_path(name: str, partition: Sequence[str]) -> tuple[str, ...]:
    if name not in PIPELINE.tables():
        raise StorageError(f"{name!r} is no table; known: {', '.join(PIPELINE.tables())}")
    for part in partition:
        check_batch_name(part)
    return (name, *partition, _TABLE_FILE)


def _parquet_bytes(frame: pl.DataFrame, footer: Mapping[str, Any]) -> bytes:
    """The frame as a Parquet file. A footer that is not empty holds the hash of the whole file beside what is given."""
    buffer = io.BytesIO()
    metadata = {_FOOTER_KEY: json.dumps({**footer, _FILE_HASH: _NO_HASH}, sort_keys=True)} if footer else None
    rows = row_lookup.rows_per_group(frame.height)
    frame.rechunk().write_parquet(buffer, compression="zstd", row_group_size=rows, metadata=metadata)
    data = buffer.getvalue()
    if metadata is None:
        return data
    mark = f'"{_FILE_HASH}": "'.encode()
    before, _, after = data.rpartition(mark + _NO_HASH.encode())
    return b"".join([before, mark, _hash(data).encode(), after])


def file_fault(data: bytes) -> str | None:
    """Whether a stored table, or a shard of scores, was changed since it was written, be it by one byte; in words.

    Of a file that was written before files held their own hash, the columns alone can be compared.
    """
    try:
        footer = _footer(io.BytesIO(data))[0]
        version, file_hash = footer["data_version"], footer.get(_FILE_HASH)
    except _NO_FOOTER as error:
        return f"it cannot be read ({error})"
    is_known = footer.keys() <= {"provenance", "data_version", "scored_with", _FILE_HASH}
    is_whole = file_hash is None or _hash_but_for(data, file_hash) == file_hash
    return None if is_known and is_whole and _hash_body(data) == version else "it was changed since it was written"


def _footer(stream: Any) -> tuple[dict[str, Any], int]:
    """What the pipeline wrote into the footer of a Parquet file, and the number of rows. Raises `_NO_FOOTER`."""
    metadata = pq.read_metadata(stream)
    return json.loads((metadata.metadata or {})[_FOOTER_KEY.encode()]), metadata.num_rows


def _hash_but_for(data: bytes, file_hash: str) -> str | None:
    """Hash of a file in which its own hash is zeros; None where it does not hold it."""
    start = data.rfind(file_hash.encode())
    view = memoryview(data)
    return None if start < 0 else _hash(view[:start], _NO_HASH.encode(), view[start + len(file_hash) :])


def _hash(*parts: bytes | memoryview) -> str:
    """Hash of bytes (32 hex digits), in parts."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def _read_parquet(data: bytes) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(data), glob=False)


def _read_shard(data: bytes) -> pl.DataFrame:
    """A shard of scores, as it was written, labelled. Raises what Polars does, or ValueError, where it is none."""
    footer = json.loads(pl.read_parquet_metadata(io.BytesIO(data))[_FOOTER_KEY])
    if _hash_body(data) != footer["data_version"]:
        raise ValueError("it was changed since it was written")
    columns = tables.dtypes(tables.CachedScores)
    # Its rows were checked when it was written, and there may be thousands of shards.
    frame = _read_parquet(data).select(list(columns))  # Columns that are not read may stand beside these.
    if dict(frame.schema) != columns:
        raise ValueError("it was written by another version")
    return _labelled(frame, footer.get("scored_with", UNKNOWN_SCORER))


def _labelled(scores: pl.DataFrame, scored_with: Mapping[str, Any]) -> pl.DataFrame:
    return scores.with_columns(scored_with=pl.lit(json.dumps(scored_with, sort_keys=True)))


def _num_rows(data: bytes) -> int:
    """Rows of a shard; 0 where it is none."""
    try:
        return _read_shard(data).height
    except _NO_SHARD:
        return 0


def _hash_body(parquet: bytes) -> str:
    """Hash of a Parquet file less its footer, which names its writer: of the columns' bytes (32 hex digits)."""
    # A Parquet file ends: …columns | footer | length of the footer, 4 bytes little-endian | PAR1
    footer_bytes = int.from_bytes(parquet[-_FOOTER_TAIL_BYTES:-4], "little")
    return _hash(parquet[: -(footer_bytes + _FOOTER_TAIL_BYTES)])


def empty(table: type[dy.Schema]) -> pl.DataFrame:
    """A frame of the table with no row."""
    return pl.DataFrame(schema=tables.dtypes(table))
