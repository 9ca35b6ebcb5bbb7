"""batching: every sequence once, longest first, within the budget of padded tokens, the same each time."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qaq_pipeline.batching import token_budget_batches

LENGTHS = st.lists(st.integers(1, 300), max_size=60)
BUDGETS = st.integers(16, 2000)


def padded_tokens(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


def test_the_longest_come_first_and_a_batch_is_as_full_as_its_budget_allows() -> None:
    assert token_budget_batches([3, 9, 5, 4, 5], 10) == [[1], [2, 4], [3, 0]]


def test_a_sequence_over_the_budget_is_a_batch_of_its_own() -> None:
    assert token_budget_batches([100, 2, 2], 10) == [[0], [1, 2]]


def test_nothing_makes_no_batch() -> None:
    assert token_budget_batches([], 10) == []


@given(LENGTHS, BUDGETS)
def test_every_sequence_is_in_exactly_one_batch(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, BUDGETS)
def test_the_budget_of_padded_tokens_is_kept_unless_one_sequence_alone_breaks_it(
    lengths: list[int], budget: int
) -> None:
    for batch in token_budget_batches(lengths, budget):
        assert len(batch) == 1 or padded_tokens([batch], lengths) <= budget


@given(LENGTHS, BUDGETS)
def test_lengths_never_rise_from_the_first_sequence_to_the_last(lengths: list[int], budget: int) -> None:
    order = [lengths[index] for index in itertools.chain(*token_budget_batches(lengths, budget))]
    assert order == sorted(lengths, reverse=True)


@given(LENGTHS, BUDGETS)
def test_no_batch_has_room_for_the_next_sequence(lengths: list[int], budget: int) -> None:
    for batch, following in itertools.pairwise(token_budget_batches(lengths, budget)):
        assert padded_tokens([[*batch, following[0]]], lengths) > budget


@given(LENGTHS, BUDGETS)
def test_padding_is_bounded_by_the_largest_batch_times_the_range_of_lengths(lengths: list[int], budget: int) -> None:
    """Sorted batches cover disjoint ranges of lengths, so that their paddings add up to one range at most."""
    batches = token_budget_batches(lengths, budget)
    largest = max(map(len, batches), default=0)
    spread = max(lengths, default=0) - min(lengths, default=0)
    assert 0 <= padded_tokens(batches, lengths) - sum(lengths) <= largest * spread


@given(LENGTHS, BUDGETS)
def test_equal_input_gives_equal_batches_and_ties_keep_their_order(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    assert batches == token_budget_batches(list(lengths), budget)
    for batch in batches:
        for one, other in itertools.pairwise(batch):
            assert lengths[one] > lengths[other] or one < other
