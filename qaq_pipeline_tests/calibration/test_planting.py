"""planting: how many rows each defect gets, which ones, and that a batch gets the same again in any order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from qaq_pipeline.calibration import planting
from qaq_pipeline.calibration.planting import draw, plant
from qaq_pipeline.config.settings import CalibrationSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.draws import draws
from qaq_pipeline.schema.vocabularies import Defect


def settings(rows: int = 60, **values: Any) -> CalibrationSettings:
    return CalibrationSettings.model_validate({"mismatches": rows, "rows_per_defect": rows} | values)


def rows(number: int = 60) -> pl.DataFrame:
    """Accepted pairs of code in two languages, each a query and an answer of its own."""
    codes = [
        "def f{}(x):\n    y = x + {}  # a function of its own\n" + "    y = work_on(y)\n" * 20 + "    return y",
        "const f{} = x => {{\n  let y = x + {}; // of its own, too\n" + "  y = workOn(y);\n" * 20 + "  return y;\n}}",
    ]
    texts = [(f"Write sorter number{n} for table{n} row{n}.", codes[n % 2].format(n, n)) for n in range(number)]
    return pairs_of_texts(texts)


def pairs_of_texts(texts: list[tuple[str, str]]) -> pl.DataFrame:
    pair_ids = [records.pair_id(None, query, answer) for query, answer in texts]
    frame = pl.DataFrame(texts, schema={"query": pl.String, "answer": pl.String}, orient="row")
    types = tables.dtypes(tables.RawData)
    nothing = {name: pl.lit(None, types[name]) for name in ("system", "language", "history")}
    return frame.with_columns(pair_id=pl.Series(pair_ids, dtype=pl.String), **nothing)


@pytest.mark.parametrize(
    ("number", "mismatches", "others"), [(0, 0, 0), (5, 5, 5), (60, 60, 60), (400, 200, 60), (3000, 200, 60)]
)
def test_by_default_the_number_of_planted_rows_is_constant_and_at_most_one_of_each_defect_for_each_pair(
    number: int, mismatches: int, others: int
) -> None:
    planted = plant([rows(number)], CalibrationSettings())
    expected = {defect.value: mismatches if defect is Defect.OTHER_ANSWER else others for defect in Defect if number}
    found = Counter(planted["defect"])
    if number <= others:  # Every pair is taken: an answer in another language may be the next one as well.
        assert expected.pop("wrong_language", 0) >= found.pop("wrong_language", 0) >= number * 0.8
    assert found == expected
    twins = planted.select("defect", "original_pair_id")
    assert twins.n_unique() == twins.height


def test_what_is_planted_fits_its_table_and_names_the_twin_and_the_defect() -> None:
    pairs = rows()
    planted = plant([pairs], settings(10))
    tables.enforce(tables.PlantedRows, planted)
    assert Counter(planted["defect"]) == dict.fromkeys(list(Defect), 10)
    twins = planted.join(pairs, left_on="original_pair_id", right_on="pair_id", suffix="_twin")
    assert twins.height == 90
    for row in twins.iter_rows(named=True):
        assert row["pair_id"] == records.pair_id(row["system"], row["query"], row["answer"])
        assert (row["query"] == row["query_twin"]) == (row["defect"] != "invented_terms")
    assert set(planted["pair_id"]).isdisjoint(pairs["pair_id"])


def test_the_twins_of_a_defect_are_distinct_the_first_of_the_draw_and_shared_between_defects() -> None:
    pairs = rows()
    planted = plant([pairs], settings(9))
    of_defect: dict[str, list[str]] = dict(planted.group_by("defect").agg("original_pair_id").iter_rows())
    assert len(of_defect.pop("wrong_language")) == 9  # One of the first has it as its other answer.
    first = draw([pairs], 0)[0]["pair_id"].head(9)
    assert all(sorted(twins) == sorted(first) for twins in of_defect.values())


def test_other_answers_are_a_derangement_each_the_next_in_the_order_of_the_draw() -> None:
    pairs = rows()
    planted = plant([pairs], settings(defects=["other_answer"]))
    assert planted.height == planted["answer"].n_unique() == 60
    drawn, _ = draw([pairs], 0)
    following = dict(zip(drawn["pair_id"], [*drawn["answer"][1:], drawn["answer"][0]], strict=True))
    assert dict(planted.select("original_pair_id", "answer").iter_rows()) == following


def test_a_pair_that_the_batch_holds_is_never_planted() -> None:
    """Each query is there with every answer."""
    pairs = rows(6)
    held = pairs_of_texts([(q, a) for q in pairs["query"] for a in pairs["answer"]])
    assert plant([held], settings(defects=["other_answer"])).is_empty()


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does() -> None:
    pairs = rows()
    first = plant([pairs], settings(5))
    assert_frame_equal(plant([pairs.reverse()], settings(5)), first)
    assert not plant([pairs], settings(5, seed=1)).equals(first)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_size_of_the_parts_does_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planting, "_MOST_DRAWN", 40)
    pairs = rows(120)
    again = pairs.with_columns(answer=pl.col("answer") + "!", pair_id=pl.col("pair_id").str.reverse())
    both = pl.concat([pairs, again]).sort("pair_id")
    drawn, pair_ids = draw(both.iter_slices(size), 3)
    whole = both.with_columns(draw=draws(both["pair_id"], 3)).sort("draw", "pair_id")
    assert_frame_equal(drawn, whole.unique("query", keep="first", maintain_order=True).head(40).select(drawn.columns))
    assert pair_ids.to_list() == both["pair_id"].to_list()
    assert_frame_equal(plant(both.iter_slices(size), settings(5)), plant([both], settings(5)))


def test_rows_of_the_same_query_are_drawn_once() -> None:
    pairs = rows(9)
    twice = pl.concat(
        [pairs, pairs.with_columns(answer=pl.col("answer") + "!", pair_id=pl.col("pair_id").str.reverse())]
    )
    assert draw([twice], 0)[0].height == 9


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_of_no_row_or_one_gets_what_can_be_made(number: int) -> None:
    planted = plant([rows(number)], settings(3))
    made_alone = {"echo", "refusal", "invented_terms", "cut_answer", "cut_at_line", "filler", "one_token_bug"}
    assert set(planted["defect"]) == (made_alone if number else set())
