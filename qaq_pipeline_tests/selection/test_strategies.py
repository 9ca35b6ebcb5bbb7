"""selection: every strategy on a few hand-made pairs, budgets, ties, filters, random orders, and the controls."""

from __future__ import annotations

import random
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import TypeAdapter

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import RankingSettings
from qaq_pipeline.schema.draws import draws
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.tables import VERDICT, DisagreementScores, RmiScores, dtypes, enforce
from qaq_pipeline.schema.vocabularies import SelectionReason
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.random_order import quotas
from qaq_pipeline.selection.strategies import select, select_all
from qaq_pipeline.selection.verdicts import COMPACT

ROLES = ["strong", "weak"]
MODEL_COLUMNS = {
    "rmi": 1.0,
    "rank": 0.5,
    "stratum": 1,
    "log_ppl_q": 1.0,
    "log_ppl_q_given_a": 1.0,
    "log_ppl_a": 1.0,
    "log_ppl_a_given_q": 1.0,
    "ifd_ppl": 0.5,
    "ifd_loss": 0.5,
    "nll_end": 0.5,
    "num_a_tokens_untruncated": 10,
}
REASONS = ["null_reason_rmi", "null_reason_ifd", "null_reason_end"]
GOLDEN_DRAWS = [
    0.345723643218402,
    0.5877072141512608,
    0.4925553180171599,
    0.781214220750039,
    0.8407682832997067,
    0.6349005200221751,
]
GOLDEN_ORDER = ["a", "c", "b", "f", "d", "e"]
POOL_SIZES = st.integers(1, 30)


def parse(**values: Any) -> Selection:
    return TypeAdapter(Selection).validate_python({"name": "mine"} | values)


def pairs(**columns: list[Any]) -> pl.DataFrame:
    """Candidates a, b, c, …; a column `rank_strong` is `rank` of the strong model; the rest is the same for all."""
    size = len(next(iter(columns.values())))
    pair_ids = [_name(number) for number in range(size)]
    of_pair = {name: columns.get(name, [value] * size) for name, value in {"gap": 0.0, "rank_sum": 1.0}.items()}
    scores, ranks = {}, []
    for role in ROLES:
        values = {"num_q_tokens": 1, "num_a_tokens": 1, "is_truncated": False, "is_short_query": False} | MODEL_COLUMNS
        given = {name: columns.get(f"{name}_{role}", [value] * size) for name, value in values.items()}
        given |= {reason: columns.get(f"{reason}_{role}", [None] * size) for reason in REASONS}
        ranked = zip(given["stratum"], given["rank"], strict=True)
        ranks.append([{"model": role, "stratum": s, "num_strata": 1, "rank": rank} for s, rank in ranked])
        of_model = {name: given.get(name, pair_ids) for name in dtypes(RmiScores)}
        scores[role] = pl.DataFrame(of_model, schema=dtypes(RmiScores))
    known = {"pair_id": pair_ids, "pool_id": ["batch:test"] * size, **of_pair, "ranks": list(zip(*ranks, strict=True))}
    types = {name: dtype for name, dtype in dtypes(DisagreementScores).items() if name in known}
    return candidates(pl.DataFrame(known, schema=types), scores)


def _name(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"z{number:06}"


def taken(verdicts: pl.DataFrame) -> list[str]:
    """The selected pairs, in the order of the selection."""
    return verdicts.filter("is_selected").sort("position")["pair_id"].to_list()


def reasons(verdicts: pl.DataFrame) -> dict[str, str]:
    return dict(verdicts.select("pair_id", "reason").iter_rows())


def half(**values: Any) -> Selection:
    return parse(budget={"fraction": 0.5}, **values)


# --- each strategy


GAP = [0.1, 0.9, None, -0.5, 0.3, 0.2, -0.9]
RANK_SUM = [1.9, 0.4, None, 1.1, 0.2, 1.5, 0.6]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("diff_high", ["b", "e", "f"]),
        ("diff_low", ["g", "d", "a"]),
        ("sum_high", ["a", "f", "d"]),
        ("sum_low", ["e", "b", "g"]),
    ],
)
def test_disagreement_takes_the_extremes_of_what_both_models_could_score(strategy: str, expected: list[str]):
    verdicts = select(pairs(gap=GAP, rank_sum=RANK_SUM), half(strategy=strategy))
    assert taken(verdicts) == expected
    assert verdicts["pool_size"].unique().to_list() == [6]
    assert reasons(verdicts)["c"] == "not_in_pool"


def test_rmi_band_takes_what_lies_in_the_half_open_band():
    frame = pairs(rank_strong=[0.5, 0.75, 0.51, None, 0.76, 0.6, 1.0], rank_weak=[0.6] * 7)
    verdicts = select(frame, parse(strategy="rmi_band", band=(0.5, 0.75)))
    assert taken(verdicts) == ["b", "f", "c"]
    assert set(verdicts.filter("is_selected")["reason"]) == {"in_band"}
    assert reasons(verdicts)["a"] == reasons(verdicts)["e"] == "outside_band"
    assert reasons(verdicts)["d"] == "not_in_pool"
    assert verdicts["cut"].unique().to_list() == [None]


@pytest.mark.parametrize("budget", [{"fraction": 1.0}, {"count": 3}, {"count": 9}, {"answer_tokens": 999}])
def test_where_all_that_could_be_taken_was_there_is_no_cut(budget: dict[str, Any]):
    verdicts = select(pairs(gap=[0.1, 0.4, None, 0.3]), parse(strategy="diff_high", budget=budget))
    assert taken(verdicts) == ["b", "d", "a"]
    assert verdicts["cut"].to_list() == [None] * 4


@pytest.mark.parametrize(
    ("strategy", "column"), [("rmi_band", "rank"), ("ifd", "ifd_ppl"), ("length", "num_a_tokens_untruncated")]
)
def test_the_named_model_decides(strategy: str, column: str):
    values = [6, 5, 7] if strategy == "length" else [0.6, 0.2, 0.1]
    frame = pairs(**{f"{column}_strong": values[::-1], f"{column}_weak": values})
    budget = {} if strategy == "rmi_band" else {"budget": {"count": 1}}
    of_weak = taken(select(frame, parse(strategy=strategy, model="weak", **budget)))
    of_strong = taken(select(frame, parse(strategy=strategy, **budget)))
    assert (of_weak, of_strong) == ((["c"], ["a"]) if strategy == "length" else (["a"], ["c"]))


def test_rmi_top_takes_the_highest_ranks_of_its_model():
    frame = pairs(rank_strong=[0.1, 0.2, 0.3, 0.4, None], rank_weak=[0.9, None, 0.3, 0.8, 0.95])
    assert taken(select(frame, half(strategy="rmi_top"))) == ["d", "c"]
    assert taken(select(frame, half(strategy="rmi_top", model="weak"))) == ["e", "a"]


def test_ifd_takes_the_highest_up_to_the_maximum():
    frame = pairs(
        ifd_ppl_strong=[0.2, 1.0, 1.01, 0.9, None, 0.3, 0.1], ifd_loss_strong=[0.9, 0.1, 0.8, 0.2, 0.3, 0.4, 0.5]
    )
    verdicts = select(frame, half(strategy="ifd"))
    assert taken(verdicts) == ["b", "d", "f"]
    assert (reasons(verdicts)["c"], reasons(verdicts)["e"]) == ("ifd_above_maximum", "not_in_pool")
    assert taken(select(frame, half(strategy="ifd", maximum=None))) == ["c", "b", "d"]
    assert taken(select(frame, half(strategy="ifd", measure="ifd_loss"))) == ["a", "c", "g", "f"]


@pytest.mark.parametrize(("order", "expected"), [("high", ["e", "b"]), ("low", ["d", "a"])])
@pytest.mark.parametrize("measure", ["log_ppl_q", "log_ppl_q_given_a", "log_ppl_a", "log_ppl_a_given_q"])
def test_ppl_takes_either_end_of_its_measure(measure: str, order: str, expected: list[str]):
    frame = pairs(**{f"{measure}_weak": [2.0, 3.0, None, 1.0, 4.0]})
    selection = half(strategy="ppl", measure=measure, order=order, model="weak")
    assert taken(select(frame, selection)) == expected


def test_ppl_never_takes_a_query_left_unscored_for_its_length():
    frame = pairs(log_ppl_q_strong=[9.0, 1.0], null_reason_rmi_strong=["too_few_query_tokens", None])
    verdicts = select(frame, parse(strategy="ppl", measure="log_ppl_q", budget={"count": 2}))
    assert taken(verdicts) == ["b"]


def test_length_takes_the_longest_answers_that_every_model_could_score():
    frame = pairs(num_a_tokens_untruncated_strong=[5, 50, 7, 40, 6], rmi_weak=[1.0, None, 1.0, 1.0, 1.0])
    assert taken(select(frame, half(strategy="length"))) == ["d", "c"]


def test_length_needs_no_rmi_where_none_is_wanted():
    absent = {f"rmi_{role}": [None] * 3 for role in ROLES}
    absent |= {f"null_reason_rmi_{role}": ["not_wanted", "not_wanted", "pair_too_long"] for role in ROLES}
    frame = pairs(num_a_tokens_untruncated_strong=[5, 6, 7], ifd_ppl_weak=[0.5, None, 0.5], **absent)
    verdicts = select(frame, parse(strategy="length", budget={"count": 3}))
    assert taken(verdicts) == ["a"]


def test_random_orders_by_the_draw_of_what_every_model_could_score():
    frame = pairs(rmi_weak=[1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0])
    drawn = dict(zip("abcdefg", draws(pl.Series([*"abcdefg"]), 7), strict=True))
    expected = sorted("abcefg", key=lambda name: drawn[name])
    verdicts = select(frame, half(strategy="random", seed=7))
    assert taken(verdicts) == expected[:3]
    assert verdicts["score"].to_list() == [None if name == "d" else drawn[name] for name in "abcdefg"]
    assert taken(select(frame, half(strategy="random", seed=8))) != expected[:3]


def test_stratified_random_takes_the_quota_of_every_stratum_by_draw():
    strata = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, None]
    frame = pairs(stratum_weak=strata, stratum_strong=[1] * 11)
    drawn = dict(zip("abcdefghijk", draws(pl.Series([*"abcdefghijk"]), 0), strict=True))
    first = {
        s: sorted((n for n, t in zip(drawn, strata, strict=True) if t == s), key=lambda n: drawn[n]) for s in (1, 2, 3)
    }
    verdicts = select(frame, half(strategy="stratified_random", model="weak"))
    assert sorted(taken(verdicts)) == sorted([*first[1][:2], *first[2][:2], *first[3][:1]])
    assert reasons(verdicts)["k"] == "not_in_pool"


# --- random orders


def test_the_draws_of_seed_0_are_these():
    assert draws(pl.Series(["a", "b", "c", "d", "e", "f"]), 0).to_list() == GOLDEN_DRAWS
    verdicts = select(pairs(gap=[0.0] * 6), parse(strategy="random", budget={"count": 6}))
    assert taken(verdicts) == GOLDEN_ORDER


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), share=st.floats(0, 1))
def test_quotas_are_the_largest_remainders(sizes: list[int], share: float):
    n = sum(sizes)
    k = round(share * n)
    exact = {stratum: k * size / n for stratum, size in enumerate(sizes, start=1)}
    naive = {stratum: k * size // n for stratum, size in enumerate(sizes, start=1)}
    remainders = sorted(exact, key=lambda stratum: (-(k * sizes[stratum - 1] % n), stratum))
    for stratum in remainders[: k - sum(naive.values())]:
        naive[stratum] += 1
    assert quotas(dict(enumerate(sizes, start=1)), k) == naive
    assert sum(naive.values()) == k


def test_equal_remainders_go_to_the_lower_stratum():
    assert quotas({3: 10, 1: 10, 2: 10}, 4) == {1: 2, 2: 1, 3: 1}
    assert quotas({}, 0) == {}


@effort(max_examples=30)
@given(strata=st.lists(st.integers(1, 5), min_size=1, max_size=60), fraction=st.floats(0.01, 1))
def test_every_stratum_is_taken_in_proportion_to_one_row(strata: list[int], fraction: float):
    frame = pairs(stratum_strong=strata)
    verdicts = select(frame, parse(strategy="stratified_random", budget={"fraction": fraction}))
    k = len(taken(verdicts))
    for stratum in set(strata):
        in_stratum = verdicts.filter(pl.Series(strata) == stratum)
        assert abs(len(taken(in_stratum)) - k * in_stratum.height / len(strata)) < 1


@pytest.mark.parametrize("num_tokens", range(0, 70, 3))
def test_any_prefix_of_equal_strata_is_in_proportion_to_one_row(num_tokens: int):
    strata = [1 + number % 4 for number in range(61)]
    frame = pairs(num_a_tokens_untruncated_strong=[1] * 61, stratum_strong=strata)
    selection = parse(strategy="stratified_random", budget={"answer_tokens": num_tokens + 1})
    verdicts = select(frame, selection)
    k = min(num_tokens + 1, 61)
    counts = [len(taken(verdicts.filter(pl.Series(strata) == stratum))) for stratum in range(1, 5)]
    assert sum(counts) == k
    assert all(abs(c - k * strata.count(s) / 61) <= 1 for s, c in enumerate(counts, start=1))


# --- budgets, order, reasons


@pytest.mark.parametrize(
    ("fraction", "pool", "expected"),
    [(0.25, 8, 2), (0.25, 10, 3), (0.25, 9, 2), (0.25, 1, 0), (0.5, 1, 1), (1.0, 7, 7), (0.29, 50, 15), (0.1, 5, 1)],
)
def test_a_fraction_rounds_half_up_as_written(fraction: float, pool: int, expected: int):
    frame = pairs(gap=[number / 100 for number in range(pool)] + [None] * 3)
    verdicts = select(frame, parse(strategy="diff_high", budget={"fraction": fraction}))
    assert len(taken(verdicts)) == expected


@pytest.mark.parametrize("count", [1, 3, 99])
def test_a_count_takes_what_there_is(count: int):
    verdicts = select(pairs(gap=[0.1, 0.2, None, 0.3]), parse(strategy="diff_high", budget={"count": count}))
    assert taken(verdicts) == ["d", "b", "a"][:count]


@pytest.mark.parametrize(("budget", "expected"), [(4, []), (5, ["a"]), (14, ["a"]), (15, ["a", "b"]), (99, [*"abcd"])])
def test_a_token_budget_takes_the_longest_prefix_that_fits(budget: int, expected: list[str]):
    frame = pairs(
        gap=[0.4, 0.3, 0.2, 0.1, None],
        num_a_tokens_untruncated_strong=[5, 10, 100, 1, 1] if budget < 99 else [5, 10, 83, 1, 1],
        num_a_tokens_untruncated_weak=[1] * 5,
    )
    verdicts = select(frame, parse(strategy="diff_high", budget={"answer_tokens": budget}))
    assert taken(verdicts) == expected


@pytest.mark.parametrize("strategy", ["diff_high", "diff_low"])
def test_ties_go_by_pair_id_whatever_the_order_of_rows(strategy: str):
    frame = pairs(gap=[0.5, -0.5] * 5000)
    shuffled = frame.sample(fraction=1, shuffle=True, seed=1)
    ordered = frame.filter(model="strong").sort("pair_id")
    tied = ordered["pair_id"].filter(ordered["gap"] == (0.5 if strategy == "diff_high" else -0.5))
    verdicts = select(shuffled, parse(strategy=strategy, budget={"fraction": 0.25}))
    assert taken(verdicts) == tied[:2500].to_list()
    assert verdicts["pair_id"].equals(ordered["pair_id"])


def test_verdicts_tell_score_position_cut_and_pool():
    verdicts = select(pairs(gap=[0.1, 0.4, None, 0.3, 0.2]), half(strategy="diff_high"))
    assert verdicts.drop("selection", "cut", "pool_size").rows() == [
        ("a", False, "below_cut", 0.1, 4),
        ("b", True, "within_budget", 0.4, 1),
        ("c", False, "not_in_pool", None, None),
        ("d", True, "within_budget", 0.3, 2),
        ("e", False, "below_cut", 0.2, 3),
    ]
    assert verdicts.select("selection", "cut", "pool_size").unique().rows() == [("mine", 0.3, 4)]


def test_a_minimum_gap_is_exclusive_and_does_not_shrink_the_pool():
    frame = pairs(gap=[0.1, 0.2, 0.11, 0.0, -0.1, -0.2])
    verdicts = select(frame, half(strategy="diff_high", min_gap=0.1))
    assert taken(verdicts) == ["b", "c"]
    assert reasons(verdicts)["a"] == "gap_below_minimum"
    assert verdicts["position"].to_list() == [None, 1, 2, None, None, None]
    assert verdicts["pool_size"].unique().to_list() == [6]


def test_a_range_of_rank_strong_keeps_out_what_both_models_rank_low():
    frame = pairs(gap=[0.4, 0.3, 0.2, 0.1], rank_strong=[0.5, 0.51, 0.9, 1.0])
    verdicts = select(frame, half(strategy="diff_high", rank_strong=(0.5, 0.9)))
    assert taken(verdicts) == ["b", "c"]
    assert reasons(verdicts)["a"] == reasons(verdicts)["d"] == "rank_strong_out_of_range"


@pytest.mark.parametrize(
    ("ends", "kept"),
    [((0.2, 2.0), ["b", "c"]), ((0.2, None), ["b", "c", "d"]), ((None, 2.0), ["a", "b", "c"]), ((None, None), "abcd")],
)
def test_a_range_of_rmi_strong_keeps_out_mismatches_and_echoes(ends: tuple[float | None, float | None], kept: str):
    frame = pairs(gap=[0.4, 0.3, 0.2, 0.1], rmi_strong=[0.2, 0.3, 2.0, 2.1])
    every = parse(strategy="diff_high", budget={"fraction": 1.0}, rmi_strong=ends)
    verdicts = select(frame, every)
    assert taken(verdicts) == list(kept)
    assert {reasons(verdicts)[name] for name in set("abcd") - set(kept)} <= {"rmi_strong_out_of_range"}


BANDS = [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]


@pytest.mark.parametrize("bands", [BANDS, [(i / 10, (i + 1) / 10) for i in range(10)]])
def test_bands_partition_the_ranks_exactly(bands: list[tuple[float, float]]):
    for m in range(1, 41):
        frame = pairs(rank_strong=[number / m for number in range(1, m + 1)])
        sizes = [len(taken(select(frame, parse(strategy="rmi_band", band=band)))) for band in bands]
        steps = len(bands)
        assert sizes == [(i + 1) * m // steps - i * m // steps for i in range(steps)]


@pytest.mark.parametrize("tied", [2, 3, 4])
def test_ties_are_in_or_out_of_a_band_together(tied: int):
    ranks = [(tied + 1) / 2 / 4] * tied + [number / 4 for number in range(tied + 1, 5)]
    verdicts = select(pairs(rank_strong=ranks), parse(strategy="rmi_band", band=(0.25, 0.5)))
    assert len(taken(verdicts)) == (tied if (tied + 1) / 8 <= 0.5 else 0)


# --- the whole table


def scores_of(size: int, seed: int) -> dict[str, pl.DataFrame]:
    """RmiScores of two models over few distinct values, a tenth of them null."""
    chance = random.Random(seed)
    frames = {}
    for role in ROLES:
        rows = []
        for number in range(size):
            row: dict[str, Any] = dict.fromkeys(dtypes(RmiScores))
            row |= {f"log_ppl_{of}": chance.randint(1, 9) / 4 for of in ("q", "q_given_a", "a", "a_given_q")}
            row |= {"rmi": chance.randint(-9, 9) / 4, "ifd_ppl": chance.randint(1, 9) / 8, "ifd_loss": 0.5}
            row |= {"nll_end": chance.randint(0, 9) / 4}
            if chance.random() < 0.1:
                row |= dict.fromkeys(["rmi", "ifd_ppl", "ifd_loss", "nll_end"])
                row |= dict.fromkeys(REASONS, "pair_too_long")
            row |= dict.fromkeys(["num_q_tokens", "num_a_tokens", "num_a_tokens_untruncated"], chance.randint(1, 99))
            rows.append(row | {"pair_id": f"{number:032x}", "is_truncated": False, "is_short_query": False})
        frames[role] = enforce(RmiScores, pl.DataFrame(rows, schema=dtypes(RmiScores), orient="row"))
    return frames


def candidates_of(scores: dict[str, pl.DataFrame], shuffle: int | None = None) -> pl.DataFrame:
    ranking = RankingSettings(num_strata=4, min_rows_per_stratum=2)
    frame = enforce(DisagreementScores, disagreement_scores(scores, ranking, "batch:test")[0])
    if shuffle is None:
        return candidates(frame, scores)
    shuffled = {role: table.sample(fraction=1, shuffle=True, seed=shuffle) for role, table in scores.items()}
    return candidates(frame.sample(fraction=1, shuffle=True, seed=shuffle), shuffled).sample(
        fraction=1, shuffle=True, seed=shuffle + 1
    )


STRATEGIES = [
    {"strategy": "diff_high", "min_gap": 0.1, "rank_strong": (0.2, 1.0)},
    {"strategy": "diff_low"},
    {"strategy": "sum_high"},
    {"strategy": "sum_low"},
    {"strategy": "rmi_band"},
    {"strategy": "rmi_top", "model": "weak"},
    {"strategy": "ifd"},
    {"strategy": "ppl", "order": "low"},
    {"strategy": "length"},
    {"strategy": "random"},
    {"strategy": "stratified_random", "seed": 3},
]
EVERY_SELECTION = [parse(**values | {"name": f"s{i}"}) for i, values in enumerate(STRATEGIES)]


def test_candidates_hold_the_numbers_of_every_model():
    scores = scores_of(30, seed=1)
    ranked, _ = disagreement_scores(scores, RankingSettings(num_strata=3, min_rows_per_stratum=2), "batch:test")
    frame = candidates(ranked, scores)
    assert frame["model"].to_list() == ["strong"] * 30 + ["weak"] * 30
    flat = to_columns(ranked, "ranks")
    for role in ROLES:
        of_model = frame.filter(model=role)
        assert of_model["pair_id"].equals(ranked["pair_id"])
        for column in ("rank", "stratum", "num_strata"):
            assert of_model[column].to_list() == flat[f"{column}_{role}"].to_list()
        assert of_model.select(scores[role].columns).equals(scores[role])
        assert of_model.select("gap", "rank_sum").equals(ranked.select("gap", "rank_sum"))
        assert of_model["answer_tokens"].equals(scores["strong"]["num_a_tokens_untruncated"])


def test_ranks_and_scores_must_be_of_the_same_pairs():
    ranked, _ = disagreement_scores(scores_of(5, seed=1), RankingSettings(), "batch:test")
    with pytest.raises(ValueError, match="5 pairs are ranked, 'strong' scored 4"):
        candidates(ranked, scores_of(4, seed=1))


@pytest.mark.parametrize("ranked_roles", [["strong"], ["strong", "third", "weak"], ["strong", "other"]])
def test_ranks_and_scores_must_be_of_the_same_models(ranked_roles: list[str]):
    scores = scores_of(5, seed=1)
    ranked, _ = disagreement_scores(scores, RankingSettings(), "batch:test")
    rank = {"stratum": 1, "num_strata": 1, "rank": 0.5}
    of_roles = [{"model": role, **rank} for role in ranked_roles]
    ranks = pl.Series("ranks", [*ranked["ranks"][:-1].to_list(), of_roles], dtype=ranked["ranks"].dtype)
    with pytest.raises(ValueError, match="not every pair is ranked under the models"):
        candidates(ranked.with_columns(ranks), scores)


@effort(max_examples=15)
@given(size=POOL_SIZES, seed=st.integers(0, 999))
def test_verdicts_do_not_depend_on_the_order_of_rows(size: int, seed: int):
    scores = scores_of(size, seed)
    expected = select_all(candidates_of(scores), EVERY_SELECTION)
    assert_frame_equal(select_all(candidates_of(scores, shuffle=seed), EVERY_SELECTION), expected)


@effort(max_examples=15)
@given(size=POOL_SIZES, seed=st.integers(0, 999))
def test_every_verdict_is_consistent(size: int, seed: int):
    frame = candidates_of(scores_of(size, seed))
    for _, verdicts in select_all(frame, EVERY_SELECTION).group_by("selection"):
        assert verdicts.height == size
        assert set(verdicts["reason"]) <= set(SelectionReason)
        chosen = verdicts.filter("is_selected")
        assert set(chosen["reason"]) <= {"within_budget", "in_band"}
        assert chosen["score"].null_count() == 0
        assert sorted(chosen["position"]) == list(range(1, chosen.height + 1))
        outside = verdicts.filter(reason="not_in_pool")
        assert outside["score"].null_count() == outside["position"].null_count() == outside.height
        assert verdicts["pool_size"].unique().to_list() == [size - outside.height]


@pytest.mark.parametrize("published", EVERY_SELECTION, ids=lambda selection: selection.strategy)
def test_controls_have_the_pool_and_the_size_of_the_published_selection(published: Selection):
    scores = scores_of(200, seed=5)
    verdicts = select_all(candidates_of(scores), [published, parse(name="random", strategy="random", seed=9)])
    names = verdicts["selection"].unique(maintain_order=True).to_list()
    assert names == [published.name, "random", "control_random", "control_stratified_random"]
    first, _, *controls = verdicts.partition_by("selection", maintain_order=True)
    for control in controls:
        assert control["is_selected"].sum() == first["is_selected"].sum() > 0
        pool = control.filter(pl.col("reason") != "not_in_pool")["pair_id"]
        assert pool.equals(first.filter(pl.col("reason") != "not_in_pool")["pair_id"])


def test_the_random_control_is_the_order_of_seed_0():
    selections = [parse(strategy="diff_high", budget={"count": 2}), parse(name="random", strategy="random", seed=5)]
    verdicts = select_all(pairs(gap=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), selections)
    assert taken(verdicts.filter(selection="control_random")) == GOLDEN_ORDER[:2]


def test_the_stratified_control_is_a_draw_of_its_own():
    frame = candidates_of(scores_of(400, seed=3))
    published = parse(strategy="diff_high", budget={"fraction": 0.25})
    verdicts = select_all(frame, [published])
    found = [set(taken(verdicts.filter(selection=f"control_{name}"))) for name in ("random", "stratified_random")]
    size = len(found[0])
    assert size == len(found[1]) >= 80
    assert len(found[0] & found[1]) < 0.45 * size  # Independent draws share a quarter.
    same = parse(name="same", strategy="stratified_random", seed=1, budget={"count": size})
    assert found[1] == set(taken(select(frame, same)))


def test_controls_of_a_token_budget_have_the_same_token_budget():
    tokens = [7, 3, 9, 1, 4, 6]
    frame = pairs(gap=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], num_a_tokens_untruncated_strong=tokens)
    verdicts = select_all(frame, [parse(strategy="diff_high", budget={"answer_tokens": 15})])
    drawn, spent = [], 0
    for name in GOLDEN_ORDER:
        spent += tokens["abcdef".index(name)]
        if spent > 15:
            break
        drawn.append(name)
    assert taken(verdicts.filter(selection="control_random")) == drawn


def test_controls_get_no_more_tokens_than_filters_leave():
    frame = pairs(gap=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], num_a_tokens_untruncated_strong=[5] * 6)
    selection = parse(strategy="diff_high", min_gap=0.4, budget={"answer_tokens": 1000})
    verdicts = select_all(frame, [selection])
    assert verdicts.group_by("selection").agg(pl.col("is_selected").sum())["is_selected"].to_list() == [2, 2, 2]


def test_pairs_without_a_stratum_are_one_in_the_stratified_control():
    frame = pairs(stratum_strong=[1, 1, 1, 1, None, None, None, None])
    verdicts = select_all(frame, [half(strategy="ifd")])
    control = verdicts.filter(selection="control_stratified_random")
    assert sum(name in "abcd" for name in taken(control)) == 2
    assert control["pool_size"].unique().to_list() == [8]


@pytest.mark.parametrize("size", [0, 1])
def test_tiny_batches_have_verdicts_of_the_declared_types(size: int):
    verdicts = select_all(candidates_of(scores_of(size, seed=2)), EVERY_SELECTION)
    expected = {"pair_id": pl.String(), **{name: COMPACT.get(name, one.dtype) for name, one in VERDICT.inner.items()}}
    assert verdicts.schema == pl.Schema(expected)
    assert verdicts.height == size * (len(EVERY_SELECTION) + 2)


def test_nothing_scorable_selects_nothing():
    frame = pairs(gap=[None, None], rmi_strong=[None, None])
    verdicts = select_all(frame, [parse(strategy="diff_high")])
    assert set(verdicts["reason"]) == {"not_in_pool"}
    assert verdicts["cut"].null_count() == verdicts.height
