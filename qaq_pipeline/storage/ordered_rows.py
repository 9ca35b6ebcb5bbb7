"""Rows that come in any order and are read in the order of pair_id, however many they are.

Belongs here: keeping some rows in memory and the others in files. Does not belong here: what the rows are (`sums`,
`tables`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import polars as pl

from qaq_pipeline.storage.files import Files

ROWS_AT_ONCE = 1 << 17
"""Rows in memory at once, roughly."""
_ROWS_PER_START = 1 << 10
_ROWS_PER_GROUP = 1 << 12


class Rows(Protocol):
    """Rows in the order of pair_id."""

    def parts(self) -> Iterator[pl.DataFrame]:
        """The rows, some at a time, as often as they are asked for; one part at least."""


class OrderedRows:
    """Rows of many pairs. As soon as there are many, they are in files, each of which is sorted.

    Args:
        files: of the storage.
        place: of a folder there, in which the files are until this object is gone.
        rows_at_once: a file is written when so many rows have come.
        then_by: columns that order the rows of one pair; needed where a pair has several.
    """

    def __init__(
        self,
        files: Files,
        place: Sequence[str],
        rows_at_once: int = ROWS_AT_ONCE,
        then_by: Sequence[str] = (),
    ) -> None:
        self._storage, self._place = files, place
        self._rows_at_once = rows_at_once
        self._order = ["pair_id", *then_by]
        self._open: list[pl.DataFrame] = []
        self._num_open = 0
        self._folder: Path | None = None
        self._files: list[Path] = []
        self._starts: list[str] = []
        """Every 1,024th pair_id of each file, from its first. As texts, since a column of some would hold them all."""

    def append(self, rows: pl.DataFrame) -> None:
        """Add rows, of the same columns each time."""
        self._open.append(rows)
        self._num_open += rows.height
        if self._num_open >= self._rows_at_once:
            self._close()

    def parts(self) -> Iterator[pl.DataFrame]:
        """As `Rows`. Something must have been appended, if only a frame without rows."""
        if not self._files:
            yield pl.concat(self._open).sort(self._order)
            return
        self._close()
        rows = pl.scan_parquet(self._files, glob=False)
        # Half as many as were written at once: they are in memory as they were read, and sorted.
        starts = sorted(self._starts)[:: max(self._rows_at_once // (2 * _ROWS_PER_START), 1)]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            wanted = pl.col("pair_id") >= start
            part = rows.filter(wanted if stop is None else wanted & (pl.col("pair_id") < stop))
            yield part.sort(self._order).collect()

    def _close(self) -> None:
        """Write the rows in memory to a file."""
        rows = pl.concat(self._open).sort(self._order) if self._open else pl.DataFrame()
        self._open, self._num_open = [], 0
        if rows.is_empty():
            return
        if self._folder is None:
            until_gone = ExitStack()
            self._folder = until_gone.enter_context(self._storage.unfinished_folder(*self._place))
            weakref.finalize(self, until_gone.close)
        file = self._folder / f"{len(self._files)}.parquet"
        rows.write_parquet(file, row_group_size=_ROWS_PER_GROUP)
        self._files.append(file)
        self._starts += rows["pair_id"].gather_every(_ROWS_PER_START).to_list()
