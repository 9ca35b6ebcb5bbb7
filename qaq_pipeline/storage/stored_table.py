"""A table and its provenance, whose rows are in memory or in a file, and a table that is made part by part.

Belongs here: reading columns, and rows in parts. Does not belong here: where tables are stored (`tables`), and the
bytes of a file (`parquet_file`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import dataframely as dy
import polars as pl

from qaq_pipeline.schema.tables import TableError, dtypes, enforce
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.files import LocalFile, StorageError, hash_json
from qaq_pipeline.storage.parquet_file import Writer


class RowsFile:
    """The rows of a table in a file.

    Args:
        locate: returns the file; it is called when rows are read.
        version: the table's data version.
        num_rows: of the table.
    """

    def __init__(self, locate: Callable[[], LocalFile], version: str, num_rows: int) -> None:
        self._locate = locate
        self.version, self.num_rows = version, num_rows

    def read(self, columns: list[str] | None) -> pl.DataFrame:
        """These columns of all rows, in this order; None: all. Raises StorageError where another file is there now."""
        return pl.read_parquet(self._path(), columns=columns, glob=False)

    def parts(self, columns: list[str] | None) -> Iterator[pl.DataFrame]:
        """The same, some thousand rows at a time."""
        rows = pl.scan_parquet(self._path(), glob=False)
        wanted = rows if columns is None else rows.select(columns)
        for start in range(0, self.num_rows, parquet_file.ROWS_PER_GROUP):
            yield wanted.slice(start, parquet_file.ROWS_PER_GROUP).collect()

    @cached_property
    def local(self) -> LocalFile:
        """The file itself."""
        return self._locate()

    def _path(self) -> Path:
        path = self.local.path
        with path.open("rb") as stream:
            found = parquet_file.read_footer(stream)[0]["data_version"]
        if found != self.version:
            raise StorageError(f"{path}: it was replaced while it was read; run again")
        return path


class StoredTable:
    """Rows and their provenance: inputs with their versions, settings hash, code version, model identity.

    Args:
        rows: in memory, or in a file, from which they are read each time that they are asked for.
        provenance: of the table.
        stored_version: the data version under which rows in memory were stored; None: that of their bytes.
    """

    def __init__(
        self,
        rows: pl.DataFrame | RowsFile,
        provenance: Mapping[str, Any] | None = None,
        stored_version: str | None = None,
    ) -> None:
        self._rows = rows
        self.provenance = dict(provenance or {})
        self.stored_version = rows.version if isinstance(rows, RowsFile) else stored_version
        """The data version under which it was stored: a newer Parquet writer must not change it. None: not stored."""

    @property
    def frame(self) -> pl.DataFrame:
        """All rows and columns. Of a large table, read the columns that are needed, or parts."""
        return self._rows if isinstance(self._rows, pl.DataFrame) else self._rows.read(None)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self._rows.height if isinstance(self._rows, pl.DataFrame) else self._rows.num_rows

    def select(self, *columns: str) -> pl.DataFrame:
        """These columns of all rows, in this order."""
        return self._rows.select(columns) if isinstance(self._rows, pl.DataFrame) else self._rows.read(list(columns))

    def parts(self, *columns: str) -> Iterator[pl.DataFrame]:
        """These columns, or all if none is named, at most `ROWS_PER_GROUP` rows at a time."""
        if isinstance(self._rows, RowsFile):
            yield from self._rows.parts(list(columns) or None)
        else:
            yield from self._rows.select(columns or pl.all()).iter_slices(parquet_file.ROWS_PER_GROUP)

    @cached_property
    def data_version(self) -> str:
        """Hash of the content alone (32 hex digits): equal content has equal versions, whenever it was made."""
        return self.stored_version or parquet_file.hash_rows(self.frame)

    @cached_property
    def provenance_id(self) -> str:
        """Hash of the provenance (32 hex digits); it has no run id and no time."""
        return hash_json(self.provenance)

    @property
    def file(self) -> RowsFile | None:
        """The file of the rows; None: they are in memory."""
        return self._rows if isinstance(self._rows, RowsFile) else None

    def is_stored_in(self, file: RowsFile) -> None:
        """Free the memory of the rows: they are read from this file from now on."""
        self.stored_version = self.data_version
        self._rows = file


class TableWriter:
    """A table that is made part by part, in key order. Its rows are in a file until the table is stored.

    Leaving its context without `finish` removes the file.

    Args:
        name: of the table.
        schema: of the table.
        file: that is written.
    """

    def __init__(self, name: str, schema: type[dy.Schema], file: LocalFile) -> None:
        self._name, self._schema, self._file = name, schema, file
        self._key = schema.primary_key()
        self._last: tuple[Any, ...] | None = None
        self._stream = file.path.open("w+b")
        self._writer = Writer(self._stream, dtypes(schema))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._stream.closed:
            self._writer.close({})
            self._stream.close()
            self._file.path.unlink(missing_ok=True)

    def append(self, rows: pl.DataFrame) -> None:
        """Write rows that come after those before.

        Raises:
            TableError: they do not fit the schema, or their keys do not grow.
        """
        try:
            checked = enforce(self._schema, rows)
            self._require_order(checked)
        except TableError as error:
            raise TableError(f"{self._name}: {error}; nothing was written") from error
        self._writer.append(checked)

    @property
    def num_rows(self) -> int:
        """Number of rows so far."""
        return self._writer.num_rows

    def finish(self, provenance: Mapping[str, Any]) -> StoredTable:
        """End the file, and return the table."""
        version = self._writer.end()
        self._writer.close({"provenance": dict(provenance), "data_version": version})
        self._stream.close()
        file, num_rows = self._file, self._writer.num_rows
        return StoredTable(RowsFile(lambda: file, version, num_rows), provenance)

    def _require_order(self, rows: pl.DataFrame) -> None:
        """Keys that grow are also unique, whatever the number of parts."""
        if rows.is_empty():
            return
        keys = rows.select(pl.struct(self._key)).to_series()
        first, last = (tuple(keys[place].values()) for place in (0, -1))
        is_sorted = keys.is_sorted()  # `enforce` has found each key once.
        if not is_sorted or (self._last is not None and first <= self._last):
            name = self._schema.__name__
            raise TableError(f"{name}: the rows are not in the order of {', '.join(self._key)}, or not unique")
        self._last = last


def parts_of_both(
    one: StoredTable, columns: Sequence[str], other: StoredTable, of_other: Sequence[str], key: Sequence[str]
) -> Iterator[pl.DataFrame]:
    """Columns of two tables that have the same rows in the same order, some thousand rows at a time.

    Args:
        one: a table.
        columns: of it.
        other: the other table.
        of_other: columns of that one, of other names.
        key: columns that both have; they are given once.

    Raises:
        StorageError: the tables do not have the same rows.
    """
    parts = zip_longest(one.parts(*key, *columns), other.parts(*key, *of_other))
    for part, of_rows in parts:
        if part is None or of_rows is None or not part.select(key).equals(of_rows.select(key)):
            raise StorageError(f"two tables have not the same rows in the same order (by {', '.join(key)})")
        yield pl.concat([part, of_rows.drop(key)], how="horizontal")


def with_own_bytes(rows: pl.DataFrame) -> pl.DataFrame:
    """The same rows with copies of their texts: rows that were selected keep the texts of all others in memory."""
    return pl.DataFrame(rows.to_arrow(compat_level=pl.CompatLevel.oldest()), schema=rows.schema)
