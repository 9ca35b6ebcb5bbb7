"""The pairs to score: where their texts are read, and the order in which they are scored.

Belongs here: which rows of a batch are scored, and reading their texts. Does not belong here: their sequences
(`planner`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self

import numpy as np
import polars as pl

from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import RawData, dtypes
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.storage.parquet_file import ROWS_PER_GROUP
from qaq_pipeline.storage.stored_table import StoredTable, parts_of_both, with_own_bytes

TEXTS = ("system", "query", "answer", "history")
"""Columns of the texts of a pair, in the order of `Pair`."""

BYTES_AT_ONCE = 1 << 26
"""Bytes of pairs that are in memory at once. Each time, all texts are read, and these are kept."""
_BYTES_BESIDE_TEXTS = 150
"""Of a pair in memory: its pair_id, its place, and where its texts lie."""
_PAIRS_PER_SIZE = 64
"""The bytes of so many pairs are counted together."""

_OF_HISTORY = pl.col("history").list.eval(pl.element().struct.field("content").str.len_bytes()).list.sum()
_SIZES = {
    "num_characters": pl.sum_horizontal(pl.col("query", "answer").str.len_chars()).cast(pl.UInt32),
    "num_bytes": pl.sum_horizontal(pl.col("system", "query", "answer").str.len_bytes(), _OF_HISTORY).cast(pl.UInt32),
}


def pairs_of(rows: pl.DataFrame) -> list[Pair]:
    """The pairs of a table with their texts, in its order."""
    return [Pair(*row) for row in rows.select("pair_id", *TEXTS).iter_rows()]


def accepted_parts(raw_data: StoredTable, screened_data: StoredTable, *columns: str) -> Iterator[pl.DataFrame]:
    """pair_id and columns of RawData of the rows that are scored, one of each distinct pair, some thousand at a time.

    Args:
        raw_data: of a batch.
        screened_data: of the same rows, in the same order: that of their keys.
        columns: of RawData.
    """
    for part in parts_of_both(raw_data, ("pair_id", *columns), screened_data, ("status",), ROW_KEY):
        yield part.filter(pl.col("status") == Status.ACCEPTED.value).select("pair_id", *columns)


class Pairs:
    """Distinct pairs. Their texts are read when they are needed, as often as they are needed.

    Args:
        read: yields pair_id and the named columns, of `TEXTS`, part by part, in the same order each time.
    """

    def __init__(self, read: Callable[..., Iterator[pl.DataFrame]]) -> None:
        self.read = read

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Self:
        """Pairs in memory."""
        schema = {name: dtypes(RawData)[name] for name in ("pair_id", *TEXTS)}
        rows = [(pair.pair_id, *(getattr(pair, name) for name in TEXTS)) for pair in pairs]
        frame = pl.DataFrame(rows, schema=schema, orient="row")
        return cls(lambda *columns: frame.select("pair_id", *columns).iter_slices(ROWS_PER_GROUP))

    def and_then(self, others: Self) -> Self:
        """These pairs, and the others after them."""

        def read(*columns: str) -> Iterator[pl.DataFrame]:
            yield from self.read(*columns)
            yield from others.read(*columns)

        return type(self)(read)


class LongestFirst:
    """Pairs in the order in which they are scored: the longest first, by number of characters, then as they are read.

    The place of a pair is its number in this order, from 0. Four bytes of each pair are in memory.

    Args:
        pairs: distinct pairs.
        bytes_at_once: bytes of pairs in memory at once; one window is always possible.
    """

    def __init__(self, pairs: Pairs, bytes_at_once: int = BYTES_AT_ONCE) -> None:
        self._read = pairs.read
        self._bytes_at_once = bytes_at_once
        parts = [part.select(**_SIZES) for part in pairs.read(*TEXTS)]
        sizes = pl.concat([pl.DataFrame(schema=dict.fromkeys(_SIZES, pl.UInt32())), *parts])
        order = np.argsort(~sizes["num_characters"].to_numpy(), kind="stable")
        num_characters, firsts = np.unique(sizes["num_characters"].to_numpy()[order], return_index=True)
        self._num_characters, self._firsts = num_characters[::-1], firsts[::-1]
        """The distinct lengths, the longest first, and the first place of each."""
        self._places = np.empty(len(order), np.uint32)
        """Of the pairs, in the order in which they are read."""
        self._places[order] = np.arange(len(order), dtype=np.uint32)
        starts = np.arange(0, len(order), _PAIRS_PER_SIZE)
        num_bytes = np.add.reduceat(sizes["num_bytes"].to_numpy()[order], starts, dtype=np.int64)
        self._num_bytes = num_bytes + _BYTES_BESIDE_TEXTS * _PAIRS_PER_SIZE
        """Of each 64 places, from the first."""

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._places)

    def num_characters(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Of query and answer of the pairs in a range of places, by place."""
        places = np.arange(start, len(self) if stop is None else stop)
        return self._num_characters[np.searchsorted(self._firsts, places, side="right") - 1]

    def pair_ids(self, start: int = 0, stop: int | None = None) -> pl.Series:
        """Of the pairs in a range of places, by place. All are read again."""
        return self._rows(start, len(self) if stop is None else stop)["pair_id"]

    def windows(self, num_pairs: int) -> Iterator[list[Pair]]:
        """The pairs with their texts, so many at a time."""
        for start, stop in self._ranges(num_pairs):
            yield from self._windows(start, stop, num_pairs)

    def _ranges(self, num_pairs: int) -> Iterator[tuple[int, int]]:
        """Ranges of places, of whole windows, whose texts are in memory at once."""
        start = num_bytes = 0
        for first in range(0, len(self), num_pairs):
            stop = first + num_pairs
            of_window = int(self._num_bytes[first // _PAIRS_PER_SIZE : -(-stop // _PAIRS_PER_SIZE)].sum())
            if first > start and num_bytes + of_window > self._bytes_at_once:
                yield start, first
                start, num_bytes = first, 0
            num_bytes += of_window
        if start < len(self):
            yield start, len(self)

    def _windows(self, start: int, stop: int, num_pairs: int) -> Iterator[list[Pair]]:
        for window in self._texts(start, stop).iter_slices(num_pairs):
            yield pairs_of(window)

    def _texts(self, start: int, stop: int) -> pl.DataFrame:
        """The texts of the pairs in a range of places, in their order."""
        return self._rows(start, stop, *TEXTS)

    def _rows(self, start: int, stop: int, *columns: str) -> pl.DataFrame:
        """The pairs in a range of places, in their order: pair_id, these columns, and `place`."""
        schema = {"pair_id": pl.String(), **{name: dtypes(RawData)[name] for name in columns}, "place": pl.UInt32()}
        taken, num_read = [pl.DataFrame(schema=schema)], 0
        for part in self._read(*columns):
            places = pl.Series("place", self._places[num_read : num_read + part.height])
            num_read += part.height
            taken.append(
                with_own_bytes(part.with_columns(places).filter(places.is_between(start, stop, closed="left")))
            )
        return pl.concat(taken).sort("place")
