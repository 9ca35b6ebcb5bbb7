"""The place of a row as a value."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaq_pipeline.schema.row_place import RowPlace, row_place

PLACES = st.builds(
    RowPlace,
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,9}", fullmatch=True),
    st.text(min_size=1),
    st.integers(1, 2**62),
    st.integers(0, 99),
)


@given(PLACES)
def test_a_place_is_read_as_it_was_written(place: RowPlace) -> None:
    assert RowPlace.parse(str(place)) == place


@given(PLACES)
def test_a_frame_writes_places_as_a_value_does(place: RowPlace) -> None:
    frame = pl.DataFrame([{name: getattr(place, name) for name in place.__dataclass_fields__}])
    assert frame.select(row_place()).item() == str(place)
    assert RowPlace.of(frame.row(0, named=True)) == place


@pytest.mark.parametrize("text", ["", "b1", "b1/rows.jsonl", "b1/rows.jsonl:3", "b1/rows.jsonl:x.0", "rows.jsonl:3.0"])
def test_what_is_no_place_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected BATCH/FILE:ROW\.TURN"):
        RowPlace.parse(text)
