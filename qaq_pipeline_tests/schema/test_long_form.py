"""long_form: from long frames to lists of structs and back, and columns for people."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from qaq_pipeline.schema.long_form import to_columns, to_lists, to_long
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
