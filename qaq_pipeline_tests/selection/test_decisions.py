"""ledger: every row in is a row out, with its decision, a reason of the closed vocabulary, and a sentence."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import TypeAdapter

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.schema import vocabularies
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import Decisions, SelectedSubset, TableError, dtypes, enforce
from qaq_pipeline.schema.vocabularies import NullReason, SelectionReason
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection import decisions, explanations, rank_reference, strategies
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows

PROVENANCE_ID = "0123456789abcdef" * 2
HALF = {"budget": {"fraction": 0.5}}

UNSCORED = {"rmi": None, "log_ppl_q": None, "log_ppl_q_given_a": None, "null_reason_rmi": "query_too_long"}
UNSCORED_ANSWER = {"ifd_ppl": None, "ifd_loss": None, "log_ppl_a": None, "null_reason_ifd": "non_finite"}

# Rows 1 to 4 are pairs 1 to 4, row 5 cannot be read, row 6 repeats pair 4, row 7 is pair 5, which no model can score.
RAW = raw_rows(
    {},
    {},
    {},
    {"system": "Be brief.", "source": "forum", "language": "go"},
    rejected(),
    {"pair_id": pair_name(4), "system": "Be brief."},
    {"pair_id": pair_name(5)},
)
STRONG = rmi_rows(
    {"rmi": 0.1, "ifd_ppl": 0.9},
    {"rmi": 0.2, "ifd_ppl": 1.25},
    {"rmi": 0.3, "ifd_ppl": 0.7},
    {"rmi": 0.4, "ifd_ppl": 0.6, "is_truncated": True, "num_a_tokens": 9},
    UNSCORED | UNSCORED_ANSWER,
)
WEAK = rmi_rows(
    {"rmi": 0.4}, {"rmi": 0.3}, {"rmi": 0.2}, {"rmi": 0.1}, UNSCORED | {"null_reason_rmi": "no_tokens_to_score"}
)

RANKS = (
    "Ranked by RMI, how much the answer helps to predict the query, from 0 to 1 among pairs of like query perplexity: "
    "the strong model ranks it {strong} in the only stratum, the weak model ranks it {weak} in the only stratum. "
)
CUT = "The answer has 11 tokens, of which only the first 9 were read by the strong model. "
GAP = "the gap, the rank under the strong model less that under the weak one"


def decide(
    strategy: str = "diff_high",
    *,
    raw: pl.DataFrame = RAW,
    strong: pl.DataFrame = STRONG,
    weak: pl.DataFrame = WEAK,
    is_against_reference: bool = False,
    **published: Any,
) -> pl.DataFrame:
    """Decisions under one selection, as the asset makes them; with a reference, r1 of these very pairs."""
    given = {"name": "mine", "strategy": strategy} | ({} if strategy == "rmi_band" else HALF) | published
    selected_by: Selection = TypeAdapter(Selection).validate_python(given)
    scores = {"strong": strong, "weak": weak}
    pool = rank_reference.pool_id("r1", "0") if is_against_reference else "batch:b1"
    disagreement, _ = disagreement_scores(scores, ONE_STRATUM, pool)
    candidates = strategies.candidates(disagreement, scores)
    verdicts = strategies.select_all(
        candidates, [selected_by], sorted(scores), candidates if is_against_reference else None
    )
    frame = decisions.decide(
        raw, screen_alone(raw, ScreeningSettings()), scores, disagreement, verdicts, selected_by, PROVENANCE_ID
    )
    return enforce(Decisions, frame)


def said(row: int, frame: pl.DataFrame) -> tuple[str, str, str]:
    """Decision, reason and sentence of a row."""
    return frame.filter(source_row=row).select("decision", "reason", "explanation").row(0)


def test_every_row_in_is_a_row_out_with_its_fate() -> None:
    frame = decide()
    assert_frame_equal(frame.select(ROW_KEY), RAW.select(ROW_KEY))
    assert frame.select("decision", "reason").rows() == [
        ("not_selected", "below_cut"),
        ("not_selected", "below_cut"),
        ("selected", "within_budget"),
        ("selected", "within_budget"),
        ("rejected", "empty_query"),
        ("duplicate", "exact_duplicate"),
        ("unscorable", "query_too_long"),
    ]
    assert frame["provenance_id"].unique().to_list() == [PROVENANCE_ID]


GOLDEN = [
    pytest.param(
        4,
        {},
        "selected",
        "within_budget",
        RANKS.format(strong="1.000", weak="0.250") + CUT + f"Selected by mine, which takes the highest 50% of the pool "
        f"by {GAP}: this one, with 0.750, is number 1 of 4; the last pair taken has 0.250.",
        id="selected",
    ),
    pytest.param(
        1,
        {},
        "not_selected",
        "below_cut",
        RANKS.format(strong="0.250", weak="1.000") + f"Not selected by mine, which takes the highest 50% of the pool "
        f"by {GAP}: this one, with -0.750, is number 4 of 4; the last pair taken has 0.250.",
        id="below_cut",
    ),
    pytest.param(
        1,
        {"budget": {"answer_tokens": 1}},
        "not_selected",
        "below_cut",
        RANKS.format(strong="0.250", weak="1.000") + "Not selected by mine, which takes the highest of the pool whose "
        f"answers have 1 tokens in all by {GAP}: this one, with -0.750, is number 4 of 4; nothing was taken.",
        id="below_cut_of_nothing",
    ),
    pytest.param(
        3,
        {"strategy": "rmi_band"},
        "selected",
        "in_band",
        RANKS.format(strong="0.750", weak="0.500") + "Selected by mine, which takes what the strong model ranks above "
        "0.5 and up to 0.75: it ranks this one 0.750.",
        id="in_band",
    ),
    pytest.param(
        2,
        {"strategy": "rmi_band"},
        "not_selected",
        "outside_band",
        RANKS.format(strong="0.500", weak="0.750") + "Not selected by mine, which takes what the strong model ranks "
        "above 0.5 and up to 0.75: it ranks this one 0.500.",
        id="outside_band",
    ),
    pytest.param(
        3,
        {"min_gap": 0.25},
        "not_selected",
        "gap_below_minimum",
        RANKS.format(strong="0.750", weak="0.500") + "Not selected by mine, which takes only pairs whose gap, the rank "
        "under the strong model less that under the weak one, is above 0.25: this one's is 0.250.",
        id="gap_below_minimum",
    ),
    pytest.param(
        3,
        {"strategy": "sum_high", "min_gap": 0.25},
        "not_selected",
        "gap_below_minimum",
        RANKS.format(strong="0.750", weak="0.500") + "Not selected by mine, which takes only pairs whose gap, the rank "
        "under the strong model less that under the weak one, is above 0.25: this one's is 0.250.",
        id="gap_below_minimum_of_a_sum",
    ),
    pytest.param(
        4,
        {"rank_strong": [0.2, 0.9]},
        "not_selected",
        "rank_strong_out_of_range",
        RANKS.format(strong="1.000", weak="0.250") + CUT + "Not selected by mine, which takes only pairs that the "
        "strong model ranks above 0.2 and up to 0.9: it ranks this one 1.000.",
        id="rank_strong_out_of_range",
    ),
    pytest.param(
        3,
        {"rmi_strong": [None, 0.25]},
        "not_selected",
        "rmi_strong_out_of_range",
        RANKS.format(strong="0.750", weak="0.500")
        + "Not selected by mine, which takes only pairs whose RMI under the strong model is up to 0.25 nats/token: "
        "this one's is 0.300.",
        id="rmi_strong_out_of_range",
    ),
    pytest.param(
        2,
        {"strategy": "ifd"},
        "not_selected",
        "ifd_above_maximum",
        RANKS.format(strong="0.500", weak="0.750") + "Not selected by mine, which takes no pair above 1 by IFD, the "
        "strong model's perplexity of the answer after the query over that of the answer alone: this one has 1.250.",
        id="ifd_above_maximum",
    ),
    pytest.param(
        1,
        {"strategy": "ppl", "measure": "log_ppl_q"},
        "selected",
        "within_budget",
        RANKS.format(strong="0.250", weak="1.000") + "Selected by mine, which takes the highest 50% of the pool by the "
        "strong model's log perplexity of the query in nats per token: this one, with 2.000, is number 1 of 4; the "
        "last pair taken has 2.000.",
        id="ppl",
    ),
    pytest.param(
        3,
        {"strategy": "ppl", "measure": "log_ppl_q", "order": "low"},
        "not_selected",
        "below_cut",
        RANKS.format(strong="0.750", weak="0.500") + "Not selected by mine, which takes the lowest 50% of the pool by "
        "the strong model's log perplexity of the query in nats per token: this one, with 2.000, is number 3 of 4; the "
        "last pair taken has 2.000 too, and a smaller pair_id, which goes first among equals.",
        id="a_tie",
    ),
    pytest.param(
        2,
        {"strategy": "length"},
        "selected",
        "within_budget",
        RANKS.format(strong="0.500", weak="0.750") + "Selected by mine, which takes the highest 50% of the pool by the "
        "answer's length in tokens of the strong model: this one, with 11, is number 2 of 4; the last pair taken has "
        "11.",
        id="length",
    ),
    pytest.param(
        5,
        {},
        "rejected",
        "empty_query",
        "Rejected when it was read, and never scored: `query` is blank.",
        id="rejected",
    ),
    pytest.param(
        6,
        {},
        "duplicate",
        "exact_duplicate",
        "Duplicate. Equal to b1/a.jsonl:4.0, which stands for it: equal system text, query and answer.",
        id="duplicate",
    ),
    pytest.param(
        7,
        {},
        "unscorable",
        "query_too_long",
        "Not scorable: under the strong model, the query alone does not fit into the window (scoring.max_tokens), and "
        "none is cut; under the weak model, there is no token to score. So mine cannot place it, nor take it.",
        id="unscorable",
    ),
]


@pytest.mark.parametrize(("row", "published", "decision", "reason", "sentence"), GOLDEN)
def test_a_row_is_explained(row: int, published: dict[str, Any], decision: str, reason: str, sentence: str) -> None:
    assert said(row, decide(**published)) == (decision, reason, sentence)


@pytest.mark.parametrize(
    ("strategy", "measure"),
    [
        ("diff_low", f"lowest 50% of the pool by {GAP}: this one, with -0.750, is "),
        ("sum_high", "highest 50% of the pool by the sum of the two models' ranks: this one, with 1.250, is "),
        ("sum_low", "lowest 50% of the pool by the sum of the two models' ranks: this one, with 1.250, is "),
        ("rmi_top", "highest 50% of the pool by the rank under the strong model: this one, with 0.250, is "),
        ("random", "lowest 50% of the pool by a random draw in [0, 1): this one, with 0."),
        ("stratified_random", "by the place in a random draw inside every stratum of query perplexity: this one, "),
    ],
)
def test_the_sentence_names_what_the_selection_orders_by(strategy: str, measure: str) -> None:
    assert measure in said(1, decide(strategy))[2]


@pytest.mark.parametrize("strategy", ["random", "stratified_random"])
def test_a_random_selection_draws_from_the_batch_whatever_the_ranks_are_taken_against(strategy: str) -> None:
    _, _, sentence = said(1, decide(strategy, is_against_reference=True))
    assert "among pairs of like query perplexity of the reference r1: " in sentence
    assert "; the last pair taken has 0." in sentence
    assert "; the last pair taken of the reference r1 has " in said(1, decide(is_against_reference=True))[2]


@pytest.mark.parametrize("is_against_reference", [False, True])
def test_where_all_that_could_be_taken_was_the_sentence_says_so(is_against_reference: bool) -> None:
    _, _, sentence = said(1, decide(budget={"fraction": 1.0}, is_against_reference=is_against_reference))
    assert sentence.endswith("this one, with -0.750, is number 4 of 4; all that could be taken were.")


@pytest.mark.parametrize(
    ("strategy", "given", "value", "said_of_it"),
    [
        ("rmi_band", {"band": [0.5, 0.75]}, 1501 / 2001, "above 0.5 and up to 0.75: it ranks this one 0.7501"),
        ("diff_high", {"min_gap": 0.3}, 0.29996, "is above 0.3: this one's is 0.29996"),
        ("diff_high", {"rmi_strong": [None, 0.2]}, 0.2000004, "up to 0.2 nats/token: this one's is 0.2000004"),
        ("ifd", {"maximum": 1.0}, 1.0001, "above 1 by IFD"),
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
    assert said_of_it in sentence
    assert "this one has 1.000." not in sentence


def test_a_place_among_those_that_pass_a_limit_is_not_called_one_of_the_pool() -> None:
    _, _, sentence = said(3, decide(rmi_strong=[None, 5.0]))
    assert re.search(r"is number \d of those that pass rmi_strong, in a pool of 4;", sentence)


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
    row |= {"verdict_cut": 0.2, "verdict_pool_size": 3}
    strategies = {"in_band": "rmi_band", "outside_band": "rmi_band", "ifd_above_maximum": "ifd"}
    given = {"name": "mine", "strategy": strategies.get(reason.value, "diff_high")}
    given |= {"min_gap": 0.2} if reason is SelectionReason.GAP_BELOW_MINIMUM else {}
    given |= {"rmi_strong": [None, 0.2]} if reason is SelectionReason.RMI_STRONG_OUT_OF_RANGE else {}
    sentence = explanations.explain(row, TypeAdapter(Selection).validate_python(given))
    assert reason.value not in sentence
    assert "None" not in sentence
    assert sentence.endswith(".")
    assert ".." not in sentence


@pytest.mark.parametrize(
    ("number", "words"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (101, "101st")]
)
def test_strata_are_counted_in_words(number: int, words: str) -> None:
    assert explanations._ordinal(number) == words


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"fraction": 0.25}, "the highest 25% of the pool by"),
        ({"fraction": 0.5}, "the highest 50% of the pool by"),
        ({"fraction": 0.125}, "the highest 12.5% of the pool by"),
        ({"fraction": 1.0}, "the highest 100% of the pool by"),
        ({"count": 1000}, "the highest 1,000 of the pool by"),
    ],
)
def test_a_budget_is_told_as_it_is_set(budget: dict[str, Any], words: str) -> None:
    assert words in said(1, decide(budget=budget))[2]


def test_numbers_are_told_apart_where_they_differ_and_show_no_minus_zero() -> None:
    assert explanations._apart(0.30001, 0.30004) == ("0.30001", "0.30004")
    assert explanations._apart(0.3, 0.3) == ("0.300", "0.300")
    assert explanations._apart(-0.0, 0.25) == ("0.000", "0.250")


def test_a_short_query_is_told() -> None:
    strong = STRONG.with_columns(is_short_query=pl.lit(True), num_q_tokens=pl.lit(3, pl.Int64))
    _, _, sentence = said(1, decide(strong=strong))
    assert "The query has only 3 tokens for the strong model, which makes scores noisy." in sentence


def test_a_model_that_does_not_rank_a_selected_pair_is_told() -> None:
    weak = rmi_rows({}, {}, {}, UNSCORED, UNSCORED)
    _, _, sentence = said(4, decide("rmi_top", weak=weak))
    assert "the strong model ranks it 1.000 in the only stratum, the weak model does not rank it." in sentence


def test_what_a_version_says_of_a_row_is_one_line() -> None:
    told = partial(explanations.explain_in_version, left_out=None)
    selected = {"decision": "selected", "reason": "within_budget", "explanation": "Selected."}
    dropped = {"decision": "not_selected", "reason": "below_cut", "explanation": "Not selected."}
    assert told(selected, has_batch=True, was_in=None, told=None) == "in it: Selected."
    assert told(selected, has_batch=True, was_in=1, told="Selected.") == "in it: as above"
    assert told(dropped, has_batch=True, was_in=2, told=None) == "dropped, had been in version 2: Not selected."
    assert told(dropped, has_batch=True, was_in=None, told=None) == "not in it: Not selected."
    assert told(None, has_batch=False, was_in=2, told=None) == "dropped, had been in version 2: its batch was not in it"
    assert told(None, has_batch=True, was_in=None, told=None) == "no such row had been delivered"
    gated = told(None, has_batch=False, left_out="gated (too_many_rejected): 2 of 3", was_in=2, told=None)
    assert gated.endswith("its batch was not in it: gated (too_many_rejected): 2 of 3")
    both = [f"Ranked 0.5. {verdict} by mine." for verdict in ("Selected", "Not selected")]
    assert told(dropped | {"explanation": both[1]}, has_batch=True, was_in=2, told=both[0]) == (
        "dropped, had been in version 2: as above, but: Not selected by mine."
    )
    old = {"decision": "duplicate", "reason": "exact_duplicate"}
    assert told(old, has_batch=True, was_in=None, told=None) == (
        "not in it: duplicate (exact_duplicate); older versions hold no sentence"
    )


def test_a_duplicate_shows_its_pairs_scores_but_has_no_verdict() -> None:
    frame = decide()
    duplicate, original = (frame.filter(source_row=row).row(0, named=True) for row in (6, 4))
    assert duplicate["scores"] == original["scores"]
    assert (duplicate["gap"], duplicate["rank_sum"]) == (original["gap"], original["rank_sum"]) == (0.75, 1.25)
    assert duplicate["verdicts"] == []
    assert duplicate["duplicate_of"] == "b1/a.jsonl:4.0"


def test_a_rejected_row_has_neither_scores_nor_verdicts() -> None:
    row = decide().filter(source_row=5).row(0, named=True)
    assert (row["scores"], row["verdicts"], row["gap"], row["rank_sum"], row["pair_id"]) == ([], [], None, None, None)


def test_scores_stand_by_model_and_verdicts_by_selection() -> None:
    row = decide().filter(source_row=3).row(0, named=True)
    assert [(score["model"], score["rmi"], score["rank"]) for score in row["scores"]] == [
        ("strong", 0.3, 0.75),
        ("weak", 0.2, 0.5),
    ]
    names = [verdict["selection"] for verdict in row["verdicts"]]
    assert names == ["mine", "control_random", "control_stratified_random"]
    assert row["verdicts"][0] == {
        "selection": "mine",
        "is_selected": True,
        "reason": "within_budget",
        "score": 0.25,
        "position": 2,
        "cut": 0.25,
        "pool_size": 4,
    }


def test_a_pair_that_one_model_cannot_score_is_unscorable_with_that_models_reason() -> None:
    weak = rmi_rows({}, {}, UNSCORED | {"null_reason_rmi": "non_finite"}, {}, UNSCORED)
    frame = decide(weak=weak)
    assert said(3, frame)[:2] == ("unscorable", "non_finite")
    assert said(3, frame)[2].startswith("Not scorable: under the weak model, the model gave no finite number. ")


def test_a_score_that_was_not_wanted_is_no_reason() -> None:
    not_wanted = UNSCORED | {"null_reason_rmi": NullReason.NOT_WANTED.value}
    strong = rmi_rows(not_wanted, not_wanted, not_wanted, not_wanted, not_wanted | UNSCORED_ANSWER)
    weak = rmi_rows(*[not_wanted] * 5)
    frame = decide("ifd", strong=strong, weak=weak)
    assert said(7, frame) == (
        "unscorable",
        "non_finite",
        "Not scorable: under the strong model, the model gave no finite number. So mine cannot place it, nor take it.",
    )
    ranked = "No model ranks it by RMI. Selected by mine, which takes the highest 50% of the pool by IFD, "
    assert said(1, frame)[2].startswith(ranked)


def test_the_vocabulary_of_reasons_is_closed() -> None:
    frame = decide()
    with pytest.raises(TableError, match=r"reason\|check \(7 rows\)"):
        enforce(Decisions, frame.with_columns(reason=pl.lit("because")))
    with pytest.raises(TableError, match=r"decision\|check \(7 rows\)"):
        enforce(Decisions, frame.with_columns(decision=pl.lit("maybe")))
    with pytest.raises(TableError, match=r"reason\|nullability"):
        enforce(Decisions, frame.with_columns(reason=pl.lit(None, pl.String)))


def test_the_order_of_the_rows_does_not_matter() -> None:
    shuffled = decide(raw=RAW[::-1], strong=STRONG[[2, 0, 4, 1, 3]], weak=WEAK[::-1])
    assert shuffled.equals(decide())


def test_a_batch_without_rows_has_no_decisions() -> None:
    assert decide(raw=raw_rows(), strong=rmi_rows(), weak=rmi_rows()).is_empty()


def test_a_batch_of_rejected_rows_is_decided_too() -> None:
    frame = decide(raw=raw_rows(rejected(), rejected()), strong=rmi_rows(), weak=rmi_rows())
    assert frame["decision"].to_list() == ["rejected", "rejected"]


# --- the rows that a selection takes --------------------------------------------------------------------------------


def test_the_selected_rows_come_best_first_with_their_text() -> None:
    rows = enforce(SelectedSubset, decisions.selected_rows("mine", RAW, decide()))
    assert rows.columns == list(dtypes(SelectedSubset))
    assert rows["position"].to_list() == [1, 2]
    assert rows.row(0, named=True) == {
        "batch": "b1",
        "source_file": "a.jsonl",
        "source_row": 4,
        "turn_index": 0,
        "position": 1,
        "pair_id": pair_name(4),
        "system": "Be brief.",
        "query": "query 4",
        "answer": "answer 4",
        "source": "forum",
        "language": "go",
    }


@pytest.mark.parametrize("control", ["control_random", "control_stratified_random"])
def test_a_control_takes_as_many_rows_of_the_same_pool(control: str) -> None:
    rows = enforce(SelectedSubset, decisions.selected_rows(control, RAW, decide()))
    assert rows["position"].to_list() == [1, 2]
    assert set(rows["source_row"]) <= {1, 2, 3, 4}


def test_a_selection_that_takes_nothing_has_no_rows() -> None:
    nothing = decide(min_gap=1.0)
    assert enforce(SelectedSubset, decisions.selected_rows("mine", RAW, nothing)).is_empty()


# --- any batch ------------------------------------------------------------------------------------------------------

_ROW = st.sampled_from(["rejected", *range(1, 6)])
_RMI = st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 0.1, 2.0]))
_STRATEGIES = ["diff_high", "sum_low", "rmi_band", "rmi_top", "ifd", "length", "random", "stratified_random"]


def _scores(rmis: list[float | None]) -> pl.DataFrame:
    return rmi_rows(*(UNSCORED if rmi is None else {"rmi": rmi} for rmi in rmis))


@effort(max_examples=40)
@given(
    rows=st.lists(_ROW, max_size=8),
    strong=st.lists(_RMI, min_size=5, max_size=5),
    weak=st.lists(_RMI, min_size=5, max_size=5),
    strategy=st.sampled_from(_STRATEGIES),
)
def test_decisions_add_up_whatever_the_batch(
    rows: list[Any], strong: list[float | None], weak: list[float | None], strategy: str
) -> None:
    numbers = sorted({row for row in rows if row != "rejected"})
    renamed = {number: place for place, number in enumerate(numbers, start=1)}
    raw = raw_rows(*(rejected() if row == "rejected" else {"pair_id": pair_name(renamed[row])} for row in rows))
    frame = decide(strategy, raw=raw, strong=_scores(strong[: len(numbers)]), weak=_scores(weak[: len(numbers)]))
    assert_frame_equal(frame.select(ROW_KEY), raw.select(ROW_KEY))
    distinct = frame.filter(pl.col("decision").is_in(["selected", "not_selected", "unscorable"]))
    assert distinct.height == len(numbers)
    assert frame.filter(decision="rejected").height == rows.count("rejected")
    chosen = decisions.selected_rows("mine", raw, frame)
    assert sorted(chosen["pair_id"]) == sorted(frame.filter(decision="selected")["pair_id"])
    for control in ("control_random", "control_stratified_random"):
        assert decisions.selected_rows(control, raw, frame).height == chosen.height
