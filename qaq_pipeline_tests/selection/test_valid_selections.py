"""selection: `valid: true` excludes exactly the invalid pairs, before anything else, and they stay in the pool."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import TypeAdapter

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.schema.tables import RankReference, Validity, dtypes, enforce
from qaq_pipeline.schema.vocabularies import INVALID_REASONS, SelectionReason, Signal
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.grammar.composition import with_grounds
from qaq_pipeline.selection.grammar.pair_columns import with_pair_columns
from qaq_pipeline.selection.strategies import select, select_all
from qaq_pipeline.validity.words import WHY
from qaq_pipeline_tests.support.decided import decide, kept_rows
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rmi_rows
from qaq_pipeline_tests.support.sentences import Check

ROLES = ("strong", "weak")
SCREENING = ScreeningSettings()
TWO_MODELS = "models: {strong: {hub: a/b}, weak: {hub: a/c}}\n"
Scores = dict[str, pl.DataFrame]

STRATEGIES: dict[str, dict[str, Any]] = {
    "diff_high": {},
    "diff_low": {},
    "sum_high": {},
    "sum_low": {},
    "rmi_top": {},
    "rmi_band": {"band": (0.2, 0.9)},
    "ifd": {},
    "ppl": {"measure": "log_ppl_q"},
    "length": {},
    "random": {},
    "stratified_random": {},
}


def parse(strategy: str = "rmi_top", **values: Any) -> Selection:
    named = {"name": "mine", "strategy": strategy, "valid": True} | values
    return TypeAdapter(Selection).validate_python(named)


def scores(rmi: list[float]) -> Scores:
    """RmiScores of the pairs 1, 2, 3, …: the weak model ranks them the other way round."""
    columns = {"strong": rmi, "weak": [-value for value in rmi]}
    return {
        role: rmi_rows(
            *(
                {"rmi": value, "ifd_ppl": 0.1 + 0.01 * n, "log_ppl_q": 1 + 0.1 * n, "num_a_tokens_untruncated": 10 + n}
                for n, value in enumerate(values)
            )
        )
        for role, values in columns.items()
    }


def validity(*invalid_by: Signal | None, first: int = 1) -> pl.DataFrame:
    """Validity of the pairs `first`, `first` + 1, …: the signal that declares each invalid; None: valid."""
    rows = [
        {
            "pair_id": pair_name(first + n),
            "invalid_by": signal,
            "query_in_answer": 0.0,
            "answer_in_query": 0.0,
            "signals": [],
        }
        for n, signal in enumerate(invalid_by)
    ]
    return enforce(Validity, pl.DataFrame(rows, schema=dtypes(Validity)))


def judged(rmi: list[float], *invalid_by: Signal | None) -> pl.DataFrame:
    """Candidates with their validity; with a higher RMI, a pair is better by every strategy on RMI."""
    of_models = scores(rmi)
    ranked, _ = disagreement_scores(of_models, ONE_STRATUM, "batch:b1")
    return with_validity(candidates(ranked, of_models), validity(*invalid_by))


def of_rows(pairs: pl.DataFrame, raw: pl.DataFrame, selection: Selection) -> pl.DataFrame:
    """The candidates with the columns of their rows that the selection names."""
    return with_pair_columns(pairs, kept_rows(raw, screen_alone(raw, SCREENING)), [selection], {})


def taken(verdicts: pl.DataFrame) -> list[str]:
    return verdicts.filter("is_selected").sort("position")["pair_id"].to_list()


def reasons(verdicts: pl.DataFrame) -> list[str]:
    return verdicts.sort("pair_id")["reason"].to_list()


def names(*numbers: int) -> list[str]:
    return [pair_name(number) for number in numbers]


BEST_FIRST = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
NONE = (None,) * 8


# --- what is excluded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", list(Signal))
def test_an_invalid_pair_is_excluded_with_the_reason_of_its_signal(signal: Signal) -> None:
    pairs = judged(BEST_FIRST, signal, *NONE[1:])
    verdicts = select(pairs, parse(budget={"count": 2}))
    assert taken(verdicts) == names(2, 3)
    assert reasons(verdicts)[0] == INVALID_REASONS[signal].value == f"invalid_{signal}"
    assert verdicts.sort("pair_id")["position"].to_list() == [None, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_takes_an_invalid_pair_and_every_one_takes_the_valid_ones(strategy: str) -> None:
    signals = [*Signal, None, None, None]
    pairs = judged(BEST_FIRST, *signals)
    selection = parse(
        strategy, **({} if strategy == "rmi_band" else {"budget": {"fraction": 1.0}}), **STRATEGIES[strategy]
    )
    verdicts = select(pairs, selection)
    is_invalid = [signal is not None for signal in signals]
    assert [reason.startswith("invalid_") for reason in reasons(verdicts)] == is_invalid
    valid = {pair_name(n) for n, signal in enumerate(signals, start=1) if signal is None}
    inside = {pair_name(n) for n in (6, 7)} if strategy == "rmi_band" else valid
    assert set(taken(verdicts)) == inside


@given(st.lists(st.sampled_from([None, None, *Signal]), min_size=1, max_size=8), st.integers(1, 9))
@effort(max_examples=60)
def test_it_takes_the_best_valid_pairs_up_to_the_budget(signals: list[Signal | None], count: int) -> None:
    pairs = judged(BEST_FIRST[: len(signals)], *signals)
    verdicts = select(pairs, parse(budget={"count": count}))
    valid = [pair_name(n) for n, signal in enumerate(signals, start=1) if signal is None]
    assert taken(verdicts) == valid[:count]
    excluded = [reason for reason in reasons(verdicts) if reason.startswith("invalid_")]
    assert excluded == [f"invalid_{signal}" for signal in signals if signal is not None]
    assert set(verdicts["pool_size"]) == {len(signals)}


def test_without_valid_an_invalid_pair_is_taken() -> None:
    pairs = judged(BEST_FIRST, Signal.ECHO, *NONE[1:])
    selection = parse(valid=False, budget={"count": 1})
    assert taken(select(pairs, selection)) == names(1)
    assert_frame_equal(select(pairs.drop("invalid_by"), selection), select(pairs, selection))


def test_where_every_pair_is_valid_it_decides_as_without_valid() -> None:
    pairs = judged(BEST_FIRST, *NONE)
    valid, all_pairs = (select_all(pairs, [parse(valid=valid, budget={"count": 3})]) for valid in (True, False))
    assert_frame_equal(valid, all_pairs)


def test_where_no_pair_is_valid_nothing_is_taken() -> None:
    verdicts = select_all(judged(BEST_FIRST, *[Signal.MISMATCH] * 8), [parse(budget={"fraction": 0.5})])
    assert not verdicts["is_selected"].any()
    assert set(verdicts["reason"]) == {"invalid_mismatch"}
    assert set(verdicts["pool_size"]) == {8}


# --- its place among the other settings -----------------------------------------------------------------------------


def test_validity_comes_after_the_pool_and_before_where_and_the_filters() -> None:
    pairs = judged(BEST_FIRST[:4], Signal.MISMATCH, Signal.MISMATCH, None, None)
    is_first = pl.col("pair_id") == pair_name(1)
    pairs = pairs.with_columns(gap=pl.when(~is_first).then("gap"))
    raw = raw_rows(*({"language": "go"} for _ in range(4)))
    selection = parse("diff_high", where=[{"column": "language", "equals": "python"}], min_gap=1.0, budget={"count": 4})
    with_columns = of_rows(pairs, raw, selection)
    found = reasons(select(with_columns, selection))
    assert found == ["not_in_pool", "invalid_mismatch", "where_not_met", "where_not_met"]
    filtered = select(pairs, parse("diff_high", min_gap=1.0, budget={"count": 4}))
    assert reasons(filtered) == ["not_in_pool", "invalid_mismatch", "gap_below_minimum", "gap_below_minimum"]


def test_an_invalid_pair_does_not_fill_the_cap_of_its_query() -> None:
    pairs = judged(BEST_FIRST[:4], Signal.ECHO, None, None, None)
    raw = raw_rows(*({"query": "the same"} for _ in range(4)))
    selection = parse(max_per_query=1, budget={"fraction": 1.0})
    verdicts = select(of_rows(pairs, raw, selection), selection)
    assert reasons(verdicts) == ["invalid_echo", "within_budget", "query_full", "query_full"]


def test_an_invalid_pair_does_not_fill_the_quota_of_its_group() -> None:
    pairs = judged(BEST_FIRST[:4], Signal.ECHO, None, None, None)
    raw = raw_rows({"language": "go"}, {"language": "go"}, {"language": "go"}, {"language": "rust"})
    selection = parse(quotas={"per": "language", "shares": "equal"}, budget={"count": 2})
    verdicts = select(of_rows(pairs, raw, selection), selection)
    assert reasons(verdicts) == ["invalid_echo", "within_budget", "quota_full", "within_budget"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [({"fraction": 0.5}, 4), ({"fraction": 0.25}, 2), ({"count": 6}, 5), ({"answer_tokens": 10_000}, 5)],
)
def test_invalid_pairs_count_in_the_pool_so_that_a_budget_may_not_be_reached(
    budget: dict[str, Any], expected: int
) -> None:
    pairs = judged(BEST_FIRST, Signal.ECHO, None, Signal.MISMATCH, None, None, None, None, Signal.UNFINISHED)
    verdicts = select(pairs, parse(budget=budget))
    assert len(taken(verdicts)) == expected
    assert set(verdicts["pool_size"]) == {8}
    few = select(judged(BEST_FIRST, *[Signal.ECHO] * 7, None), parse(budget={"fraction": 0.5}))
    assert taken(few) == names(8)
    assert set(few["cut"]) == {None}


# --- the controls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"count": 3}, {"fraction": 0.25}, {"answer_tokens": 45}, {"fraction": 1.0}])
def test_controls_take_as_many_valid_pairs_and_no_other(budget: dict[str, Any]) -> None:
    signals = [Signal.ECHO, None] * 10
    pairs = judged([1 - 0.01 * n for n in range(20)], *signals)
    verdicts = select_all(pairs, [parse(budget=budget)])
    valid = set(names(*range(2, 21, 2)))
    sizes = {}
    for (name,), found in verdicts.group_by("selection"):
        sizes[name] = len(taken(found))
        assert set(taken(found)) <= valid
        assert set(found.filter(~pl.col("pair_id").is_in(valid))["reason"]) == {"invalid_echo"}
    assert set(sizes) == {"mine", "control_random", "control_stratified_random"}
    if "answer_tokens" not in budget:
        assert len(set(sizes.values())) == 1


def test_the_stratified_control_divides_among_the_valid_pairs_of_each_stratum() -> None:
    """Of stratum 1, two of ten pairs are valid; of stratum 2, all ten: of six pairs, one is of stratum 1."""
    signals = [Signal.ECHO] * 8 + [None] * 12
    pairs = judged([1 - 0.01 * n for n in range(20)], *signals)
    is_first = pl.col("pair_id") <= pair_name(10)
    pairs = pairs.with_columns(stratum=pl.when(is_first).then(1).otherwise(2).cast(pl.Int64))
    verdicts = select_all(pairs, [parse(budget={"count": 6})])
    drawn = taken(verdicts.filter(selection="control_stratified_random"))
    assert len(drawn) == 6
    assert len(set(drawn) & set(names(9, 10))) == 1


# --- against a reference --------------------------------------------------------------------------------------------


def frozen(rmi: list[float], of_reference: pl.DataFrame | None) -> pl.DataFrame:
    reference, _ = rank_reference.freeze([scores(rmi)], ONE_STRATUM, of_reference)
    return enforce(RankReference, reference)


def against(reference: pl.DataFrame, rmi: list[float], *invalid_by: Signal | None) -> pl.DataFrame:
    """Candidates of a batch of the pairs 101, 102, …, ranked against a reference."""
    of_batch = {
        role: frame.with_columns(pair_id=pl.Series(names(*range(101, 101 + len(rmi)))))
        for role, frame in scores(rmi).items()
    }
    ranked = rank_reference.disagreement_scores(of_batch, reference, ONE_STRATUM, "reference:r1:0")
    return with_validity(candidates(ranked, of_batch), validity(*invalid_by, first=101))


def test_the_cut_of_a_reference_is_that_of_its_valid_pairs() -> None:
    selection = parse(budget={"count": 2})
    batch_rmi = [0.75, 0.65, 0.55, 0.45]
    cuts = {}
    for signals in (NONE, (Signal.ECHO, Signal.MISMATCH, *NONE[2:])):
        reference = frozen(BEST_FIRST, validity(*signals))
        verdicts = select(
            against(reference, batch_rmi, None, None, None, None),
            selection,
            rank_reference.reference_candidates(reference, ROLES),
        )
        cuts[signals] = (set(verdicts["cut"]), taken(verdicts))
    # Of eight pairs, the second best has the rank 7/8; of the valid ones, the fourth best is the second.
    assert cuts[NONE] == ({7 / 8}, names(101))
    assert list(cuts.values())[1] == ({5 / 8}, names(101, 102, 103))


def test_an_invalid_pair_of_a_batch_is_excluded_whatever_the_cut_of_the_reference() -> None:
    reference = frozen(BEST_FIRST, validity(*NONE))
    pairs = against(reference, [0.9, 0.85, 0.05], Signal.IMPLAUSIBLE_QUERY, None, Signal.ECHO)
    verdicts = select(pairs, parse(budget={"count": 2}), rank_reference.reference_candidates(reference, ROLES))
    assert reasons(verdicts) == ["invalid_implausible_query", "within_budget", "invalid_echo"]


def test_a_reference_without_a_valid_pair_takes_nothing() -> None:
    reference = frozen(BEST_FIRST, validity(*[Signal.ECHO] * 8))
    pairs = against(reference, [0.9, 0.5], None, None)
    verdicts = select(pairs, parse(budget={"count": 2}), rank_reference.reference_candidates(reference, ROLES))
    assert reasons(verdicts) == ["below_cut", "below_cut"]


def test_a_reference_that_was_not_judged_has_only_valid_pairs() -> None:
    judged_as_valid, unjudged = frozen(BEST_FIRST, validity(*NONE)), frozen(BEST_FIRST, None)
    assert_frame_equal(judged_as_valid, unjudged)


# --- what people read -----------------------------------------------------------------------------------------------


def explained(selection: Selection, *invalid_by: Signal | None, why: dict[str, str] | None = None) -> dict[str, str]:
    """The explanation of each row."""
    size = len(invalid_by)
    raw = raw_rows(*({} for _ in range(size)))
    pairs = judged(BEST_FIRST[:size], *invalid_by)
    verdicts = select_all(pairs, [selection])
    whys = pl.DataFrame(
        {"pair_id": list(why or {}), WHY: list((why or {}).values())}, schema={"pair_id": pl.String, WHY: pl.String}
    )
    frame = decide(raw, screen_alone(raw, SCREENING), pairs, verdicts, selection, "0" * 32, why_invalid=whys)
    return dict(frame.select("pair_id", "explanation").iter_rows())


def test_the_explanation_of_an_invalid_pair_is_the_reason_of_its_signal(check_sentence: Check) -> None:
    why = "The answer repeats the query and says little else (signal echo). Here 0.912 decides"
    found = explained(parse(budget={"count": 1}), Signal.ECHO, None, None, why={pair_name(1): why})
    assert f"{why}." in found[pair_name(1)]
    for said in found.values():
        check_sentence(said)


def test_a_budget_that_is_not_reached_says_that_valid_is_a_limit(check_sentence: Check) -> None:
    whys = {pair_name(n): "Why" for n in (1, 2)}
    found = explained(parse(budget={"fraction": 1.0}), Signal.ECHO, Signal.ECHO, None, None, why=whys)
    for number in (3, 4):
        check_sentence(found[pair_name(number)])


def test_a_valid_pair_has_no_grounds_of_validity() -> None:
    selection = parse(budget={"count": 1})
    pairs = judged(BEST_FIRST[:3], Signal.ECHO, None, None)
    verdict = select(pairs, selection)
    assert with_grounds(verdict, pairs, selection).columns == verdict.columns


# --- settings and frames --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["calibration: {enabled: false}", "scoring: {quantities: [ifd]}"])
def test_valid_pairs_need_calibration(off: str, check_sentence: Check) -> None:
    chosen = "selections: [{name: mine, strategy: length, valid: true}]\n"
    with pytest.raises(SettingsError) as error:
        parse_settings(f"{TWO_MODELS}{chosen}{off}\n")
    check_sentence(error.value)
    assert parse_settings(f"{TWO_MODELS}{chosen.replace(', valid: true', '')}{off}\n").published.valid is False


def test_the_default_selection_takes_valid_pairs_with_a_high_gap() -> None:
    published = parse_settings(TWO_MODELS).published
    assert (published.name, published.strategy, published.valid) == ("qaq", "diff_high", True)


def test_the_validity_of_other_pairs_is_refused() -> None:
    of_models = scores(BEST_FIRST)
    ranked, _ = disagreement_scores(of_models, ONE_STRATUM, "batch:b1")
    pairs = candidates(ranked, of_models)
    with pytest.raises(ValueError, match="scores and validity are not of the same pairs; make validity again"):
        with_validity(pairs, validity(*NONE[1:]))
    assert with_validity(pairs, None).equals(pairs)


def test_every_signal_has_a_reason_not_to_select() -> None:
    assert all(INVALID_REASONS[signal] in SelectionReason for signal in Signal)
