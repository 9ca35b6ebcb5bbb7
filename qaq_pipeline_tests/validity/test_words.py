"""words: the sentences of each reason and of each cut, whose numbers are those of the frames."""

from __future__ import annotations

import re
from typing import Any

import polars as pl
import pytest

from qaq_pipeline.config.settings import ValiditySettings
from qaq_pipeline.schema.tables import ValidityCuts, dtypes
from qaq_pipeline.schema.vocabularies import Defect, NoCutReason, Signal
from qaq_pipeline.validity import words
from qaq_pipeline.validity.judgement import MODELS, choose_cuts, judge
from qaq_pipeline.validity.signals.catalogue import SIGNALS
from qaq_pipeline.validity.signals.signal import Definition
from qaq_pipeline.validity.words import WHY
from qaq_pipeline_tests.support.frames import pair_name
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.validity import CLEAN_PAIR, DEFECTS, DROP_ALL, pairs_like, sample, together

NUMBER = re.compile(r"-?\d+(?:\.\d+)?%?")

Judged = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]

SHOWN = {
    Signal.ECHO: lambda row: row["rmi"] / row["log_ppl_q"],
    Signal.IMPLAUSIBLE_QUERY: lambda row: row["log_ppl_q"],
    Signal.MISMATCH: lambda row: row["rmi"],
    Signal.UNFINISHED: lambda row: row["nll_end"],
    Signal.UNCLOSED: lambda row: float(row["is_unclosed"]),
}
"""The number of a pair as people read it."""

COVARIATE = {
    Signal.IMPLAUSIBLE_QUERY: lambda row: 1 / row["num_q_tokens"],
    Signal.MISMATCH: lambda row: row["log_ppl_q"],
}


@pytest.fixture(scope="module")
def pairs() -> pl.DataFrame:
    """Pairs with every defect among clean ones."""
    defective = [pairs_like(defect, 20, 1001 + 100 * place) for place, defect in enumerate(DEFECTS)]
    return together(pairs_like(CLEAN_PAIR, 100), *defective)


def judged_by(signal: Signal, pairs: pl.DataFrame) -> Judged:
    """The pairs, their validity where this signal alone declares, and the cuts."""
    settings = ValiditySettings.model_validate(dict.fromkeys(Signal, "flag") | {signal: "drop"})
    cuts = choose_cuts(sample(pairs), settings)
    return pairs, judge(pairs, cuts, settings), cuts


def reasons(judged: Judged) -> dict[str, str]:
    return dict(words.reasons(*judged).iter_rows())


def cut_of(signal: Signal, cuts: pl.DataFrame) -> dict[str, Any]:
    return cuts.row(by_predicate=pl.col("signal") == signal.value, named=True)


def one_cut(signal: Signal = Signal.MISMATCH, **values: Any) -> pl.DataFrame:
    """ValidityCuts of one signal."""
    blank = dict.fromkeys(dtypes(ValidityCuts)) | {
        "num_planted": 60,
        "num_pairs": 100,
        "spreads": [],
        "chosen_from": ["b1"],
    }
    return pl.DataFrame([blank | {"signal": signal.value} | values], schema=dtypes(ValidityCuts))


@pytest.mark.parametrize(("dropped", "is_said"), [(0.14, False), (0.16, True)])
def test_a_signal_that_finds_more_than_can_have_its_defect_is_said_first(dropped: float, is_said: bool) -> None:
    cuts = one_cut(cut=0.0, missed=0.1, dropped=dropped, defect_share=0.05, defect_share_upper=0.1, false_share=0.01)
    said = words.warnings(cuts)
    assert len(said) == is_said
    assert all(f"finds {dropped:.1%} of the pairs, but at most 10.0%" in sentence for sentence in said)


# --- reasons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SIGNALS, ids=lambda one: one.signal)
def test_the_reason_of_each_signal(pairs: pl.DataFrame, one: Definition, check_sentence: Check) -> None:
    judged = judged_by(one.signal, pairs)
    check_sentence(reasons(judged)[judged[1].drop_nulls("invalid_by")["pair_id"].sort()[0]])


def test_exactly_the_invalid_pairs_have_a_reason_and_it_names_their_signal(pairs: pl.DataFrame) -> None:
    cuts = choose_cuts(sample(pairs), DROP_ALL)
    validity = judge(pairs, cuts, DROP_ALL)
    invalid = dict(validity.drop_nulls("invalid_by").select("pair_id", "invalid_by").iter_rows())
    found = reasons((pairs, validity, cuts))
    assert set(found) == set(invalid)
    assert set(invalid.values()) == set(Signal)
    assert all(f"(signal {invalid[pair_id]})." in why for pair_id, why in found.items())


@pytest.mark.parametrize("one", SIGNALS, ids=lambda one: one.signal)
def test_every_number_of_a_reason_is_that_of_the_frames(pairs: pl.DataFrame, one: Definition) -> None:
    judged = judged_by(one.signal, pairs)
    _, validity, cuts = judged
    cut, found = cut_of(one.signal, cuts), reasons(judged)
    spreads = {spread["model"]: spread for spread in cut["spreads"]}
    evidence = dict(
        validity.explode("signals")
        .unnest("signals")
        .filter(signal=one.signal.value)
        .select("pair_id", "evidence")
        .rows()
    )
    invalid = validity.filter(invalid_by=one.signal.value)["pair_id"].to_list()
    assert len(invalid) > 10
    for pair_id in invalid:
        rows = {row["model"]: row for row in pairs.filter(pair_id=pair_id).iter_rows(named=True)}
        at = {role: COVARIATE.get(one.signal, lambda _: 0.0)(row) for role, row in rows.items()}
        means = [one.sign * (spreads[m]["place"] + spreads[m]["place_slope"] * at[m]) for m in MODELS]
        numbers = [*(SHOWN[one.signal](rows[role]) for role in MODELS), *means, evidence[pair_id], cut["cut"]]
        expected = [f"{number:.3f}" for number in numbers] + [f"{1 - cut['missed']:.0%}"]
        if one.of_text is not None:
            expected = [f"{means[0]:.0%}"]
        assert NUMBER.findall(found[pair_id]) == expected
        assert evidence[pair_id] <= cut["cut"]


def test_a_signal_of_the_text_says_whether_the_text_has_its_mark(pairs: pl.DataFrame) -> None:
    (one,) = [one for one in SIGNALS if one.of_text is not None]
    cut = cut_of(one.signal, judged_by(one.signal, pairs)[2])
    mean = -cut["spreads"][0]["place"]
    for is_open, said in ((True, "a bracket or a code fence is left open, as in"), (False, "no bracket or code fence")):
        pair = pairs_like(CLEAN_PAIR, 1).with_columns(is_unclosed=pl.lit(is_open))
        (sentence,) = words.measured(one, pair, cut, {pair_name(1): 0.0}).values()
        assert sentence.startswith(f"Here {said}")
        assert NUMBER.findall(sentence) == [f"{mean:.0%}"]
        assert "model" not in sentence


def test_no_number_is_minus_zero() -> None:
    pairs = pairs_like(CLEAN_PAIR, 1).with_columns(rmi=pl.lit(-0.0001))
    spreads = [{"model": m, "place": -0.0002, "place_slope": 0.0, "scale": 1.0, "scale_slope": 0.0} for m in MODELS]
    cuts = one_cut(cut=-0.0001, missed=0.1, spreads=spreads)
    signals = [{"signal": one.signal.value, "evidence": -0.0002, "is_raised": True} for one in SIGNALS]
    validity = pl.DataFrame({"pair_id": [pair_name(1)], "invalid_by": ["mismatch"], "signals": [signals]})
    [why] = reasons((pairs, validity, cuts)).values()
    assert NUMBER.findall(why) == ["0.000"] * 6 + ["90%"]


def test_without_an_invalid_pair_there_is_no_reason(pairs: pl.DataFrame) -> None:
    _, validity, cuts = judged_by(Signal.MISMATCH, pairs)
    for kept in (validity.filter(pl.col("invalid_by").is_null()), validity.clear()):
        none = words.reasons(pairs, kept, cuts)
        assert none.schema == {"pair_id": pl.String, WHY: pl.String}
        assert none.is_empty()


# --- cuts -----------------------------------------------------------------------------------------------------------


def test_the_sentence_about_each_cut(pairs: pl.DataFrame, check_sentence: Check) -> None:
    cuts = choose_cuts(sample(pairs), DROP_ALL)
    said = words.of_cuts(cuts)
    assert len(said) == len(SIGNALS)
    for one, sentence in zip(SIGNALS, said, strict=True):
        row = cut_of(one.signal, cuts)
        names = ("dropped", "defect_share", "defect_share_upper", "missed", "false_share")
        costs = [f"{row[name]:.0%}" if name == "missed" else f"{row[name]:.1%}" for name in names]
        assert f"{one.signal} (cut from b1)" in sentence
        assert NUMBER.findall(sentence.replace("(cut from b1)", "")) == costs
        check_sentence(sentence)
    assert words.warnings(cuts) == []
    assert not words.is_untold(cuts)


@pytest.mark.parametrize("reason", list(NoCutReason))
def test_the_sentence_where_there_is_no_cut(reason: NoCutReason, check_sentence: Check) -> None:
    check_sentence(words.of_cuts(one_cut(null_reason=reason.value)))


def test_a_signal_that_is_turned_off_is_not_spoken_of() -> None:
    assert words.of_cuts(one_cut(null_reason=NoCutReason.TURNED_OFF.value)) == []


@pytest.mark.parametrize("signal", list(Signal))
def test_a_signal_that_cannot_tell_is_a_warning(signal: Signal, check_sentence: Check) -> None:
    cuts = one_cut(signal, null_reason=NoCutReason.CANNOT_TELL.value)
    check_sentence(words.warnings(cuts))
    assert words.is_untold(cuts) is (signal is Signal.MISMATCH)


def test_that_rmi_tells_nothing_is_said_first() -> None:
    cuts = pl.concat([one_cut(signal, null_reason=NoCutReason.CANNOT_TELL.value) for signal in Signal])
    for order in (cuts, cuts.reverse()):
        said = words.warnings(order)
        assert [sentence == words.untold(cuts) for sentence in said] == [True] + [False] * 4


@pytest.mark.parametrize(("chosen_from", "of"), [(["b0"], "batch b0"), (["b0", "b1"], "the batches b0, b1")])
def test_a_cut_of_other_batches_is_said_to_be_theirs(chosen_from: list[str], of: str) -> None:
    for signal in Signal:
        cuts = one_cut(signal, null_reason=NoCutReason.CANNOT_TELL.value, chosen_from=chosen_from)
        (said,) = words.warnings(cuts)
        assert f"does not tell the pairs of {of} from" in said
        assert "this batch" not in said
        (of_cut,) = words.of_cuts(cuts)
        assert f"(rows of {', '.join(chosen_from)})" in of_cut


@pytest.mark.parametrize("reason", [reason for reason in NoCutReason if reason is not NoCutReason.CANNOT_TELL])
def test_no_other_reason_is_a_warning(reason: NoCutReason) -> None:
    cuts = one_cut(null_reason=reason.value)
    assert words.warnings(cuts) == []
    assert not words.is_untold(cuts)


def test_a_defect_that_no_signal_knows_sets_no_cut() -> None:
    others = set(Defect) - set(DEFECTS)
    assert others == {Defect.REFUSAL, Defect.FILLER, Defect.WRONG_LANGUAGE, Defect.ONE_TOKEN_BUG}
