"""explanations: a sentence for every reason. The snapshot has the sentences; numbers and reasons are asserted here."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import polars as pl
import pytest
from pydantic import TypeAdapter
from syrupy.assertion import SnapshotAssertion

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.schema import vocabularies
from qaq_pipeline.schema.vocabularies import NullReason, SelectionReason
from qaq_pipeline.selection import explanations
from qaq_pipeline_tests.selection.test_decisions import RAW, STRONG, UNSCORED, UNSCORED_ANSWER, decide, said
from qaq_pipeline_tests.support.frames import pair_name, rmi_rows
from qaq_pipeline_tests.support.sentences import Check

ONE_QUERY = RAW.with_columns(query=pl.when(pl.col("source_row") == 2).then(pl.lit(" query\t4")).otherwise("query"))
ONE_EACH = {"per": "language", "shares": "equal"}
GOLDEN = [
    pytest.param(4, {}, "selected", "within_budget", id="selected"),
    pytest.param(1, {}, "not_selected", "below_cut", id="below_cut"),
    pytest.param(1, {"budget": {"answer_tokens": 1}}, "not_selected", "below_cut", id="below_cut_of_nothing"),
    pytest.param(3, {"strategy": "rmi_band"}, "selected", "in_band", id="in_band"),
    pytest.param(2, {"strategy": "rmi_band"}, "not_selected", "outside_band", id="outside_band"),
    pytest.param(3, {"min_gap": 0.25}, "not_selected", "gap_below_minimum", id="gap_below_minimum"),
    pytest.param(
        3,
        {"strategy": "sum_high", "min_gap": 0.25},
        "not_selected",
        "gap_below_minimum",
        id="gap_below_minimum_of_a_sum",
    ),
    pytest.param(
        4, {"rank_strong": [0.2, 0.9]}, "not_selected", "rank_strong_out_of_range", id="rank_strong_out_of_range"
    ),
    pytest.param(
        3, {"rmi_strong": [None, 0.25]}, "not_selected", "rmi_strong_out_of_range", id="rmi_strong_out_of_range"
    ),
    pytest.param(2, {"strategy": "ifd"}, "not_selected", "ifd_above_maximum", id="ifd_above_maximum"),
    pytest.param(1, {"strategy": "ppl", "measure": "log_ppl_q"}, "selected", "within_budget", id="ppl"),
    pytest.param(
        3, {"strategy": "ppl", "measure": "log_ppl_q", "order": "low"}, "not_selected", "below_cut", id="a_tie"
    ),
    pytest.param(2, {"strategy": "length"}, "selected", "within_budget", id="length"),
    pytest.param(
        1,
        {"where": [{"column": "language", "equals": "go"}]},
        "not_selected",
        "where_not_met",
        id="where_not_met_without_a_value",
    ),
    pytest.param(
        4,
        {"where": [{"column": "source", "is_present": True}, {"column": "language", "one_of": ["c", "rust"]}]},
        "not_selected",
        "where_not_met",
        id="where_not_met",
    ),
    pytest.param(
        4,
        {"where": [{"column": "num_a_tokens", "at_least": 10}]},
        "not_selected",
        "where_not_met",
        id="where_not_met_by_a_number",
    ),
    pytest.param(
        4,
        {"where": [{"column": "source", "is_present": False}]},
        "not_selected",
        "where_not_met",
        id="where_not_met_by_a_value",
    ),
    pytest.param(
        3, {"where": [{"column": "num_a_tokens", "at_least": 10}]}, "selected", "within_budget", id="where_met"
    ),
    pytest.param(2, {"max_per_query": 1, "raw": ONE_QUERY}, "not_selected", "query_full", id="query_full"),
    pytest.param(2, {"max_per_cluster": 1, "raw": ONE_QUERY}, "not_selected", "cluster_full", id="cluster_full"),
    pytest.param(
        2,
        {"max_per_query": 2, "max_per_cluster": 1, "raw": ONE_QUERY},
        "not_selected",
        "cluster_full",
        id="cluster_full_within_the_query",
    ),
    pytest.param(1, {"quotas": ONE_EACH}, "not_selected", "quota_full", id="quota_full"),
    pytest.param(3, {"quotas": ONE_EACH}, "selected", "within_budget", id="within_a_quota"),
    pytest.param(4, {"quotas": ONE_EACH}, "selected", "within_budget", id="all_of_a_group"),
    pytest.param(
        4, {"quotas": {"per": "language", "shares": {"none": 0.5}}}, "not_selected", "quota_full", id="no_quota"
    ),
    pytest.param(
        3, {"strategy": "rmi_band", "band": [0, 1], "quotas": ONE_EACH}, "selected", "in_band", id="a_quota_of_a_band"
    ),
    *(
        pytest.param(
            4, {"valid": True, "invalid": {pair_name(4): signal.value}}, "not_selected", reason.value, id=reason.value
        )
        for signal, reason in vocabularies.INVALID_REASONS.items()
    ),
    pytest.param(
        4, {"invalid": {pair_name(4): "echo"}}, "selected", "within_budget", id="invalid_where_valid_is_not_asked_for"
    ),
    pytest.param(5, {}, "rejected", "empty_query", id="rejected"),
    pytest.param(6, {}, "duplicate", "exact_duplicate", id="duplicate"),
    pytest.param(7, {}, "unscorable", "query_too_long", id="unscorable"),
]


@pytest.mark.parametrize(("row", "published", "decision", "reason"), GOLDEN)
def test_a_row_is_explained(
    row: int, published: dict[str, Any], decision: str, reason: str, snapshot: SnapshotAssertion
) -> None:
    *fate, sentence = said(row, decide(**published))
    assert fate == [decision, reason]
    assert sentence == snapshot


STRATEGIES = ["diff_low", "sum_high", "sum_low", "rmi_top", "random", "stratified_random"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_sentence_names_what_the_selection_orders_by(strategy: str, snapshot: SnapshotAssertion) -> None:
    assert said(1, decide(strategy))[2] == snapshot


@pytest.mark.parametrize("strategy", ["diff_high", "random", "stratified_random"])
def test_a_random_selection_draws_from_the_batch_whatever_the_ranks_are_taken_against(
    strategy: str, snapshot: SnapshotAssertion
) -> None:
    _, _, sentence = said(1, decide(strategy, is_against_reference=True))
    assert sentence.count(" of the reference r1") == (3 if strategy == "diff_high" else 1)
    assert sentence == snapshot


@pytest.mark.parametrize("is_against_reference", [False, True])
def test_where_all_that_could_be_taken_was_the_sentence_says_so(
    is_against_reference: bool, snapshot: SnapshotAssertion, check_sentence: Check
) -> None:
    _, _, sentence = said(1, decide(budget={"fraction": 1.0}, is_against_reference=is_against_reference))
    check_sentence(sentence)
    assert sentence == snapshot


@pytest.mark.parametrize(
    ("strategy", "given", "value", "said_of_it"),
    [
        ("rmi_band", {"band": [0.5, 0.75]}, 1501 / 2001, "0.7501"),
        ("diff_high", {"min_gap": 0.3}, 0.29996, "0.29996"),
        ("diff_high", {"rmi_strong": [None, 0.2]}, 0.2000004, "0.2000004"),
        ("ifd", {"maximum": 1.0}, 1.0001, "1.0001"),
    ],
)
def test_a_number_just_beyond_a_bound_is_told_from_it(
    strategy: str, given: dict[str, Any], value: float, said_of_it: str
) -> None:
    reasons = {"rmi_band": "outside_band", "ifd": "ifd_above_maximum"}
    by = {"min_gap": "gap_below_minimum", "rmi_strong": "rmi_strong_out_of_range"}
    reason = reasons.get(strategy) or by[next(iter(given))]
    score = {"model": "strong", "rmi": value, "rank": 0.5, "stratum": 1, "num_strata": 1, "null_reason": None}
    score |= {"is_truncated": False, "is_short_query": False}
    row = {"decision": "not_selected", "reason": reason, "scores": [score], "evidence": None, "gap": value}
    row |= {"pool_id": "batch:b1", "verdict_reason": reason, "verdict_score": value, "verdict_position": None}
    row |= {"verdict_cut": None, "verdict_pool_size": 3}
    sentence = explanations.explain(
        row, TypeAdapter(Selection).validate_python({"name": "mine", "strategy": strategy} | given)
    )
    assert sentence.endswith(f" is {said_of_it}.")


def test_a_place_among_those_that_pass_a_limit_is_not_called_one_of_the_pool() -> None:
    _, _, sentence = said(3, decide(rmi_strong=[None, 5.0]))
    assert re.search(r", number \d of those that pass the limits \(rmi_strong\) in a pool of 4 pairs;", sentence)


def test_every_reason_of_a_selection_has_a_sentence() -> None:
    explained = {case.values[3] for case in GOLDEN} & {reason.value for reason in SelectionReason}
    assert explained == {reason.value for reason in SelectionReason} - {SelectionReason.NOT_IN_POOL.value}


EVERY_REASON = [
    reason
    for vocabulary in (
        vocabularies.RejectReason,
        vocabularies.WithdrawalReason,
        vocabularies.ContaminationReason,
        vocabularies.DuplicateReason,
        vocabularies.HoldOutReason,
        NullReason,
        SelectionReason,
    )
    for reason in vocabulary
    if reason not in (SelectionReason.NOT_IN_POOL, NullReason.NOT_WANTED)
]
DECISION_OF = {
    vocabularies.RejectReason: "rejected",
    vocabularies.WithdrawalReason: "withdrawn",
    vocabularies.ContaminationReason: "contaminated",
    vocabularies.DuplicateReason: "duplicate",
    vocabularies.HoldOutReason: "held_out",
    NullReason: "unscorable",
}


@pytest.mark.parametrize("reason", EVERY_REASON)
def test_no_reason_is_told_by_its_name_in_the_code(reason: Any) -> None:
    """Words for every value of every closed vocabulary, whatever is added to one."""
    score = {"model": "strong", "rmi": 0.3, "rank": 0.75, "stratum": 2, "num_strata": 3, "null_reason": None}
    score |= {"is_truncated": False, "is_short_query": False}
    if isinstance(reason, NullReason):
        score |= {"rank": None, "stratum": None, "null_reason": reason.value}
    row = {"decision": DECISION_OF.get(type(reason), "not_selected"), "reason": reason.value, "scores": [score]}
    row |= {"detail": "it is so", "evidence": "this", "duplicate_of": "b1/a:1.0", "similarity": 0.9, "gap": 0.1}
    row |= {"pool_id": "batch:b1", "verdict_reason": reason.value, "verdict_score": 0.1, "verdict_position": 1}
    row |= {"verdict_cut": 0.2, "verdict_pool_size": 3, "why_invalid": "The evidence is here"}
    strategies = {"in_band": "rmi_band", "outside_band": "rmi_band", "ifd_above_maximum": "ifd"}
    given = {"name": "mine", "strategy": strategies.get(reason.value, "diff_high")}
    given |= {"min_gap": 0.2} if reason is SelectionReason.GAP_BELOW_MINIMUM else {}
    given |= {"rmi_strong": [None, 0.2]} if reason is SelectionReason.RMI_STRONG_OUT_OF_RANGE else {}
    row |= {"verdict_condition": 0, "verdict_value": None, "verdict_query_place": 2, "verdict_cluster_place": 2}
    row |= {"verdict_group": "go", "verdict_group_place": 2, "verdict_group_taken": 1}
    given |= {"where": [{"column": "judge.score", "at_least": 7}]} if reason is SelectionReason.WHERE_NOT_MET else {}
    given |= {"max_per_query": 1} if reason is SelectionReason.QUERY_FULL else {}
    given |= {"max_per_cluster": 1} if reason is SelectionReason.CLUSTER_FULL else {}
    given |= {"quotas": {"per": "language", "shares": "equal"}} if reason is SelectionReason.QUOTA_FULL else {}
    sentence = explanations.explain(row, TypeAdapter(Selection).validate_python(given))
    assert reason.value not in sentence
    assert "None" not in sentence
    assert sentence.endswith(".")
    assert ".." not in sentence


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"fraction": 0.25}, "the 25% of the pool with the highest gap"),
        ({"fraction": 0.5}, "the 50% of the pool with the highest gap"),
        ({"fraction": 0.125}, "the 12.5% of the pool with the highest gap"),
        ({"fraction": 1.0}, "every pair of the pool"),
        ({"count": 1000}, "the 1,000 pairs of the pool with the highest gap"),
    ],
)
def test_a_budget_is_told_as_it_is_set(budget: dict[str, Any], words: str) -> None:
    assert words in said(1, decide(budget=budget))[2]


def test_numbers_are_told_apart_where_they_differ_and_show_no_minus_zero() -> None:
    assert explanations._apart(0.30001, 0.30004) == ("0.30001", "0.30004")
    assert explanations._apart(0.3, 0.3) == ("0.300", "0.300")
    assert explanations._apart(-0.0, 0.25) == ("0.000", "0.250")


def test_a_short_query_is_told(snapshot: SnapshotAssertion) -> None:
    strong = STRONG.with_columns(is_short_query=pl.lit(True), num_q_tokens=pl.lit(3, pl.Int64))
    assert said(1, decide(strong=strong))[2] == snapshot


def test_a_model_that_does_not_rank_a_selected_pair_is_told(snapshot: SnapshotAssertion) -> None:
    weak = rmi_rows({}, {}, {}, UNSCORED, UNSCORED)
    assert said(4, decide("rmi_top", weak=weak))[2] == snapshot


def test_a_token_beyond_the_embedding_is_told(check_sentence: Check) -> None:
    beyond = rmi_rows({}, {}, {}, UNSCORED | {"null_reason_rmi": NullReason.TOKEN_BEYOND_EMBEDDING.value}, UNSCORED)
    *_, reason, sentence = said(4, decide(weak=beyond))
    assert reason == NullReason.TOKEN_BEYOND_EMBEDDING
    check_sentence(sentence)


def test_a_pair_that_no_model_ranks_is_told(snapshot: SnapshotAssertion) -> None:
    not_wanted = UNSCORED | {"null_reason_rmi": NullReason.NOT_WANTED.value}
    strong = rmi_rows(not_wanted, not_wanted, not_wanted, not_wanted, not_wanted | UNSCORED_ANSWER)
    frame = decide("ifd", strong=strong, weak=rmi_rows(*[not_wanted] * 5))
    assert [said(row, frame)[2] for row in (1, 7)] == snapshot


def test_what_a_version_says_of_a_row_is_one_line(snapshot: SnapshotAssertion) -> None:
    told = partial(explanations.explain_in_version, left_out=None)
    selected = {"decision": "selected", "explanation": "Selected."}
    dropped = {"decision": "not_selected", "explanation": "Not selected."}
    ranked = [f"Ranked 0.5. {verdict} by mine." for verdict in ("Selected", "Not selected")]
    lines = {
        "in it": told(selected, has_batch=True, was_in=None, told=None),
        "in it, as told": told(selected, has_batch=True, was_in=1, told="Selected."),
        "dropped": told(dropped, has_batch=True, was_in=2, told=None),
        "dropped, in part as told": told(
            dropped | {"explanation": ranked[1]}, has_batch=True, was_in=2, told=ranked[0]
        ),
        "not in it": told(dropped, has_batch=True, was_in=None, told=None),
        "dropped with its batch": told(None, has_batch=False, was_in=2, told=None),
        "dropped with its gated batch": told(
            None, has_batch=False, left_out="gated (too_many_rejected): 2 of 3", was_in=2, told=None
        ),
        "no such row": told(None, has_batch=True, was_in=None, told=None),
    }
    assert all("version 2" in line for state, line in lines.items() if state.startswith("dropped"))
    assert lines == snapshot
