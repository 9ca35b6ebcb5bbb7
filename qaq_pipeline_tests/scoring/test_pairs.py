"""pairs: the order of scoring, and texts that are read part by part, some at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import polars as pl
import pytest

from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.scoring.pairs import TEXTS, LongestFirst, Pairs

TURNS = ({"role": "user", "content": "Before."}, {"role": "assistant", "content": "Yes."})


def pair(number: int) -> Pair:
    """A pair of 3 to 40 characters, some of which are two bytes; every third one has a system text or a history."""
    system, history = ("Be brief." if number % 3 == 1 else None), (list(TURNS) if number % 3 == 2 else None)
    return Pair(f"{number * 7919 % 1000:032x}", system, "é" * (1 + number % 5), "a" * (2 + number * 13 % 34), history)


PAIRS = [pair(number) for number in range(50)]
ORDERED = sorted(PAIRS, key=lambda one: -len(one.query) - len(one.answer))


def in_parts(size: int) -> Pairs:
    """The pairs, so many in a part, after a part without rows."""
    (frame,) = Pairs.of(PAIRS).read(*TEXTS)

    def read(*columns: str) -> Iterator[pl.DataFrame]:
        rows = frame.select("pair_id", *columns)
        return itertools.chain([rows.clear()], rows.iter_slices(size))

    return Pairs(read)


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("bytes_at_once", [1, 300, 10**6])
@pytest.mark.parametrize("window", [1, 4, 64])
def test_windows_are_the_longest_first_whatever_is_read_at_once(size: int, bytes_at_once: int, window: int) -> None:
    ordered = LongestFirst(in_parts(size), bytes_at_once)
    windows = list(ordered.windows(window))
    assert list(itertools.chain(*windows)) == ORDERED
    assert all(len(one) == window for one in windows[:-1])
    assert ordered.pair_ids().to_list() == [one.pair_id for one in ORDERED]
    assert ordered.num_characters().tolist() == [len(one.query) + len(one.answer) for one in ORDERED]


@pytest.mark.parametrize(("bytes_at_once", "num_readings"), [(10**6, 1), (1, 13)])
def test_texts_are_read_once_to_order_them_and_once_for_each_range_that_is_in_memory(
    bytes_at_once: int, num_readings: int
) -> None:
    pairs, readings = in_parts(7), []

    def read(*columns: str) -> Iterator[pl.DataFrame]:
        readings.append(columns)
        return pairs.read(*columns)

    for _ in LongestFirst(Pairs(read), bytes_at_once).windows(4):
        pass
    assert len(readings) == 1 + num_readings


def size_of(one: Pair) -> int:
    """Bytes of a pair in memory: all texts, and what every pair takes."""
    history = "".join(turn["content"] for turn in one.history or ())
    return len(((one.system or "") + one.query + one.answer + history).encode()) + 150


@pytest.mark.parametrize("limit", [1, 30_000, 60_000])
def test_the_pairs_in_memory_take_at_most_so_many_bytes_or_are_one_window(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    pairs = [pair(number) for number in range(1000)]
    found, ordered = [], LongestFirst(Pairs.of(pairs), limit)
    sizes = [size_of(one) for one in itertools.chain(*ordered.windows(64))]
    texts: Callable[[int, int], pl.DataFrame] = ordered._texts
    monkeypatch.setattr(ordered, "_texts", lambda start, stop: found.append((start, stop)) or texts(start, stop))
    list(ordered.windows(64))
    assert [stop for _, stop in found] == [*(start for start, _ in found[1:]), len(pairs)]
    for start, stop in found:
        assert sum(sizes[start:stop]) <= limit or stop - start <= 64
        assert stop == len(pairs) or sum(sizes[start : stop + 64]) > limit


def test_pairs_of_two_tables_are_read_one_after_the_other() -> None:
    both = Pairs.of(PAIRS[:9]).and_then(Pairs.of(PAIRS[9:]))
    assert list(itertools.chain(*LongestFirst(both).windows(4))) == ORDERED


@pytest.mark.parametrize("number", [0, 1])
def test_no_pair_makes_no_window_and_one_pair_makes_one(number: int) -> None:
    ordered = LongestFirst(Pairs.of(PAIRS[:number]))
    assert list(ordered.windows(4)) == [[one] for one in PAIRS[:number]]
    assert len(ordered) == number
