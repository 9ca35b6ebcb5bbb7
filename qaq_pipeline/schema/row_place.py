"""The place of a row as a value: `batch/file:row.turn`, the way decisions, errors and `qaq explain` name it.

Belongs here: the form of a place, of one row and of a whole frame. Does not belong here: looking a row up
(`storage.row_lookup`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import polars as pl

RECORD_KEY = ["batch", "source_file", "source_row"]
ROW_KEY = [*RECORD_KEY, "turn_index"]
"""The columns that together name a row."""


@dataclass(frozen=True, slots=True)
class RowPlace:
    """One (query, answer) pair of a delivery."""

    batch: str
    source_file: str
    source_row: int
    """From 1."""
    turn_index: int = 0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The place of a row that has the columns of `ROW_KEY`."""
        return cls(*(row[name] for name in ROW_KEY))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The place that `str` wrote.

        Raises:
            ValueError: it is none; the text says what is expected.
        """
        batch, slash, rest = text.partition("/")
        source_file, colon, position = rest.rpartition(":")
        source_row, dot, turn = position.partition(".")
        if not (slash and colon and dot and source_row.isdecimal() and turn.isdecimal()):
            raise ValueError(f"{text!r} is not the place of a row; expected BATCH/FILE:ROW.TURN")
        return cls(batch, source_file, int(source_row), int(turn))

    @property
    def in_batch(self) -> str:
        """`file:row.turn`."""
        return f"{self.source_file}:{self.source_row}.{self.turn_index}"

    def __str__(self) -> str:
        return f"{self.batch}/{self.in_batch}"


def without_records_of(rows: pl.DataFrame, barred: pl.DataFrame) -> pl.DataFrame:
    """The rows; null as `record` where a turn of it is barred: a record holds all turns of a conversation.

    Args:
        rows: with the key and `record`.
        barred: keys of the rows whose text may not be shown.
    """
    is_barred = barred.select(RECORD_KEY).unique().with_columns(is_barred=pl.lit(True))
    marked = rows.join(is_barred, on=RECORD_KEY, how="left", validate="m:1", maintain_order="left")
    return marked.with_columns(record=pl.when(pl.col("is_barred").is_null()).then("record")).drop("is_barred")


def row_place() -> pl.Expr:
    """The places of a frame's rows, as text."""
    return pl.format("{}/{}:{}.{}", *ROW_KEY)


def may_be_in(rows: pl.DataFrame, part: pl.DataFrame) -> pl.DataFrame:
    """The rows whose keys may be in a part of a table: a join of these alone is quick, whatever the number of rows."""
    ends = [part.select(pl.col(name).min().alias("low"), pl.col(name).max().alias("high")) for name in RECORD_KEY]
    (*names, numbers) = (frame.row(0) for frame in ends)
    has_one_file = all(low == high for low, high in names)
    ranges = zip(RECORD_KEY, (*names, numbers) if has_one_file else names, strict=False)
    return rows.filter(pl.col(name).is_between(pl.lit(low), pl.lit(high)) for name, (low, high) in ranges)


def by_key(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows sorted by key. Looking first is cheap: most tables are stored in that order."""
    is_sorted = rows.select(pl.struct(ROW_KEY)).to_series().is_sorted()
    return rows if is_sorted else rows.sort(ROW_KEY)
