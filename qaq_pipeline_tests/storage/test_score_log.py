"""The files of the score cache: shards, packs and an index, with many writers, and with damaged or missing files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from filelock import FileLock

from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.storage import parquet_file, score_log
from qaq_pipeline.storage.locks import FileLocks
from qaq_pipeline.storage.score_cache import ScoreCache
from qaq_pipeline.storage.score_log import SCORED, ScoreLog, distinct
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.frames import IDENTITY, cached, pair_name

SCORED_WITH = {"libraries": {"torch": "2.13.0"}, "device": "cpu"}
PLACE = ("score_cache", "0123")
EVERY = 4
"""Shards of a pack in these tests."""


@pytest.fixture(autouse=True)
def _few_shards_per_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_log, "SHARDS_PER_PACK", EVERY)


def log_of(storage: Storage) -> ScoreLog:
    """The log as another process has it."""
    return ScoreLog(storage.files, storage.locks, PLACE)


@pytest.fixture
def fill() -> Callable[..., None]:
    """Function: append shards of one pair each, with these numbers."""

    def append(storage: Storage, *numbers: int, log: ScoreLog | None = None) -> None:
        for number in numbers:
            (log or log_of(storage)).append(cached(number), SCORED_WITH)

    return append


def pairs_in(storage: Storage, *asked: int) -> list[int]:
    """Numbers of the pairs of which a reader gets scores, once for each score; they are asked for if none are named."""
    wanted = pl.Series([pair_name(number) for number in asked or range(1000)])
    found = distinct(pl.concat([pl.DataFrame(schema=SCORED), *log_of(storage).read(wanted)]))
    return [int(pair_id, 16) for pair_id in found["pair_id"]]


def files(storage: Storage) -> list[str]:
    """Folders of the files that a listing has."""
    return sorted(name.partition("/")[0] for name in storage.files.files_below(*PLACE))


def test_shards_become_packs_and_no_score_is_lost(any_storage: Storage, fill: Callable[..., None]) -> None:
    fill(any_storage, *range(EVERY - 1))
    assert files(any_storage) == ["index.json", *["shards"] * (EVERY - 1)]
    fill(any_storage, EVERY - 1)
    assert files(any_storage) == ["index.json", "packs", "packs"], "a pack and its keys"
    fill(any_storage, EVERY)
    assert files(any_storage) == ["index.json", "packs", "packs", "shards"]
    assert pairs_in(any_storage) == list(range(EVERY + 1))
    assert log_of(any_storage).counts()[0] == EVERY + 1
    names = log_of(any_storage).names()
    assert [name.partition("/")[0] for name in names] == ["packs", "shards"]
    assert names[1] == f"shards/{EVERY:012d}.parquet"


def test_rows_of_a_pack_are_those_of_its_shards(storage: Storage) -> None:
    log = log_of(storage)
    for number in range(EVERY - 1):
        log.append(
            cached(number, quantity=Quantity.END).with_columns(end_ids=pl.lit(f"7 {number}")), {"device": str(number)}
        )
    before = distinct(pl.concat(log.read(pl.Series([pair_name(1)]))))
    log.pack()
    after = distinct(pl.concat(log.read(pl.Series([pair_name(1)]))))
    assert before.equals(after)
    assert after["scored_with"].to_list() == [f'{{"device": "{number}"}}' for number in range(EVERY - 1)]


def test_a_score_that_comes_again_is_one_row_of_its_pack(storage: Storage) -> None:
    log = log_of(storage)
    for sum_nll in (2.0, 1.5, 1.75):
        log.append(cached(1, sum_nll=sum_nll), SCORED_WITH)
    log.pack()
    (pack,) = log.read(pl.Series([pair_name(1)]))
    assert pack["sum_nll"].to_list() == [1.5]


def test_packs_stay_few_and_each_score_is_written_a_few_times(
    storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = ScoreLog._write_pack

    def count(log: ScoreLog, scores: pl.DataFrame) -> object:
        written.append(scores.height)
        return write(log, scores)

    monkeypatch.setattr(ScoreLog, "_write_pack", count)
    monkeypatch.setattr(score_log, "SCORES_PER_PACK", 64)
    number = 256
    fill(storage, *range(number))
    assert pairs_in(storage) == list(range(number))
    assert len(log_of(storage).names()) <= number / 64 + 5
    assert max(written) <= 64
    assert sum(written) <= 6 * number


def test_a_reader_takes_only_the_packs_with_its_pairs(
    storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_log, "SCORES_PER_PACK", EVERY)
    fill(storage, *range(5 * EVERY))
    read: list[str] = []
    read_if_any = storage.files.read_if_any
    monkeypatch.setattr(storage.files, "read_if_any", lambda *parts: (read.append(parts[-1]), read_if_any(*parts))[1])
    assert pairs_in(storage, EVERY) == list(range(EVERY, 2 * EVERY))
    assert len([name for name in read if name.endswith(".parquet") and "-" in name]) == 1
    assert log_of(storage).holding(pair_name(EVERY)) == [log_of(storage).names()[1]]
    assert log_of(storage).holding(pair_name(999)) == []


# --- many processes --------------------------------------------------------------------------------------------------


def test_writers_at_the_same_time_lose_nothing(any_storage: Storage, fill: Callable[..., None]) -> None:
    """Each remembers another end of the log, and all of them pack."""
    logs = [log_of(any_storage) for _ in range(4)]

    def write(number: int) -> None:
        fill(any_storage, *range(number * 10, number * 10 + 10), log=logs[number])

    with ThreadPoolExecutor(len(logs)) as threads:
        list(threads.map(write, range(len(logs))))
    assert pairs_in(any_storage) == list(range(40))
    assert files(any_storage).count("shards") < 2 * EVERY


def test_a_writer_that_was_away_while_others_packed_is_read(storage: Storage, fill: Callable[..., None]) -> None:
    away = log_of(storage)
    fill(storage, 0, log=away)
    fill(storage, *range(1, 2 * EVERY))
    fill(storage, 100, log=away)
    assert pairs_in(storage) == [*range(2 * EVERY), 100]


def test_a_shard_whose_number_was_packed_while_it_was_written_is_written_again(
    storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, create = log_of(storage), storage.files.create
    fill(storage, 0)

    def others_first(data: bytes, *parts: str) -> bool:
        monkeypatch.setattr(storage.files, "create", create)
        fill(storage, *range(1, EVERY))
        return create(data, *parts)

    monkeypatch.setattr(storage.files, "create", others_first)
    fill(storage, 100, log=slow)
    assert pairs_in(storage) == [*range(EVERY), 100]
    assert files(storage).count("shards") == 1


def test_of_two_that_pack_the_same_one_wins_and_the_other_leaves_nothing(
    any_storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(any_storage, *range(EVERY - 1))
    first, second = log_of(any_storage), log_of(any_storage)
    replace = ScoreLog._replace

    def other_first(log: ScoreLog, *arguments: object) -> None:
        monkeypatch.setattr(ScoreLog, "_replace", replace)
        second.pack()
        replace(log, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ScoreLog, "_replace", other_first)
    first.pack()
    assert files(any_storage) == ["index.json", "packs", "packs"]
    assert pairs_in(any_storage) == list(range(EVERY - 1))


@pytest.mark.parametrize("moment", ["a pack", "a shard"])
def test_a_reader_finds_what_is_packed_while_it_reads(
    storage: Storage, fill: Callable[..., None], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(storage, *range(EVERY + 2))
    read_if_any, names = storage.files.read_if_any, log_of(storage).names()
    wanted = names[0] if moment == "a pack" else names[1]

    def pack_first(*parts: str) -> bytes | None:
        if parts[-1] == wanted.rpartition("/")[2]:
            monkeypatch.setattr(storage.files, "read_if_any", read_if_any)
            log_of(storage).pack()
            fill(storage, *range(50, 50 + EVERY))
        return read_if_any(*parts)

    monkeypatch.setattr(storage.files, "read_if_any", pack_first)
    assert set(pairs_in(storage)) >= set(range(EVERY + 2))


def test_what_a_killed_process_left_is_removed_by_the_next_that_packs(
    storage: Storage, fill: Callable[..., None]
) -> None:
    fill(storage, *range(EVERY))
    for name in ("shards/000000000001.parquet", "packs/1-0123456789abcdef.parquet", "packs/1-0123456789abcdef.keys"):
        storage.files.write_bytes(b"left", *PLACE, *name.split("/"))
    fill(storage, *range(EVERY, 2 * EVERY))
    assert pairs_in(storage) == list(range(2 * EVERY))
    assert files(storage) == ["index.json", "packs", "packs"]


# --- a store that lies, and damaged files ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 2], ids=["an empty listing", "half of the names"])
def test_nothing_depends_on_a_listing(
    any_storage: Storage, fill: Callable[..., None], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = any_storage.files.names
    monkeypatch.setattr(any_storage.files, "names", lambda *parts: names(*parts)[::share] if share else [])
    fill(any_storage, *range(3 * EVERY + 2))
    assert pairs_in(any_storage) == list(range(3 * EVERY + 2))
    assert log_of(any_storage).counts()[0] == 3 * EVERY + 2, "none twice"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "spoil",
    [lambda _: None, lambda data: data[:-9], lambda data: data.replace(b'"first": 4', b'"first": 5'), lambda _: b"[]"],
    ids=["lost", "torn", "changed", "of another kind"],
)
def test_a_damaged_index_is_built_again(
    storage: Storage,
    fill: Callable[..., None],
    spoil: Callable[[bytes], bytes | None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(storage, *range(EVERY + 2))
    index = Path(storage.files.path(*PLACE, "index.json"))
    before = index.read_bytes()
    spoiled = spoil(before)
    index.unlink() if spoiled is None else index.write_bytes(spoiled)
    assert pairs_in(storage) == list(range(EVERY + 2))
    assert "it is built again from the files beside it" in caplog.text
    assert index.read_bytes() == before


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_pack_that_is_damaged_or_lost_costs_its_own_scores_only(
    storage: Storage, fill: Callable[..., None], is_lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fill(storage, *range(EVERY + 2))
    pack = Path(storage.files.path(*PLACE, *log_of(storage).names()[0].split("/")))
    pack.unlink() if is_lost else pack.write_bytes(flip_a_byte(pack.read_bytes()))
    assert pairs_in(storage) == [EVERY, EVERY + 1]
    assert str(pack) in caplog.text
    assert log_of(storage).num_set_aside() == (0 if is_lost else 1)
    caplog.clear()
    fill(storage, *range(EVERY))
    assert pairs_in(storage) == list(range(EVERY + 2))
    assert caplog.text == ""


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_pack_without_its_keys_is_read(storage: Storage, fill: Callable[..., None], is_lost: bool) -> None:
    fill(storage, *range(EVERY))
    (keys,) = Path(storage.files.path(*PLACE, "packs")).glob("*.keys")
    keys.unlink() if is_lost else keys.write_bytes(flip_a_byte(keys.read_bytes()))
    assert pairs_in(storage, 1) == list(range(EVERY))


def test_a_damaged_shard_is_set_aside_and_the_others_are_packed(
    storage: Storage, fill: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    fill(storage, 0, 1)
    shard = Path(storage.files.path(*PLACE, "shards", f"{0:012d}.parquet"))
    shard.write_bytes(flip_a_byte(shard.read_bytes()))
    assert pairs_in(storage) == [1]
    assert f"{shard}: no file of scores" in caplog.text
    assert files(storage) == ["index.json", "packs", "packs", "set_aside"]
    caplog.clear()
    fill(storage, 0)
    assert pairs_in(storage) == [0, 1]
    assert caplog.text == ""


def flip_a_byte(data: bytes) -> bytes:
    return data[:3] + bytes([data[3] ^ 1]) + data[4:]


def test_a_disk_without_hard_links_serves_too(
    storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    fill(storage, *range(EVERY + 1))
    fill(storage, EVERY + 1, log=log_of(storage))
    assert pairs_in(storage) == list(range(EVERY + 2))


def test_two_caches_of_one_storage_have_the_same_scores(any_storage: Storage) -> None:
    one, other = (ScoreCache(any_storage.files, any_storage.locks) for _ in range(2))
    wanted = pl.Series([pair_name(number) for number in range(10)])
    for number in range(10):
        (one if number % 2 else other).append(IDENTITY, cached(number), SCORED_WITH)
    assert one.read(IDENTITY, wanted).equals(other.read(IDENTITY, wanted))
    assert one.read(IDENTITY, wanted)["place"].to_list() == list(range(10))


# --- what a review found ---------------------------------------------------------------------------------------------


def test_an_index_whose_write_was_answered_late_keeps_its_packs(
    storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store applied a write, the answer was lost, and the library sent it again: the condition does not hold."""
    monkeypatch.setattr(storage.files, "_is_conditional", True)
    monkeypatch.setattr(storage.files, "_tag", lambda *_: "tag")
    answers = iter([False])

    def replace(data: bytes, _: str | None, *parts: str) -> bool:
        if parts[-1] != "index.json" and storage.files.exists(*parts):
            return False
        storage.files.write_bytes(data, *parts)
        return next(answers, True) if parts[-1] == "index.json" and b'"name"' in data else True

    monkeypatch.setattr(storage.files, "_replace", replace)
    fill(storage, *range(EVERY))
    assert next(answers, None) is None, "an answer was lost"
    assert pairs_in(storage) == list(range(EVERY))
    fill(storage, *range(EVERY, 2 * EVERY))
    assert pairs_in(storage) == list(range(2 * EVERY))


@pytest.mark.parametrize("reader", ["pairs", "pack"])
def test_a_shard_that_somebody_removed_hides_no_later_one(
    any_storage: Storage, fill: Callable[..., None], reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_of(any_storage)
    fill(any_storage, 0, 1, 2, log=log)
    any_storage.files.remove(*PLACE, "shards", f"{1:012d}.parquet")
    if reader == "pack":
        fill(any_storage, *range(3, 2 * EVERY), log=log)
    assert pairs_in(any_storage) == [0, 2, *(range(3, 2 * EVERY) if reader == "pack" else ())]
    assert "it is missing, though later shards are there" in caplog.text


def test_a_writer_goes_on_after_scores_were_removed(any_storage: Storage, fill: Callable[..., None]) -> None:
    log = log_of(any_storage)
    fill(any_storage, *range(EVERY + 2), log=log)
    log_of(any_storage).clear()
    assert files(any_storage) == ["index.json"]
    fill(any_storage, 100, log=log_of(any_storage))
    fill(any_storage, 101, log=log)
    assert pairs_in(any_storage) == [100, 101]


def test_a_writer_whose_number_is_removed_meanwhile_writes_again(
    storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(storage, 0, 1)
    create = storage.files.create

    def clear_first(data: bytes, *parts: str) -> bool:
        monkeypatch.setattr(storage.files, "create", create)
        log_of(storage).clear()
        fill(storage, 100)
        return create(data, *parts)

    monkeypatch.setattr(storage.files, "create", clear_first)
    fill(storage, 101)
    assert pairs_in(storage) == [100, 101]


def test_of_two_that_rebuild_the_index_the_second_takes_what_the_first_wrote(
    storage: Storage, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(storage, *range(EVERY))
    storage.files.remove(*PLACE, "index.json")
    hold = storage.locks.hold

    def other_first(*names: str) -> object:
        monkeypatch.setattr(storage.locks, "hold", hold)
        fill(storage, *range(EVERY, 2 * EVERY))
        return hold(*names)

    monkeypatch.setattr(storage.locks, "hold", other_first)
    assert pairs_in(storage) == list(range(2 * EVERY))


def test_a_damaged_pack_is_left_to_the_next_reader_while_another_process_changes_the_index(
    tmp_path: Path, fill: Callable[..., None]
) -> None:
    storage = Storage(str(tmp_path / "storage"), FileLocks(tmp_path / "locks", 0.1))
    fill(storage, *range(EVERY + 1))
    pack = Path(storage.files.path(*PLACE, *log_of(storage).names()[0].split("/")))
    pack.write_bytes(flip_a_byte(pack.read_bytes()))
    with ThreadPoolExecutor(1) as other, FileLock(tmp_path / "locks" / "score_cache__0123.lock"):
        assert other.submit(pairs_in, storage).result() == [EVERY]
    assert pairs_in(storage) == [EVERY]
    assert len(log_of(storage).names()) == 1


def test_a_shard_of_which_any_byte_changed_is_not_read(storage: Storage, fill: Callable[..., None]) -> None:
    fill(storage, 0)
    whole = storage.files.read_bytes(*PLACE, "shards", f"{0:012d}.parquet")
    for place in range(0, len(whole), 7):
        for bit in (0, 5):
            changed = whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
            with pytest.raises(parquet_file.UNREADABLE):
                score_log._decode(changed)
