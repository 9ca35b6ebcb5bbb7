"""long_form: from long frames to lists of structs and back, and columns for people."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from qaq_pipeline.schema.long_form import find_pairs, rows_of_pairs, slices_of_pairs, to_columns, to_lists, to_long
from qaq_pipeline.schema.tables import MODEL_RANK

TYPES = {"pair_id": pl.String} | {name: column.dtype for name, column in MODEL_RANK.inner.items()}


def long(pair_ids: list[str], models: list[str]) -> pl.DataFrame:
    rows = [(pair, model, 1, 2, i / 7) for model in models for i, pair in enumerate(pair_ids)]
    return pl.DataFrame(rows, schema=TYPES, orient="row")


@given(num_pairs=st.integers(0, 5), num_models=st.integers(1, 4))
def test_the_way_to_lists_and_back_changes_nothing(num_pairs: int, num_models: int) -> None:
    frame = long([f"p{i}" for i in range(num_pairs)], [f"m{i}" for i in range(num_models)])
    lists = to_lists(frame, MODEL_RANK, "ranks")
    assert lists.schema == {"pair_id": pl.String(), "ranks": pl.List(MODEL_RANK.dtype)}
    assert lists["ranks"].list.len().to_list() == [num_models] * num_pairs
    assert_frame_equal(to_long(lists, "ranks", "pair_id"), frame)


def test_models_with_other_pairs_have_no_lists() -> None:
    frame = pl.concat([long(["a", "b"], ["strong"]), long(["b", "a"], ["weak"])])
    with pytest.raises(ValueError, match="ranks: not every model has the same pairs"):
        to_lists(frame, MODEL_RANK, "ranks")
    with pytest.raises(ValueError, match="ranks: not every model has the same pairs"):
        to_lists(frame[:3], MODEL_RANK, "ranks")


def test_rows_without_a_struct_are_in_no_long_form_and_null_in_columns() -> None:
    ranks = to_lists(long(["a"], ["strong", "weak"]), MODEL_RANK, "ranks")["ranks"].to_list()[0]
    frame = pl.DataFrame(
        {"pair_id": ["a", "b", "c"], "ranks": [ranks[1:], [], None]},
        schema_overrides={"ranks": pl.List(MODEL_RANK.dtype)},
    )
    assert to_long(frame, "ranks", "pair_id").select("pair_id", "model").rows() == [("a", "weak")]
    columns = to_columns(frame, "ranks", ":", ["rank"])
    assert columns.to_dict(as_series=False) == {"pair_id": ["a", "b", "c"], "rank:weak": [0.0, None, None]}


# --- the rows of some pairs -----------------------------------------------------------------------------------------

NUMBERS = st.lists(st.integers(0, 30), unique=True, max_size=12)


@given(known=NUMBERS, wanted=NUMBERS)
def test_pairs_are_found_among_sorted_ones(known: list[int], wanted: list[int]) -> None:
    pair_ids, others = (pl.Series([f"{number:032x}" for number in of], dtype=pl.String) for of in (known, wanted))
    places = find_pairs(pair_ids.sort(), others)
    expected = [number for number in wanted if number in known]
    assert pair_ids.sort().gather(places).to_list() == [f"{number:032x}" for number in expected]


@given(num_pairs=st.integers(0, 9), num_keys=st.integers(1, 3), size=st.integers(1, 10))
def test_the_parts_of_a_long_frame_have_all_rows_of_their_pairs(num_pairs: int, num_keys: int, size: int) -> None:
    rows = [(key, pair) for key in range(num_keys) for pair in range(num_pairs)]
    long = pl.DataFrame(rows, schema={"key": pl.Int64, "pair": pl.Int64}, orient="row")
    parts = list(slices_of_pairs(long, num_keys, size))
    for number, part in enumerate(parts):
        pairs = range(number * size, min(num_pairs, (number + 1) * size))
        assert part.rows() == [(key, pair) for key in range(num_keys) for pair in pairs]
        assert rows_of_pairs(long, num_pairs, pl.Series(pairs, dtype=pl.UInt32)).equals(part)
    assert sum(part.height for part in parts) == long.height
    assert rows_of_pairs(long, num_pairs, pl.Series(dtype=pl.UInt32)).is_empty()
