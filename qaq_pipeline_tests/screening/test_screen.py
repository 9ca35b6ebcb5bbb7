"""screen: the first accepted row in key order represents equal pairs, and no row is lost."""

from __future__ import annotations

import random
from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from qaq_pipeline.config.settings import RecordSettings, ScreeningSettings
from qaq_pipeline.ingest.records import read_file
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import ScreenedData, enforce
from qaq_pipeline.schema.vocabularies import RejectReason, Status
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline_tests.support.frames import pair_name, raw_rows, rejected

SETTINGS = RecordSettings.model_validate({})


def pair(number: int, **changes: Any) -> dict[str, Any]:
    return {"pair_id": pair_name(number)} | changes


def at(file: str, row: int, number: int) -> dict[str, Any]:
    return pair(number, source_file=file, source_row=row)


def screen(raw: pl.DataFrame) -> pl.DataFrame:
    return screen_alone(raw, ScreeningSettings())


def screened(raw: pl.DataFrame) -> dict[str, str | None]:
    """Return, for each row as file:row, the row that represents it; None if it is no duplicate."""
    frame = enforce(ScreenedData, screen(raw))
    return {f"{row['source_file']}:{row['source_row']}": row["duplicate_of"] for row in frame.iter_rows(named=True)}


def test_the_first_of_equal_pairs_in_key_order_stands_for_the_others() -> None:
    raw = raw_rows(pair(1), pair(2), pair(1), pair(3), pair(2), pair(1))
    assert screened(raw) == {
        "a.jsonl:1": None,
        "a.jsonl:2": None,
        "a.jsonl:3": "b1/a.jsonl:1.0",
        "a.jsonl:4": None,
        "a.jsonl:5": "b1/a.jsonl:2.0",
        "a.jsonl:6": "b1/a.jsonl:1.0",
    }


def test_a_duplicate_says_why_and_of_what() -> None:
    (row,) = screen(raw_rows(pair(1), pair(1))).filter(status="duplicate").iter_rows(named=True)
    assert row == {
        "batch": "b1",
        "source_file": "a.jsonl",
        "source_row": 2,
        "turn_index": 0,
        "pair_id": pair_name(1),
        "status": "duplicate",
        "reason": "exact_duplicate",
        "duplicate_of": "b1/a.jsonl:1.0",
        "similarity": 1.0,
        "evidence": "equal system text, query and answer",
        "cluster": None,
        "batch_gate": None,
    }


def test_duplicates_are_found_across_the_files_of_a_batch() -> None:
    raw = raw_rows(at("z.jsonl", 1, 1), at("a.jsonl", 7, 1), at("a.jsonl", 10, 1), at("m.jsonl", 1, 2))
    found = {"a.jsonl:7": None, "a.jsonl:10": "b1/a.jsonl:7.0", "m.jsonl:1": None, "z.jsonl:1": "b1/a.jsonl:7.0"}
    assert screened(raw) == found


def test_turns_of_one_row_are_told_apart() -> None:
    raw = raw_rows(pair(1, source_row=1), pair(1, source_row=1, turn_index=1))
    assert screen(raw)["duplicate_of"].to_list() == [None, "b1/a.jsonl:1.0"]


def test_a_rejected_row_never_stands_for_a_pair() -> None:
    refused = {"status": Status.REJECTED.value, "reason": RejectReason.WRONG_TYPE.value, "detail": "no"}
    raw = raw_rows(pair(1, **refused), pair(1), pair(1, **refused), pair(1))
    frame = screen(raw)
    assert frame["status"].to_list() == ["rejected", "accepted", "rejected", "duplicate"]
    assert frame["duplicate_of"].to_list() == [None, None, None, "b1/a.jsonl:2.0"]
    assert frame["evidence"].to_list() == ["no", None, "no", "equal system text, query and answer"]


def test_rejected_rows_without_a_pair_are_no_duplicates_of_each_other() -> None:
    frame = screen(raw_rows(rejected(), rejected(RejectReason.BAD_JSON, "column 1"), rejected()))
    assert frame["status"].to_list() == ["rejected"] * 3
    assert frame["reason"].to_list() == ["empty_query", "bad_json", "empty_query"]
    assert frame["evidence"].to_list() == ["`query` is blank", "column 1", "`query` is blank"]


def test_the_system_text_matters_and_an_absent_one_is_an_empty_one() -> None:
    lines = [
        b'{"query": "q", "response": "a"}',
        b'{"query": "q", "response": "a", "system": "Be brief."}',
        b'{"query": "q", "response": "a", "system": ""}',
        b'{"query": "q", "response": "a "}',
        b'{"query": "q", "response": "a", "system": "Be brief."}',
    ]
    raw = read_file(b"\n".join(lines), "a.jsonl", "b1", SETTINGS).frame
    assert screen(raw)["duplicate_of"].to_list() == [None, None, "b1/a.jsonl:1.0", "b1/a.jsonl:1.0", "b1/a.jsonl:2.0"]


def test_no_rows_are_no_rows() -> None:
    assert enforce(ScreenedData, screen(raw_rows())).is_empty()


_ROWS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 4), st.integers(0, 3), st.booleans()),
    max_size=12,
    unique_by=lambda row: row[:2],
)


@given(rows=_ROWS, seed=st.integers())
def test_every_row_comes_back_and_each_readable_pair_is_accepted_once(
    rows: list[tuple[str, int, int, bool]], seed: int
) -> None:
    raw = raw_rows(*(at(file, row, number) | ({} if readable else rejected()) for file, row, number, readable in rows))
    frame = enforce(ScreenedData, screen(raw))
    assert frame.select(ROW_KEY).equals(raw.select(ROW_KEY).sort(ROW_KEY))
    accepted = frame.filter(status="accepted")["pair_id"]
    assert accepted.is_unique().all()
    assert set(accepted) == set(raw["pair_id"].drop_nulls())
    assert frame.filter(status="rejected").height == raw.filter(status="rejected").height
    references = frame.filter(status="accepted").select(
        pl.format("{}/{}:{}.{}", *ROW_KEY).alias("duplicate_of"), "pair_id"
    )
    of_duplicates = frame.filter(status="duplicate").select("duplicate_of", "pair_id")
    assert of_duplicates.join(references, on=["duplicate_of", "pair_id"], how="anti").is_empty()
    shuffled = raw.sample(fraction=1, shuffle=True, seed=random.Random(seed).randrange(2**32))
    assert screen(shuffled).equals(frame)
