"""Lookup of rows in a Parquet file without reading the others, and parsing of row references.

Belongs here: conditions on rows, pruning of row groups by statistics, and the index from pair_ids to keys.
Does not belong here: file locations (`storage`), and explanations of a row.

In a file sorted by key, the minimum and maximum of each row group leave one or two groups to read. A pair_id is a
hash and can be anywhere, so an index beside the file, sorted by pair_id, maps it to the keys.

pyarrow's datasets are not used: importing them takes longer than finding the row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import polars as pl
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qaq_pipeline.schema.row_place import RECORD_KEY, ROW_KEY

Condition = tuple[str, Literal["==", ">=", "<"], Any]
"""Column, comparison and value."""
Where = Sequence[Condition]
"""Conditions that must all hold; empty: every row."""

SHORTEST_KEY = 6
"""Minimum number of leading digits to look up a pair_id."""

_AFTER_HEX = "g"
_LARGEST_ROW = 2**63 - 1

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {"==": operator.eq, ">=": operator.ge, "<": operator.lt}


# --- row references --------------------------------------------------------------------------------------------------


def meant(row: str) -> list[Where]:
    """Parse a row reference: a row number, file:row, file:row.turn, or the first digits of a pair_id.

    The first result that finds rows counts. A whole number can also be the beginning of a pair_id.
    """
    file, _, position = row.rpartition(":")
    number, _, turn = position.partition(".")
    if file and _is_row(number):
        of_turn: list[Condition] = [("turn_index", "==", int(turn))] if _is_row(turn) else []
        return [[("source_file", "==", file), ("source_row", "==", int(number)), *of_turn]]
    of_number: list[Where] = [[("source_row", "==", int(row))]] if _is_row(row) else []
    return [*of_number, of_pair(row)] if is_pair(row) else of_number


def meant_in(batch: str, row: str) -> list[Where]:
    """Parse a row reference with an optional batch name: BATCH/FILE:ROW. The full text is tried first."""
    return meant(row) + (meant(row.removeprefix(f"{batch}/")) if row.startswith(f"{batch}/") else [])


def _is_row(text: str) -> bool:
    return text.isdecimal() and int(text) <= _LARGEST_ROW


def is_pair(text: str) -> bool:
    """Return whether the text can be a pair_id or the beginning of one."""
    return SHORTEST_KEY <= len(text) <= 32 and not text.strip("0123456789abcdef")


def of_pair(start: str) -> Where:
    """Return the conditions for rows whose pair_id begins with a text."""
    return [("pair_id", ">=", start), ("pair_id", "<", start + _AFTER_HEX)]


def of_key(key: Sequence[Any]) -> Where:
    """Return the conditions for the row of a key, in the order of `ROW_KEY`."""
    return [(name, "==", value) for name, value in zip(ROW_KEY, key, strict=True)]


def of_record(key: Sequence[Any]) -> Where:
    """Return the conditions for the rows of a record, by its key in the order of `RECORD_KEY`."""
    return [(name, "==", value) for name, value in zip(RECORD_KEY, key, strict=True)]


def find_rows(rows: pl.DataFrame, row: str, batch: str = "") -> pl.DataFrame:
    """Return the rows of a frame that match a row reference, which may begin with the batch name."""
    for where in meant_in(batch, row):
        found = rows.filter(*_expressions(where))
        if not found.is_empty():
            return found
    return rows.clear()


def _expressions(where: Where) -> list[pl.Expr]:
    return [_COMPARE[how](pl.col(name), pl.lit(value)) for name, how, value in where]


# --- files -----------------------------------------------------------------------------------------------------------


def read_rows(stream: BinaryIO, where: Where, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read the rows of a Parquet file for which all conditions hold, in order.

    A row group is read in full only if its statistics allow a match and the columns of the conditions contain one.

    Args:
        stream: the open file.
        where: the conditions.
        columns: the columns to read; those missing from the file are ignored. None: all columns.
    """
    with pq.ParquetFile(stream) as file:
        wanted = [name for name in file.schema_arrow.names if columns is None or name in columns]
        asked = list({name: None for name, _, _ in where})
        holds = pl.all_horizontal(pl.lit(True), *_expressions(where)).fill_null(False)
        found = [pl.DataFrame(file.read_row_groups([], wanted))]
        for group in _groups_left(file.metadata, where):
            is_wanted = pl.DataFrame(file.read_row_group(group, asked)).select(holds).to_series()
            if is_wanted.any():
                found.append(pl.DataFrame(file.read_row_group(group, wanted)).filter(is_wanted))
    return pl.concat(found)


def columns(stream: BinaryIO) -> list[str]:
    """Return the names of the columns of a Parquet file."""
    return list(pq.read_schema(stream).names)


def scan(stream: BinaryIO, columns: Sequence[str], begins: Mapping[str, int]) -> Iterator[pl.DataFrame]:
    """Yield these columns of a Parquet file, one row group at a time; of a file without rows, one part without rows.

    Args:
        stream: the file.
        columns: names.
        begins: how many characters of a text column are wanted. A slice by Polars would keep the whole text in memory.
    """
    with pq.ParquetFile(stream) as file:
        groups = [[group] for group in range(file.num_row_groups)] or [[]]
        for group in groups:
            rows = file.read_row_groups(group, list(columns))
            for name, characters in begins.items():
                part = pc.call_function("utf8_slice_codeunits", [rows[name]], pc.SliceOptions(0, characters))
                rows = rows.set_column(rows.column_names.index(name), name, part)
            yield pl.DataFrame(rows)


def _groups_left(metadata: pq.FileMetaData, where: Where) -> list[int]:
    """Return the row groups that the statistics do not rule out."""
    columns = {metadata.schema.column(number).path: number for number in range(metadata.num_columns)}
    return [
        group
        for group in range(metadata.num_row_groups)
        if all(
            _may_hold(metadata.row_group(group).column(columns[name]).statistics, how, value)
            for name, how, value in where
        )
    ]


def _may_hold(statistics: Any, how: str, value: Any) -> bool:
    if statistics is None or not statistics.has_min_max:
        return True
    if how == "==":
        return statistics.min <= value <= statistics.max
    return statistics.max >= value if how == ">=" else statistics.min < value


def indexed(rows: pl.DataFrame) -> pl.DataFrame:
    """Map the pair_ids of some rows of a table to their keys; rejected rows have no pair_id."""
    return rows.select("pair_id", *ROW_KEY).drop_nulls("pair_id")
