"""The stored tables: what fits, what does not, and what the error says."""

from __future__ import annotations

import dataframely as dy
import polars as pl
import pytest

from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import CachedScores, Logprobs, RawData, ScreenedData, TableError, dtypes, enforce
from qaq_pipeline.schema.vocabularies import (
    Decision,
    DuplicateReason,
    NullReason,
    Quantity,
    RejectReason,
    SelectionReason,
    Status,
)
from qaq_pipeline_tests.support.sentences import Check

STORED_TABLES = PIPELINE.tables()

ALL_TABLES = [*dict.fromkeys(STORED_TABLES.values()), CachedScores]
PAIR_ID = "0123456789abcdef" * 2


def screened(*rows: dict[str, object]) -> pl.DataFrame:
    """Accepted rows of one file, with the given changes."""
    accepted = {
        "batch": "b1",
        "source_file": "a.jsonl",
        "turn_index": 0,
        "status": Status.ACCEPTED.value,
        "reason": None,
        "duplicate_of": None,
        "similarity": None,
        "cluster": "b1/a.jsonl:1.0",
        "evidence": None,
    }
    return pl.DataFrame(
        [accepted | {"source_row": n, "pair_id": f"{n:032x}"} | row for n, row in enumerate(rows, start=1)],
        schema=dtypes(ScreenedData),
    )


def logprobs(**changes: object) -> pl.DataFrame:
    """One scored pair without token log-probs, with the given changes."""
    row: dict[str, object] = dict.fromkeys(dtypes(Logprobs))
    row |= {f"sum_nll_{quantity}": 1.5 for quantity in Quantity}
    row |= {"pair_id": PAIR_ID, "num_q_tokens": 3, "num_a_tokens": 5, "num_a_tokens_untruncated": 7}
    return pl.DataFrame([row | {"is_truncated": True} | changes], schema=dtypes(Logprobs))


DUPLICATE: dict[str, object] = {
    "pair_id": f"{1:032x}",
    "status": Status.DUPLICATE.value,
    "reason": DuplicateReason.EXACT_DUPLICATE.value,
    "duplicate_of": "b1/a.jsonl:1.0",
    "similarity": 1.0,
    "cluster": None,
    "evidence": "equal text",
}
REJECTED: dict[str, object] = {
    "pair_id": None,
    "status": Status.REJECTED.value,
    "reason": RejectReason.EMPTY_QUERY.value,
    "cluster": None,
}


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.__name__)
def test_an_empty_frame_of_the_declared_columns_fits(table: type[dy.Schema]) -> None:
    frame = pl.DataFrame(schema=dtypes(table))
    assert enforce(table, frame).schema == frame.schema


def test_filled_frames_fit_and_come_back_unchanged() -> None:
    rows = screened({}, DUPLICATE, REJECTED)
    assert enforce(ScreenedData, rows).equals(rows)
    assert enforce(Logprobs, logprobs()).equals(logprobs())


def test_columns_come_back_in_the_declared_order() -> None:
    shuffled = logprobs().select(sorted(dtypes(Logprobs), reverse=True))
    assert enforce(Logprobs, shuffled).columns == list(dtypes(Logprobs))


def test_missing_and_undeclared_columns_are_named(check_sentence: Check) -> None:
    frame = logprobs().drop("num_q_tokens").with_columns(surprise=1)
    with pytest.raises(TableError) as error:
        enforce(Logprobs, frame)
    check_sentence(error.value)


def test_a_wrong_dtype_is_named_with_the_right_one(check_sentence: Check) -> None:
    frame = logprobs().with_columns(pl.col("num_q_tokens").cast(pl.Int32))
    with pytest.raises(TableError) as error:
        enforce(Logprobs, frame)
    check_sentence(error.value)


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("pair_id", "not-a-hash", "pair_id|regex"),
        ("sum_nll_q", -0.1, "sum_nll_q|min"),
        ("sum_nll_q", None, "null_iff_reason"),
        ("sum_nll_q", float("nan"), "sum_nll_q|nan"),
        ("sum_nll_q", float("inf"), "sum_nll_q|inf"),
        ("null_reason_a", NullReason.NON_FINITE.value, "null_iff_reason"),
        ("null_reason_a", "because", "null_reason_a|check"),
        ("num_q_tokens", 0, "scored_has_tokens"),
        ("num_q_tokens", -1, "num_q_tokens|min"),
        ("num_q_tokens", None, "num_q_tokens|nullability"),
    ],
)
def test_a_broken_rule_is_named_with_its_count_and_a_row(column: str, value: object, rule: str) -> None:
    with pytest.raises(TableError) as caught:
        enforce(Logprobs, logprobs(**{column: value}))
    text = str(caught.value)
    assert text.startswith("Logprobs: ")
    assert f"{rule} (1 rows)" in text
    assert text.endswith(f"{{'pair_id': {(value if column == 'pair_id' else PAIR_ID)!r}}}")


def test_a_null_sum_needs_a_reason_and_a_reason_needs_a_null_sum() -> None:
    unscored = logprobs(sum_nll_q_given_a=None, null_reason_q_given_a=NullReason.QUERY_TOO_LONG.value)
    assert enforce(Logprobs, unscored).equals(unscored)
    for lonely in ({"sum_nll_q_given_a": None}, {"null_reason_q_given_a": NullReason.QUERY_TOO_LONG.value}):
        with pytest.raises(TableError, match="null_iff_reason"):
            enforce(Logprobs, logprobs(**lonely))


def test_every_row_that_breaks_a_rule_is_counted() -> None:
    rows = screened({"similarity": 1.5}, {"similarity": -1.0}, {"similarity": 2.0}, {})
    with pytest.raises(TableError, match=r"similarity\|max \(2 rows\)") as caught:
        enforce(ScreenedData, rows)
    assert "similarity|min (1 rows)" in str(caught.value)


def test_a_pair_is_accepted_once_but_may_be_delivered_often() -> None:
    enforce(ScreenedData, screened({}, DUPLICATE))
    with pytest.raises(TableError, match=r"pairs_are_scored_once \(2 rows\)"):
        enforce(ScreenedData, screened({}, {"pair_id": f"{1:032x}"}))


def test_equal_keys_are_rejected() -> None:
    with pytest.raises(TableError, match=r"primary_key \(2 rows\)"):
        enforce(ScreenedData, screened({}, {"source_row": 1}))


def test_distinct_rows_and_no_others_have_a_cluster() -> None:
    held_out: dict[str, object] = {"status": "held_out", "reason": "cluster_drawn"}
    between: dict[str, object] = {"status": "between", "reason": "similar_to_both"}
    enforce(ScreenedData, screened({}, held_out, between, DUPLICATE, REJECTED))
    for row in ({"cluster": None}, held_out | {"cluster": None}, REJECTED | {"cluster": "b1/a.jsonl:1.0"}):
        with pytest.raises(TableError, match=r"distinct_rows_have_a_cluster \(1 rows\)"):
            enforce(ScreenedData, screened({}, row))


def test_a_duplicate_names_the_row_that_represents_it() -> None:
    with pytest.raises(TableError, match="duplicate_names_its_row"):
        enforce(ScreenedData, screened({}, DUPLICATE | {"duplicate_of": None}))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"status": Status.REJECTED.value}, "rejected_iff_reason"),
        ({"reason": RejectReason.BAD_JSON.value}, "rejected_iff_reason"),
        ({"answer": None}, "accepted_has_text"),
        ({"status": "maybe"}, "status|check"),
    ],
)
def test_a_rejected_row_has_a_reason_and_an_accepted_one_its_text(changes: dict[str, object], rule: str) -> None:
    row: dict[str, object] = dict.fromkeys(dtypes(RawData))
    row |= dict(zip(ROW_KEY, ("b1", "a.jsonl", 1, 0), strict=True))
    row |= {"pair_id": PAIR_ID, "query": "Q", "answer": "A", "record": "{}", "status": Status.ACCEPTED.value}
    enforce(RawData, pl.DataFrame([row], schema=dtypes(RawData)))
    with pytest.raises(TableError) as caught:
        enforce(RawData, pl.DataFrame([row | changes], schema=dtypes(RawData)))
    assert f"{rule} (1 rows)" in str(caught.value)


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.__name__)
def test_every_column_says_what_it_holds(table: type[dy.Schema]) -> None:
    assert table.__doc__
    silent = [name for name, column in table.columns().items() if not (column.description or "").strip()]
    assert silent == []


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.__name__)
def test_every_table_has_a_key(table: type[dy.Schema]) -> None:
    assert table.primary_key()


def test_the_reasons_of_a_decision_do_not_overlap() -> None:
    vocabularies = (SelectionReason, RejectReason, DuplicateReason, NullReason)
    values = [member.value for vocabulary in vocabularies for member in vocabulary]
    assert len(values) == len(set(values))
    assert {status.value for status in Status} - {Status.ACCEPTED.value} <= {decision.value for decision in Decision}
