"""Rows that come in any order and are read in the order of pair_id, however many they are.

Belongs here: keeping some rows in memory and the others in files. Does not belong here: what the rows are (`sums`).
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

import polars as pl

ROWS_AT_ONCE = 1 << 17
"""Rows in memory at once."""
_EACH = 1 << 10
"""Rows of a file for each pair_id of it that is known without reading it."""


class Rows(Protocol):
    """Rows in the order of pair_id."""

    def parts(self) -> Iterator[pl.DataFrame]:
        """The rows, some at a time, as often as they are asked for; one part at least."""


class OrderedRows:
    """Rows with distinct pair_ids. They are in files of this machine, each sorted, as soon as there are many.

    Args:
        rows_at_once: most rows in memory.
    """

    def __init__(self, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self._rows_at_once = rows_at_once
        self._open: list[pl.DataFrame] = []
        self._num_open = 0
        self._folder: Path | None = None
        """Removed with this object."""
        self._files: list[Path] = []
        self._starts: list[pl.Series] = []
        """Some pair_ids of each file, `_EACH` rows apart."""

    @classmethod
    def of(cls, rows: pl.DataFrame) -> Self:
        """The rows of a frame."""
        found = cls(rows.height + 1)
        found.append(rows)
        return found

    def append(self, rows: pl.DataFrame) -> None:
        """Add rows, of the same columns each time."""
        self._open.append(rows)
        self._num_open += rows.height
        if self._num_open >= self._rows_at_once:
            self._close()

    def parts(self) -> Iterator[pl.DataFrame]:
        """As `Rows`. Rows must have been added."""
        if not self._files:
            yield pl.concat(self._open).sort("pair_id")
            return
        self._close()
        rows = pl.scan_parquet(self._files, glob=False)
        starts = pl.concat(self._starts).sort()[:: max(self._rows_at_once // _EACH, 1)]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            wanted = pl.col("pair_id") >= start
            yield rows.filter(wanted if stop is None else wanted & (pl.col("pair_id") < stop)).sort("pair_id").collect()

    def _close(self) -> None:
        """Write the rows in memory to a file."""
        if not self._open:
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="qaq_pipeline-"))
            weakref.finalize(self, shutil.rmtree, self._folder)
        rows = pl.concat(self._open).sort("pair_id")
        file = self._folder / f"{len(self._files)}.parquet"
        rows.write_parquet(file, row_group_size=1 << 14)
        self._files.append(file)
        self._starts.append(rows["pair_id"].gather_every(_EACH))
        self._open, self._num_open = [], 0
