"""row_lookup: pruning by statistics finds what a filter of the whole file finds; row references."""

from __future__ import annotations

import io
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from qaq_pipeline.storage import row_lookup
from qaq_pipeline_tests.support.frames import pair_name, raw_rows

ROWS = raw_rows(*({} for _ in range(30)))


def stored(rows: pl.DataFrame, group: int) -> io.BytesIO:
    buffer = io.BytesIO()
    rows.write_parquet(buffer, row_group_size=group)
    buffer.seek(0)
    return buffer


@effort(max_examples=25)
@given(start=st.integers(0, 35), stop=st.integers(0, 35), group=st.integers(1, 40))
def test_what_is_found_equals_a_filter_of_all_rows(start: int, stop: int, group: int) -> None:
    where: row_lookup.Where = [("source_row", ">=", start), ("source_row", "<", stop), ("batch", "==", "b1")]
    expected = ROWS.filter(pl.col("source_row") >= start, pl.col("source_row") < stop)
    assert row_lookup.read_rows(stored(ROWS, group), where).equals(expected)
    assert row_lookup.read_rows(stored(ROWS, group), where, ["pair_id", "none"]).equals(expected.select("pair_id"))


def test_no_row_group_is_read_that_its_statistics_rule_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(file: Any, group: int, columns: Any = None) -> Any:
        read.append(group)
        return original(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert row_lookup.read_rows(stored(ROWS, 5), [("source_row", "==", 17)])["source_row"].to_list() == [17]
    assert set(read) == {3}
    read.clear()
    index = row_lookup.indexed(ROWS[::-1]).sort("pair_id")
    assert row_lookup.read_rows(stored(index, 5), row_lookup.of_pair(pair_name(29)))["source_row"].to_list() == [29]
    assert set(read) == {5}


def test_null_keys_and_files_without_rows_are_no_error() -> None:
    rows = raw_rows({}, {"pair_id": None})
    assert row_lookup.read_rows(stored(rows, 1), row_lookup.of_pair(pair_name(1)))["source_row"].to_list() == [1]
    assert row_lookup.read_rows(stored(ROWS.clear(), 5), [("source_row", "==", 1)]).is_empty()
    assert row_lookup.indexed(rows)["source_row"].to_list() == [1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3", [3]),
        ("a.jsonl:3", [3]),
        ("a.jsonl:3.0", [3]),
        ("a.jsonl:3.1", []),
        (pair_name(3), [3]),
        ("0" * 6, list(range(1, 31))),
        ("0" * 5, []),
        ("9" * 30, []),
        ("²", []),
        ("a:²", []),
        ("x" * 8, []),
    ],
)
def test_a_row_is_meant_by_its_number_its_place_or_its_pair(text: str, found: list[int]) -> None:
    assert row_lookup.find_rows(ROWS, text)["source_row"].to_list() == found
