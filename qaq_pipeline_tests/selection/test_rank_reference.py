"""reference: ranks and cuts against a frozen pool, which of its own batch are the in-batch ones; drift; the asset."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from hypothesis import assume, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import TypeAdapter

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import RankingSettings, Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.lm import causal_lm
from qaq_pipeline.orchestration.jobs import build_job_defs
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.reports.drift import Drift, drift
from qaq_pipeline.runs import refresh, registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import Events, RunError
from qaq_pipeline.schema import vocabularies
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import DisagreementScores, RankReference, RmiScores, dtypes, enforce
from qaq_pipeline.schema.vocabularies import NullReason
from qaq_pipeline.selection import disagreement_scores, rank_reference, ranks
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.rank_reference import reference_candidates
from qaq_pipeline.selection.stored_reference import NAME
from qaq_pipeline.selection.strategies import select, select_all
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import SAMPLES, write_jsonl
from qaq_pipeline_tests.end_to_end.test_pipeline import (
    HandMadeRuntime,
    code_versions,
    curate,
    latest,
    run_stages,
    table,
)
from qaq_pipeline_tests.orchestration import test_checks
from qaq_pipeline_tests.support.frames import pair_name, rmi_rows
from qaq_pipeline_tests.support.sentences import Check

REFERENCE_JOB = PIPELINE["rank_reference"].job
SELECTING = PIPELINE["disagreement_scores"].job

SettingsFor = Callable[..., Settings]
Deliver = Callable[..., Path]
Scores = dict[str, pl.DataFrame]

ROLES = ["strong", "weak"]
POOL = "reference:r1:0"


def ranking(num_strata: int = 3, min_rows: int = 1, **values: Any) -> RankingSettings:
    return RankingSettings(num_strata=num_strata, min_rows_per_stratum=min_rows, **values)


def scores(strong: Sequence[Sequence[Any]], weak: Sequence[Sequence[Any]], first: int = 1) -> Scores:
    """RmiScores of the pairs `first`, `first` + 1, …: (log PPL(Q), RMI or None) of each, under each model."""
    return {role: _model_scores(rows, first) for role, rows in (("strong", strong), ("weak", weak))}


def _model_scores(rows: Sequence[Sequence[Any]], first: int) -> pl.DataFrame:
    changes = [
        {
            "pair_id": pair_name(first + number),
            "log_ppl_q": log_ppl_q,
            "rmi": rmi,
            "null_reason_rmi": None if rmi is not None else NullReason.NON_FINITE.value,
            "ifd_ppl": 0.3 * (number % 5),
            "num_a_tokens_untruncated": 5 + number % 3,
        }
        for number, (log_ppl_q, rmi) in enumerate(rows)
    ]
    return rmi_rows(*changes)


def alike(*rows: Sequence[Any], first: int = 1) -> Scores:
    """Scores that both models agree on."""
    return scores(rows, rows, first)


def freeze(*batches: Scores, how: RankingSettings | None = None) -> pl.DataFrame:
    frame, _ = rank_reference.freeze(batches, how or ranking())
    return enforce(RankReference, frame)


def against(batch: Scores, frozen: pl.DataFrame, how: RankingSettings | None = None) -> pl.DataFrame:
    return enforce(DisagreementScores, rank_reference.disagreement_scores(batch, frozen, how or ranking(), POOL))


def wide(ranked: pl.DataFrame) -> pl.DataFrame:
    """The ranks in columns: `rank_strong`."""
    return to_columns(ranked, "ranks")


def choose(**values: Any) -> Selection:
    return TypeAdapter(Selection).validate_python({"name": "mine"} | values)


def budget(**values: Any) -> dict[str, Any]:
    return {"budget": values}


SELECTIONS = [
    choose(name="diff_high", strategy="diff_high", **budget(fraction=0.4)),
    choose(name="diff_low", strategy="diff_low", **budget(count=2), min_gap=-0.5),
    choose(name="sum_high", strategy="sum_high", **budget(answer_tokens=20), rank_strong=(0.2, 0.9)),
    choose(name="sum_low", strategy="sum_low", **budget(fraction=0.5)),
    choose(name="band", strategy="rmi_band", band=(0.25, 0.75)),
    choose(name="rmi_top", strategy="rmi_top", **budget(count=3), model="weak"),
    choose(name="ifd", strategy="ifd", **budget(fraction=0.5)),
    choose(name="ppl", strategy="ppl", measure="log_ppl_q", order="low", **budget(answer_tokens=12)),
    choose(name="length", strategy="length", **budget(fraction=0.3)),
    choose(name="random", strategy="random", seed=3, **budget(count=4)),
    choose(name="stratified_rows", strategy="stratified_random", **budget(count=5)),
    choose(name="stratified_tokens", strategy="stratified_random", **budget(answer_tokens=25)),
]

# Few distinct values, so that ties and duplicate edges are the rule.
FEW_VALUES = st.sampled_from([0.0, 0.5, 1.0, 1.25, 3.0])
PAIR = st.tuples(FEW_VALUES, st.one_of(st.none(), FEW_VALUES, st.floats(-5, 5)))
RANKINGS = st.builds(
    ranking, num_strata=st.integers(1, 6), min_rows=st.integers(1, 4), strata_from=st.sampled_from(["own", "strong"])
)


@st.composite
def batches(draw: st.DrawFn, first: int = 1, min_size: int = 1) -> Scores:
    size = draw(st.integers(min_size, 30))
    strong, weak = (draw(st.lists(PAIR, min_size=size, max_size=size)) for _ in ROLES)
    return scores(strong, weak, first)


def freeze_or_skip(batch: Scores, how: RankingSettings) -> pl.DataFrame:
    pools = ranks.pools(batch, how)
    assume(all(pool["rmi"].count() > 0 for pool in pools.values()))
    return freeze(batch, how=how)


# --- its own batch --------------------------------------------------------------------------------------------------


@given(batch=batches(), how=RANKINGS)
@effort(max_examples=60)
@pytest.mark.slow
def test_its_own_batch_has_its_in_batch_ranks_and_verdicts_to_the_last_bit(batch: Scores, how: RankingSettings) -> None:
    frozen = freeze_or_skip(batch, how)
    in_batch, _ = disagreement_scores.disagreement_scores(batch, how, POOL)
    ranked = against(batch, frozen, how)
    assert_frame_equal(ranked, in_batch, check_exact=True)
    own = reference_candidates(frozen, ROLES)
    expected = select_all(candidates(in_batch, batch), SELECTIONS)
    found = select_all(candidates(ranked, batch), SELECTIONS, own)
    assert_frame_equal(found, expected, check_exact=True)


@given(batch=batches())
@effort(max_examples=30)
def test_a_reference_that_took_nothing_takes_nothing(batch: Scores) -> None:
    frozen = freeze_or_skip(batch, ranking())
    nothing = choose(strategy="rmi_top", **budget(answer_tokens=1))
    pairs = candidates(against(batch, frozen), batch)
    verdicts = select(pairs, nothing, reference_candidates(frozen, ROLES))
    assert not verdicts["is_selected"].any()
    assert verdicts["cut"].null_count() == verdicts.height


# --- other batches --------------------------------------------------------------------------------------------------


def naive_against(
    own: Sequence[tuple[float, float]], row: tuple[float, float], pair_id: str, num_strata: int
) -> tuple[int, float]:
    """Stratum and rank by the formulas: `own` are the reference's (log PPL(Q), RMI), of the pairs 1, 2, 3, …"""
    n = len(own)
    in_order = sorted(range(n), key=lambda number: (own[number][0], pair_name(number + 1)))
    members: dict[int, list[int]] = {}
    for place, number in enumerate(in_order):
        members.setdefault(place * num_strata // n + 1, []).append(number)
    stratum = num_strata
    for candidate, numbers in sorted(members.items(), reverse=True):
        last = numbers[-1]
        if (own[last][0], pair_name(last + 1)) >= (row[0], pair_id):
            stratum = candidate
    peers = [own[number][1] for number in members[stratum]]
    less, equal = sum(rmi < row[1] for rmi in peers), sum(rmi == row[1] for rmi in peers)
    return stratum, min(1, (less + (equal + 1) / 2) / len(peers))


SCORED = st.tuples(st.one_of(FEW_VALUES, st.floats(0, 6)), st.one_of(FEW_VALUES, st.floats(-5, 5)))


@given(
    own=st.lists(SCORED, min_size=1, max_size=25),
    rows=st.lists(SCORED, min_size=1, max_size=25),
    first=st.integers(1, 40),
    num_strata=st.integers(1, 5),
)
@effort(max_examples=60)
def test_other_pairs_have_the_ranks_of_the_naive_formula(
    own: list[tuple[float, float]], rows: list[tuple[float, float]], first: int, num_strata: int
) -> None:
    how = ranking(num_strata)
    found = wide(against(alike(*rows, first=first), freeze(alike(*own), how=how), how))
    bins = min(num_strata, len(own))
    expected = [naive_against(own, row, pair_name(first + number), bins) for number, row in enumerate(rows)]
    assert list(zip(found["stratum_strong"], found["rank_strong"], strict=True)) == expected
    assert found["num_strata_strong"].unique().to_list() == [bins]


def test_rows_beyond_every_edge_and_every_rmi_of_the_reference_have_a_stratum_and_a_rank() -> None:
    frozen = freeze(alike((1.0, 0.1), (1.5, 0.2), (2.0, 0.3), (2.5, 0.4)), how=ranking(2))
    ranked = wide(against(alike((0.2, -9.0), (9.0, 9.0), (1.7, 0.25), (9.0, 0.35), first=11), frozen, ranking(2)))
    assert ranked["stratum_strong"].to_list() == [1, 2, 2, 2]
    assert ranked["rank_strong"].to_list() == [0.25, 1.0, 0.25, 0.75]
    assert ranked["gap"].to_list() == [0.0] * 4


def test_an_equal_edge_is_told_apart_by_pair_id() -> None:
    frozen = freeze(alike(*[(1.0, 0.1 * number) for number in range(4)], first=10), how=ranking(2))
    # The edge of the first stratum is (1.0, pair 11).
    assert frozen.filter(model="weak", stratum=1)["pair_id"].to_list() == [pair_name(10), pair_name(11)]
    below, beyond = (wide(against(alike((1.0, 0.0), first=number), frozen, ranking(2))) for number in (9, 12))
    assert (below["stratum_weak"].item(), beyond["stratum_weak"].item()) == (1, 2)


def test_what_a_model_could_not_score_is_in_no_stratum_and_has_its_reason() -> None:
    frozen = freeze(alike((1.0, 0.1), (2.0, 0.2)))
    ranked = wide(against(scores([(1.0, None), (1.0, 0.1)], [(1.0, 0.3), (1.0, None)]), frozen))
    assert ranked["rank_strong"].null_count() == ranked["rank_weak"].null_count() == 1
    assert ranked["gap"].to_list() == [None, None]
    assert ranked["null_reason"].to_list() == ["non_finite"] * 2


def test_a_batch_without_pairs_has_no_ranks_and_no_drift() -> None:
    frozen = freeze(alike((1.0, 0.1), (2.0, 0.2)))
    assert against(alike(), frozen).is_empty()
    assert drift(alike(), frozen) == Drift({}, 0.0)


def test_with_the_strata_of_the_strong_model_so_are_those_of_the_reference() -> None:
    how = ranking(2, strata_from="strong")
    rows = [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3), (4.0, 0.4)]
    frozen = freeze(scores(rows, rows[::-1]), how=how)
    assert frozen.filter(model="weak")["stratum_log_ppl_q"].to_list() == [1.0, 2.0, 3.0, 4.0]
    ranked = wide(against(scores([(1.5, 0.1), (3.5, 0.1)], [(9.0, 0.1), (0.1, 0.1)], first=11), frozen, how))
    assert ranked["stratum_weak"].to_list() == ranked["stratum_strong"].to_list() == [1, 2]


def test_a_frozen_cut_decides_and_not_a_top_k() -> None:
    rows = [(1.0, number) for number in range(8)]
    frozen = freeze(alike(*rows), how=ranking(1))
    top = choose(strategy="rmi_top", **budget(fraction=0.25))
    # The last of the reference's upper quarter has the rank 7 / 8.
    batch = alike((1.0, 5.5), (1.0, 6.5), (1.0, 7), (1.0, 9.5), (1.0, 1), first=21)
    ranked = against(batch, frozen, ranking(1))
    verdicts = select(candidates(ranked, batch), top, reference_candidates(frozen, ROLES))
    assert verdicts["is_selected"].to_list() == [False, True, True, True, False]
    assert verdicts["position"].to_list() == [4, 3, 1, 2, 5]
    assert (verdicts["cut"].unique().to_list(), verdicts["pool_size"].unique().to_list()) == ([0.875], [5])
    assert verdicts["reason"].to_list() == ["below_cut", *["within_budget"] * 3, "below_cut"]


def test_equal_scores_are_taken_up_to_the_pair_id_of_the_cut() -> None:
    frozen = freeze(alike(*[(1.0, 0.5)] * 4, first=10), how=ranking(1))
    top = choose(strategy="rmi_top", **budget(count=2))
    batch = alike(*[(1.0, 0.5)] * 4, first=9)
    pairs = candidates(against(batch, frozen, ranking(1)), batch)
    verdicts = select(pairs, top, reference_candidates(frozen, ROLES))
    assert verdicts["is_selected"].to_list() == [True, True, True, False]


@pytest.mark.parametrize(
    "values",
    [budget(fraction=1.0), budget(count=99), budget(answer_tokens=999), {"rank_strong": (0.5, 1)} | budget(count=7)],
)
def test_a_budget_that_cut_nothing_off_refuses_no_pair_of_a_worse_batch(values: dict[str, Any]) -> None:
    frozen = freeze(alike(*[(1.0, 0.1 * number) for number in range(8)]), how=ranking(1))
    all_of_it = choose(strategy="diff_high", **values)
    batch = scores([(1.0, 0.45), (1.0, -5.0)], [(1.0, 9.0)] * 2, first=21)
    pairs = candidates(against(batch, frozen, ranking(1)), batch)
    own = reference_candidates(frozen, ROLES)
    assert pairs["gap"].max() < own["gap"].min()  # type: ignore[operator]
    verdicts = select(pairs, all_of_it, own)
    expected = [True, all_of_it.rank_strong is None]  # type: ignore[union-attr]
    assert verdicts["is_selected"].to_list() == expected
    assert verdicts["cut"].to_list() == [None, None]


def test_a_changed_budget_needs_no_new_reference() -> None:
    batch = alike(*[(1.0, 0.1 * number) for number in range(10)])
    frozen = freeze(batch, how=ranking(1))
    pairs = candidates(against(batch, frozen, ranking(1)), batch)
    own = reference_candidates(frozen, ROLES)
    for count in (1, 4, 10):
        top = choose(strategy="rmi_top", **budget(count=count))
        assert select(pairs, top, own)["is_selected"].sum() == count


def test_random_selections_and_controls_are_as_large_in_a_batch_as_its_share_asks_for() -> None:
    frozen = freeze(alike(*[(0.1 * number, 0.1 * number) for number in range(20)]), how=ranking(2))
    own = reference_candidates(frozen, ROLES)
    batch = alike(*[(0.2 * number, 0.2 * number) for number in range(10)], first=100)
    pairs = candidates(against(batch, frozen, ranking(2)), batch)
    for strategy in ("random", "stratified_random"):
        for values in ({"fraction": 0.3}, {"count": 6}):
            drawn = select(pairs, choose(strategy=strategy, **budget(**values)), own)
            assert drawn["is_selected"].sum() == 3
    published = choose(name="top", strategy="rmi_top", **budget(count=5))
    sizes = select_all(pairs, [published], own).group_by("selection").agg(pl.sum("is_selected"))
    # The two best of five in each stratum of the batch rank as high as the fifth best of the reference.
    assert sizes["is_selected"].to_list() == [2, 2, 2]


def test_a_control_has_the_answer_tokens_that_were_taken_and_not_the_budget_of_the_reference() -> None:
    frozen = freeze(alike(*[(1.0, 0.1 * number) for number in range(40)]), how=ranking(1))
    own = reference_candidates(frozen, ROLES)
    batch = alike(*[(1.0, 0.4 * number + 0.05) for number in range(10)], first=100)
    pairs = candidates(against(batch, frozen, ranking(1)), batch)
    published = choose(name="top", strategy="rmi_top", **budget(answer_tokens=60))
    verdicts = select_all(pairs, [published], own).join(
        pairs.filter(model="strong").select("pair_id", tokens="num_a_tokens_untruncated"), on="pair_id"
    )
    taken = dict(verdicts.filter("is_selected").group_by("selection").agg(pl.sum("tokens")).iter_rows())
    assert 0 < taken["top"] < 60
    assert all(0 <= taken["top"] - taken[f"control_{strategy}"] < 7 for strategy in ("random", "stratified_random"))


# --- what it is made of ---------------------------------------------------------------------------------------------


def test_a_pair_of_two_batches_counts_once_as_in_the_first() -> None:
    first, second = alike((1.0, 0.1), (2.0, 0.2)), alike((9.0, 9.0), (3.0, 0.3), first=2)
    frozen = freeze(first, second)
    both = alike((1.0, 0.1), (2.0, 0.2), (3.0, 0.3))
    expected, _ = disagreement_scores.disagreement_scores(both, ranking(), POOL)
    assert frozen.filter(model="strong")["rmi"].to_list() == [0.1, 0.2, 0.3]
    assert_frame_equal(against(both, frozen), expected, check_exact=True)
    assert freeze(second, first).filter(model="strong")["rmi"].to_list() == [0.1, 9.0, 0.3]


@given(first=batches(), second=batches(first=15), how=RANKINGS)
@effort(max_examples=30)
def test_two_batches_are_ranked_as_their_union(first: Scores, second: Scores, how: RankingSettings) -> None:
    known = first["strong"].select("pair_id")
    union = {role: pl.concat([first[role], second[role].join(known, on="pair_id", how="anti")]) for role in ROLES}
    frozen = freeze_or_skip(union, how)
    assert_frame_equal(freeze(first, second, how=how), frozen, check_exact=True)


def test_a_reference_without_a_pair_that_can_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the models \['weak'\] can rank no pair"):
        freeze(scores([(1.0, 0.1)], [(1.0, None)]))


def test_a_model_that_the_reference_does_not_know_is_refused() -> None:
    batch = alike((1.0, 0.1))
    with pytest.raises(
        ValueError, match=r"has scores of the models \['strong', 'weak'\], not of \['third'\]; build one under"
    ):
        against(batch | {"third": batch["weak"]}, freeze(batch))


def test_a_small_reference_warns_of_its_strata(check_sentence: Check) -> None:
    _, warnings = rank_reference.freeze([alike((1.0, 0.1), (2.0, 0.2))], ranking(5, 2))
    assert len(warnings) == 2
    check_sentence(warnings[0])


@pytest.mark.parametrize(
    ("pool_id", "name"), [("batch:b1", None), (rank_reference.pool_id("r1", "0f"), "r1"), ("batch:reference", None)]
)
def test_a_pool_id_tells_the_name_of_its_reference(pool_id: str, name: str | None) -> None:
    assert rank_reference.name_in(pool_id) == name


# --- drift ----------------------------------------------------------------------------------------------------------


def test_a_batch_has_no_drift_from_itself_and_a_shifted_one_has() -> None:
    values = np.random.default_rng(1).normal(2.0, 0.3, size=(400, 2)).tolist()
    frozen = freeze(alike(*values))
    names = {f"{m}_{q}_{role}" for m in ("psi", "ks") for q in ("log_ppl_q", "rmi") for role in ROLES}
    assert drift(alike(*values), frozen) == Drift(dict.fromkeys(names, 0.0), 200.0)
    shifted = alike(*[(log_ppl_q, rmi - 1.0) for log_ppl_q, rmi in values])
    found = drift(shifted, frozen).statistics
    assert found["psi_log_ppl_q_strong"] == 0.0
    assert found["psi_rmi_strong"] > 2.0
    assert found["ks_rmi_weak"] > 0.8


def test_psi_is_that_of_its_formula() -> None:
    frozen = freeze(alike(*[(1.0, 0.1 * number) for number in range(20)]))
    # Two rows of the reference in each of ten bins; of the batch all five in the last.
    found = drift(alike(*[(1.0, 1.85)] * 5, first=50), frozen)
    share, empty, full = 2.5 / 25, 0.5 / 10, 5.5 / 10
    expected = 9 * (empty - share) * math.log(empty / share) + (full - share) * math.log(full / share)
    assert found.statistics["psi_rmi_strong"] == pytest.approx(expected, rel=1e-12)
    assert found.evidence == 5 * 20 / 25


@given(own=st.lists(SCORED, min_size=1, max_size=30), rows=st.lists(SCORED, min_size=1, max_size=30))
@effort(max_examples=100)
def test_ks_is_the_largest_distance_of_the_two_distributions(own: list[Any], rows: list[Any]) -> None:
    found = drift(alike(*rows), freeze(alike(*own))).statistics
    for column, quantity in enumerate(("log_ppl_q", "rmi")):
        r, b = ([row[column] for row in sample] for sample in (own, rows))
        distances = [abs(sum(v <= x for v in r) / len(r) - sum(v <= x for v in b) / len(b)) for x in [*r, *b]]
        assert found[f"ks_{quantity}_weak"] == pytest.approx(max(distances), abs=1e-12)
        assert 0 <= found[f"psi_{quantity}_weak"] < math.inf


def test_pairs_without_an_rmi_have_no_part_in_drift() -> None:
    frozen = freeze(alike((1.0, 0.1), (2.0, 0.2)))
    found = drift(scores([(1.0, 0.1), (2.0, 0.2), (9.0, None)], [(9.0, None)] * 3), frozen)
    names = {"psi_log_ppl_q_strong", "ks_log_ppl_q_strong", "psi_rmi_strong", "ks_rmi_strong"}
    assert found == Drift(dict.fromkeys(names, 0.0), 0.0)


# --- settings -------------------------------------------------------------------------------------------------------

OF_B1 = {"name": "r1", "batches": ["b1"]}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"pool": "reference"}, ["ranking", "pool: reference needs `reference: {name: NAME, batches: [BATCH, …]}`"]),
        ({"reference": {"name": "R 1", "batches": ["b1"]}}, ["ranking.reference.name", "pattern", "'R 1'"]),
        ({"reference": {"name": "r1", "batches": []}}, ["ranking.reference.batches", "at least 1"]),
        ({"reference": {"name": "r1", "batches": ["../evil"]}}, ["ranking.reference", "batch name '../evil'"]),
        ({"reference": {"name": "r1", "batches": ["b1", "b1"]}}, ["ranking.reference", "'b1' appears twice"]),
        ({"pool": "all"}, ["ranking.pool", "'batch' or 'reference'", "'all'"]),
    ],
)
def test_a_reference_that_cannot_be_is_refused_with_its_field(
    settings_for: SettingsFor, values: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_for(ranking=values)
    for part in named:
        assert part in str(caught.value)


def test_a_reference_of_ranks_needs_rmi(settings_for: SettingsFor, check_sentence: Check) -> None:
    of_ifd = {"scoring": {"quantities": ["ifd"]}, "selections": [{"name": "ifd", "strategy": "ifd"}]}
    with pytest.raises(SettingsError) as error:
        referring(settings_for, **of_ifd)
    check_sentence(error.value)
    assert settings_for(**of_ifd).ranking.pool == "batch"


CHANGED_REFERENCE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "name": ({"ranking": {"reference": OF_B1 | {"name": "r2"}}}, {NAME, "disagreement_scores", "decisions"}),
    "batches": (
        {"ranking": {"reference": OF_B1 | {"batches": ["b1", "b2"]}}},
        {NAME, "disagreement_scores", "decisions"},
    ),
    "strata": ({"ranking": {"num_strata": 3}}, {NAME, "disagreement_scores"}),
    "pool": ({"ranking": {"pool": "batch"}}, {"disagreement_scores", "decisions"}),
    "scorable_share": ({"gates": {"min_scorable_share": 0.9}}, {"rmi_scores", NAME, "decisions"}),
    "budget": (
        {"selections": [{"name": "diff_high", "strategy": "diff_high", "budget": {"count": 3}}]},
        {"decisions", "curated_dataset"},
    ),
}


@pytest.mark.parametrize("changed", list(CHANGED_REFERENCE))
def test_a_changed_setting_of_the_reference_makes_exactly_its_readers_stale(
    settings_for: SettingsFor, changed: str
) -> None:
    sections, stale = CHANGED_REFERENCE[changed]
    base = {"pool": "reference", "reference": OF_B1}
    before = code_versions(settings_for(ranking=base))
    after = code_versions(settings_for(**sections | {"ranking": base | sections.get("ranking", {})}))
    assert {name for name in before if before[name] != after[name]} == stale


def test_without_a_reference_there_is_no_asset_of_one(settings_for: SettingsFor) -> None:
    assert NAME not in code_versions(settings_for())
    assert NAME in code_versions(settings_for(ranking={"reference": OF_B1}))


def test_the_graph_has_the_reference_before_the_ranks_and_of_its_own_batches_alone(settings_for: SettingsFor) -> None:
    settings = referring(settings_for, batches=["b1", "b2"])
    defs = build_defs(settings)
    dg.Definitions.validate_loadable(defs)
    assert REFERENCE_JOB in [job.name for job in defs.jobs or []]
    graph = defs.resolve_asset_graph()
    node = graph.get(dg.AssetKey(NAME))
    assert {key.to_user_string() for key in node.child_keys} == {
        "disagreement_scores",
        "decisions",
        "training_trial",
    }
    mapping = node.partition_mappings[dg.AssetKey("rmi_scores")]
    assert isinstance(mapping, dg.SpecificPartitionsPartitionMapping)
    assert dg.deserialize_value(dg.serialize_value(mapping)) == mapping  # As the webserver gets it.
    assert list(mapping.partition_keys) == ["b1|strong", "b1|weak", "b2|strong", "b2|weak"]


# --- the asset ------------------------------------------------------------------------------------------------------

FIRST, SECOND = SAMPLES[:12], SAMPLES[12:]
SELECTED = ["pair_id", "decision", "reason", "gap", "scores", "verdicts"]


@pytest.fixture
def deliver(tmp_path: Path) -> Deliver:
    """Factory: rows, as (query, answer), in a file."""

    def write(rows: Sequence[tuple[str, str]], name: str = "rows.jsonl") -> Path:
        records = [{"query": query, "response": answer} for query, answer in rows]
        return write_jsonl(tmp_path / "delivered" / name, records)

    return write


def referring(
    settings_for: SettingsFor, name: str = "r1", batches: Sequence[str] = ("b1",), **sections: Any
) -> Settings:
    """Settings with `pool: reference`."""
    of = {"pool": "reference", "reference": {"name": name, "batches": list(batches)}}
    return settings_for(ranking=of | sections.pop("ranking", {}), **sections)


def materialise_reference(settings: Settings, instance: dg.DagsterInstance) -> None:
    build_job_defs(settings).resolve_job_def(REFERENCE_JOB).execute_in_process(instance=instance)


def metadata(instance: dg.DagsterInstance, asset: str) -> dict[str, Any]:
    event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    assert event is not None
    assert event.asset_materialization is not None
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def near_reference(instance: dg.DagsterInstance, batch: str) -> dict[str, Any] | None:
    """The numbers of the newest check of drift, none where nothing can be compared; None: it could not be made."""
    event = test_checks.evaluations(instance)[f"disagreement_scores.is_near_reference|{batch}"]
    return None if event.severity is dg.AssetCheckSeverity.ERROR else test_checks.numbers(event)


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded although every score was cached")

    monkeypatch.setattr(causal_lm, "load_model", load)


def test_a_batch_that_is_the_reference_is_decided_as_in_its_own_pool_and_the_next_against_it(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    in_batch = settings_for()
    curate(in_batch, instance, deliver(FIRST))
    before = table(in_batch, "decisions").select(SELECTED)
    settings = referring(settings_for)
    curate(settings, instance, deliver(FIRST))
    assert_frame_equal(table(settings, "decisions").select(SELECTED), before, check_exact=True)
    storage = open_storage(settings)
    frozen = storage.tables.read(NAME, Partition("r1"))
    assert frozen.frame.height == 2 * 12

    curate(settings, instance, deliver(SECOND, "second.jsonl"), batch="b2")
    ranked = storage.tables.read("disagreement_scores", Partition("b2"))
    pool_id = rank_reference.pool_id("r1", frozen.data_version)
    assert ranked.frame["pool_id"].unique().to_list() == [pool_id]
    assert ranked.provenance["inputs"][NAME] == frozen.data_version
    scored = {role: table(settings, "rmi_scores", "b2", role) for role in ROLES}
    expected = rank_reference.disagreement_scores(scored, frozen.frame, settings.ranking, pool_id)
    assert_frame_equal(ranked.frame, expected, check_exact=True)
    decisions = storage.tables.read("decisions", Partition("b2"))
    assert decisions.provenance["inputs"][NAME] == frozen.data_version
    assert decisions.provenance["pool_id"] == pool_id
    manifest = versions.read_manifest(storage, latest(settings)["version"])
    assert [entry["data_versions"][NAME] for entry in manifest["batches"]] == [frozen.data_version] * 2
    cut = table(settings, "decisions")["verdicts"][0][0]["cut"]
    for gap, verdicts, said in decisions.frame.select("gap", "verdicts", "explanation").iter_rows():
        assert (verdicts[0]["cut"], verdicts[0]["pool_size"]) == (cut, 8)
        assert verdicts[0]["is_selected"] or gap <= cut
        check_sentence(said)
        check_sentence(said)
    # A batch that is not of it leaves it as it is.
    assert storage.tables.read(NAME, Partition("r1")).data_version == frozen.data_version


@pytest.mark.slow
def test_a_new_reference_ranks_every_batch_again_without_scoring_and_its_difference_is_published(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = referring(settings_for)
    curate(settings_for(), instance, deliver(FIRST))
    curate(old, instance, deliver(FIRST))
    curate(old, instance, deliver(SECOND, "second.jsonl"), batch="b2")
    published = latest(old)["version"]
    chosen = {batch: set(table(old, "selected_subset", batch)["pair_id"]) for batch in ("b1", "b2")}
    no_model(monkeypatch)
    new = referring(settings_for, "r2", ["b1", "b2"])
    done = refresh.refresh_all(Deployment(new, instance))
    assert done.rebuilt == [("select_from_batch", Partition("b1")), ("select_from_batch", Partition("b2"))]
    assert refresh.refresh_all(Deployment(new, instance)).rebuilt == []
    storage = open_storage(new)
    assert storage.tables.read("disagreement_scores", Partition("b1")).frame["pool_id"][0].startswith("reference:r2:")
    assert storage.tables.has(NAME, Partition("r1"))
    now = {batch: set(table(new, "selected_subset", batch)["pair_id"]) for batch in ("b1", "b2")}
    assert now != chosen
    assert done.version == latest(new)["version"] != published
    assert (
        metadata(instance, "curated_dataset")["rows_entered"] + metadata(instance, "curated_dataset")["rows_left"] > 0
    )


def test_made_again_it_is_the_same_and_other_content_needs_another_name(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = referring(settings_for)
    curate(settings, instance, deliver(FIRST))
    file = Path(open_storage(settings).tables.url(NAME, Partition("r1")))
    before = file.read_bytes()
    materialise_reference(settings, instance)
    assert file.read_bytes() == before
    said = "the reference r1 is frozen, and .*; give ranking.reference a new name"
    with pytest.raises(dg.Failure, match=said):
        materialise_reference(referring(settings_for, ranking={"num_strata": 1}), instance)
    rescored = referring(settings_for, weak={"system_prompt": "Write clean code."})
    run_stages(rescored, instance, "b1", "score_batch")
    with pytest.raises(dg.Failure, match=said):
        materialise_reference(rescored, instance)
    assert file.read_bytes() == before
    materialise_reference(referring(settings_for, "r2", weak={"system_prompt": "Write clean code."}), instance)


@pytest.mark.slow
def test_a_damaged_reference_is_written_again_as_it_was_or_refused(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    settings = referring(settings_for)
    curate(settings, instance, deliver(FIRST))
    file = Path(open_storage(settings).tables.url(NAME, Partition("r1")))
    good = file.read_bytes()
    file.write_bytes(good[:40] + bytes([good[40] ^ 255]) + good[41:])
    with pytest.raises(StorageError):
        open_storage(settings).tables.read(NAME, Partition("r1"))
    materialise_reference(settings, instance)
    assert file.read_bytes() == good
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(dg.Failure) as error:
        materialise_reference(settings, instance)
    check_sentence(error.value)
    # Drift from it cannot be measured, which changes no rank.
    summary = curate(settings_for(ranking={"reference": OF_B1}), instance, deliver(FIRST))
    assert summary.rows_by_decision["selected"] == 3
    assert near_reference(instance, "b1") is None


def test_ranks_are_not_taken_against_a_reference_of_other_settings(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    curate(referring(settings_for), instance, deliver(FIRST))
    for changed in ({"num_strata": 1}, {"reference": {"name": "r1", "batches": ["b1", "b2"]}}):
        with pytest.raises(dg.Failure) as error:
            run_stages(referring(settings_for, ranking=changed), instance, "b1", SELECTING)
        check_sentence(error.value)


def test_decisions_refuse_ranks_of_another_pool(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    curate(settings_for(), instance, deliver(FIRST))
    settings = referring(settings_for)
    materialise_reference(settings, instance)
    said = r"disagreement_scores of batch b1 are ranks in the pool batch:b1, the settings ask for reference:r1:\w+; mat"
    with pytest.raises(dg.Failure, match=said):
        materialise_decisions(settings, instance)
    run_stages(settings, instance, "b1", SELECTING)
    with pytest.raises(dg.Failure) as error:
        materialise_decisions(settings_for(), instance)
    check_sentence(error.value)


def materialise_decisions(settings: Settings, instance: dg.DagsterInstance) -> None:
    """decisions of b1 alone."""
    job = build_job_defs(settings).resolve_job_def(SELECTING)
    job.execute_in_process(instance=instance, partition_key="b1", asset_selection=[dg.AssetKey("decisions")])


@pytest.mark.slow
def test_a_batch_that_other_models_scored_is_not_ranked_against_it(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    curate(referring(settings_for), instance, deliver(FIRST))
    other = {"weak": {"system_prompt": "Write clean code."}}
    said = (
        r"the models \['weak'\] of batch b2 are not those of the reference r1, or were asked differently; materialise"
    )
    with pytest.raises(RunError, match=said):
        curate(referring(settings_for, **other), instance, deliver(SECOND, "second.jsonl"), batch="b2")
    # Where only drift is measured, it is not.
    drifting = settings_for(ranking={"reference": OF_B1}, **other)
    curate(drifting, instance, deliver(SECOND, "second.jsonl"), batch="b2")
    assert near_reference(instance, "b2") == {}


def test_batches_that_were_scored_differently_make_no_reference(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    curate(settings_for(), instance, deliver(FIRST))
    other = {"strong": {"system_prompt": "Write clean code."}}
    curate(settings_for(**other), instance, deliver(SECOND, "second.jsonl"), batch="b2")
    with pytest.raises(dg.Failure) as error:
        materialise_reference(referring(settings_for, batches=["b1", "b2"]), instance)
    check_sentence(error.value)


@pytest.mark.slow
def test_batches_that_were_scored_under_different_eligibility_make_no_reference(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    curate(settings_for(), instance, deliver(FIRST))
    curate(settings_for(eligibility={"min_query_tokens": 3}), instance, deliver(SECOND, "second.jsonl"), batch="b2")
    settings = referring(settings_for, batches=["b1", "b2"])
    said = r"different `eligibility` \(b1\|strong: .*'min_query_tokens': 1.*b2\|weak: .*3.*\); materialise rmi_scores"
    with pytest.raises(dg.Failure, match=said):
        materialise_reference(settings, instance)
    run_stages(settings, instance, "b2", "score_batch")
    materialise_reference(settings, instance)
    assert open_storage(settings).tables.has(NAME, Partition("r1"))


def test_a_batch_that_is_missing_or_gated_or_out_of_date_makes_no_reference(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    settings = referring(settings_for, batches=["b1", "b2"])
    curate(settings_for(), instance, deliver(FIRST))
    with pytest.raises(dg.Failure) as error:
        materialise_reference(settings, instance)
    check_sentence(error.value)
    with pytest.raises(RunError, match="gated"):
        curate(settings_for(), instance, deliver([("q", ""), *SECOND[:2]], "second.jsonl"), batch="b2")
    with pytest.raises(dg.Failure) as error:
        materialise_reference(settings, instance)
    check_sentence(error.value)
    registration.register(Deployment(settings, instance), "b2", [deliver(SECOND, "second.jsonl")], None, replaces=True)
    run_stages(settings, instance, "b2", "ingest_batch")
    with pytest.raises(dg.Failure) as error:
        materialise_reference(settings, instance)
    check_sentence(error.value)
    nothing = {f"sum_nll_{q}": pl.lit(None, pl.Float64) for q in vocabularies.Quantity}
    reasons = {f"null_reason_{q}": pl.lit(NullReason.NON_FINITE.value) for q in vocabularies.Quantity}
    run_stages(settings, instance, "b2", "score_batch", model_runtime=HandMadeRuntime(**nothing, **reasons))
    with pytest.raises(dg.Failure) as error:
        materialise_reference(settings, instance)
    check_sentence(error.value)
    assert not open_storage(settings).tables.has(NAME, Partition("r1"))


def test_the_driver_makes_the_reference_when_its_batches_are_scored_and_says_which_are_not(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = referring(settings_for, batches=["b1", "b2"])
    said = (
        "the reference r1 is not built yet, and its batches b2 are not scored; run them first, with ranking.pool: batch"
    )
    with pytest.raises(RunError, match=said):
        curate(settings, instance, deliver(FIRST))
    registration.register(Deployment(settings, instance), "b2", [deliver(SECOND, "second.jsonl")], None)
    stages: list[str] = []
    run_batch.run_batch(Deployment(settings, instance), "b2", Events(on_stage=lambda job, _: stages.append(job)))
    assert stages.count(REFERENCE_JOB) == 1
    assert stages.index(REFERENCE_JOB) == stages.index(SELECTING) - 1
    assert run_batch.run_batch(Deployment(settings, instance), "b1").scored == 0


@pytest.mark.slow
def test_with_the_batch_as_pool_the_reference_only_measures_drift(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    curate(settings_for(), instance, deliver(FIRST))
    before = table(settings_for(), "decisions")
    settings = settings_for(ranking={"reference": OF_B1})
    curate(settings, instance, deliver(FIRST))
    assert near_reference(instance, "b1") == {}
    materialise_reference(settings, instance)
    curate(settings, instance, deliver(FIRST))
    assert near_reference(instance, "b1") == {
        f"{m}_{q}_{r}": 0.0 for m in ("psi", "ks") for q in ("log_ppl_q", "rmi") for r in ROLES
    }
    assert table(settings, "decisions").equals(before)
    curate(settings, instance, deliver(SECOND, "second.jsonl"), batch="b2")
    of_second = near_reference(instance, "b2")
    assert of_second is not None
    assert of_second["ks_rmi_weak"] > 0


def test_a_new_batch_leaves_the_reference_fresh(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = referring(settings_for)
    curate(settings, instance, deliver(FIRST))

    def status() -> StaleStatus:
        graph = build_job_defs(settings).resolve_asset_graph()
        return CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance)).get_status(
            dg.AssetKey(NAME)
        )

    assert status() is StaleStatus.FRESH
    curate(settings, instance, deliver(SECOND, "second.jsonl"), batch="b2")
    assert status() is StaleStatus.FRESH
    run_stages(referring(settings_for, weak={"system_prompt": "Write clean code."}), instance, "b1", "score_batch")
    assert status() is StaleStatus.STALE


@pytest.mark.slow
def test_a_history_of_310_000_pairs_is_ranked_against_a_reference_in_seconds() -> None:
    rows = 310_000
    random = np.random.default_rng(0)
    frozen_of, history = (_many(random, rows) for _ in range(2))
    how = RankingSettings()
    frozen, _ = rank_reference.freeze([frozen_of], how)
    started = time.perf_counter()
    ranked = rank_reference.disagreement_scores(history, frozen, how, POOL)
    verdicts = select_all(candidates(ranked, history), SELECTIONS[:1], reference_candidates(frozen, ROLES))
    seconds = time.perf_counter() - started
    print(f"{rows} pairs ranked and selected against {rows}: {seconds:.2f} s")
    assert verdicts.filter(pl.col("selection") == "diff_high")["is_selected"].mean() == pytest.approx(0.4, abs=0.01)
    assert seconds < 10


def _many(random: np.random.Generator, rows: int) -> Scores:
    pair_ids = [f"{number:032x}" for number in random.integers(0, 2**62, rows)]
    blank = rmi_rows({}).drop("pair_id", "log_ppl_q", "rmi")
    return {
        role: pl.DataFrame({"pair_id": pair_ids})
        .with_columns(log_ppl_q=pl.Series(random.gamma(4.0, 0.5, rows)), rmi=pl.Series(random.normal(0.3, 0.5, rows)))
        .join(blank, how="cross")
        .select(list(dtypes(RmiScores)))
        for role in ROLES
    }
