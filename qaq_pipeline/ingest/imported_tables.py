"""Imported tables: files of the user with facts about pairs, such as test results, judge scores or licences.

Belongs here: reading and hashing them. Does not belong here: which pair has which value (`selection.grammar`).

The format is detected from the content: gzip around any of the others; Parquet; JSONL (the first character is `{`);
else CSV. Every value is kept as text, so that no format changes what a condition means.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
from polars.exceptions import PolarsError

from qaq_pipeline.config.settings import TableSettings
from qaq_pipeline.ingest.records import field_of
from qaq_pipeline.storage.files import StorageError, read_url

KEY = "key"
"""Column of a read table that names the pair or the row."""

_FORM_OF_KEY = {"pair_id": r"^[0-9a-f]{32}$", "row": r"^[^/]+/.+:\d+\.\d+$"}
_SHOWN_FORM = {"pair_id": "32 hexadecimal digits", "row": "batch/file:row.turn"}


class ImportedTableError(ValueError):
    """An imported table cannot be used. The text names the table, the fault, its place and the remedy."""


@dataclass(frozen=True, slots=True)
class ImportedTable:
    """The columns of a file that selections name."""

    key: str
    """The column that named the pairs: `pair_id` or `row`."""
    sha256: str
    rows: pl.DataFrame
    """`key`, and each column as text."""


def read_tables(tables: Sequence[TableSettings], named: Mapping[str, Sequence[str]]) -> dict[str, ImportedTable]:
    """The named columns of each table. Raises `ImportedTableError`."""
    return {table.name: load_table(table, named[table.name]) for table in tables}


def load_table(table: TableSettings, columns: Sequence[str]) -> ImportedTable:
    """Load the columns of the table at a local path or fsspec URL. Raises `ImportedTableError`."""
    data = _read(table)
    try:
        content = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        rows = _parse(content.removeprefix(codecs.BOM_UTF8), table, [table.key, *columns])
    except ImportedTableError:
        raise
    except (PolarsError, ValueError, OSError, EOFError, zlib.error) as error:
        raise _error(table, f"cannot be read ({error}); expected Parquet, CSV or JSONL") from error
    _require_keys(rows[table.key], table)
    return ImportedTable(table.key, hashlib.sha256(data).hexdigest(), rows.rename({table.key: KEY}))


def _error(table: TableSettings, what: str) -> ImportedTableError:
    return ImportedTableError(f"table {table.name}, {table.path}: {what}")


def _read(table: TableSettings) -> bytes:
    try:
        return read_url(table.path)
    except StorageError as error:
        raise _error(table, f"cannot be opened ({error}); check tables[].path") from error


def _parse(data: bytes, table: TableSettings, columns: Sequence[str]) -> pl.DataFrame:
    if data.startswith(b"PAR1"):
        _require_columns(columns, pl.read_parquet_schema(io.BytesIO(data)), table)
        return _as_text(pl.read_parquet(io.BytesIO(data), columns=list(columns)), table)
    if data.lstrip().startswith(b"{"):
        return _parse_lines(data.decode().split("\n"), table, columns)
    lines = data.rstrip(b"\r\n")
    _require_columns(columns, pl.read_csv(io.BytesIO(lines), infer_schema=False, n_rows=0).columns, table)
    return pl.read_csv(io.BytesIO(lines), infer_schema=False, columns=list(columns))


def _as_text(frame: pl.DataFrame, table: TableSettings) -> pl.DataFrame:
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested() or dtype == pl.Binary]
    if nested:
        dtype = frame.schema[nested[0]]
        raise _error(table, f"column {nested[0]} is {dtype}; write it as text, numbers or true and false")
    return frame.select(pl.all().cast(pl.String))


def _parse_lines(lines: Sequence[str], table: TableSettings, columns: Sequence[str]) -> pl.DataFrame:
    texts = pl.Series([line for line in lines if line.strip()], dtype=pl.String)
    frame = pl.DataFrame({"line": texts}).select(field_of(pl.col("line"), name).alias(name) for name in columns)
    if any(frame[name].null_count() == frame.height for name in columns):
        records = (record for line in texts if isinstance(record := json.loads(line), dict))
        _require_columns(columns, {name for record in records for name in record}, table)
    return frame


def _require_columns(columns: Sequence[str], known: Iterable[str], table: TableSettings) -> None:
    names = set(known)
    for column in columns:
        if column not in names:
            where = f"the key (tables[].key is {column})" if column == table.key else f"{table.name}.{column}"
            raise _error(table, f"there is no column {column} for {where}; it has {', '.join(sorted(names))}")


def _require_keys(keys: pl.Series, table: TableSettings) -> None:
    """Reject a key that is missing, malformed or repeated, by the number of its row, from 1."""
    bad = (~keys.str.contains(_FORM_OF_KEY[table.key]).fill_null(value=False)).arg_true()
    if len(bad):
        row = bad[0]
        raise _error(table, f"row {row + 1}: {table.key} is {keys[row]!r}, not {_SHOWN_FORM[table.key]}; correct it")
    again = (~keys.is_first_distinct()).arg_true()
    if len(again):
        row = again[0]
        first = keys.index_of(keys[row])
        raise _error(
            table, f"rows {(first or 0) + 1} and {row + 1} both have {table.key} {keys[row]}; keep one row of each"
        )
