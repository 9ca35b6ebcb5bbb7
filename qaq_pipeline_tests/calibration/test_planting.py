"""planting: how many rows each defect gets, which ones, and that a batch gets the same again in any order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from qaq_pipeline.calibration.planting import ENOUGH, draw, plant, quotas
from qaq_pipeline.config.settings import CalibrationSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import Defect


def settings(**values: Any) -> CalibrationSettings:
    return CalibrationSettings.model_validate({"max_planted_share": None} | values)


def rows(number: int = 60, strata: int = 3) -> pl.DataFrame:
    """Scorable pairs of code in two languages, each a query and an answer of its own."""
    codes = ["def f{}(x):\n    return x + {}  # a function of its own", "const f{} = x => x + {}; // of its own, too"]
    texts = [(f"Write the function number {n}, please.", codes[n % 2].format(n, n)) for n in range(number)]
    return pl.DataFrame(
        [
            {
                "pair_id": records.pair_id(None, query, answer),
                "query": query,
                "answer": answer,
                "stratum": n % strata + 1,
            }
            for n, (query, answer) in enumerate(texts)
        ],
        schema={"pair_id": pl.String, "query": pl.String, "answer": pl.String, "stratum": pl.Int64},
    ).with_columns(system=pl.lit(None, pl.String), language=pl.lit(None, pl.String))


def test_a_small_batch_gives_the_first_defects_enough_and_a_large_one_gives_all_the_same() -> None:
    assert list(quotas(400, settings(max_planted_share=0.1)).values()) == [ENOUGH, ENOUGH, 0, 0, 0, 0, 0, 0]
    assert list(quotas(18, settings(max_planted_share=0.1)).values()) == [1, 0, 0, 0, 0, 0, 0, 0]
    assert list(quotas(1790, settings(max_planted_share=0.1)).values()) == [23] * 3 + [22] * 5
    assert set(quotas(10**6, settings(max_planted_share=0.1)).values()) == {100}
    assert set(quotas(3, settings(max_rows_per_defect=7)).values()) == {7}
    assert quotas(100, settings(max_planted_share=0.29, defects=["echo"])) == {Defect.ECHO: 29}


@given(st.integers(0, 20_000), st.floats(0.01, 1), st.integers(1, 200), st.permutations(list(Defect)))
def test_no_more_is_dealt_than_may_be_and_nothing_that_may_be_is_left(
    num_pairs: int, share: float, cap: int, defects: list[Defect]
) -> None:
    share = round(share, 3)
    dealt = quotas(num_pairs, settings(max_planted_share=share, max_rows_per_defect=cap, defects=defects))
    may_be = int(round(share * 1000) * num_pairs // 1000)
    assert sum(dealt.values()) == min(may_be, cap * len(defects))
    assert list(dealt) == defects
    assert list(dealt.values()) == sorted(dealt.values(), reverse=True)
    assert max(dealt.values()) <= cap


def test_what_is_planted_fits_its_table_and_names_the_twin_and_the_defect() -> None:
    pairs = rows()
    planted = plant(pairs, settings(max_rows_per_defect=10))
    tables.enforce(tables.PlantedRows, planted)
    assert Counter(planted["defect"]) == dict.fromkeys(list(Defect), 10)
    twins = planted.join(pairs, left_on="original_pair_id", right_on="pair_id", suffix="_twin")
    assert twins.height == 80
    for row in twins.iter_rows(named=True):
        assert row["pair_id"] == records.pair_id(row["system"], row["query"], row["answer"])
        assert (row["query"] == row["query_twin"]) == (row["defect"] != "invented_terms")
    assert set(planted["pair_id"]).isdisjoint(pairs["pair_id"])


def test_the_twins_of_a_defect_are_distinct_drawn_evenly_from_the_strata_and_shared_between_defects() -> None:
    pairs = rows()
    planted = plant(pairs, settings(max_rows_per_defect=9))
    of_defect: dict[str, list[str]] = dict(planted.group_by("defect").agg("original_pair_id").iter_rows())
    assert len({frozenset(twins) for twins in of_defect.values()}) == 1
    assert all(len(set(twins)) == 9 for twins in of_defect.values())
    strata = pairs.filter(pl.col("pair_id").is_in(of_defect["echo"]))["stratum"]
    assert Counter(strata) == {1: 3, 2: 3, 3: 3}


def test_other_answers_are_a_derangement_inside_the_stratum() -> None:
    pairs = rows()
    planted = plant(pairs, settings(defects=["other_answer"], max_rows_per_defect=60))
    assert planted.height == 60
    origin = dict(pairs.select("answer", "stratum").iter_rows())
    own = dict(pairs.select("pair_id", "stratum").iter_rows())
    assert all(origin[row["answer"]] == own[row["original_pair_id"]] for row in planted.iter_rows(named=True))
    assert planted["answer"].n_unique() == 60
    assert planted.join(pairs, left_on=["original_pair_id", "answer"], right_on=["pair_id", "answer"]).is_empty()


def test_a_pair_that_the_batch_holds_is_never_planted() -> None:
    """Two rows ask the same in other words; one of them has the other's answer and query already."""
    pairs = rows(6, strata=1)
    every = [(q, a) for q in pairs["query"] for a in pairs["answer"]]
    held = pl.DataFrame(
        [
            {
                "pair_id": records.pair_id(None, q, a),
                "query": q,
                "answer": a,
                "stratum": 1,
                "system": None,
                "language": None,
            }
            for q, a in every
        ],
        schema=pairs.select("pair_id", "query", "answer", "stratum", "system", "language").schema,
    )
    assert plant(held, settings(defects=["other_answer"])).is_empty()


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does() -> None:
    pairs = rows()
    first = plant(pairs, settings(max_rows_per_defect=5))
    assert_frame_equal(plant(pairs.reverse(), settings(max_rows_per_defect=5)), first)
    assert not plant(pairs, settings(max_rows_per_defect=5, seed=1)).equals(first)


def test_rows_of_the_same_query_are_drawn_once() -> None:
    pairs = rows(9)
    twice = pl.concat(
        [pairs, pairs.with_columns(answer=pl.col("answer") + "!", pair_id=pl.col("pair_id").str.reverse())]
    )
    assert draw(twice, settings()).height == 9


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_of_no_row_or_one_gets_what_can_be_made(number: int) -> None:
    planted = plant(rows(number), settings(max_rows_per_defect=3))
    made_alone = {"echo", "refusal", "invented_terms", "cut_answer", "filler", "one_token_bug"}
    assert set(planted["defect"]) == (made_alone if number else set())
