"""question: which rows a request means, against a naive loop over the same rows."""

from __future__ import annotations

import random
from typing import Any

import polars as pl
import pytest

from qaq_pipeline.row_browser.listing import SEPARATOR, Listing
from qaq_pipeline.row_browser.question import NONE, Question, QuestionError, answer, choices, parse
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline_tests.support.sentences import Check

LANGUAGES = ["python", "c, c++", None]
FILTERED = ("decision", "signals", "language")
RAISED = ["echo", "mismatch", "echo, mismatch", "", None]


def made_up(number: int, seed: int) -> Listing:
    chosen = random.Random(seed)
    rows = [
        {
            "batch": "b1",
            "source_file": "a.jsonl",
            "source_row": row,
            "turn_index": 0,
            "decision": chosen.choice(["selected", "not_selected"]),
            "reason": chosen.choice(["within_budget", "below_cut"]),
            "signals": chosen.choice(RAISED),
            "language": chosen.choice(LANGUAGES),
            "gap": chosen.choice([None, -0.5, 0.0, 0.25, 0.25]),
        }
        for row in range(1, number + 1)
    ]
    schema = {"signals": pl.String, "language": pl.String, "gap": pl.Float64}
    return Listing(pl.DataFrame(rows, schema_overrides=schema), None)


def has(row: dict[str, Any], name: str, wanted: frozenset[str]) -> bool:
    values = (row[name] or "").split(SEPARATOR) if name == "signals" else [row[name]]
    return any((value or NONE) in wanted for value in values)


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_is_that_of_a_naive_loop(seed: int) -> None:
    listing, chosen = made_up(60, seed), random.Random(seed)
    question = Question(
        decision=frozenset(chosen.sample(["selected", "not_selected", "duplicate"], chosen.randint(0, 2))),
        signals=frozenset(chosen.sample(["echo", "mismatch", NONE], chosen.randint(0, 2))),
        language=frozenset(chosen.sample(["python", "c, c++", NONE], chosen.randint(0, 2))),
        number="gap",
        low=chosen.choice([None, 0.0]),
        high=chosen.choice([None, 0.2]),
        order=chosen.choice(["", "gap", "language"]),
        direction=chosen.choice(["asc", "desc"]),
    )
    with_text = pl.DataFrame({"source_row": chosen.sample(range(1, 61), 40)}, schema={"source_row": pl.Int64})
    keys = listing.rows.join(with_text, on="source_row", how="semi").select(ROW_KEY)
    wanted = [
        row
        for row in listing.rows.to_dicts()
        if row["source_row"] in with_text["source_row"].to_list()
        and all(has(row, n, asked) for n in FILTERED if (asked := getattr(question, n)))
        and (question.low is None or (row["gap"] is not None and row["gap"] >= question.low))
        and (question.high is None or (row["gap"] is not None and row["gap"] <= question.high))
    ]
    if question.order:
        known = [row for row in wanted if row[question.order] is not None]
        known.sort(key=lambda row: row[question.order], reverse=question.direction == "desc")  # Stable, as by place.
        wanted = known + [row for row in wanted if row[question.order] is None]
    assert answer(listing, question, keys).to_dicts() == wanted


def test_choices_count_rows_and_a_row_of_two_signals_counts_for_both() -> None:
    listing = made_up(200, 0)
    counts = dict(choices(listing)["signals"])
    signals = [(row or NONE).split(SEPARATOR) for row in listing.rows["signals"]]
    assert counts == {name: sum(name in one for one in signals) for name in ("echo", "mismatch", NONE)}
    assert "batch" not in choices(listing)
    numbers = [number for _, number in choices(listing)["decision"]]
    assert numbers == sorted(numbers, reverse=True)


def test_a_parameter_without_a_value_is_not_there_and_choices_add_up() -> None:
    asked = parse([("text", ""), ("decision", "a"), ("decision", "b"), ("low", ""), ("order", "gap")])
    assert asked == Question(decision=frozenset("ab"), order="gap")


@pytest.mark.parametrize(
    "parameters",
    [[("colour", "red")], [("low", "much")], [("length", "0")], [("length", "100000")], [("direction", "up")]],
)
def test_a_parameter_that_cannot_be_is_named(parameters: list[tuple[str, str]], check_sentence: Check) -> None:
    with pytest.raises(QuestionError) as error:
        parse(parameters)
    check_sentence(error.value)


@pytest.mark.parametrize("asked", [{"order": "nothing"}, {"number": "decision", "low": 1.0}, {"low": 1.0}])
def test_a_column_that_is_not_there_is_named_with_those_that_are(asked: dict[str, Any], check_sentence: Check) -> None:
    with pytest.raises(QuestionError) as error:
        answer(made_up(3, 0), Question(**asked), None)
    check_sentence(error.value)
