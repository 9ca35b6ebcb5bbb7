"""ordered_rows: rows of any order come back in the order of pair_id, from memory and from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from qaq_pipeline.storage.ordered_rows import OrderedRows
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.frames import pair_name

PLACE = ("score_cache", "0123")


def rows(num_rows: int) -> pl.DataFrame:
    """Rows with random pair_ids, in no order."""
    numbers = np.random.default_rng(0).permutation(num_rows)
    return pl.DataFrame({"pair_id": [pair_name(int(number)) for number in numbers], "value": numbers})


@pytest.mark.parametrize(
    ("num_rows", "at_once"), [(0, 10), (1, 10), (9, 10), (20_000, 3_000), (20_000, 20_000), (20_000, 70_000)]
)
@pytest.mark.parametrize("appended", [30, 700, 5_000])
def test_rows_come_back_in_order_as_often_as_they_are_asked_for(
    num_rows: int, at_once: int, appended: int, storage: Storage, tmp_path: Path
) -> None:
    expected = rows(num_rows).sort("pair_id")
    ordered = OrderedRows(storage.files, PLACE, at_once)
    ordered.append(expected.clear())
    for part in rows(num_rows).iter_slices(max(min(num_rows, appended), 1)):
        ordered.append(part)
    for _ in range(2):
        assert pl.concat(ordered.parts()).equals(expected)
    assert bool(list(tmp_path.rglob("*.parquet"))) == (num_rows >= at_once)
    del ordered
    assert not list(tmp_path.rglob("*.parquet"))


def test_no_part_is_much_larger_than_what_may_be_in_memory(storage: Storage) -> None:
    ordered = OrderedRows(storage.files, PLACE, 4_096)
    for part in rows(40_000).iter_slices(1_000):
        ordered.append(part)
    assert max(part.height for part in ordered.parts()) <= 2 * 4_096


def test_rows_of_one_pair_come_back_in_the_order_of_further_columns(storage: Storage) -> None:
    thrice = pl.concat([rows(3_000).with_columns(batch=pl.lit(name)) for name in "cab"])
    ordered = OrderedRows(storage.files, PLACE, 2_048, then_by=["batch"])
    for part in thrice.iter_slices(1_000):
        ordered.append(part)
    assert pl.concat(ordered.parts()).equals(thrice.sort("pair_id", "batch"))
