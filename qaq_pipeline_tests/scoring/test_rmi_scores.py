"""rmi_scores: the naive formulas in plain Python, the edges of strata and ranks, and the reasons of nulls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from qaq_pipeline.config.settings import EligibilitySettings, RankingSettings
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.tables import DisagreementScores, Logprobs, RmiScores, dtypes, enforce
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.scoring.rmi_scores import rmi_scores
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.ranks import count_strata

POOL = "batch:test"
Pairs = Sequence[tuple[float, float | None]]
PARTS = {"rmi": ("q", "q_given_a"), "ifd": ("a", "a_given_q")}
FAILURES = ["query_too_long", "pair_too_long", "no_tokens_to_score", "non_finite"]


def pair_id(number: int) -> str:
    return f"{number:032x}"


def logprobs(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """A Logprobs frame. Defaults of a row: 10 nats, 10 tokens, no reason."""
    full = []
    for number, row in enumerate(rows):
        values: dict[str, Any] = dict.fromkeys(dtypes(Logprobs))
        values |= {f"sum_nll_{quantity}": 10.0 for quantity in Quantity}
        values |= {"num_q_tokens": 10, "num_a_tokens": 10, "num_a_tokens_untruncated": 10, "is_truncated": False}
        full.append(values | {"pair_id": pair_id(number)} | row)
    return enforce(Logprobs, pl.DataFrame(full, schema=dtypes(Logprobs), orient="row"))


def scored(rows: list[dict[str, Any]], min_query_tokens: int = 1, short_query_tokens: int = 4) -> pl.DataFrame:
    limits = EligibilitySettings(min_query_tokens=min_query_tokens, short_query_tokens=short_query_tokens)
    return enforce(RmiScores, rmi_scores(logprobs(rows), limits))


def model_scores(pairs: Pairs) -> pl.DataFrame:
    """RmiScores of pairs (log PPL(Q), RMI); a null RMI means that the pair is too long."""
    empty = dict.fromkeys(dtypes(RmiScores))
    rows = [
        empty
        | {
            "pair_id": pair_id(number),
            "log_ppl_q": log_ppl_q,
            "rmi": rmi,
            "null_reason_rmi": "pair_too_long" if rmi is None else None,
            "null_reason_ifd": "not_wanted",
            "null_reason_end": "not_wanted",
            "num_q_tokens": 5,
            "num_a_tokens": 5,
            "num_a_tokens_untruncated": 5,
            "is_truncated": False,
            "is_short_query": False,
        }
        for number, (log_ppl_q, rmi) in enumerate(pairs)
    ]
    return enforce(RmiScores, pl.DataFrame(rows, schema=dtypes(RmiScores), orient="row"))


def ranked(ranking: RankingSettings, **pairs: Pairs) -> tuple[pl.DataFrame, list[str]]:
    """DisagreementScores, with the ranks in columns as well (`rank_strong`), and warnings."""
    frame, warnings = disagreement_scores({role: model_scores(rows) for role, rows in pairs.items()}, ranking, POOL)
    ranks = to_columns(enforce(DisagreementScores, frame).select("ranks"), "ranks")
    return pl.concat([frame, ranks], how="horizontal"), warnings


def settings(num_strata: int = 10, min_rows: int = 1, **values: Any) -> RankingSettings:
    return RankingSettings(num_strata=num_strata, min_rows_per_stratum=min_rows, **values)


def naive_ranks(
    pairs: Sequence[tuple[float, Any]], pool: list[int], ranking: RankingSettings
) -> dict[int, tuple[int, float]]:
    """Stratum and rank of each pair of the pool, by the formulas in readings 9 and 10 of method.md."""
    n = len(pool)
    bins = max(1, min(ranking.num_strata, n // ranking.min_rows_per_stratum))
    by_ppl = sorted(pool, key=lambda number: (pairs[number][0], pair_id(number)))
    stratum = {number: math.floor(i * bins / n) + 1 for i, number in enumerate(by_ppl)}
    ranks = {}
    for number in pool:
        peers = [pairs[other][1] for other in pool if stratum[other] == stratum[number]]
        below = sum(rmi < pairs[number][1] for rmi in peers)
        equal = sum(rmi == pairs[number][1] for rmi in peers)
        ranks[number] = (stratum[number], (below + (equal + 1) / 2) / len(peers))
    return ranks


# Few distinct values, so that ties and duplicate bin edges are the rule.
FEW_VALUES = st.sampled_from([0.0, 0.5, 1.0, 1.25, 3.0])
PAIR = st.tuples(FEW_VALUES, st.one_of(st.none(), FEW_VALUES, st.floats(-5, 5)))


@st.composite
def two_models(draw: st.DrawFn) -> tuple[list[Any], list[Any]]:
    size = draw(st.integers(0, 40))
    return tuple(draw(st.lists(PAIR, min_size=size, max_size=size)) for _ in range(2))  # pyrefly: ignore


# --- rmi_scores


SUMS = st.one_of(st.none(), st.just(0.0), st.floats(0, 1e4))
ROW = st.fixed_dictionaries(
    {
        **{f"sum_nll_{quantity}": SUMS for quantity in Quantity},
        "num_q_tokens": st.integers(1, 6),
        "num_a_tokens": st.integers(1, 6),
        "failure": st.sampled_from(FAILURES),
    }
)


def with_reasons(row: dict[str, Any]) -> dict[str, Any]:
    reasons = {
        f"null_reason_{quantity}": row["failure"] if row[f"sum_nll_{quantity}"] is None else None
        for quantity in Quantity
    }
    return {name: value for name, value in row.items() if name != "failure"} | reasons


@effort(max_examples=40)
@given(st.lists(ROW, max_size=8))
def test_scores_equal_the_naive_formulas(drawn: list[dict[str, Any]]):
    rows = [with_reasons(row) for row in drawn]
    for row, result in zip(rows, scored(rows, min_query_tokens=3).rows(named=True), strict=True):
        tokens = {"q": "num_q_tokens", "q_given_a": "num_q_tokens", "a": "num_a_tokens", "a_given_q": "num_a_tokens"}
        log_ppl: dict[str, Any] = {
            of: None if row[f"sum_nll_{of}"] is None else row[f"sum_nll_{of}"] / row[count]
            for of, count in tokens.items()
        }
        assert {of: result[f"log_ppl_{of}"] for of in tokens} == log_ppl
        assert (result["nll_end"], result["null_reason_end"]) == (row["sum_nll_end"], row["null_reason_end"])
        few = row["num_q_tokens"] < 3
        if few or None in (log_ppl["q"], log_ppl["q_given_a"]):
            assert result["rmi"] is None
        else:
            assert result["rmi"] == log_ppl["q"] - log_ppl["q_given_a"]
        a, a_given_q = log_ppl["a"], log_ppl["a_given_q"]
        if few or a is None or a_given_q is None or a == 0 or a_given_q - a > 709 or a_given_q / a == math.inf:
            assert (result["ifd_ppl"], result["ifd_loss"]) == (None, None)
        else:
            assert result["ifd_ppl"] == pytest.approx(math.exp(a_given_q - a), rel=1e-12, abs=1e-300)
            assert result["ifd_loss"] == a_given_q / a


def test_a_worked_example():
    row = {"sum_nll_q": 30.0, "sum_nll_q_given_a": 12.0, "num_q_tokens": 6}
    row |= {"sum_nll_a": 40.0, "sum_nll_a_given_q": 20.0, "num_a_tokens": 20, "num_a_tokens_untruncated": 90}
    result = scored([row]).row(0, named=True)
    assert (result["log_ppl_q"], result["log_ppl_q_given_a"], result["rmi"]) == (5.0, 2.0, 3.0)
    assert (result["log_ppl_a"], result["log_ppl_a_given_q"]) == (2.0, 1.0)
    assert (result["ifd_ppl"], result["ifd_loss"]) == (pytest.approx(math.exp(-1)), 0.5)
    assert (result["num_a_tokens_untruncated"], result["is_short_query"]) == (90, False)


@pytest.mark.parametrize("score", ["rmi", "ifd"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("query_too_long", "pair_too_long", "query_too_long"),
        (None, "pair_too_long", "pair_too_long"),
        ("not_wanted", "not_wanted", "not_wanted"),
        ("not_wanted", "pair_too_long", "pair_too_long"),
        ("pair_too_long", "not_wanted", "pair_too_long"),
    ],
)
def test_a_missing_sum_gives_its_reason(score: str, first: str | None, second: str | None, expected: str):
    row: dict[str, Any] = {}
    for part, reason in zip(PARTS[score], (first, second), strict=True):
        row |= {f"null_reason_{part}": reason} | ({f"sum_nll_{part}": None} if reason else {})
    result = scored([row]).row(0, named=True)
    other = "ifd" if score == "rmi" else "rmi"
    assert (result[f"null_reason_{score}"], result[f"null_reason_{other}"]) == (expected, None)


def test_a_query_under_the_minimum_keeps_its_facts_and_has_no_score():
    result = scored([{"num_q_tokens": 2}, {"num_q_tokens": 3}], min_query_tokens=3)
    assert result["null_reason_rmi"].to_list() == ["too_few_query_tokens", None]
    assert result["null_reason_ifd"].to_list() == ["too_few_query_tokens", None]
    assert result["rmi"].to_list() == [None, 0.0]
    assert result["ifd_loss"].to_list() == [None, 1.0]
    assert result["log_ppl_q"].to_list() == [5.0, pytest.approx(10 / 3)]


def test_the_end_of_the_answer_needs_neither_a_long_query_nor_another_sum():
    unscored: dict[str, Any] = {f"sum_nll_{part}": None for part in (*PARTS["rmi"], *PARTS["ifd"])}
    unscored |= {f"null_reason_{part}": "not_wanted" for part in (*PARTS["rmi"], *PARTS["ifd"])} | {"num_q_tokens": 1}
    ended = {"sum_nll_end": 0.25}
    cut = {"sum_nll_end": None, "null_reason_end": "answer_truncated"}
    result = scored([unscored | ended, cut], min_query_tokens=3)
    assert result["nll_end"].to_list() == [0.25, None]
    assert result["null_reason_end"].to_list() == [None, "answer_truncated"]
    assert result["null_reason_rmi"].to_list() == ["not_wanted", None]


def test_the_reason_of_a_sum_goes_before_that_of_a_short_query():
    unscored: dict[str, Any] = {f"sum_nll_{part}": None for part in PARTS["rmi"]}
    unscored |= {f"null_reason_{part}": "no_tokens_to_score" for part in PARTS["rmi"]} | {"num_q_tokens": 0}
    assert scored([unscored])["null_reason_rmi"].to_list() == ["no_tokens_to_score"]


@pytest.mark.parametrize(
    ("nll_a", "nll_a_given_q"), [(0.0, 10.0), (0.0, 0.0), (0.0, 1e9), (1.0, 1e9), (5e-324, 1e5), (1e-300, 10.0**12)]
)
def test_what_is_not_finite_is_null_with_a_reason(nll_a: float, nll_a_given_q: float):
    result = scored([{"sum_nll_a": nll_a, "sum_nll_a_given_q": nll_a_given_q}]).row(0, named=True)
    assert (result["ifd_ppl"], result["ifd_loss"], result["null_reason_ifd"]) == (None, None, "non_finite")
    assert (result["rmi"], result["null_reason_rmi"]) == (0.0, None)


def test_short_queries_are_flagged_and_scored():
    result = scored([{"num_q_tokens": 3}, {"num_q_tokens": 4}])
    assert result["is_short_query"].to_list() == [True, False]
    assert result["rmi"].null_count() == 0


def test_scores_do_not_depend_on_the_order_or_the_number_of_rows():
    rows = [{"sum_nll_q": 10 + 0.7 * number, "num_q_tokens": 49, "num_a_tokens": 49} for number in range(50)]
    frame = logprobs(rows)
    limits = EligibilitySettings(min_query_tokens=1, short_query_tokens=4)
    together = rmi_scores(frame, limits)
    assert_frame_equal(rmi_scores(frame.sample(fraction=1, shuffle=True, seed=1), limits), together)
    one_by_one = pl.concat([rmi_scores(part, limits) for part in frame.iter_slices(1)])
    assert_frame_equal(one_by_one, together, check_exact=True)


def test_no_rows_give_an_empty_table():
    assert scored([]).schema == pl.Schema(dtypes(RmiScores))


# --- strata, ranks, gap


@pytest.mark.parametrize("strata_from", ["own", "strong"])
@effort(max_examples=40)
@given(models=two_models(), num_strata=st.integers(1, 12), min_rows=st.integers(1, 8))
def test_strata_ranks_and_gap_equal_the_naive_formulas(
    strata_from: str, models: tuple[list[Any], list[Any]], num_strata: int, min_rows: int
):
    strong, weak = models
    ranking = settings(num_strata, min_rows, strata_from=strata_from)
    frame, _ = ranked(ranking, strong=strong, weak=weak)
    weak_binned = weak
    pools = [[number for number, (_, rmi) in enumerate(model) if rmi is not None] for model in models]
    if strata_from == "strong":
        weak_binned = [(ppl, rmi) for (ppl, _), (_, rmi) in zip(strong, weak, strict=True)]
        pools[1] = [number for number in pools[1] if number in pools[0]]
    r_strong, r_weak = naive_ranks(strong, pools[0], ranking), naive_ranks(weak_binned, pools[1], ranking)
    for number, row in enumerate(frame.rows(named=True)):
        assert (row["stratum_strong"], row["rank_strong"]) == r_strong.get(number, (None, None))
        assert (row["stratum_weak"], row["rank_weak"]) == r_weak.get(number, (None, None))
        if number in r_strong and number in r_weak:
            assert row["gap"] == pytest.approx(r_strong[number][1] - r_weak[number][1], abs=1e-14)
            assert row["rank_sum"] == pytest.approx(r_strong[number][1] + r_weak[number][1], abs=1e-14)
        else:
            assert (row["gap"], row["rank_sum"], row["null_reason"]) == (None, None, "pair_too_long")


def test_duplicate_ppl_edges_do_not_merge_strata():
    frame, warnings = ranked(settings(4), strong=[(1.0, 0.0)] * 8, weak=[(1.0, 0.0)] * 8)
    assert frame["stratum_strong"].to_list() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert warnings == []


def test_strata_differ_in_size_by_one_at_most():
    for n in range(1, 60):
        pairs = [(float(number % 3), 0.0) for number in range(n)]
        sizes = ranked(settings(7), strong=pairs, weak=pairs)[0]["stratum_strong"].value_counts()["count"]
        assert len(sizes) == min(7, n)
        assert sizes.max() - sizes.min() <= 1  # pyrefly: ignore


def test_every_rank_is_the_float_of_its_fraction():
    for m in range(1, 60):
        pairs = [(1.0, float(number)) for number in range(m)]
        frame, _ = ranked(settings(1), strong=pairs, weak=pairs)
        assert frame["rank_strong"].to_list() == [(number + 1) / m for number in range(m)]


def test_ties_get_their_average_rank():
    pairs = [(1.0, rmi) for rmi in (3.0, 1.0, 3.0, 2.0, 3.0)]
    frame, _ = ranked(settings(1), strong=pairs, weak=pairs)
    assert frame["rank_strong"].to_list() == [0.8, 0.2, 0.8, 0.4, 0.8]


def test_equal_gaps_are_equal_floats():
    strong = [(1.0, float(number)) for number in range(10)]
    weak = [(1.0, float(number)) for number in (9, 0, 1, 2, 3, 4, 5, 6, 7, 8)]
    frame, _ = ranked(settings(1), strong=strong, weak=weak)
    assert frame["gap"].to_list() == [-0.9] + [0.1] * 9


def test_the_unscorable_are_outside_bins_and_ranks():
    strong = [(1.0, 1.0), (0.0, None), (2.0, 2.0), (3.0, 3.0)]
    weak = [(1.0, 1.0), (2.0, 2.0), (0.0, None), (3.0, 3.0)]
    frame, _ = ranked(settings(3), strong=strong, weak=weak)
    assert frame["stratum_strong"].to_list() == [1, None, 2, 3]
    assert frame["stratum_weak"].to_list() == [1, 2, None, 3]
    assert frame["gap"].to_list() == [0.0, None, None, 0.0]
    assert frame["null_reason"].to_list() == [None, "pair_too_long", "pair_too_long", None]


def test_the_null_reason_is_the_strong_models_first():
    strong = model_scores([(1.0, None), (1.0, 1.0)])
    weak = model_scores([(1.0, None), (1.0, None)]).with_columns(null_reason_rmi=pl.lit("query_too_long"))
    frame, _ = disagreement_scores({"strong": strong, "weak": weak}, settings(), POOL)
    assert frame["null_reason"].to_list() == ["pair_too_long", "query_too_long"]


def test_strata_from_the_strong_model_are_those_of_pairs_that_both_can_score():
    strong = [(1.0, 1.0), (2.0, None), (3.0, 1.0), (4.0, 2.0)]
    weak = [(9.0, 5.0), (8.0, 6.0), (7.0, 7.0), (6.0, 8.0)]
    frame, _ = ranked(settings(3, strata_from="strong"), strong=strong, weak=weak)
    assert frame["stratum_weak"].to_list() == [1, None, 2, 3]


def test_every_model_is_in_the_long_form_in_order():
    pairs = [(1.0, 1.0), (2.0, None)]
    frame, _ = ranked(settings(2), weak=pairs, strong=pairs, middle=[(1.0, None), (2.0, 3.0)])
    assert frame["ranks"].to_list() == [
        [
            {"model": "middle", "stratum": None, "num_strata": 1, "rank": None},
            {"model": "strong", "stratum": 1, "num_strata": 1, "rank": 1.0},
            {"model": "weak", "stratum": 1, "num_strata": 1, "rank": 1.0},
        ],
        [
            {"model": "middle", "stratum": 1, "num_strata": 1, "rank": 1.0},
            {"model": "strong", "stratum": None, "num_strata": 1, "rank": None},
            {"model": "weak", "stratum": None, "num_strata": 1, "rank": None},
        ],
    ]


@pytest.mark.parametrize(("rows", "strata"), [(0, 0), (1, 1), (19, 1), (39, 1), (40, 2), (199, 9), (10_000, 10)])
def test_no_stratum_is_smaller_than_the_minimum(rows: int, strata: int):
    assert count_strata(rows, RankingSettings()) == strata


def test_fewer_strata_come_with_a_warning():
    pairs = [(float(number), 1.0 if number < 34 else None) for number in range(130)]
    frame, warnings = ranked(RankingSettings(), strong=pairs, weak=[(1.0, 1.0)] * 130)
    assert frame["num_strata_strong"].unique().to_list() == [1]
    assert warnings == [
        "model 'strong': 34 of 130 pairs can be ranked, so 1 stratum instead of 10: a stratum holds at least 20 pairs",
        "model 'weak': 130 of 130 pairs can be ranked, so 6 strata instead of 10: a stratum holds at least 20 pairs",
    ]


def test_nothing_scorable_has_no_strata():
    frame, warnings = ranked(settings(), strong=[(1.0, None)] * 2, weak=[(1.0, 1.0)] * 2)
    assert (frame["num_strata_strong"].to_list(), frame["rank_strong"].to_list()) == ([0, 0], [None, None])
    assert warnings[0] == "model 'strong': none of 2 pairs can be ranked"


def test_one_pair_is_one_stratum_of_rank_one():
    frame, _ = ranked(RankingSettings(), strong=[(1.0, -3.0)], weak=[(1.0, 4.0)])
    assert frame.select("stratum_strong", "rank_strong", "rank_weak", "gap", "rank_sum").row(0) == (1, 1, 1, 0, 2)


def test_an_empty_batch_gives_an_empty_table_without_warnings():
    frame, warnings = ranked(RankingSettings(), strong=[], weak=[])
    assert frame.schema == pl.Schema(dtypes(DisagreementScores))
    assert warnings == []


@effort(max_examples=40)
@given(models=two_models(), seed=st.integers(0, 99))
def test_ranks_do_not_depend_on_the_order_of_rows(models: tuple[list[Any], list[Any]], seed: int):
    scores = dict(zip(("strong", "weak"), map(model_scores, models), strict=True))
    shuffled = {role: frame.sample(fraction=1, shuffle=True, seed=seed) for role, frame in scores.items()}
    expected, _ = disagreement_scores(scores, settings(3), POOL)
    assert_frame_equal(disagreement_scores(shuffled, settings(3), POOL)[0], expected, check_exact=True)


def test_models_must_have_scored_the_same_pairs():
    pair = (1.0, 1.0)
    with pytest.raises(ValueError, match="strong: 3 pairs, weak: 2 pairs"):
        ranked(settings(), strong=[pair] * 3, weak=[pair] * 2)
    with pytest.raises(ValueError, match=r"\['weak'\] are missing"):
        ranked(settings(), strong=[pair])
