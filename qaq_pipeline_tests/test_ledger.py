"""ledger: every row in is a row out, with its decision, a reason of the closed vocabulary, and a sentence."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import TypeAdapter

from qaq_pipeline import ledger, reference, schema, selection
from qaq_pipeline.config import ScreeningSettings, Selection
from qaq_pipeline.schema import Decisions, NullReason, SelectedSubset, SelectionReason, TableError, dtypes, enforce
from qaq_pipeline.screening import screen_alone
from qaq_pipeline.strata import disagreement_scores
from qaq_pipeline_tests.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows

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
    {"rmi": 0.4, "ifd_ppl": 0.6, "is_truncated": True},
    UNSCORED | UNSCORED_ANSWER,
)
WEAK = rmi_rows(
    {"rmi": 0.4}, {"rmi": 0.3}, {"rmi": 0.2}, {"rmi": 0.1}, UNSCORED | {"null_reason_rmi": "no_tokens_to_score"}
)

RANKS = (
    "Rank of RMI among pairs of like query perplexity: strong {strong} in stratum 1 of 1, "
    "weak {weak} in stratum 1 of 1. "
)


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
    pool = reference.pool_id("r1", "0") if is_against_reference else "batch:b1"
    disagreement, _ = disagreement_scores(scores, ONE_STRATUM, pool)
    candidates = selection.candidates(disagreement, scores)
    verdicts = selection.select_all(
        candidates, [selected_by], sorted(scores), candidates if is_against_reference else None
    )
    frame = ledger.decide(
        raw, screen_alone(raw, ScreeningSettings()), scores, disagreement, verdicts, selected_by, PROVENANCE_ID
    )
    return enforce(Decisions, frame)


def said(row: int, frame: pl.DataFrame) -> tuple[str, str, str]:
    """Decision, reason and sentence of a row."""
    return frame.filter(source_row=row).select("decision", "reason", "explanation").row(0)


def test_every_row_in_is_a_row_out_with_its_fate() -> None:
    frame = decide()
    assert_frame_equal(frame.select(schema.ROW_KEY), RAW.select(schema.ROW_KEY))
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
        RANKS.format(strong="1.000", weak="0.250") + "The tail of its answer was cut for: strong. "
        "Selected by mine: gap 0.750 is number 1 of 4 in the pool; the last pair taken has 0.250.",
        id="selected",
    ),
    pytest.param(
        1,
        {},
        "not_selected",
        "below_cut",
        RANKS.format(strong="0.250", weak="1.000")
        + "Not selected by mine: gap -0.750 is number 4 of 4 in the pool; the last pair taken has 0.250.",
        id="below_cut",
    ),
    pytest.param(
        1,
        {"budget": {"answer_tokens": 1}},
        "not_selected",
        "below_cut",
        RANKS.format(strong="0.250", weak="1.000")
        + "Not selected by mine: gap -0.750 is number 4 of 4 in the pool; nothing was taken.",
        id="below_cut_of_nothing",
    ),
    pytest.param(
        3,
        {"strategy": "rmi_band"},
        "selected",
        "in_band",
        RANKS.format(strong="0.750", weak="0.500") + "Selected by mine: rank 0.750 is in the band (0.5, 0.75].",
        id="in_band",
    ),
    pytest.param(
        2,
        {"strategy": "rmi_band"},
        "not_selected",
        "outside_band",
        RANKS.format(strong="0.500", weak="0.750")
        + "Not selected by mine: rank 0.500 is outside the band (0.5, 0.75].",
        id="outside_band",
    ),
    pytest.param(
        3,
        {"min_gap": 0.25},
        "not_selected",
        "gap_below_minimum",
        RANKS.format(strong="0.750", weak="0.500")
        + "Not selected by mine: gap 0.250 is below the minimum gap or equal to it (0.25).",
        id="gap_below_minimum",
    ),
    pytest.param(
        4,
        {"rank_strong": [0.2, 0.9]},
        "not_selected",
        "rank_strong_out_of_range",
        RANKS.format(strong="1.000", weak="0.250") + "The tail of its answer was cut for: strong. "
        "Not selected by mine: its rank under the strong model is not in the range (0.2, 0.9).",
        id="rank_strong_out_of_range",
    ),
    pytest.param(
        2,
        {"strategy": "ifd"},
        "not_selected",
        "ifd_above_maximum",
        RANKS.format(strong="0.500", weak="0.750")
        + "Not selected by mine: ifd_ppl of the strong model 1.250 is above the maximum 1.0.",
        id="ifd_above_maximum",
    ),
    pytest.param(
        1,
        {"strategy": "ppl", "measure": "log_ppl_q"},
        "selected",
        "within_budget",
        RANKS.format(strong="0.250", weak="1.000")
        + "Selected by mine: log_ppl_q of the strong model 2.000 is number 1 of 4 in the pool; "
        "the last pair taken has 2.000.",
        id="ppl",
    ),
    pytest.param(5, {}, "rejected", "empty_query", "Rejected when it was read: `query` is blank", id="rejected"),
    pytest.param(
        6,
        {},
        "duplicate",
        "exact_duplicate",
        "Duplicate of b1/a.jsonl:4.0, which stands for this pair: equal system text, query and answer.",
        id="duplicate",
    ),
    pytest.param(
        7,
        {},
        "unscorable",
        "query_too_long",
        "Not scorable: strong model: query_too_long; weak model: no_tokens_to_score. "
        "It is in no stratum and cannot be selected.",
        id="unscorable",
    ),
]


@pytest.mark.parametrize(("row", "published", "decision", "reason", "sentence"), GOLDEN)
def test_a_row_is_explained(row: int, published: dict[str, Any], decision: str, reason: str, sentence: str) -> None:
    assert said(row, decide(**published)) == (decision, reason, sentence)


@pytest.mark.parametrize(
    ("strategy", "measure"),
    [
        ("diff_low", "gap -0.750"),
        ("sum_high", "rank sum 1.250"),
        ("sum_low", "rank sum 1.250"),
        ("rmi_top", "rank 0.250"),
        ("length", "answer length in tokens 11.000"),
        ("ifd", "ifd_ppl of the strong model 0.900"),
    ],
)
def test_the_sentence_names_what_the_selection_orders_by(strategy: str, measure: str) -> None:
    assert f" by mine: {measure} is number " in said(1, decide(strategy))[2]


@pytest.mark.parametrize(
    ("strategy", "measure"), [("random", "random draw"), ("stratified_random", "place in the stratified draw")]
)
def test_a_random_selection_says_that_it_drew(strategy: str, measure: str) -> None:
    assert f" by mine: {measure} " in said(1, decide(strategy))[2]


@pytest.mark.parametrize("strategy", ["random", "stratified_random"])
def test_a_random_selection_draws_from_the_batch_whatever_the_ranks_are_taken_against(strategy: str) -> None:
    _, _, sentence = said(1, decide(strategy, is_against_reference=True))
    assert "among pairs of like query perplexity of the reference r1: " in sentence
    assert "; the last pair taken has 0." in sentence
    assert "; the last pair taken of the reference r1 has " in said(1, decide(is_against_reference=True))[2]


@pytest.mark.parametrize("is_against_reference", [False, True])
def test_where_all_that_could_be_taken_was_the_sentence_says_so(is_against_reference: bool) -> None:
    _, _, sentence = said(1, decide(budget={"fraction": 1.0}, is_against_reference=is_against_reference))
    assert sentence.endswith("gap -0.750 is number 4 of 4 in the pool; all that could be taken were.")


def test_every_reason_of_a_selection_has_a_sentence() -> None:
    explained = {case.values[3] for case in GOLDEN} & {reason.value for reason in SelectionReason}
    assert explained == {reason.value for reason in SelectionReason} - {SelectionReason.NOT_IN_POOL.value}


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
    assert said(3, frame)[2].startswith("Not scorable: weak model: non_finite. ")


def test_a_score_that_was_not_wanted_is_no_reason() -> None:
    not_wanted = UNSCORED | {"null_reason_rmi": NullReason.NOT_WANTED.value}
    strong = rmi_rows(not_wanted, not_wanted, not_wanted, not_wanted, not_wanted | UNSCORED_ANSWER)
    weak = rmi_rows(*[not_wanted] * 5)
    frame = decide("ifd", strong=strong, weak=weak)
    assert said(7, frame) == (
        "unscorable",
        "non_finite",
        "Not scorable: strong model: non_finite. It is in no stratum and cannot be selected.",
    )
    assert said(1, frame)[2].startswith("No model ranks it. Selected by mine: ifd_ppl of the strong model ")


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
    rows = enforce(SelectedSubset, ledger.selected_rows("mine", RAW, decide()))
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
    rows = enforce(SelectedSubset, ledger.selected_rows(control, RAW, decide()))
    assert rows["position"].to_list() == [1, 2]
    assert set(rows["source_row"]) <= {1, 2, 3, 4}


def test_a_selection_that_takes_nothing_has_no_rows() -> None:
    nothing = decide(min_gap=1.0)
    assert enforce(SelectedSubset, ledger.selected_rows("mine", RAW, nothing)).is_empty()


# --- any batch ------------------------------------------------------------------------------------------------------

_ROW = st.sampled_from(["rejected", *range(1, 6)])
_RMI = st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 0.1, 2.0]))
_STRATEGIES = ["diff_high", "sum_low", "rmi_band", "rmi_top", "ifd", "length", "random", "stratified_random"]


def _scores(rmis: list[float | None]) -> pl.DataFrame:
    return rmi_rows(*(UNSCORED if rmi is None else {"rmi": rmi} for rmi in rmis))


@effort(max_examples=40, deadline=None)
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
    assert_frame_equal(frame.select(schema.ROW_KEY), raw.select(schema.ROW_KEY))
    distinct = frame.filter(pl.col("decision").is_in(["selected", "not_selected", "unscorable"]))
    assert distinct.height == len(numbers)
    assert frame.filter(decision="rejected").height == rows.count("rejected")
    chosen = ledger.selected_rows("mine", raw, frame)
    assert sorted(chosen["pair_id"]) == sorted(frame.filter(decision="selected")["pair_id"])
    for control in ("control_random", "control_stratified_random"):
        assert ledger.selected_rows(control, raw, frame).height == chosen.height
