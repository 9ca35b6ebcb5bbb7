"""planner: windows prepared in advance, longest pairs first, cached quantities left out, and counts that add up.

Tolerance: after the first window of pairs of varied length, the forecast is within 30 % of the final count.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from random import Random

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaq_pipeline.config.settings import ModelSettings, ScoringSettings
from qaq_pipeline.lm.prompts import EncodedPair, Pair, PairEncoder, Target, TokenSequence
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import NullReason, Quantity
from qaq_pipeline.scoring import sums
from qaq_pipeline.scoring.pairs import LongestFirst, Pairs
from qaq_pipeline.scoring.planner import WINDOW_PAIRS, Plan, wanted_quantities
from qaq_pipeline.storage.score_cache import FOUND

ALL = frozenset(Quantity)
RMI = frozenset({Quantity.Q, Quantity.Q_GIVEN_A})
IFD = frozenset({Quantity.A, Quantity.A_GIVEN_Q})
END = frozenset({Quantity.END})
Window = list[TokenSequence]
Key = tuple[str, str, int, str]
"""A cached score: pair_id, quantity, number of tokens, end tokens."""

FORECAST_TOLERANCE = 0.3
PATIENCE = 10.0
"""Seconds to wait for another thread."""


class ByteTokenizer:
    """A `prompts.Tokenizer`: the id of a byte is its value."""

    bos_token_id: int | None = 256
    end_of_text_id: int | None = None

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.end_token_ids = ends

    def is_control(self, token_id: int) -> bool:
        raise AssertionError("the frame `plain` has no control tokens")

    def encode_markup(self, text: str, *, continues: bool = False) -> list[int]:
        return list(text.encode())

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        raise AssertionError("the frame `plain` renders no chat")


class WatchedEncoder(PairEncoder):
    """A real encoder that reports the start of a window, and waits or fails if a test wants it to."""

    def __init__(
        self, *, prior: str = "null_answer", max_tokens: int = 4096, ends: tuple[int, ...] = (257, 259)
    ) -> None:
        model = ModelSettings.model_validate({"hub": "tiny/tiny", "frame": "plain", "system_prompt": "S"})
        scoring = ScoringSettings.model_validate({"prior": prior, "max_tokens": max_tokens})
        super().__init__(ByteTokenizer(ends), model, scoring)
        self.begun: list[list[str]] = []
        """The ids of each window's pairs."""
        self.threads: set[str] = set()
        self.gates = [threading.Event() for _ in range(20)]
        """One gate per window, open unless a test closes it."""
        for gate in self.gates:
            gate.set()
        self.failing_window: int | None = None
        self._has_begun = threading.Condition()

    def encode(self, pairs: Sequence[Pair], wanted: Collection[Quantity]) -> list[EncodedPair]:
        number = len(self.begun)
        with self._has_begun:
            self.begun.append([pair.pair_id for pair in pairs])
            self.threads.add(threading.current_thread().name)
            self._has_begun.notify_all()
        assert self.gates[number].wait(PATIENCE), f"nobody opened the gate of window {number}"
        if number == self.failing_window:
            raise UnicodeError(f"window {number} cannot be tokenised")
        return super().encode(pairs, wanted)

    def wait_for(self, num_windows: int) -> None:
        """Wait until so many windows have started."""
        with self._has_begun:
            assert self._has_begun.wait_for(lambda: len(self.begun) >= num_windows, PATIENCE)


def pair(number: int, query: str, answer: str) -> Pair:
    return Pair(f"{number:032x}", None, query, answer)


def varied_pairs(num_pairs: int) -> list[Pair]:
    """Pairs of 60 to 1,000 characters, in no order of length."""
    return [pair(n, "q" * (20 + 37 * n % 300), "a" * (40 + 53 * n % 640)) for n in range(num_pairs)]


def plan_of(
    pairs: Sequence[Pair],
    encoder: PairEncoder,
    wanted: Collection[Quantity],
    keys: Iterable[Key] = (),
    window_pairs: int = WINDOW_PAIRS,
) -> Plan:
    """The plan of the pairs, of which these scores are cached."""
    ordered = LongestFirst(Pairs.of(pairs))
    places = {pair_id: place for place, pair_id in enumerate(ordered.pair_ids())}
    rows = [
        {"place": places[pair_id], "quantity": quantity, "sum_nll": 1.0, "num_tokens": num_tokens, "end_ids": end_ids}
        for pair_id, quantity, num_tokens, end_ids in keys
        if pair_id in places  # As the cache gives them.
    ]
    cached = pl.DataFrame(rows, schema=FOUND, orient="row").sort("place")
    return Plan(ordered, encoder, wanted, cached, window_pairs)


def scored(plan: Plan) -> pl.DataFrame:
    """The Logprobs table of a plan, with 1.0 for each sum that is not cached."""
    rows = [(*key[:2], 1.0, *key[2:], None) for key in keys_of(planned(plan))]
    plan.sums.add_shard(pl.DataFrame(rows, schema=tables.dtypes(tables.CachedScores), orient="row"))
    return tables.enforce(tables.Logprobs, pl.concat(plan.sums.parts()))


def keys_of(sequences: Iterable[TokenSequence]) -> list[Key]:
    """The cache keys of the quantities that the sequences score."""
    return [
        (one.pair_id, target.quantity.value, target.stop - target.start, target.end_ids)
        for one in sequences
        for target in one.targets
    ]


def all_keys(encoder: PairEncoder, pairs: Sequence[Pair], wanted: Collection[Quantity]) -> list[Key]:
    """Every wanted quantity that can be scored, directly from the encoder."""
    return sorted(keys_of(itertools.chain(*(one.sequences for one in encoder.encode(pairs, wanted)))))


def planned(plan: Plan) -> Window:
    return list(itertools.chain(*plan.windows()))


# --- what is wanted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (("rmi",), RMI),
        (("ifd",), IFD),
        (("end",), END),
        (("rmi", "ifd"), RMI | IFD),
        (("ifd", "rmi"), RMI | IFD),
        (("end", "ifd", "rmi"), ALL),
    ],
)
def test_the_wanted_quantities_are_those_that_the_scores_are_made_of(
    scores: tuple[str, ...], expected: frozenset[Quantity]
) -> None:
    assert wanted_quantities(ScoringSettings.model_validate({"quantities": scores})) == expected


# --- windows ---------------------------------------------------------------------------------------------------------


def test_no_pairs_make_no_windows() -> None:
    encoder = WatchedEncoder()
    plan = plan_of([], encoder, ALL)
    assert list(plan.windows()) == []
    assert encoder.begun == []
    assert (plan.expected_tokens, plan.expected_sequences, plan.num_cached, plan.num_quantities) == (0, 0, 0, 0)


def test_the_longest_pairs_come_first_by_their_characters_and_ties_as_they_come() -> None:
    pairs = [pair(5, "abc", "d"), pair(2, "a", "bcd"), pair(9, "ab", "c" * 9), pair(1, "", "a"), pair(0, "ü" * 4, "ü")]
    encoder = WatchedEncoder()
    windows = list(plan_of(pairs, encoder, RMI, window_pairs=2).windows())
    ids = [[f"{number:032x}" for number in window] for window in ([9, 0], [5, 2], [1])]
    assert encoder.begun == ids
    assert [[one.pair_id for one in window] for window in windows[:2]] == [[a, a, b, b] for a, b in ids[:2]]
    assert windows[2] == [], "a pair without a query has nothing to score, but its window is made"


def test_sequences_are_those_of_the_encoder() -> None:
    pairs, encoder = varied_pairs(5), WatchedEncoder(prior="user")
    window = planned(plan_of(pairs, encoder, ALL))
    by_id = {one.pair_id: one for one in encoder.encode(pairs, ALL)}
    expected = itertools.chain(*(by_id[pair_id].sequences for pair_id in encoder.begun[0]))
    assert window == list(expected)


def test_a_window_is_made_while_the_one_before_it_is_used() -> None:
    encoder = WatchedEncoder()
    encoder.gates[1].clear()
    windows = plan_of(varied_pairs(8), encoder, RMI, window_pairs=2).windows()
    assert len(next(windows)) == 4, "the first window waits for no other"
    encoder.wait_for(2)
    encoder.gates[1].set()
    assert len(next(windows)) == 4
    encoder.wait_for(3)
    assert threading.current_thread().name not in encoder.threads
    windows.close()  # pyrefly: ignore


def test_no_more_than_one_window_is_made_ahead() -> None:
    encoder = WatchedEncoder()
    encoder.gates[2].clear()
    windows = plan_of(varied_pairs(12), encoder, RMI, window_pairs=2).windows()
    next(windows)
    encoder.wait_for(2)
    time.sleep(0.1)  # Time enough for a window that should not be made.
    assert len(encoder.begun) == 2
    encoder.gates[2].set()
    assert len(list(windows)) == 5


def test_windows_that_nobody_asks_for_leave_no_thread_behind() -> None:
    windows = plan_of(varied_pairs(8), WatchedEncoder(), RMI, window_pairs=2).windows()
    next(windows)
    assert any(thread.name.startswith("tokenise") for thread in threading.enumerate())
    windows.close()  # pyrefly: ignore
    assert not any(thread.name.startswith("tokenise") for thread in threading.enumerate())


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_an_exception_in_the_encoder_reaches_whoever_asks_for_that_window(failing: int) -> None:
    encoder = WatchedEncoder()
    encoder.failing_window = failing
    windows = plan_of(varied_pairs(8), encoder, RMI, window_pairs=2).windows()
    assert all(len(next(windows)) == 4 for _ in range(failing))
    with pytest.raises(UnicodeError, match=f"window {failing} cannot be tokenised"):
        next(windows)
    assert not any(thread.name.startswith("tokenise") for thread in threading.enumerate())


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_sequence_whose_targets_are_all_cached_is_dropped() -> None:
    plan = plan_of([pair(1, "abc", "defgh")], WatchedEncoder(), ALL, [(f"{1:032x}", "a_given_q", 5, "")])
    scored = [target.quantity for one in planned(plan) for target in one.targets]
    assert sorted(scored) == sorted(ALL - {Quantity.A_GIVEN_Q})
    assert (plan.num_cached, plan.num_quantities, plan.num_sequences) == (1, 4, 3)


def test_a_cached_target_is_dropped_from_a_sequence_that_has_another() -> None:
    """With the prior `user`, one sequence scores Q and A | Q."""
    encoder, pairs = WatchedEncoder(prior="user"), [pair(1, "abc", "defgh")]
    (whole,) = (one for one in planned(plan_of(pairs, encoder, RMI | IFD)) if len(one.targets) == 2)
    plan = plan_of(pairs, encoder, RMI | IFD, [(f"{1:032x}", "q", 3, "")])
    (rest,) = (one for one in planned(plan) if one.token_ids == whole.token_ids)
    assert [target.quantity for target in rest.targets] == [Quantity.A_GIVEN_Q]
    assert rest.targets[0] in whole.targets
    assert rest.num_shared == whole.num_shared
    assert (plan.num_cached, plan.num_quantities, plan.num_sequences) == (1, 3, 3)


def sequence_of(plan: Plan, quantity: Quantity) -> TokenSequence:
    """The sequence that scores the quantity, and nothing else if it is one of a pair."""
    (found,) = (one for one in planned(plan) if quantity in {target.quantity for target in one.targets})
    return found


@pytest.mark.parametrize(
    ("prior", "first", "last", "length"),
    [("user", Quantity.Q, Quantity.A_GIVEN_Q, 3), ("null_answer", Quantity.END, Quantity.Q_GIVEN_A, 1)],
)
def test_a_sequence_ends_with_its_last_target_that_is_not_cached(
    prior: str, first: Quantity, last: Quantity, length: int
) -> None:
    """With the prior `user`, one sequence scores Q and A | Q; in every, one scores the end of A, and Q | A."""
    encoder, pairs = WatchedEncoder(prior=prior), [pair(1, "abc", "defgh")]
    whole = sequence_of(plan_of(pairs, encoder, ALL), last)
    assert [target.quantity for target in whole.targets] == [first, last]
    cached = [key for key in keys_of([whole]) if key[1] == last]
    plan = plan_of(pairs, encoder, ALL, cached)
    rest = sequence_of(plan, first)
    assert rest.targets == whole.targets[:1]
    assert rest.token_ids == whole.token_ids[: whole.targets[0].start + length]
    assert len(rest.token_ids) == rest.targets[0].stop < len(whole.token_ids)
    assert (plan.num_cached, plan.num_quantities) == (1, 4)


# --- the end of the answer -------------------------------------------------------------------------------------------


def test_where_rmi_is_wanted_the_end_adds_neither_sequence_nor_token() -> None:
    pairs, encoder = varied_pairs(20), WatchedEncoder()
    without, with_end = (plan_of(pairs, encoder, wanted) for wanted in (RMI, RMI | END))
    expected, found = planned(without), planned(with_end)
    assert [(one.token_ids, one.num_shared) for one in found] == [(one.token_ids, one.num_shared) for one in expected]
    assert (with_end.num_sequences, with_end.num_tokens) == (without.num_sequences, without.num_tokens)
    assert with_end.num_shared_tokens == without.num_shared_tokens
    assert (with_end.num_quantities, with_end.num_targets) == (without.num_quantities + 20, without.num_targets + 20)


def test_where_rmi_is_cached_the_end_alone_is_scored_in_a_sequence_without_the_query() -> None:
    pairs, encoder = [pair(1, "WXYZ", "answer")], WatchedEncoder()
    alone = planned(plan_of(pairs, encoder, END))
    cached = all_keys(encoder, pairs, RMI)
    assert planned(plan_of(pairs, encoder, RMI | END, cached)) == alone
    (sequence,) = alone
    assert not set(sequence.token_ids) & set(b"WXYZ"), "the query is not in it"
    assert sequence.token_ids[-7:] == [*b"answer", *b"\n"], "A, and the token after it"
    assert sequence.targets == (Target(Quantity.END, len(sequence.token_ids) - 1, len(sequence.token_ids), (257, 259)),)


def test_with_other_end_tokens_the_end_alone_is_scored_again() -> None:
    pairs = varied_pairs(7)
    before = all_keys(WatchedEncoder(ends=(257,)), pairs, ALL)
    plan = plan_of(pairs, WatchedEncoder(ends=(257, 259)), ALL, before, window_pairs=3)
    assert {(key[1], key[3]) for key in keys_of(planned(plan))} == {("end", "257 259")}
    assert (plan.num_cached, plan.num_quantities, plan.num_sequences) == (4 * 7, 7, 7)


def test_an_answer_that_is_cut_and_a_model_without_end_tokens_score_everything_else() -> None:
    cut = plan_of([pair(1, "abc", "d" * 900)], WatchedEncoder(max_tokens=300), ALL)
    endless = plan_of([pair(1, "abc", "def")], WatchedEncoder(ends=()), ALL)
    for plan, reason in ((cut, NullReason.ANSWER_TRUNCATED), (endless, NullReason.NO_END_TOKEN)):
        table = scored(plan)
        assert plan.num_quantities == 4
        assert table.select("sum_nll_q", "sum_nll_q_given_a", "sum_nll_a", "sum_nll_a_given_q").row(0) == (1.0,) * 4
        assert table["null_reason_end"].to_list() == [reason.value]


@pytest.mark.parametrize("num_tokens", [2, 4])
def test_a_cached_sum_over_another_number_of_tokens_is_scored_again(num_tokens: int) -> None:
    cached = [(f"{1:032x}", "q", num_tokens, ""), (f"{1:032x}", "q_given_a", 3, "")]
    plan = plan_of([pair(1, "abc", "defgh")], WatchedEncoder(), RMI, cached)
    assert [key[1] for key in keys_of(planned(plan))] == ["q"]
    assert (plan.num_cached, plan.num_quantities) == (1, 1)


def test_the_scores_of_another_pair_serve_no_pair() -> None:
    keys = all_keys(WatchedEncoder(), [pair(2, "abc", "def")], ALL)
    assert len(keys) == 5
    plan = plan_of([pair(1, "abc", "def")], WatchedEncoder(), ALL, keys)
    assert len(planned(plan)) == 4
    assert plan.num_cached == 0


def test_where_all_is_cached_nothing_is_left_but_the_encodings() -> None:
    pairs, encoder = varied_pairs(7), WatchedEncoder()
    keys = all_keys(encoder, pairs, ALL)
    plan = plan_of(pairs, encoder, ALL, keys, window_pairs=3)
    assert list(plan.windows()) == [[], [], []]
    assert len(keys) == 5 * 7
    assert (plan.num_cached, plan.num_quantities, plan.expected_tokens) == (len(keys), 0, 0)
    table = pl.concat(plan.sums.parts())
    assert table.height == 7
    assert table.select(pl.col(f"sum_nll_{quantity}").sum() for quantity in Quantity).row(0) == (7.0,) * 5


# --- counts ----------------------------------------------------------------------------------------------------------


PAIRS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60)), max_size=12)
"""Sizes of query and answer in bytes: some pairs have nothing to score, some exceed 256 tokens."""


@given(
    PAIRS,
    st.sampled_from(["null_answer", "user", "bare"]),
    st.sampled_from([ALL, RMI, IFD, END, RMI | END]),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_cached_and_scored_quantities_are_together_all_that_can_be_scored(
    sizes: list[tuple[int, int]], prior: str, wanted: frozenset[Quantity], window_pairs: int, random: Random
) -> None:
    pairs = [pair(number, "q" * query, "a" * answer) for number, (query, answer) in enumerate(sizes)]
    encoder = WatchedEncoder(prior=prior, max_tokens=256)
    keys = all_keys(encoder, pairs, wanted)
    cached = random.sample(keys, random.randint(0, len(keys)))
    stale = [(pair_id, quantity, num_tokens + 1, end_ids) for pair_id, quantity, num_tokens, end_ids in cached[::2]]
    stale += [(*key[:3], "257 300") for key in cached[::2] if key[1] == Quantity.END]
    plan = plan_of(pairs, encoder, wanted, [*cached[1::2], *stale], window_pairs)

    sequences = planned(plan)

    assert sorted([*keys_of(sequences), *cached[1::2]]) == keys
    assert plan.num_cached == len(cached[1::2])
    assert plan.num_cached + plan.num_quantities == len(keys)
    assert all(one.targets for one in sequences)
    assert plan.num_sequences == plan.expected_sequences == len(sequences)
    assert plan.num_tokens == plan.expected_tokens == sum(len(one.token_ids) for one in sequences)
    assert plan.expected_attended == sum(sum(range(len(one.token_ids) + 1)) for one in sequences)
    assert plan.expected_shared_attended == sum(sum(range(one.num_shared + 1)) for one in sequences)
    assert plan.sums.num_encoded == plan.num_pairs == len(pairs)


def test_counts_and_reasons_of_the_table_are_those_of_the_encoder() -> None:
    pairs = [pair(1, "abc", "d" * 900), pair(2, "", "a"), pair(3, "q", "a")]
    encoder = WatchedEncoder(max_tokens=256)
    table = scored(plan_of(pairs, encoder, RMI))
    expected = encoder.encode(pairs, RMI)
    assert expected[0].is_truncated
    for name in ("pair_id", "num_q_tokens", "num_a_tokens", "num_a_tokens_untruncated", "is_truncated"):
        assert table[name].to_list() == [getattr(one, name) for one in expected]
    for quantity in Quantity:
        assert table[f"null_reason_{quantity}"].to_list() == [one.null_reasons.get(quantity) for one in expected]


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("rows_at_once", [7, 1 << 17])
def test_the_table_is_in_the_order_of_the_ids_with_the_sums_of_each_pair(
    is_cached: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "ROWS_AT_ONCE", rows_at_once)
    pairs, encoder = varied_pairs(40), WatchedEncoder()
    keys = all_keys(encoder, pairs, RMI)
    plan = plan_of(pairs, encoder, RMI, keys if is_cached else (), window_pairs=7)
    planned(plan)
    if not is_cached:
        rows = [(*key[:2], float(int(key[0], 16)), *key[2:], None) for key in keys]
        for row in rows:
            plan.sums.add_shard(pl.DataFrame([row], schema=tables.dtypes(tables.CachedScores), orient="row"))
    parts = list(plan.sums.parts())
    table = pl.concat(parts)
    assert max(part.height for part in parts) <= rows_at_once
    assert table["pair_id"].to_list() == [one.pair_id for one in pairs]
    assert table["sum_nll_q"].to_list() == ([1.0] * 40 if is_cached else [float(number) for number in range(40)])


def test_a_quantity_that_is_neither_scored_nor_refused_is_an_error() -> None:
    plan = plan_of([pair(1, "abc", "def")], WatchedEncoder(), RMI)
    planned(plan)
    with pytest.raises(AssertionError, match=f"pair {1:032x}: q was neither scored nor refused"):
        pl.concat(plan.sums.parts())


def test_the_forecast_is_fair_after_the_first_window_and_exact_after_the_last() -> None:
    plan = plan_of(varied_pairs(64), WatchedEncoder(), ALL, window_pairs=8)
    assert plan.expected_tokens == plan.expected_sequences == 0
    forecasts = []
    scored: Window = []
    for window in plan.windows():
        scored += window
        assert plan.num_tokens == sum(len(one.token_ids) for one in scored)
        assert plan.expected_tokens >= plan.num_tokens
        forecasts.append((plan.expected_tokens, plan.expected_sequences))
    num_tokens = sum(len(one.token_ids) for one in scored)
    assert len(forecasts) == 8
    assert forecasts[-1] == (num_tokens, 4 * 64)
    assert forecasts[0][0] == pytest.approx(num_tokens, rel=FORECAST_TOLERANCE)
    assert forecasts[0][1] == 4 * 64


def test_the_forecast_of_a_run_taken_up_again_is_fair_when_the_first_sequences_are_known() -> None:
    """A killed run leaves the longest pairs cached; the number of processes depends on the forecast."""
    pairs, encoder = varied_pairs(64), WatchedEncoder()
    longest = sorted(pairs, key=lambda one: -len(one.query) - len(one.answer))[:36]
    plan = plan_of(pairs, encoder, ALL, all_keys(encoder, longest, ALL), window_pairs=8)
    assert_fair(plan)


def test_the_forecast_of_a_run_taken_up_again_is_fair_without_end_tokens() -> None:
    pairs, encoder = varied_pairs(64), WatchedEncoder(ends=())
    longest = sorted(pairs, key=lambda one: -len(one.query) - len(one.answer))[:36]
    assert_fair(plan_of(pairs, encoder, ALL, all_keys(encoder, longest, ALL), window_pairs=8))


def test_the_forecast_is_fair_when_only_the_ends_are_to_be_scored_again() -> None:
    pairs = varied_pairs(64)
    cached = all_keys(WatchedEncoder(ends=(1,)), pairs, ALL)
    assert_fair(plan_of(pairs, WatchedEncoder(), ALL, cached, window_pairs=8))


def assert_fair(plan: Plan) -> None:
    """The forecast after the first window with work is at least half of the final count, and at most twice it."""
    windows = plan.windows()
    assert next(window for window in windows if window)
    forecast = plan.expected_tokens
    assert list(windows)
    assert plan.num_tokens / 2 < forecast < 2 * plan.num_tokens
