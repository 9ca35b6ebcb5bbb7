"""decisions: every row in is a row out, with its decision, a reason of the closed vocabulary, and a sentence."""

from __future__ import annotations

from typing import Any
from unittest import mock

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import TypeAdapter

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import Decisions, SelectedSubset, TableError, dtypes, enforce
from qaq_pipeline.schema.vocabularies import NullReason
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection import decisions, rank_reference
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.decisions import DecidedPairs
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.grammar.pair_columns import with_pair_columns
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.storage import parquet_file
from qaq_pipeline_tests.support import decided
from qaq_pipeline_tests.support.decided import kept_rows
from qaq_pipeline_tests.support.frames import ONE_STRATUM, all_valid, pair_name, raw_rows, rejected, rmi_rows

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
BOTH = {"strong": STRONG, "weak": WEAK}


def decide(
    strategy: str = "diff_high",
    *,
    raw: pl.DataFrame = RAW,
    strong: pl.DataFrame = STRONG,
    weak: pl.DataFrame = WEAK,
    is_against_reference: bool = False,
    invalid: dict[str, str] | None = None,
    **published: Any,
) -> pl.DataFrame:
    """Decisions under one selection, as the asset makes them; with a reference, r1 of these very pairs.

    Args:
        strategy: of the selection.
        raw: the rows.
        strong: scores under the strong model.
        weak: scores under the weak model.
        is_against_reference: whether a reference ranks the pairs.
        invalid: the signal that declares a pair invalid, by pair_id.
        published: further fields of the selection.
    """
    given = {"name": "mine", "strategy": strategy} | ({} if strategy == "rmi_band" else HALF) | published
    selected_by: Selection = TypeAdapter(Selection).validate_python(given)
    scores = {"strong": strong, "weak": weak}
    pool = rank_reference.pool_id("r1", "0") if is_against_reference else "batch:b1"
    disagreement, _ = disagreement_scores(scores, ONE_STRATUM, pool)
    screened = screen_alone(raw, ScreeningSettings())
    found = invalid or {}
    validity = all_valid(disagreement["pair_id"]).with_columns(
        invalid_by=pl.col("pair_id").replace_strict(found, default=None, return_dtype=pl.String)
    )
    judged = with_validity(candidates(disagreement, scores), validity)
    pairs = with_pair_columns(judged, kept_rows(raw, screened), [selected_by], {})
    verdicts = select_all(pairs, [selected_by], pairs if is_against_reference else None)
    said_of = {"pair_id": list(found), "why_invalid": [f"Evidence of {signal} is here" for signal in found.values()]}
    why_invalid = pl.DataFrame(said_of, schema={"pair_id": pl.String, "why_invalid": pl.String})
    frame = decided.decide(raw, screened, pairs, verdicts, selected_by, PROVENANCE_ID, why_invalid=why_invalid)
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


def test_a_score_that_was_not_wanted_is_no_reason() -> None:
    not_wanted = UNSCORED | {"null_reason_rmi": NullReason.NOT_WANTED.value}
    strong = rmi_rows(not_wanted, not_wanted, not_wanted, not_wanted, not_wanted | UNSCORED_ANSWER)
    weak = rmi_rows(*[not_wanted] * 5)
    frame = decide("ifd", strong=strong, weak=weak)
    assert said(7, frame)[:2] == ("unscorable", "non_finite")
    assert said(1, frame)[:2] == ("selected", "within_budget")


def test_an_end_that_could_not_be_scored_has_a_reason_of_its_own_and_makes_no_pair_unscorable() -> None:
    cut = {"nll_end": None, "null_reason_end": NullReason.ANSWER_TRUNCATED.value}
    not_wanted = {"nll_end": None, "null_reason_end": NullReason.NOT_WANTED.value}
    weak = UNSCORED | {"null_reason_rmi": "non_finite"}
    frame = decide(strong=rmi_rows({}, cut, cut, not_wanted, {}), weak=rmi_rows({}, {}, weak, {}, {}))
    by_row = {row: frame.filter(source_row=row).row(0, named=True) for row in (1, 2, 3, 4)}
    ends = {row: (of["scores"][0]["nll_end"], of["scores"][0]["null_reason_end"]) for row, of in by_row.items()}
    assert ends == {1: (0.25, None), 2: (None, "answer_truncated"), 3: (None, "answer_truncated"), 4: (None, None)}
    assert [by_row[row]["decision"] for row in (1, 2, 4)].count("unscorable") == 0
    assert (by_row[3]["decision"], by_row[3]["reason"]) == ("unscorable", "non_finite")


def test_the_vocabulary_of_reasons_is_closed() -> None:
    frame = decide()
    with pytest.raises(TableError, match=r"reason\|check \(7 rows\)"):
        enforce(Decisions, frame.with_columns(reason=pl.lit("because")))
    with pytest.raises(TableError, match=r"decision\|check \(7 rows\)"):
        enforce(Decisions, frame.with_columns(decision=pl.lit("maybe")))
    with pytest.raises(TableError, match=r"reason\|nullability"):
        enforce(Decisions, frame.with_columns(reason=pl.lit(None, pl.String)))


def test_the_order_of_the_rows_does_not_matter() -> None:
    shuffled = decide(raw=RAW[list(range(RAW.height))[::-1]], strong=STRONG[[2, 0, 4, 1, 3]], weak=WEAK[::-1])
    assert shuffled.equals(decide())


def test_a_batch_without_rows_has_no_decisions() -> None:
    assert decide(raw=raw_rows(), strong=rmi_rows(), weak=rmi_rows()).is_empty()


def test_a_batch_of_rejected_rows_is_decided_too() -> None:
    frame = decide(raw=raw_rows(rejected(), rejected()), strong=rmi_rows(), weak=rmi_rows())
    assert frame["decision"].to_list() == ["rejected", "rejected"]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_rows_that_are_decided_in_parts_have_the_same_decisions(size: int) -> None:
    selection: Selection = TypeAdapter(Selection).validate_python(
        {"name": "mine", "strategy": "diff_high", "max_per_query": 1, "where": [{"column": "language", "equals": "go"}]}
        | HALF
    )
    screened = screen_alone(RAW, ScreeningSettings())
    ranked = candidates(disagreement_scores(BOTH, ONE_STRATUM, "batch:b1")[0], BOTH)
    pairs = with_pair_columns(ranked, kept_rows(RAW, screened), [selection], {})
    verdicts = select_all(pairs, [selection])
    of_pairs = DecidedPairs(pairs, verdicts, selection)
    rows = screened.join(RAW.select(*ROW_KEY, "detail"), on=ROW_KEY).sort(ROW_KEY)
    parts = [decisions.decide(part, of_pairs, PROVENANCE_ID) for part in rows.iter_slices(size)]
    assert_frame_equal(pl.concat(parts), decided.decide(RAW, screened, pairs, verdicts, selection, PROVENANCE_ID))


# --- the rows that a selection takes --------------------------------------------------------------------------------


def test_the_selected_rows_come_best_first_with_their_text() -> None:
    rows = enforce(SelectedSubset, decided.selected_rows("mine", RAW, decide()))
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
        "reasoning": None,
        "history": None,
        "source": "forum",
        "language": "go",
    }


@pytest.mark.parametrize("control", ["control_random", "control_stratified_random"])
def test_a_control_takes_as_many_rows_of_the_same_pool(control: str) -> None:
    rows = enforce(SelectedSubset, decided.selected_rows(control, RAW, decide()))
    assert rows["position"].to_list() == [1, 2]
    assert set(rows["source_row"]) <= {1, 2, 3, 4}


def test_a_selection_that_takes_nothing_has_no_rows() -> None:
    nothing = decide(min_gap=1.0)
    assert enforce(SelectedSubset, decided.selected_rows("mine", RAW, nothing)).is_empty()


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
    chosen = decided.selected_rows("mine", raw, frame)
    assert sorted(chosen["pair_id"]) == sorted(frame.filter(decision="selected")["pair_id"])
    for control in ("control_random", "control_stratified_random"):
        assert decided.selected_rows(control, raw, frame).height == chosen.height


def test_rows_that_are_not_trained_on_have_a_decision_and_neither_scores_nor_verdicts() -> None:
    kept = screen_alone(RAW, ScreeningSettings())
    words = {"held_out": ("cluster_drawn", "its cluster is drawn"), "between": ("similar_to_both", "it is similar")}
    for number, (status, (reason, evidence)) in enumerate(words.items(), start=1):
        changed = {"status": status, "reason": reason, "evidence": evidence}
        kept = kept.with_columns(
            pl.when(pl.col("source_row") == number).then(pl.lit(value)).otherwise(name).alias(name)
            for name, value in changed.items()
        )
    others = ~pl.col("pair_id").is_in([pair_name(1), pair_name(2)])
    scores = {role: frame.filter(others) for role, frame in BOTH.items()}
    pairs = candidates(disagreement_scores(scores, ONE_STRATUM, "batch:b1")[0], scores)
    selection: Selection = TypeAdapter(Selection).validate_python({"name": "mine", "strategy": "diff_high"} | HALF)
    verdicts = select_all(pairs, [selection])
    frame = enforce(Decisions, decided.decide(RAW, kept, pairs, verdicts, selection, PROVENANCE_ID))
    assert said(1, frame) == (
        "held_out",
        "cluster_drawn",
        "Held out for training trials, and not scored: its cluster is drawn.",
    )
    assert said(2, frame) == (
        "between",
        "similar_to_both",
        "Between: it is similar to rows that are trained on and to held-out rows, so it is in neither, and not scored: "
        "it is similar.",
    )
    assert frame.head(2).select(pl.col("scores", "verdicts").list.len()).rows() == [(0, 0), (0, 0)]
    assert not set(selected_rows_of(frame)) & {1, 2}


@pytest.mark.parametrize("size", [1, 2, 100])
def test_the_selected_rows_are_the_same_from_parts(size: int) -> None:
    whole = decided.selected_rows("mine", RAW, decide())
    with mock.patch.object(parquet_file, "ROWS_PER_GROUP", size):
        assert_frame_equal(decided.selected_rows("mine", RAW, decide()), whole)


def selected_rows_of(frame: pl.DataFrame) -> list[int]:
    return decided.selected_rows("mine", RAW, frame)["source_row"].to_list()
