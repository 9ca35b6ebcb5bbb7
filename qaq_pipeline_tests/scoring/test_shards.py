"""shards: the rows of finished scores, when they are stored, and that any end of a run stores them.

No tolerances: every sum here is exact in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import NullReason, Quantity
from qaq_pipeline.scoring import shards
from qaq_pipeline.scoring.shards import ShardWriter
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.score_cache import ScoreCache
from qaq_pipeline.storage.storage import Storage

SCORED_WITH = {"libraries": {"torch": "2.13.0"}, "device": "cpu"}

IDENTITY = ScoreIdentity("tiny", "r1", "t1", "p1", "bare", "float32", 128, "leave_unscored")
SECONDS = 5.0
Open = Callable[[], closing[ShardWriter]]


class FlakyCache(ScoreCache):
    """A cache that fails on the first shard, like a full disk or a broken connection."""

    has_failed = False

    def append(self, identity: ScoreIdentity, scores: pl.DataFrame, scored_with: Mapping[str, Any]) -> None:
        if not self.has_failed:
            self.has_failed = True
            raise OSError("no space left on device")
        super().append(identity, scores, scored_with)


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"), tmp_path / "locks")


@pytest.fixture
def closed() -> list[pl.DataFrame]:
    """The shards that the writers have closed."""
    return []


@pytest.fixture
def open_writer(storage: Storage, clock: Clock, closed: list[pl.DataFrame]) -> Open:
    """Factory: a writer to the storage, which closes a shard every `SECONDS`."""
    return lambda: closing(ShardWriter(storage, IDENTITY, SECONDS, scored_with=SCORED_WITH, on_closed=closed.append))


@pytest.fixture
def num_files(storage: Storage) -> Callable[[], int]:
    """Factory: counts the shards in the cache."""
    return lambda: len(list(Path(storage.files.path("score_cache")).glob("*/shards/*.parquet")))


@pytest.fixture
def cached(storage: Storage) -> Callable[[], list[str]]:
    """The cached scores of the sequences 0 to 9, each as "pair quantity"."""

    def read() -> list[str]:
        frame = storage.scores.read(IDENTITY, pl.Series([f"{number:032x}" for number in range(10)]))
        return [f"{row['place']} {row['quantity']}" for row in frame.iter_rows(named=True)]

    return read


def sequence(number: int, *lengths: int) -> TokenSequence:
    """A sequence with one target of each length."""
    targets, stop = [], 3
    for quantity, length in zip(Quantity, lengths, strict=False):
        targets.append(Target(quantity, stop, stop + length))
        stop += length
    return TokenSequence(f"{number:032x}", [0] * stop, tuple(targets))


def ending(number: int, end_ids: tuple[int, ...]) -> TokenSequence:
    """A sequence that scores the end of an answer."""
    return TokenSequence(f"{number:032x}", [0] * 4, (Target(Quantity.END, 3, 4, any_of=end_ids),))


def fp32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def rows(frame: pl.DataFrame) -> list[tuple[object, ...]]:
    return frame.drop("pair_id").rows()


# --- rows ------------------------------------------------------------------------------------------------------------


def test_each_target_is_a_row_of_its_own_with_its_count_of_tokens(
    open_writer: Open, closed: list[pl.DataFrame], storage: Storage
) -> None:
    with open_writer() as writer:
        writer.add(sequence(1, 2, 3), [fp32(-0.5, -0.25), fp32(-1, -2, -4)])
        writer.add(ending(2, (7, 12)), [fp32(-0.5)])
        writer.add(sequence(2, 1), [fp32(-8)])
    (shard,) = closed
    first, second = f"{1:032x}", f"{2:032x}"
    assert shard.rows() == [
        (first, "q", 0.75, 2, "", None),
        (first, "q_given_a", 7.0, 3, "", None),
        (second, "end", 0.5, 1, "7 12", None),
        (second, "q", 8.0, 1, "", None),
    ]
    assert tables.enforce(tables.CachedScores, shard).equals(shard)
    found = storage.scores.read(IDENTITY, pl.Series([first, second])).drop("scored_with")
    assert sorted(found.rows()) == [
        (0, "q", 0.75, 2, ""),
        (0, "q_given_a", 7.0, 3, ""),
        (1, "end", 0.5, 1, "7 12"),
        (1, "q", 8.0, 1, ""),
    ]


def test_the_sum_is_taken_in_fp64(open_writer: Open, closed: list[pl.DataFrame]) -> None:
    """In fp32, 2²⁴ + 1 is 2²⁴."""
    values = fp32(-(2.0**24), -1, -1, -1)
    assert -float(values.sum()) != 2.0**24 + 3
    with open_writer() as writer:
        writer.add(sequence(1, 4), [values])
    assert closed[0]["sum_nll"].to_list() == [2.0**24 + 3]


def test_a_probability_rounded_to_over_one_gives_no_negative_sum(open_writer: Open, closed: list[pl.DataFrame]) -> None:
    with open_writer() as writer:
        writer.add(sequence(1, 2, 1), [fp32(1e-7, 0), fp32(0)])
    assert closed[0]["sum_nll"].to_list() == [0.0, 0.0]


def test_scores_that_are_not_one_for_each_target_are_refused(open_writer: Open, closed: list[pl.DataFrame]) -> None:
    with open_writer() as writer:
        with pytest.raises(ValueError, match=r"zip\(\)"):
            writer.add(sequence(1, 2), [])
        with pytest.raises(ValueError, match=r"zip\(\)"):
            writer.add(sequence(1, 2), [fp32(-1, -2), fp32(-1)])
    assert closed == []


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_what_is_not_finite_is_null_with_its_reason_and_never_cached(
    value: float, open_writer: Open, closed: list[pl.DataFrame], cached: Callable[[], list[str]]
) -> None:
    with open_writer() as writer:
        writer.add(sequence(1, 3, 2), [fp32(-1, value, -2), fp32(-1, -2)])
    assert rows(closed[0]) == [("q", None, 3, "", "non_finite"), ("q_given_a", 3.0, 2, "", None)]
    assert cached() == ["1 q_given_a"]


@pytest.mark.parametrize("reason", [NullReason.OUT_OF_MEMORY, NullReason.NON_FINITE])
def test_a_failure_is_a_row_for_each_target_and_not_in_the_cache(
    reason: NullReason, open_writer: Open, closed: list[pl.DataFrame], cached: Callable[[], list[str]]
) -> None:
    with open_writer() as writer:
        writer.add_failure(sequence(1, 4, 2), reason)
        writer.add_failure(ending(1, (7, 12)), reason)
        writer.add(sequence(2, 1), [fp32(-1)])
    assert rows(closed[0]) == [
        ("q", None, 4, "", reason.value),
        ("q_given_a", None, 2, "", reason.value),
        ("end", None, 1, "7 12", reason.value),
        ("q", 1.0, 1, "", None),
    ]
    assert tables.enforce(tables.CachedScores, closed[0]).equals(closed[0])
    assert cached() == ["2 q"]


def test_failures_alone_leave_the_cache_empty(
    open_writer: Open, closed: list[pl.DataFrame], cached: Callable[[], list[str]]
) -> None:
    with open_writer() as writer:
        writer.add_failure(sequence(1, 4), NullReason.OUT_OF_MEMORY)
    assert rows(closed[0]) == [("q", None, 4, "", "out_of_memory")]
    assert cached() == []


# --- when a shard is stored ------------------------------------------------------------------------------------------


def test_a_shard_is_stored_when_it_has_been_open_long_enough(
    open_writer: Open,
    closed: list[pl.DataFrame],
    clock: Clock,
    cached: Callable[[], list[str]],
    num_files: Callable[[], int],
) -> None:
    with open_writer() as writer:
        for number, seconds, is_due in (
            (0, 4.9, False),
            (1, 0.2, True),
            (2, 4.9, False),
            (3, 0.0, False),
            (4, 9, True),
        ):
            writer.add(sequence(number, 1), [fp32(-1)])
            before = num_files()
            clock.now += seconds
            assert writer.close_if_due() is is_due
            assert num_files() == before + is_due
        assert cached() == ["0 q", "1 q", "2 q", "3 q", "4 q"]
    assert [shard.height for shard in closed] == [2, 3]
    assert num_files() == 2, "on leaving, nothing was open"


def test_the_time_counts_from_the_last_shard_however_it_was_closed(open_writer: Open, clock: Clock) -> None:
    with open_writer() as writer:
        clock.now += 4
        writer.add(sequence(0, 1), [fp32(-1)])
        writer.close()
        clock.now += 4
        writer.add(sequence(1, 1), [fp32(-1)])
        assert not writer.close_if_due()
        clock.now += 1
        assert writer.close_if_due()


def test_what_is_finished_after_the_model_changed_is_kept_for_the_table_and_not_cached(
    storage: Storage, cached: Callable[[], list[str]], closed: list[pl.DataFrame]
) -> None:
    truths = iter([True, False])
    with closing(
        ShardWriter(
            storage,
            IDENTITY,
            SECONDS,
            scored_with=SCORED_WITH,
            is_identity_true=lambda: next(truths),
            on_closed=closed.append,
        )
    ) as writer:
        writer.add(sequence(1, 1), [fp32(-0.5)])
        writer.close()
        writer.add(sequence(2, 1), [fp32(-0.25)])
        writer.close()
    assert [shard["sum_nll"].to_list() for shard in closed] == [[0.5], [0.25]]
    assert cached() == ["1 q"]


def test_nothing_is_stored_where_nothing_was_added(
    open_writer: Open, closed: list[pl.DataFrame], clock: Clock, storage: Storage, num_files: Callable[[], int]
) -> None:
    with open_writer() as writer:
        writer.close()
        clock.now += 2 * SECONDS
        writer.close_if_due()
        writer.add(TokenSequence(f"{1:032x}", [0], ()), [])
    assert closed == []
    assert num_files() == 0
    assert not storage.files.exists("score_cache")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError, MemoryError])
def test_the_open_shard_is_stored_whatever_ends_the_run(
    error: type[BaseException], open_writer: Open, closed: list[pl.DataFrame], cached: Callable[[], list[str]]
) -> None:
    with pytest.raises(error), open_writer() as writer:  # noqa: PT012 - the test is about the open shard.
        writer.add(sequence(0, 1), [fp32(-1)])
        writer.close()
        writer.add(sequence(1, 1, 1), [fp32(-1), fp32(-2)])
        writer.add_failure(sequence(2, 1), NullReason.OUT_OF_MEMORY)
        raise error
    assert cached() == ["0 q", "1 q", "1 q_given_a"]
    assert [shard.height for shard in closed] == [1, 3]


def test_a_shard_that_could_not_be_stored_is_stored_on_leaving(tmp_path: Path, cached: Callable[[], list[str]]) -> None:
    flaky = Storage(str(tmp_path / "storage"), tmp_path / "locks")
    flaky.scores = FlakyCache(flaky.files, flaky.locks)
    with (  # noqa: PT012 - the test is about the open shard.
        pytest.raises(OSError, match="no space left"),
        closing(ShardWriter(flaky, IDENTITY, SECONDS, scored_with=SCORED_WITH)) as writer,
    ):
        writer.add(sequence(0, 1), [fp32(-1)])
        writer.close()
    assert cached() == ["0 q"]
