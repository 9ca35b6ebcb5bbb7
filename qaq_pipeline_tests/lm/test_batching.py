"""batching: every sequence once, longest first, within the budget; smaller when memory is short, and larger again.

No tolerances: counts of tokens are compared exactly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaq_pipeline.lm.batching import CLEAN_BATCHES_BEFORE_GROWTH, BatchQueue, batch_size, num_attended
from qaq_pipeline.lm.prompts import TokenSequence

Window = list[TokenSequence]
Fits = Callable[[Window], bool]

LENGTHS = st.lists(st.integers(1, 300), max_size=60)
WINDOWS = st.lists(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), max_size=25), max_size=5)
"""For each sequence of each window: its own tokens, and its shared tokens."""
BUDGETS = st.integers(1, 2000)
PADDED = st.booleans()
MEMORIES = st.integers(1, 3000)
WORKERS = st.integers(1, 4)
RANDOMS = st.randoms(use_true_random=False)


def sequence(number: int, own: int, shared: int = 0) -> TokenSequence:
    return TokenSequence(f"{number:032x}", [0] * (own + shared), (), shared)


def build(windows: Sequence[Sequence[tuple[int, int]]]) -> list[Window]:
    """Sequences numbered in the order of the arguments."""
    numbers = itertools.count()
    return [[sequence(next(numbers), own, shared) for own, shared in window] for window in windows]


def one_window(lengths: Sequence[int]) -> list[Window]:
    return build([[(length, 0) for length in lengths]])


def number_of(one: TokenSequence) -> int:
    return int(one.pair_id, 16)


def cost(batch: Sequence[TokenSequence], *, is_padded: bool) -> int:
    """With padding, every row is as long as the longest; packed, each costs its own tokens."""
    if is_padded:
        return len(batch) * max(len(one.token_ids) for one in batch)
    return sum(len(one.token_ids) - one.num_shared for one in batch)


def drain(queue: BatchQueue) -> list[Window]:
    return list(iter(queue.take, []))


def numbers(batches: Sequence[Window]) -> list[list[int]]:
    return [[number_of(one) for one in batch] for batch in batches]


@dataclass
class Outcome:
    """The outcome of a queue's sequences, by their numbers, and its budget after each batch."""

    scored: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)


def work_off(windows: Sequence[Window], queue: BatchQueue, fits: Fits, num_workers: int, random: Random) -> Outcome:
    """Run every batch as several workers do: each has one batch at a time, and they finish in any order."""
    # Halving n sequences down to single ones takes n - 1 splits.
    most_batches = 2 * sum(map(len, windows)) + 1
    outcome, running = Outcome(), list[Window]()
    for num_ended in itertools.count():
        while len(running) < num_workers and (batch := queue.take()):
            running.append(batch)
        if not running:
            return outcome
        assert num_ended < most_batches, "the queue does not come to an end"
        batch = running.pop(random.randrange(len(running)))
        if fits(batch):
            queue.fitted()
            outcome.scored += map(number_of, batch)
        elif not queue.split(batch):
            outcome.failed += map(number_of, batch)
        outcome.budgets.append(queue.budget)
    raise AssertionError("itertools.count() has no end")


# --- the size of a batch ---------------------------------------------------------------------------------------------


def test_a_padded_batch_is_as_long_as_its_longest() -> None:
    assert batch_size([9, 5, 5, 4, 3], 10, is_padded=True) == 1
    assert batch_size([5, 5, 4, 3], 10, is_padded=True) == 2
    assert batch_size([4, 3], 10, is_padded=True) == 2


def test_a_packed_batch_costs_the_sum_of_its_lengths() -> None:
    assert batch_size([5, 4, 1, 1], 10, is_padded=False) == 3
    assert batch_size([5, 4, 2, 1], 10, is_padded=False) == 2


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_sequence_over_the_budget_is_a_batch_of_its_own(is_padded: bool) -> None:
    assert batch_size([100, 2, 2], 10, is_padded=is_padded) == 1
    queue = BatchQueue(one_window([100, 2, 2]), 10, is_padded=is_padded)
    assert numbers(drain(queue)) == [[0], [1, 2]]


@given(LENGTHS, BUDGETS, PADDED)
def test_a_batch_is_the_longest_beginning_that_the_budget_allows(
    lengths: list[int], budget: int, is_padded: bool
) -> None:
    lengths = sorted(lengths, reverse=True)
    sequences = one_window(lengths)[0]
    fitting = [n for n in range(1, len(lengths) + 1) if cost(sequences[:n], is_padded=is_padded) <= budget]
    expected = max(fitting, default=1) if lengths else 0
    assert batch_size(lengths, budget, is_padded=is_padded) == expected


# --- batches as they are taken ---------------------------------------------------------------------------------------


def test_the_longest_come_first_and_a_batch_is_as_full_as_its_budget_allows() -> None:
    queue = BatchQueue(one_window([3, 9, 5, 4, 5]), 10, is_padded=True)
    assert numbers(drain(queue)) == [[1], [2, 4], [3, 0]]


def test_what_is_shared_costs_a_packed_batch_nothing_and_a_padded_one_its_length() -> None:
    windows = [[(4, 6), (5, 0), (5, 20)]]
    packed, padded = (BatchQueue(build(windows), 14, is_padded=is_padded) for is_padded in (False, True))
    assert numbers(drain(packed)) == [[1, 2, 0]]
    assert numbers(drain(padded)) == [[2], [0], [1]]
    three = build(windows)[0]
    assert packed.tokens(three) == 14
    assert padded.tokens(three) == 75


@pytest.mark.parametrize("windows", [[], [[]], [[], [], []]])
def test_nothing_makes_no_batch(windows: list[Window]) -> None:
    queue = BatchQueue(windows, 10, is_padded=True)
    assert queue.take() == []
    assert queue.take() == []


def test_a_window_without_sequences_ends_nothing() -> None:
    queue = BatchQueue(build([[], [(1, 0)], [], [], [(2, 0)], []]), 10, is_padded=True)
    assert numbers(drain(queue)) == [[0], [1]]


def test_the_next_window_is_asked_for_when_the_last_is_used_up() -> None:
    asked: list[int] = []

    def windows() -> Iterator[Window]:
        for number, window in enumerate(build([[(6, 0), (5, 0)], [(4, 0)]])):
            asked.append(number)
            yield window

    queue = BatchQueue(windows(), 6, is_padded=True)
    assert asked == []
    for expected, asked_by_then in (([0], [0]), ([1], [0]), ([2], [0, 1]), ([], [0, 1])):
        assert numbers([queue.take()]) == [expected]
        assert asked == asked_by_then


@given(WINDOWS, BUDGETS, PADDED)
def test_every_sequence_is_in_exactly_one_batch(
    windows: list[list[tuple[int, int]]], budget: int, is_padded: bool
) -> None:
    given_windows = build(windows)
    batches = drain(BatchQueue(given_windows, budget, is_padded=is_padded))
    assert all(batches)
    taken = list(itertools.chain(*batches))
    assert sorted(map(number_of, taken)) == list(range(sum(map(len, windows))))
    by_number = {number_of(one): one for window in given_windows for one in window}
    assert all(one == by_number[number_of(one)] for one in taken)


@given(WINDOWS, BUDGETS, PADDED)
def test_the_budget_is_kept_unless_one_sequence_alone_breaks_it(
    windows: list[list[tuple[int, int]]], budget: int, is_padded: bool
) -> None:
    queue = BatchQueue(build(windows), budget, is_padded=is_padded)
    for batch in drain(queue):
        assert queue.tokens(batch) == cost(batch, is_padded=is_padded)
        assert len(batch) == 1 or cost(batch, is_padded=is_padded) <= budget


@given(WINDOWS, BUDGETS, PADDED)
def test_windows_come_one_after_another_each_longest_first_and_ties_in_their_order(
    windows: list[list[tuple[int, int]]], budget: int, is_padded: bool
) -> None:
    order = [number_of(one) for one in itertools.chain(*drain(BatchQueue(build(windows), budget, is_padded=is_padded)))]
    expected = [
        sorted(window, key=lambda one: (-cost([one], is_padded=is_padded), number_of(one))) for window in build(windows)
    ]
    assert order == [number_of(one) for one in itertools.chain(*expected)]


@given(LENGTHS, BUDGETS, PADDED)
def test_no_batch_has_room_for_the_next_sequence(lengths: list[int], budget: int, is_padded: bool) -> None:
    batches = drain(BatchQueue(one_window(lengths), budget, is_padded=is_padded))
    for batch, following in itertools.pairwise(batches):
        assert cost([*batch, following[0]], is_padded=is_padded) > budget


@given(LENGTHS, BUDGETS)
def test_padding_is_bounded_by_the_largest_batch_times_the_range_of_lengths(lengths: list[int], budget: int) -> None:
    """Sorted batches cover disjoint ranges of lengths, so their padding sums to at most one range."""
    batches = drain(BatchQueue(one_window(lengths), budget, is_padded=True))
    largest = max(map(len, batches), default=0)
    spread = max(lengths, default=0) - min(lengths, default=0)
    assert 0 <= sum(cost(batch, is_padded=True) for batch in batches) - sum(lengths) <= largest * spread


@given(WINDOWS, BUDGETS, PADDED)
def test_equal_input_gives_equal_batches(windows: list[list[tuple[int, int]]], budget: int, is_padded: bool) -> None:
    one, other = (drain(BatchQueue(build(windows), budget, is_padded=is_padded)) for _ in range(2))
    assert one == other


# --- where memory falls short ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_batch_that_did_not_fit_comes_back_as_two_before_anything_else(is_padded: bool) -> None:
    queue = BatchQueue(one_window([10] * 9), 50, is_padded=is_padded)
    first = queue.take()
    assert numbers([first]) == [[0, 1, 2, 3, 4]]
    assert queue.split(first)
    assert queue.budget == 25
    assert numbers(drain(queue)) == [[0, 1], [2, 3, 4], [5, 6], [7, 8]]


def test_a_half_that_does_not_fit_either_is_halved_again() -> None:
    queue = BatchQueue(one_window([10] * 4), 40, is_padded=True)
    assert queue.split(queue.take())
    assert queue.split(queue.take())
    assert queue.budget == 10
    assert sorted(numbers(drain(queue))) == [[0], [1], [2, 3]]


@pytest.mark.parametrize("is_padded", [True, False])
def test_one_sequence_cannot_be_split_and_does_not_come_back(is_padded: bool) -> None:
    queue = BatchQueue(one_window([30, 4]), 30, is_padded=is_padded)
    assert not queue.split(queue.take())
    assert numbers(drain(queue)) == [[1]]


def test_the_budget_grows_again_after_enough_batches_that_fitted() -> None:
    queue = BatchQueue(one_window([10] * 8), 80, is_padded=True)
    batch = queue.take()
    assert queue.split(batch)
    assert queue.split(batch[:4])
    assert queue.budget == 20
    for budget in (20, 40, 80):
        assert queue.budget == budget
        for _ in range(CLEAN_BATCHES_BEFORE_GROWTH - 1):
            queue.fitted()
            assert queue.budget == budget
        queue.fitted()
    assert queue.budget == 80


def test_growth_stops_at_the_full_budget() -> None:
    queue = BatchQueue(one_window([9] * 11), 99, is_padded=True)
    assert queue.split(queue.take())
    assert queue.budget == 49
    for _ in range(3 * CLEAN_BATCHES_BEFORE_GROWTH):
        queue.fitted()
    assert queue.budget == 99


def test_a_batch_that_does_not_fit_begins_the_count_again() -> None:
    queue = BatchQueue(one_window([10] * 8), 80, is_padded=True)
    batch = queue.take()
    assert queue.split(batch)
    for _ in range(CLEAN_BATCHES_BEFORE_GROWTH - 1):
        queue.fitted()
    assert queue.split(batch[:4])
    for _ in range(CLEAN_BATCHES_BEFORE_GROWTH - 1):
        queue.fitted()
    assert queue.budget == 20


def test_a_smaller_budget_makes_smaller_batches_and_a_grown_one_larger() -> None:
    queue = BatchQueue(one_window([10] * 60), 40, is_padded=True)
    queue.split(queue.take())
    assert [len(queue.take()) for _ in range(4)] == [2, 2, 2, 2]
    for _ in range(CLEAN_BATCHES_BEFORE_GROWTH):
        queue.fitted()
    assert len(queue.take()) == 4


def test_a_long_sequence_that_does_not_fit_raises_no_budget() -> None:
    queue = BatchQueue(one_window([5000, 10, 10]), 1000, is_padded=True)
    assert not queue.split(queue.take())
    assert queue.budget <= 1000


def test_a_batch_taken_before_another_was_split_raises_no_budget() -> None:
    """Two workers: both hold a batch of the full budget, and the first one's half fails before the second's."""
    queue = BatchQueue(one_window([10] * 16), 80, is_padded=True)
    one, other = queue.take(), queue.take()
    assert queue.split(one)
    assert queue.split(queue.take())
    assert queue.budget == 20
    assert queue.split(other)
    assert queue.budget <= 20


def fits_into(memory: int, is_padded: bool, batch: Window) -> bool:
    return cost(batch, is_padded=is_padded) <= memory


@given(WINDOWS, BUDGETS, PADDED, MEMORIES, WORKERS, RANDOMS)
def test_whatever_fits_every_sequence_is_scored_once_or_fails_alone(
    windows: list[list[tuple[int, int]]], budget: int, is_padded: bool, memory: int, num_workers: int, random: Random
) -> None:
    sequences = build(windows)
    fits = functools.partial(fits_into, memory, is_padded)
    outcome = work_off(sequences, BatchQueue(sequences, budget, is_padded=is_padded), fits, num_workers, random)
    alone = {number_of(one): fits([one]) for window in sequences for one in window}
    assert sorted(outcome.scored) == [number for number, is_small in alone.items() if is_small]
    assert sorted(outcome.failed) == [number for number, is_small in alone.items() if not is_small]


@given(WINDOWS, BUDGETS, PADDED, MEMORIES, WORKERS, RANDOMS)
def test_the_budget_never_rises_over_the_full_one_and_never_falls_to_nothing(
    windows: list[list[tuple[int, int]]], budget: int, is_padded: bool, memory: int, num_workers: int, random: Random
) -> None:
    sequences = build(windows)
    fits = functools.partial(fits_into, memory, is_padded)
    outcome = work_off(sequences, BatchQueue(sequences, budget, is_padded=is_padded), fits, num_workers, random)
    assert all(1 <= after <= budget for after in outcome.budgets)


@given(LENGTHS.filter(bool), st.data())
def test_attention_costs_a_pair_of_tokens_for_each_that_one_attends_to(lengths: list[int], data: st.DataObject) -> None:
    shared = [data.draw(st.integers(0, length - 1)) for length in lengths]
    sequences = [
        sequence(number, length - k, k) for number, (length, k) in enumerate(zip(lengths, shared, strict=True))
    ]
    by_hand = [sum(range(k + 1, length + 1)) for length, k in zip(lengths, shared, strict=True)]
    packed, padded = (BatchQueue([], 1, is_padded=is_padded) for is_padded in (False, True))
    assert packed.attended(sequences) == sum(by_hand)
    assert padded.attended(sequences) == len(lengths) * sum(range(max(lengths) + 1))
    assert [num_attended(*one) for one in zip(lengths, shared, strict=True)] == by_hand
