"""signals: each is complete, tells its own defect, and keeps what only looks like it."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from qaq_pipeline.config.settings import ValiditySettings
from qaq_pipeline.schema.tables import RmiScores, dtypes
from qaq_pipeline.schema.vocabularies import INVALID_REASONS, Defect, SelectionReason, Signal
from qaq_pipeline.validity.judgement import MODELS, choose_cuts, judge, judged_pairs, of_signal
from qaq_pipeline.validity.signals.catalogue import SIGNALS
from qaq_pipeline.validity.signals.mismatch import SHORTEST
from qaq_pipeline.validity.signals.signal import Definition
from qaq_pipeline.validity.unclosed import is_unclosed
from qaq_pipeline_tests.support.frames import pair_name
from qaq_pipeline_tests.support.validity import CLEAN_PAIR, Kind, pairs_like, planted, sample, together

QUERY = "Reverse the words of a sentence in place"
NUM_CLEAN = 200


def raised(signal: Signal, pairs: pl.DataFrame, rows: pl.DataFrame | None = None) -> set[str]:
    """The pairs that a signal raises, where each of these stands in a batch of clean ones and of planted rows anew."""
    defects = next(one.defects for one in SIGNALS if one.signal is signal)
    others = [
        pairs_like(CLEAN_PAIR, NUM_CLEAN),
        *(pairs_like(defect, 30, 1000 + 100 * n) for n, defect in enumerate(defects)),
    ]
    settings = ValiditySettings()
    of_batch = sample(together(*(frame.select(pairs.columns) for frame in others), pairs), rows)
    validity = judge(of_batch.pairs, choose_cuts(of_batch, settings), settings)
    flat = validity.explode("signals").unnest("signals").filter(pl.col("is_raised"), signal=signal.value)
    return set(flat["pair_id"]) & set(pairs["pair_id"])


# --- every signal ---------------------------------------------------------------------------------------------------


def test_every_signal_has_one_definition() -> None:
    assert sorted(one.signal for one in SIGNALS) == sorted(Signal)


def test_every_signal_has_a_setting_and_a_reason() -> None:
    settings = ValiditySettings()
    for signal in Signal:
        assert settings.is_on(signal)
        assert settings.declares(signal) is (signal is not Signal.UNCLOSED)
        assert INVALID_REASONS[signal] is SelectionReason[f"INVALID_{signal.name}"]
        flag, off = (ValiditySettings.model_validate({signal.value: action}) for action in ("flag", "off"))
        assert (flag.is_on(signal), flag.declares(signal)) == (True, False)
        assert (off.is_on(signal), off.declares(signal)) == (False, False)


@pytest.mark.parametrize("one", SIGNALS, ids=lambda one: one.signal)
def test_a_definition_has_words_and_bounds(one: Definition) -> None:
    assert one.defects
    assert 0 < one.max_missed <= 0.6
    for text in (one.fault, one.measure, one.compared_with):
        assert text == text.strip(" .")
        assert not any(character.isdigit() for character in text)  # Numbers in a reason are those of the pair.


@pytest.mark.parametrize("share", [0.03, 0.3, 0.8])
@pytest.mark.parametrize("one", SIGNALS, ids=lambda one: one.signal)
def test_a_signal_tells_its_defects_and_keeps_clean_pairs(one: Definition, share: float) -> None:
    size = round(share * NUM_CLEAN)
    firsts = {defect: 2000 + 1000 * place for place, defect in enumerate(one.defects)}
    defective = [pairs_like(defect, size, first) for defect, first in firsts.items()]
    pairs = together(pairs_like(CLEAN_PAIR, NUM_CLEAN, 50_000), *defective)
    found = raised(one.signal, pairs)
    clean = {pair_name(50_000 + n) for n in range(NUM_CLEAN)}
    assert len(found & clean) <= 0.02 * NUM_CLEAN
    expected = (1 - one.max_missed) * size * len(firsts)
    assert len(found - clean) >= expected - 0.1 * size * len(firsts) - 1  # One row of few is no share.


@pytest.mark.parametrize("one", SIGNALS, ids=lambda one: one.signal)
def test_the_number_is_low_where_the_pair_has_the_defect(one: Definition) -> None:
    of_clean, of_planted = (
        frame.select(one.value.mean()).item() for frame in (pairs_like(CLEAN_PAIR, 50), planted(50, *one.defects))
    )
    assert of_planted < of_clean


# --- what each does not tell ----------------------------------------------------------------------------------------


def test_a_good_answer_that_predicts_the_query_as_an_echo_does_is_no_echo() -> None:
    helpful = pairs_like(replace(CLEAN_PAIR, explained=0.95), 20, 3000)
    assert raised(Signal.ECHO, helpful) == set()


def test_words_of_the_query_alone_make_no_echo() -> None:
    copies = replace(CLEAN_PAIR, query_in_answer=1.0, answer_in_query=0.9)
    assert raised(Signal.ECHO, pairs_like(copies, 20, 3000)) == set()


@pytest.mark.parametrize(
    ("answer", "is_echo"),
    [
        pytest.param(QUERY, True, id="the query"),
        pytest.param(f"Sure, here it is: {QUERY.upper()}!", True, id="the query after an introduction"),
        pytest.param(
            f"# {QUERY}\ndef reverse_words(text):\n    parts = text.split()\n    return ' '.join(reversed(parts))\n",
            False,
            id="code below the query",
        ),
        pytest.param("Reverse the words of a list", False, id="a part of the query"),
    ],
)
def test_an_echo_repeats_the_whole_query_and_little_else(answer: str, is_echo: bool) -> None:
    numbers = pairs_like(Defect.ECHO, 10, 3000)
    scores = {role: numbers.filter(model=role).select(*dtypes(RmiScores)) for role in MODELS}
    texts = scores["strong"].select("pair_id", query=pl.lit(QUERY), answer=pl.lit(answer))
    found = raised(Signal.ECHO, judged_pairs(scores, texts))
    assert (len(found) >= 7) if is_echo else not found


def test_a_short_query_is_compared_with_invented_words_in_a_short_query() -> None:
    of_two_tokens = 1.5 + 6 / 2  # As surprising for each token as a long query of invented words.
    short = pairs_like(CLEAN_PAIR, 20, 3000).with_columns(
        num_q_tokens=pl.lit(2, pl.Int64), log_ppl_q=pl.lit(of_two_tokens), log_ppl_q_given_a=pl.lit(2.0)
    )
    long = short.with_columns(num_q_tokens=pl.lit(39, pl.Int64))
    assert raised(Signal.IMPLAUSIBLE_QUERY, short) == set()
    assert len(raised(Signal.IMPLAUSIBLE_QUERY, long)) == 20


def test_rmi_is_compared_with_mismatches_of_the_same_perplexity() -> None:
    """Where any answer explains a fifth of the query, an RMI of 0.5 is much for an easy query, not for a hard one."""
    levels = [Kind(log_ppl_q=level, explained=0.2) for level in (0.5, 1.5, 2.5, 3.5)]
    rows = together(*(pairs_like(kind, 40, 200_000 + 100 * n) for n, kind in enumerate(levels)))
    mismatches = rows.with_columns(defect=pl.lit(Defect.OTHER_ANSWER.value))
    easy, hard = (
        pairs_like(CLEAN_PAIR, 20, first).with_columns(log_ppl_q=pl.lit(log_ppl_q), rmi=pl.lit(0.5))
        for first, log_ppl_q in ((3000, 1.0), (4000, 3.5))
    )
    found = raised(Signal.MISMATCH, together(easy, hard), mismatches)
    assert found == set(hard["pair_id"])


def test_an_answer_that_was_truncated_is_not_judged_by_its_end() -> None:
    truncated = pairs_like(Defect.CUT_ANSWER, 20, 3000).with_columns(nll_end=pl.lit(None, pl.Float64))
    assert raised(Signal.UNFINISHED, truncated) == set()


@pytest.mark.parametrize(
    ("answer", "is_open"),
    [
        ("def f(a):\n    return [a, {a: (a,)}]", False),
        ("def f(a):\n    return [a, {a: (a", True),
        ("```python\nprint(1)\n```\nIt prints 1.", False),
        ("```python\nprint(1)", True),
        ("Done :)", False),
        ("Press (a", True),
        ("a) first, b) second", False),
        ("( ] )", False),
        ("", False),
    ],
)
def test_an_answer_is_unclosed_where_a_bracket_or_a_fence_is_left_open(answer: str, is_open: bool) -> None:
    assert is_unclosed(pl.Series([answer, ""])).to_list() == [is_open, False]


# --- short answers --------------------------------------------------------------------------------------------------


def of_tokens(pairs: pl.DataFrame, strong: int, weak: int | None = None) -> pl.DataFrame:
    """The pairs with answers of so many tokens under the strong model, and under the weak one, if that differs."""
    under_weak = strong if weak is None else weak
    tokens = pl.when(pl.col("model") == "strong").then(strong).otherwise(under_weak)
    return pairs.with_columns(num_a_tokens_untruncated=tokens.cast(pairs.schema["num_a_tokens_untruncated"]))


@pytest.mark.parametrize(
    ("strong", "weak", "is_judged"),
    [(SHORTEST, SHORTEST, True), (SHORTEST - 1, SHORTEST - 1, False), (SHORTEST, SHORTEST - 1, False), (1, 99, False)],
)
def test_a_mismatch_is_told_only_from_an_answer_that_is_long_enough(strong: int, weak: int, is_judged: bool) -> None:
    mismatches = pairs_like(Defect.OTHER_ANSWER, 20, 3000)
    found = raised(Signal.MISMATCH, of_tokens(mismatches, strong, weak))
    assert (len(found) >= 15) if is_judged else not found
    validity = judged_alone(of_tokens(mismatches, strong, weak))
    assert validity["evidence"].null_count() == (0 if is_judged else 20)


def judged_alone(pairs: pl.DataFrame) -> pl.DataFrame:
    """Evidence of mismatch for each of these pairs, by the cut of clean pairs and planted rows."""
    settings = ValiditySettings()
    of_batch = sample(pairs_like(CLEAN_PAIR, NUM_CLEAN))
    validity = judge(pairs, choose_cuts(of_batch, settings), settings)
    return of_signal(validity, Signal.MISMATCH)


def test_planted_rows_with_short_answers_set_no_cut_of_mismatch() -> None:
    short = of_tokens(planted(30, Defect.OTHER_ANSWER, first=200_000), SHORTEST - 1)
    long = planted(60, Defect.OTHER_ANSWER)
    both, alone = (
        choose_cuts(sample(pairs_like(CLEAN_PAIR, NUM_CLEAN), rows), ValiditySettings()).filter(signal="mismatch")
        for rows in (together(long, short), long)
    )
    assert_frame_equal(both, alone, check_exact=True)
    assert both["num_planted"].item() == 60
