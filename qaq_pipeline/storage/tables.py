"""Stored tables: schema-checked frames with their provenance in the file's footer.

Belongs here: writing, reading and searching the tables of the pipeline. Does not belong here: what they mean
(`schema.tables`), or which there are (`pipeline`).

    <table>/<batch>[/<model>]/table.parquet
    decisions/<batch>/pair_index.parquet      from pair_ids to keys, for one version of the table
    rank_reference/<name>/table.parquet
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import dataframely as dy
import polars as pl
import pyarrow as pa

from qaq_pipeline.pipeline import PIPELINE, Pipeline
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import Decisions, dtypes, enforce
from qaq_pipeline.storage import parquet_file, row_lookup
from qaq_pipeline.storage.files import Files, Place, StorageError
from qaq_pipeline.storage.ordered_rows import OrderedRows
from qaq_pipeline.storage.parquet_file import Writer
from qaq_pipeline.storage.row_lookup import Where
from qaq_pipeline.storage.stored_table import RowsFile, StoredTable, TableWriter

_TABLE_FILE = "table.parquet"
_INDEX_FILE = "pair_index.parquet"
_INDEXED = ("decisions",)
_DELIVERED = "raw_data"
"""The table that every batch has."""
_NO_ROWS = (pa.ArrowException, KeyError, FileNotFoundError)
_WHOLE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Footer:
    """Provenance of a stored table, the hash of its content, and its size."""

    provenance: dict[str, Any]
    data_version: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class FoundRows:
    """Rows that were looked for."""

    frame: pl.DataFrame
    is_indexed: bool
    """Whether an index led to them; else every row group was read."""


class Tables:
    """The stored tables.

    Args:
        files: the root of the storage.
        pipeline: the tables and their schemas.
    """

    def __init__(self, files: Files, pipeline: Pipeline = PIPELINE) -> None:
        self._files = files
        self._pipeline = pipeline

    def write(self, table: StoredTable, name: str, partition: Partition) -> None:
        """Write a table of the pipeline, with its provenance in the footer. Its rows are then read from the file.

        Raises:
            TableError: the frame does not fit its schema; nothing is written.
        """
        place, made = self._place(name, partition), table.file
        if made is None:
            frame = enforce(self._pipeline[name].table, table.frame)
            footer = {"provenance": table.provenance, "data_version": table.data_version}
            with self._files.writing(*place) as stream:
                writer = Writer(stream, frame.schema)
                writer.append(frame)
                writer.close(footer)
        else:
            self._files.put(made.local, *place)
        table.is_stored_in(RowsFile(partial(self._files.local, *place), table.data_version, table.num_rows))
        if name in _INDEXED:
            keys = table.parts("pair_id", *ROW_KEY)
            self.write_pair_index(keys, table.data_version, *self._folder(name, partition), _INDEX_FILE)

    def begin(self, name: str, partition: Partition) -> TableWriter:
        """Begin a table that is made part by part; `write` then stores it."""
        return TableWriter(name, self._pipeline[name].table, self._files.unfinished(*self._place(name, partition)))

    def read(self, name: str, partition: Partition) -> StoredTable:
        """A table and its provenance. Its rows are read when they are asked for.

        Raises:
            StorageError: it is missing, torn, changed since it was written, or has other columns.
        """
        parts = self._existing(name, partition)
        with self._reading(parts, parquet_file.UNREADABLE):
            local = self._files.local(*parts)
            with local.path.open("rb") as stream:
                footer, num_rows = parquet_file.read_footer(stream)
                provenance, version = footer["provenance"], footer["data_version"]
                columns, fault = pl.read_parquet_schema(local.path), parquet_file.file_fault(stream)
        if columns != dtypes(self._pipeline[name].table):
            fault = f"it has other columns than {name} has now; `qaq refresh` makes it again"
            raise StorageError(f"{self._files.url(*parts)}: {fault}")
        if fault is not None:
            raise StorageError(f"{self._files.url(*parts)}: {fault}; {_AGAIN}")
        return StoredTable(RowsFile(lambda: local, version, num_rows), provenance)

    def footer(self, name: str, partition: Partition) -> Footer:
        """Provenance, data version and number of rows of a stored table, without its rows.

        Raises:
            StorageError: it is missing, or torn.
        """
        parts = self._existing(name, partition)
        with self._reading(parts, parquet_file.UNREADABLE), self._files.open(*parts) as stream:
            footer, num_rows = parquet_file.read_footer(stream)
            return Footer(footer["provenance"], footer["data_version"], num_rows)

    def readable_footer(self, name: str, partition: Partition) -> Footer | None:
        """The footer of a stored table; None where the table is missing or cannot be read."""
        try:
            return self.footer(name, partition)
        except StorageError:
            return None

    def version(self, name: str, partition: Partition) -> str | None:
        """Data version of a stored table, from its footer alone; None where it is missing or cannot be read."""
        footer = self.readable_footer(name, partition)
        return None if footer is None else footer.data_version

    def fault(self, name: str, partition: Partition) -> str | None:
        """The fault of a stored table of which any byte was changed, as a sentence; None: no fault.

        Raises:
            StorageError: it is missing.
        """
        local = self._files.local(*self._place(name, partition))
        with local.path.open("rb") as stream:
            return parquet_file.file_fault(stream)

    def has(self, name: str, partition: Partition) -> bool:
        """Whether the partition of the table is stored."""
        return self._files.exists(*self._place(name, partition))

    def url(self, name: str, partition: Partition) -> str:
        """URL of the partition of the table."""
        return self._files.url(*self._place(name, partition))

    def batches_with(self, name: str) -> list[str]:
        """Names of the batches that have a table of one partition per batch."""
        return [batch for batch in self._files.names(name) if self._files.exists(name, batch, _TABLE_FILE)]

    # --- rows ----------------------------------------------------------------------------------------------------

    def find(self, where: Where, name: str, partition: Partition, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Rows of a stored table, without reading the others: quick where it is sorted by the columns of `where`.

        Raises:
            StorageError: the table is missing, or torn.
        """
        return self.find_in_file(where, *self._existing(name, partition), columns=columns)

    def find_in_file(self, where: Where, *parts: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Rows of any Parquet file under the root, as `find`."""
        with self._reading(parts, _NO_ROWS), self._files.open(*parts) as stream:
            return row_lookup.read_rows(stream, where, columns)

    def scan(
        self, name: str, partition: Partition, columns: Sequence[str], begins: Mapping[str, int] = _WHOLE
    ) -> Iterator[pl.DataFrame]:
        """Columns of a stored table, some thousand rows at a time.

        Args:
            name: of the table.
            partition: of the table.
            columns: names.
            begins: how many characters of a text column are wanted; a column that is not named: all.

        Raises:
            StorageError: the table is missing, or torn.
        """
        yield from self.scan_file(columns, *self._existing(name, partition), begins=begins)

    def scan_file(
        self, columns: Sequence[str], *parts: str, begins: Mapping[str, int] = _WHOLE
    ) -> Iterator[pl.DataFrame]:
        """Columns of any Parquet file under the root, as `scan`."""
        with self._reading(parts, _NO_ROWS), self._files.open(*parts) as stream:
            yield from row_lookup.scan(stream, columns, begins)

    def columns_of_file(self, *parts: str) -> list[str]:
        """Names of the columns of any Parquet file under the root. Raises `StorageError` as `find`."""
        with self._reading(parts, _NO_ROWS), self._files.open(*parts) as stream:
            return row_lookup.columns(stream)

    def find_pair(self, start: str, most: int, name: str, partition: Partition) -> FoundRows:
        """Rows of a table by the first digits of their pair_id, through its index where the index is current.

        Args:
            start: the digits.
            most: how many rows at most.
            name: of the table.
            partition: of the table.

        Raises:
            StorageError: the table is missing, or torn.
        """
        place, index = self._place(name, partition), (*self._folder(name, partition), _INDEX_FILE)
        version = self.footer(name, partition).data_version
        return self.find_pair_in_files(start, most, {partition.batch: place}, index, version)

    def find_pair_in_files(
        self, start: str, most: int, files: Mapping[str, Place], index: Place, version: str
    ) -> FoundRows:
        """The same for any Parquet files, each with the rows of a batch, through their index of that version."""
        where = row_lookup.of_pair(start)
        if is_indexed := self._index_version(*index) == version:
            keys = self.find_in_file(where, *index).filter(pl.col("batch").is_in(list(files))).select(ROW_KEY)
            found = [self.find_in_file(row_lookup.of_key(key), *files[key[0]]) for key in keys[:most].rows()]
        else:
            found = [self.find_in_file(where, *file) for file in files.values()]
        return FoundRows(pl.concat(found)[:most] if found else pl.DataFrame(), is_indexed)

    def write_pair_index(self, rows: Iterable[pl.DataFrame], version: str, *parts: str) -> None:
        """Write the index of a table of that version, or of other files of decided rows.

        Args:
            rows: with key and pair_id, some thousand at a time: they are not in memory together.
            version: of the table, or of the files.
            parts: of the place of the index.
        """
        ordered = OrderedRows(self._files, parts[:-1], then_by=ROW_KEY)
        nothing = row_lookup.indexed(empty(Decisions))
        ordered.append(nothing)
        for some in rows:
            ordered.append(row_lookup.indexed(some))
        with self._files.writing(*parts) as stream:
            writer = Writer(stream, nothing.schema)
            for some in ordered.parts():
                writer.append(some)
            writer.close({"data_version": version})

    def _index_version(self, *parts: str) -> str | None:
        """The version of the table that an index is of; None where there is no index, or it cannot be read."""
        try:
            with self._files.open(*parts) as stream:
                return parquet_file.read_footer(stream)[0]["data_version"]
        except parquet_file.UNREADABLE:
            return None

    # --- places --------------------------------------------------------------------------------------------------

    def _folder(self, name: str, partition: Partition) -> tuple[str, ...]:
        known = self._pipeline.tables()
        if name not in known:
            raise StorageError(f"{name!r} is no table; known: {', '.join(known)}")
        return (name, *partition.parts)

    def _place(self, name: str, partition: Partition) -> tuple[str, ...]:
        return (*self._folder(name, partition), _TABLE_FILE)

    def _existing(self, name: str, partition: Partition) -> tuple[str, ...]:
        """The place of a table that must be there."""
        parts, batch = self._place(name, partition), partition.batch
        if self._files.exists(*parts):
            return parts
        if name in self._pipeline.tables_of_batch() and not self._files.exists(_DELIVERED, batch, _TABLE_FILE):
            raise StorageError(
                f"nothing of a batch {batch!r} is stored in {self._files.url()}; `qaq status` lists the batches, "
                f"`qaq run FILE --batch {batch}` makes it (in the UI, materialise {_DELIVERED} first)"
            )
        raise StorageError(f"{self._files.url(*parts)}: not stored yet; `qaq run` makes it (the asset {name})")

    @contextlib.contextmanager
    def _reading(self, parts: Place, damage: tuple[type[Exception], ...]) -> Iterator[None]:
        """Raise these errors as `StorageError`, with the file and the remedy."""
        try:
            yield
        except damage as error:
            raise StorageError(f"{self._files.url(*parts)}: {parquet_file.unreadable(error)}; {_AGAIN}") from error


_AGAIN = "restore it from a backup, or remove it and run `qaq refresh`, which makes it again"


def empty(table: type[dy.Schema]) -> pl.DataFrame:
    """A frame of the table with no row."""
    return pl.DataFrame(schema=dtypes(table))
