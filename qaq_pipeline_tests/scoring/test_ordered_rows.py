"""ordered_rows: rows of any order come back in the order of pair_id, from memory and from files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from qaq_pipeline.scoring.ordered_rows import OrderedRows
from qaq_pipeline_tests.support.frames import pair_name


def rows(num_rows: int) -> pl.DataFrame:
    """Rows with random pair_ids, in no order."""
    numbers = np.random.default_rng(0).permutation(num_rows)
    return pl.DataFrame({"pair_id": [pair_name(int(number)) for number in numbers], "value": numbers})


@pytest.mark.parametrize(
    ("num_rows", "at_once"), [(1, 10), (9, 10), (20_000, 3_000), (20_000, 20_000), (20_000, 70_000)]
)
@pytest.mark.parametrize("appended", [1, 700, 5_000])
def test_rows_come_back_in_order_as_often_as_they_are_asked_for(
    num_rows: int, at_once: int, appended: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = rows(num_rows).sort("pair_id")
    ordered = OrderedRows(at_once)
    for part in rows(num_rows).iter_slices(min(num_rows, appended)):
        ordered.append(part)
    for _ in range(2):
        assert pl.concat(ordered.parts()).equals(expected)
    assert bool(list(tmp_path.iterdir())) == (num_rows >= at_once)
    del ordered
    assert not list(tmp_path.iterdir())


def test_no_part_is_much_larger_than_what_may_be_in_memory() -> None:
    ordered = OrderedRows(4_096)
    for part in rows(40_000).iter_slices(1_000):
        ordered.append(part)
    assert max(part.height for part in ordered.parts()) <= 2 * 4_096


def test_rows_of_one_frame() -> None:
    (part,) = OrderedRows.of(rows(5)).parts()
    assert part.equals(rows(5).sort("pair_id"))
    (none,) = OrderedRows.of(rows(5).clear()).parts()
    assert none.is_empty()
