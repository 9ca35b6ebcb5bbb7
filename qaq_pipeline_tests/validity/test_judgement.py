"""judgement: evidence is that of a loop over pairs and models, and every reason not to judge is reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from qaq_pipeline.config.settings import ValiditySettings
from qaq_pipeline.schema.tables import RmiScores, Validity, ValidityCuts, dtypes, enforce
from qaq_pipeline.schema.vocabularies import Defect, NoCutReason, Signal
from qaq_pipeline.validity import judgement
from qaq_pipeline.validity.judgement import (
    ENOUGH,
    MODELS,
    Sample,
    choose_cuts,
    count_invalid,
    judge,
    judge_in_parts,
    judged_pairs,
    spreads_of,
)
from qaq_pipeline.validity.signals.catalogue import SCORES_READ, SIGNALS
from qaq_pipeline.validity.signals.signal import Definition
from qaq_pipeline_tests.support.frames import pair_name
from qaq_pipeline_tests.support.validity import CLEAN_PAIR, DEFECTS, DROP_ALL, pairs_like, planted, sample, together

NAIVE: dict[Signal, tuple[Callable[[dict[str, Any]], float], Callable[[dict[str, Any]], float]]] = {
    Signal.ECHO: (lambda row: -row["rmi"] / row["log_ppl_q"], lambda _: 0.0),
    Signal.IMPLAUSIBLE_QUERY: (lambda row: -row["log_ppl_q"], lambda row: 1 / row["num_q_tokens"]),
    Signal.MISMATCH: (lambda row: row["rmi"], lambda row: row["log_ppl_q"]),
    Signal.UNFINISHED: (lambda row: -row["nll_end"], lambda _: 0.0),
    Signal.UNCLOSED: (lambda row: -float(row["is_unclosed"]), lambda _: 0.0),
}
"""Value and covariate of a pair under a model."""

NUMBERS = ("cut", "missed", "defect_share", "defect_share_upper", "dropped", "false_share")

NUM_DEFECTIVE = 25
FIRST_OF = {defect: 1001 + 100 * place for place, defect in enumerate(DEFECTS)}
"""Number of the first pair of the batch with each defect; the clean ones are 1, 2, 3, …"""


@pytest.fixture(scope="module")
def batch() -> pl.DataFrame:
    """150 clean pairs, and 25 with each defect."""
    defective = [pairs_like(defect, NUM_DEFECTIVE, first) for defect, first in FIRST_OF.items()]
    return together(pairs_like(CLEAN_PAIR, 150), *defective)


@pytest.fixture(scope="module")
def cuts(batch: pl.DataFrame) -> pl.DataFrame:
    return chosen(sample(batch))


def chosen(of: Sample, settings: ValiditySettings = DROP_ALL) -> pl.DataFrame:
    """The cuts, which fit their table."""
    return enforce(ValidityCuts, choose_cuts(of, settings))


def judged(pairs: pl.DataFrame, cuts: pl.DataFrame, settings: ValiditySettings = DROP_ALL) -> pl.DataFrame:
    """The validity, which fits its table."""
    return enforce(Validity, judge(pairs, cuts, settings))


def only_but(**actions: str) -> ValiditySettings:
    """Every signal declares pairs invalid, but for these."""
    return ValiditySettings.model_validate(DROP_ALL.model_dump() | actions)


def of_signal(validity: pl.DataFrame, signal: Signal) -> pl.DataFrame:
    """pair_id, evidence and is_raised of one signal."""
    flat = validity.select("pair_id", "signals").explode("signals").unnest("signals")
    return flat.filter(signal=signal.value).drop("signal")


def invalid_by(validity: pl.DataFrame) -> dict[str, str | None]:
    return dict(validity.select("pair_id", "invalid_by").iter_rows())


def no_cut(cuts: pl.DataFrame) -> dict[str, str | None]:
    return dict(cuts.select("signal", "null_reason").iter_rows())


def without(pairs: pl.DataFrame, column: str, where: pl.Expr) -> pl.DataFrame:
    """The pairs with null in a column."""
    return pairs.with_columns(pl.when(~where).then(column).alias(column))


# --- the evidence ---------------------------------------------------------------------------------------------------


def naive_spread(numbers: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Place and scale, each as intercept and slope, of (value, covariate): two lines of least squares."""
    values, covariate = (np.array(column) for column in zip(*numbers, strict=True))
    if covariate.max() == covariate.min():
        return values.mean(), 0.0, np.abs(values - values.mean()).mean(), 0.0
    design = np.stack([np.ones(covariate.size), covariate], axis=1)
    place = np.linalg.lstsq(design, values, rcond=None)[0]
    deviations = np.abs(values - design @ place)
    scale = np.linalg.lstsq(design, deviations, rcond=None)[0]
    center, mean = covariate.mean(), deviations.mean()
    slope = min(max(scale[1], 0.0), 0.75 * mean / center)
    return place[0], place[1], mean - slope * center, slope


@pytest.mark.parametrize("one", SIGNALS, ids=lambda one: one.signal)
def test_the_evidence_is_that_of_a_loop_over_pairs_and_models(
    batch: pl.DataFrame, cuts: pl.DataFrame, one: Definition
) -> None:
    value, covariate = NAIVE[one.signal]
    expected: dict[str, list[float]] = {}
    for role in MODELS:
        rows = planted(60, *one.defects, first=100_000 + 1000 * DEFECTS.index(one.defects[0]))
        numbers = [(value(row), covariate(row)) for row in rows.filter(model=role).iter_rows(named=True)]
        place, place_slope, scale, scale_slope = naive_spread(numbers)
        for row in batch.filter(model=role).iter_rows(named=True):
            at = covariate(row)
            residual = (value(row) - place - place_slope * at) / (scale + scale_slope * at)
            expected.setdefault(row["pair_id"], []).append(residual)
    found = of_signal(judged(batch, cuts), one.signal)
    means = {pair_id: sum(residuals) / len(MODELS) for pair_id, residuals in expected.items()}
    assert dict(found.select("pair_id", "evidence").iter_rows()) == pytest.approx(means, rel=1e-9)


def test_a_pair_that_a_model_cannot_score_has_no_evidence_and_is_never_raised(
    batch: pl.DataFrame, cuts: pl.DataFrame
) -> None:
    mismatches = [pair_name(FIRST_OF[Defect.OTHER_ANSWER] + n) for n in range(NUM_DEFECTIVE)]
    is_unscored = (pl.col("model") == "weak") & pl.col("pair_id").is_in(mismatches)
    pairs = without(batch, "rmi", is_unscored)
    found = judged(pairs, cuts)
    for signal in (Signal.MISMATCH, Signal.ECHO):
        of_unscored = of_signal(found, signal).filter(pl.col("pair_id").is_in(mismatches))
        assert of_unscored["evidence"].to_list() == [None] * NUM_DEFECTIVE
        assert not of_unscored["is_raised"].any()
    assert of_signal(found, Signal.UNFINISHED)["evidence"].null_count() == 0
    assert {invalid_by(found)[pair_id] for pair_id in mismatches} == {None}
    assert_frame_equal(
        of_signal(found, Signal.MISMATCH).filter(~pl.col("pair_id").is_in(mismatches)),
        of_signal(judged(batch, cuts), Signal.MISMATCH).filter(~pl.col("pair_id").is_in(mismatches)),
        check_exact=True,
    )


def test_cuts_are_chosen_from_the_pairs_and_rows_that_both_models_score(batch: pl.DataFrame) -> None:
    first = [pair_name(n) for n in range(1, 11)]
    pairs = without(batch, "nll_end", (pl.col("model") == "strong") & pl.col("pair_id").is_in(first))
    rows = planted()
    left_out = rows.filter(defect=Defect.CUT_ANSWER.value)["pair_id"].unique().sort()[:7].implode()
    is_left_out = (pl.col("model") == "weak") & pl.col("pair_id").is_in(left_out)
    found = chosen(sample(pairs, without(rows, "nll_end", is_left_out)))
    counts = {
        signal: (pairs, rows) for signal, pairs, rows in found.select("signal", "num_pairs", "num_planted").rows()
    }
    assert counts == {
        "echo": (275, 60),
        "implausible_query": (275, 60),
        "mismatch": (275, 60),
        "unfinished": (265, 113),
        "unclosed": (275, 120),
    }
    alone = chosen(
        sample(pairs.filter(~pl.col("pair_id").is_in(first)), rows.filter(~pl.col("pair_id").is_in(left_out)))
    )
    assert_frame_equal(found.filter(signal="unfinished"), alone.filter(signal="unfinished"), check_exact=True)


def test_evidence_alone_raises_nothing_where_the_pair_cannot_have_the_defect(cuts: pl.DataFrame) -> None:
    echoes = pairs_like(Defect.ECHO, NUM_DEFECTIVE, 5000)
    explained = echoes.with_columns(query_in_answer=pl.lit(0.89))
    longer = echoes.with_columns(answer_in_query=pl.lit(0.49))
    assert count_invalid(judged(echoes, cuts))[Signal.ECHO] > NUM_DEFECTIVE - 5
    for other in (explained, longer):
        found = judged(other, cuts)
        assert set(invalid_by(found).values()) == {None}
        evidence = of_signal(found, Signal.ECHO)["evidence"]
        assert evidence.equals(of_signal(judged(echoes, cuts), Signal.ECHO)["evidence"])


def test_pairs_that_cannot_have_the_defect_are_kept_at_every_cut(batch: pl.DataFrame) -> None:
    impossible = batch.with_columns(query_in_answer=pl.lit(0.2))
    cut = chosen(sample(impossible)).row(by_predicate=pl.col("signal") == "echo", named=True)
    assert (cut["dropped"], cut["defect_share"], cut["false_share"]) == (0.0, 0.0, 0.0)


def test_a_query_without_surprise_cannot_be_judged_as_an_echo(batch: pl.DataFrame, cuts: pl.DataFrame) -> None:
    certain = pairs_like(CLEAN_PAIR, 2, 7000).with_columns(log_ppl_q=pl.lit(0.0))
    certain = certain.with_columns(rmi=pl.when(pl.col("pair_id") == pair_name(7000)).then(0.0).otherwise(-0.4))
    found = judged(together(batch, certain), cuts)
    of_certain = of_signal(found, Signal.ECHO).filter(pl.col("pair_id") >= pair_name(7000))
    assert of_certain.rows() == [(pair_name(7000), None, False), (pair_name(7001), None, False)]
    rows = together(planted().drop("defect"), certain).join(
        planted().select("pair_id", "defect").unique(), on="pair_id", how="left", maintain_order="left"
    )
    with_certain = chosen(sample(batch, rows.with_columns(pl.col("defect").fill_null(Defect.ECHO.value))))
    assert_frame_equal(with_certain.filter(signal="echo"), cuts.filter(signal="echo"), check_exact=True)


# --- the cuts -------------------------------------------------------------------------------------------------------


def test_each_signal_has_a_cut_with_its_cost(batch: pl.DataFrame, cuts: pl.DataFrame) -> None:
    assert cuts["signal"].to_list() == [one.signal.value for one in SIGNALS]
    assert cuts["null_reason"].null_count() == len(SIGNALS)
    assert cuts["chosen_from"].to_list() == [["b1"]] * len(SIGNALS)
    for one, cut in zip(SIGNALS, cuts.iter_rows(named=True), strict=True):
        assert cut["missed"] <= one.max_missed
        assert cut["defect_share"] <= cut["defect_share_upper"] <= 1
        # Whether a bracket is open is a yes or a no, so a cut cannot be moved.
        assert cut["false_share"] <= DROP_ALL.max_false_share or one.signal is Signal.UNCLOSED
        assert cut["defect_share"] == pytest.approx(NUM_DEFECTIVE * len(one.defects) / 275, abs=0.05)
        raised = of_signal(judged(batch, cuts), one.signal)["is_raised"]
        assert raised.mean() == cut["dropped"]
        assert set(spreads_of(cut["spreads"])) == set(MODELS)


def test_a_yes_or_no_has_one_cut_which_misses_the_planted_rows_that_say_no(cuts: pl.DataFrame) -> None:
    of_cut = planted().filter(pl.col("defect").is_in([Defect.CUT_ANSWER, Defect.CUT_AT_LINE]), model="weak")
    num_closed = int((~of_cut["is_unclosed"]).sum())
    assert cuts.filter(signal="unclosed")["missed"].item() == (num_closed + 1) / (of_cut.height + 1)


def of_nothing(batch: pl.DataFrame) -> Sample:
    """Every pair of the batch is one of the planted mismatches, anew."""
    return sample(pairs_like(Defect.OTHER_ANSWER, batch["pair_id"].n_unique()))


WITHOUT_CUT: dict[NoCutReason, tuple[Callable[[pl.DataFrame], Sample], ValiditySettings]] = {
    NoCutReason.TURNED_OFF: (sample, only_but(mismatch="off")),
    NoCutReason.NOT_PLANTED: (lambda pairs: sample(pairs, planted(60, Defect.ECHO)), DROP_ALL),
    NoCutReason.NOT_SCORED: (lambda pairs: sample(without(pairs, "rmi", pl.col("model") == "weak")), DROP_ALL),
    NoCutReason.TOO_FEW_PLANTED: (lambda pairs: sample(pairs, planted(ENOUGH - 1)), DROP_ALL),
    NoCutReason.CANNOT_TELL: (of_nothing, DROP_ALL),
}


@pytest.mark.parametrize("reason", list(NoCutReason))
def test_without_a_cut_there_is_a_reason_and_nothing_is_declared(batch: pl.DataFrame, reason: NoCutReason) -> None:
    make, settings = WITHOUT_CUT[reason]
    of = make(batch)
    found = chosen(of, settings)
    assert no_cut(found)["mismatch"] == reason.value
    row = found.row(by_predicate=pl.col("signal") == "mismatch", named=True)
    assert {row[name] for name in NUMBERS} == {None}
    assert row["spreads"] == []
    validity = judged(of.pairs, found, settings)
    assert of_signal(validity, Signal.MISMATCH)["evidence"].null_count() == validity.height
    assert count_invalid(validity)[Signal.MISMATCH] == 0


def test_a_cut_is_chosen_from_the_fewest_planted_rows_that_are_enough(batch: pl.DataFrame) -> None:
    assert no_cut(chosen(sample(batch, planted(ENOUGH)))) == dict.fromkeys(Signal, None)


def test_where_no_planted_row_can_have_the_defect_there_is_no_cut(batch: pl.DataFrame) -> None:
    impossible = planted(ENOUGH).with_columns(query_in_answer=pl.lit(0.0))
    expected = dict.fromkeys(Signal, None) | {Signal.ECHO.value: NoCutReason.TOO_FEW_PLANTED.value}
    assert no_cut(chosen(sample(batch, impossible))) == expected


def test_planted_rows_that_cannot_have_the_defect_are_missed_at_every_cut(batch: pl.DataFrame) -> None:
    rows = planted()
    lost = rows.filter(defect=Defect.ECHO.value)["pair_id"].unique().sort()[:9].implode()
    is_lost = pl.col("pair_id").is_in(lost)
    found = chosen(
        sample(batch, rows.with_columns(query_in_answer=pl.when(~is_lost).then("query_in_answer").otherwise(0.0)))
    )
    assert found.filter(signal="echo")["missed"].item() >= 10 / 61


def test_a_signal_that_cannot_tell_leaves_the_others_their_cuts(batch: pl.DataFrame) -> None:
    untold = {Signal.MISMATCH.value: NoCutReason.CANNOT_TELL.value}
    assert no_cut(chosen(of_nothing(batch))) == dict.fromkeys(Signal, None) | untold


def test_joined_samples_have_each_pair_once_as_in_the_first(batch: pl.DataFrame) -> None:
    other = pairs_like(CLEAN_PAIR, 30, 149)  # The pairs 149 and 150 are in both, with other numbers.
    joined = Sample.joined([sample(batch), sample(other, planted(60, Defect.ECHO, first=500_000), "b2")])
    assert joined.batches == ("b1", "b2")
    assert joined.pairs.height == batch.height + len(MODELS) * 28
    assert_frame_equal(joined.pairs.join(batch.select("pair_id").unique(), on="pair_id", how="semi"), batch)
    found = chosen(joined)
    assert found["chosen_from"].to_list() == [["b1", "b2"]] * len(SIGNALS)
    assert found.filter(signal="echo")["num_planted"].item() == 120


# --- the verdict ----------------------------------------------------------------------------------------------------


def test_each_defect_is_declared_by_its_signal_and_clean_pairs_are_valid(
    batch: pl.DataFrame, cuts: pl.DataFrame
) -> None:
    found = judged(batch, cuts)
    assert found["pair_id"].to_list() == sorted(set(batch["pair_id"]))
    counts = {signal: count for signal, count in count_invalid(found).items() if count}
    assert counts == dict(found["invalid_by"].value_counts().iter_rows())
    for one in SIGNALS:
        names = [pair_name(FIRST_OF[defect] + n) for defect in one.defects for n in range(NUM_DEFECTIVE)]
        raised = of_signal(found, one.signal).filter(pl.col("pair_id").is_in(names))["is_raised"]
        assert raised.sum() >= (1 - one.max_missed - 0.15) * raised.len()
    clean = [pair_name(n) for n in range(1, 151)]
    assert [invalid_by(found)[pair_id] for pair_id in clean].count(None) >= 145


def test_a_flagged_signal_is_raised_and_declares_nothing(batch: pl.DataFrame, cuts: pl.DataFrame) -> None:
    dropping, flagging = judged(batch, cuts), judged(batch, cuts, only_but(mismatch="flag"))
    assert flagging["signals"].equals(dropping["signals"])
    assert of_signal(flagging, Signal.MISMATCH)["is_raised"].sum() >= NUM_DEFECTIVE - 5
    assert count_invalid(flagging)[Signal.MISMATCH] == 0
    assert count_invalid(dropping)[Signal.MISMATCH] > 0


def test_a_signal_that_is_off_stores_null(batch: pl.DataFrame) -> None:
    settings = only_but(mismatch="off")
    found = judged(batch, chosen(sample(batch), settings), settings)
    of_mismatch = of_signal(found, Signal.MISMATCH)
    assert of_mismatch["evidence"].null_count() == found.height
    assert not of_mismatch["is_raised"].any()


@pytest.mark.parametrize(
    "off", [(), ("echo",), ("echo", "implausible_query"), ("echo", "implausible_query", "mismatch")]
)
def test_the_first_signal_in_the_order_of_the_catalogue_is_the_reason(cuts: pl.DataFrame, off: tuple[str, ...]) -> None:
    pairs = pairs_like(Defect.ECHO, 3, 8000).with_columns(is_unclosed=pl.lit(value=True))
    raised = cuts.with_columns(cut=pl.lit(1e3))
    found = judged(pairs, raised, only_but(**dict.fromkeys(off, "flag")))
    assert all(of_signal(found, one.signal)["is_raised"].all() for one in SIGNALS)
    assert set(found["invalid_by"]) == {next(one.signal.value for one in SIGNALS if one.signal.value not in off)}


def test_the_order_of_rows_changes_nothing(batch: pl.DataFrame, cuts: pl.DataFrame) -> None:
    texts = (
        batch.select("pair_id")
        .unique()
        .with_columns(query=pl.format("sort {}", pl.col("pair_id")), answer=pl.lit("def sort(): ..."))
    )
    scores = {role: batch.filter(model=role).select(list(dtypes(RmiScores))) for role in MODELS}
    in_order = judged_pairs(scores, texts.sort("pair_id"))
    for seed in range(3):
        mixed = {role: frame.sample(fraction=1, shuffle=True, seed=seed) for role, frame in scores.items()}
        pairs = judged_pairs(mixed, texts.sample(fraction=1, shuffle=True, seed=seed + 9))
        assert_frame_equal(pairs, in_order, check_exact=True)
        assert_frame_equal(chosen(sample(pairs)), chosen(sample(in_order)), check_exact=True)
        assert_frame_equal(judged(pairs, cuts), judged(in_order, cuts), check_exact=True)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_pairs_that_are_judged_in_parts_have_the_same_validity(
    batch: pl.DataFrame, cuts: pl.DataFrame, size: int
) -> None:
    pairs = batch.filter(pl.col("pair_id").is_in(batch["pair_id"].unique().sort().head(30).implode()))
    with mock.patch.object(judgement, "PAIRS_AT_ONCE", size):
        parts = list(judge_in_parts(pairs, cuts, DROP_ALL))
        assert list(judge_in_parts(pairs.clear(), cuts, DROP_ALL)) == []
    assert [part.height for part in parts] == [min(size, 30 - start) for start in range(0, 30, size)]
    assert_frame_equal(pl.concat(parts), judge(pairs, cuts, DROP_ALL), check_exact=True)


def test_judged_pairs_are_the_scores_of_both_models_with_the_copied_shares() -> None:
    numbers = pairs_like(CLEAN_PAIR, 2).select(*dtypes(RmiScores), "model")
    scores = {role: numbers.filter(model=role).drop("model") for role in MODELS}
    texts = pl.DataFrame(
        {"pair_id": [pair_name(2), pair_name(1)], "query": ["sort a list now"] * 2, "answer": ["sort a list now", "no"]}
    )
    pairs = judged_pairs(scores, texts)
    assert pairs.select("model", "pair_id", "query_in_answer", "answer_in_query").rows() == [
        (role, pair_name(n), share, share) for role in sorted(MODELS) for n, share in ((1, 0.0), (2, 1.0))
    ]
    assert_frame_equal(
        pairs.select("pair_id", *SCORES_READ, "model"),
        numbers.select("pair_id", *SCORES_READ, "model").sort("model", "pair_id"),
    )


def test_no_scores_give_no_pairs(batch: pl.DataFrame) -> None:
    scores = {role: batch.select(*dtypes(RmiScores)).clear() for role in MODELS}
    texts = pl.DataFrame(schema={"pair_id": pl.String, "query": pl.String, "answer": pl.String})
    pairs = judged_pairs(scores, texts)
    assert pairs.is_empty()
    assert pairs.schema == batch.select(pairs.columns).schema


def test_an_empty_batch_has_no_cut_and_no_verdict(batch: pl.DataFrame) -> None:
    nothing = sample(batch.clear(), planted().clear())
    found = chosen(nothing)
    assert set(found["null_reason"]) == {NoCutReason.NOT_PLANTED.value}
    assert judged(batch.clear(), found).is_empty()
    assert set(chosen(sample(batch.clear()))["null_reason"]) == {NoCutReason.NOT_SCORED.value}
    assert count_invalid(judged(batch.clear(), found)) == {None: 0} | dict.fromkeys([o.signal for o in SIGNALS], 0)


# --- beyond the planted rows ----------------------------------------------------------------------------------------


@effort(max_examples=60)
@given(
    explained=st.floats(-0.5, 1.0),
    log_ppl_q=st.floats(0.001, 14),
    nll_end=st.floats(0, 40),
    num_tokens=st.integers(1, 4000),
)
def test_evidence_is_finite_and_grows_with_the_value_at_every_covariate(
    cuts: pl.DataFrame, explained: float, log_ppl_q: float, nll_end: float, num_tokens: int
) -> None:
    better = {"rmi": explained * log_ppl_q + 0.1, "nll_end": nll_end, "log_ppl_q": log_ppl_q}
    worse = {"rmi": explained * log_ppl_q, "nll_end": nll_end + 0.1, "log_ppl_q": log_ppl_q}
    frames = [
        pairs_like(CLEAN_PAIR, 1, first).with_columns(
            **{name: pl.lit(value) for name, value in values.items()}, num_q_tokens=pl.lit(num_tokens)
        )
        for first, values in ((1, worse), (2, better))
    ]
    found = judged(together(*frames), cuts)
    for signal in (Signal.MISMATCH, Signal.UNFINISHED):
        below, above = of_signal(found, signal)["evidence"]
        assert math.isfinite(below)
        assert below < above
