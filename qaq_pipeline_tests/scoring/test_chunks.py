"""chunks: every pair once, the longest first, with its cached scores; small chunks at the end."""

from __future__ import annotations

import itertools
from pathlib import Path

import polars as pl
import pytest

from qaq_pipeline.lm.workers import ScorerFacts
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.scoring.chunks import CHARACTERS_OF_TEMPLATE, Chunks, Work, plan_of
from qaq_pipeline.scoring.pairs import LongestFirst, Pairs
from qaq_pipeline.scoring.planner import WINDOW_PAIRS, Plan
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.scoring.test_planner import ALL, WatchedEncoder, pair, varied_pairs

IDENTITY = ScoreIdentity("m", "r", "t", "h", "null_answer", "float32", 4096, "truncate_answer")
FEWEST = 400
"""Characters of the smallest chunk, with batches of so many tokens."""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"), tmp_path / "locks")


def chunks_of(plan: Plan, storage: Storage, num_processes: int = 2) -> Chunks:
    facts = ScorerFacts("fake", is_padded=False, shares_prefixes=True, batch_tokens=FEWEST)
    return Chunks(plan, IDENTITY, storage, [facts], num_processes)


def plan(num_pairs: int, storage: Storage) -> Plan:
    pairs = LongestFirst(Pairs.of(varied_pairs(num_pairs)))
    return Plan(pairs, WatchedEncoder(), ALL, storage.scores.read(IDENTITY, pairs.pair_ids()))


def test_every_pair_is_in_one_chunk_the_longest_first(storage: Storage) -> None:
    whole = plan(500, storage)
    chunks = list(iter(chunks_of(whole, storage).take, []))
    assert [one.pair.pair_id for chunk in chunks for one in chunk] == whole.pairs.pair_ids().to_list()


def test_chunks_become_smaller_towards_the_end_so_that_no_process_waits_long(storage: Storage) -> None:
    whole = plan(500, storage)
    total = int(whole.pairs.num_characters().sum()) + CHARACTERS_OF_TEMPLATE * len(whole.pairs)
    sizes = [
        sum(len(one.pair.query) + len(one.pair.answer) + CHARACTERS_OF_TEMPLATE for one in chunk)
        for chunk in iter(chunks_of(whole, storage).take, [])
    ]
    longest = int(whole.pairs.num_characters().max()) + CHARACTERS_OF_TEMPLATE
    assert total / 4 <= sizes[0] <= total / 4 + longest
    assert all(later <= size + longest for size, later in itertools.pairwise(sizes))
    assert all(size >= FEWEST for size in sizes[:-1])
    assert max(sizes[-2:]) <= FEWEST + longest


def test_a_chunk_is_at_most_a_window(storage: Storage) -> None:
    short = LongestFirst(Pairs.of([pair(number, "q", "a") for number in range(3 * WINDOW_PAIRS)]))
    whole = Plan(short, WatchedEncoder(), ALL, storage.scores.read(IDENTITY, short.pair_ids()))
    sizes = [len(chunk) for chunk in iter(chunks_of(whole, storage, num_processes=1).take, [])]
    assert max(sizes) <= WINDOW_PAIRS
    assert sum(sizes) == 3 * WINDOW_PAIRS


def test_no_pair_is_no_chunk(storage: Storage) -> None:
    assert chunks_of(plan(0, storage), storage).take() == []


def cache(storage: Storage, whole: Plan, pair_ids: list[str]) -> None:
    """Store a score of each sequence of some pairs."""
    rows = [
        {
            "pair_id": one.pair_id,
            "quantity": target.quantity.value,
            "sum_nll": 1.0,
            "num_tokens": target.stop - target.start,
            "end_ids": target.end_ids,
            "null_reason": None,
        }
        for window in whole.windows()
        for one in window
        for target in one.targets
        if one.pair_id in pair_ids
    ]
    storage.scores.append(IDENTITY, pl.DataFrame(rows, schema=tables.dtypes(tables.CachedScores)), {})


def test_a_pair_brings_its_cached_scores(storage: Storage) -> None:
    known = [pair.pair_id for pair in varied_pairs(40)[::3]]
    cache(storage, plan(40, storage), known)
    for chunk in iter(chunks_of(plan(40, storage), storage).take, []):
        for one in chunk:
            assert len(one.known) == (len(Quantity) if one.pair.pair_id in known else 0)
        of_chunk = plan_of(chunk, WatchedEncoder(), ALL)
        scored = {one.pair_id for window in of_chunk.windows() for one in window}
        assert scored == {one.pair.pair_id for one in chunk} - set(known)
        assert of_chunk.num_cached == len(Quantity) * sum(one.pair.pair_id in known for one in chunk)


def test_what_a_lost_process_stored_is_not_scored_again_and_the_rest_in_smaller_batches(storage: Storage) -> None:
    chunks = chunks_of(plan(40, storage), storage)
    chunk = chunks.take()
    cache(storage, plan(40, storage), [one.pair.pair_id for one in chunk[:2]])
    left = chunks.after_loss(chunk)
    assert [one.pair for one in left] == [one.pair for one in chunk]
    assert [len(one.known) for one in left] == [len(Quantity)] * 2 + [0] * (len(chunk) - 2)
    assert {one.batch_share for one in left} == {0.5}
    assert {one.batch_share for one in chunks.after_loss(left)} == {0.25}


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4, 5, 6, 7, 8, 9) + Work(num_tokens=10) == Work(1, 2, 3, 4, 15, 6, 7, 8, 9)
