"""storage: atomic writes, tables with provenance, deliveries, the score cache, locks; on disk and in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import TableError
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline.storage.parquet_file import file_fault
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable, empty
from qaq_pipeline_tests.conftest import LockHolder
from qaq_pipeline_tests.support.frames import HOSTILE_NAMES, IDENTITY, cached, pair_name, raw_rows, rejected

SCORED_WITH = {"libraries": {"torch": "2.13.0"}, "device": "cpu"}

PROVENANCE = {"code_version": "1-abc", "inputs": {}, "files": {"größe.jsonl": "12"}, "partition": ["b1"]}
ROWS = raw_rows({"query": "Größe?\n", "system": "Be brief."}, rejected(), {"answer": ""})
TABLE = ("raw_data", "b1", "table.parquet")
FILES = {"a.jsonl": b'{"query": "q", "response": "a"}\n', "b.jsonl": b"\x00\xff"}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"), tmp_path / "locks")


@pytest.fixture(params=["disk", "memory"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Storage on the local disk, and on a file system that is not local."""
    root = str(tmp_path / "storage") if request.param == "disk" else f"memory://{tmp_path.name}/storage"
    yield Storage(root, tmp_path / "locks")
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def table_file(storage: Storage, batch: str = "b1") -> Path:
    return Path(storage.tables.url("raw_data", Partition(batch)))


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_the_second_write_replaces_the_first_and_leaves_nothing_else(any_storage: Storage) -> None:
    any_storage.files.write_bytes(b"old", "folder", "file")
    any_storage.files.write_bytes(b"new", "folder", "file")
    assert any_storage.files.read_bytes("folder", "file") == b"new"
    assert any_storage.files.names("folder") == ["file"]


def test_a_reader_keeps_the_content_that_it_opened(storage: Storage) -> None:
    storage.files.write_bytes(b"old", "file")
    with Path(storage.files.url("file")).open("rb") as reader:
        storage.files.write_bytes(b"new content", "file")
        assert reader.read() == b"old"


def test_a_write_that_fails_midway_leaves_the_old_content_and_no_temporary_file(
    storage: Storage, tmp_path: Path
) -> None:
    storage.files.write_bytes(b"old", "folder", "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            storage.files.write_bytes(b"new" * 1000, "folder", "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_under(tmp_path) == ["storage/folder/file"]
    assert storage.files.read_bytes("folder", "file") == b"old"


def test_a_write_that_cannot_replace_leaves_no_temporary_file(storage: Storage, tmp_path: Path) -> None:
    storage.files.write_bytes(b"inside", "folder", "file")
    with pytest.raises(OSError, match="folder"):
        storage.files.write_bytes(b"new", "folder")
    assert files_under(tmp_path) == ["storage/folder/file"]


def test_what_is_missing_is_named(any_storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"storage/no/such: not stored yet"):
        any_storage.files.read_bytes("no", "such")
    assert not any_storage.files.exists("no", "such")


def test_json_comes_back(any_storage: Storage) -> None:
    any_storage.files.write_json({"ä": [1, None]}, "value.json")
    assert any_storage.files.read_json("value.json") == {"ä": [1, None]}
    any_storage.files.remove("value.json")
    assert not any_storage.files.exists("value.json")


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_with_its_provenance_and_version(any_storage: Storage) -> None:
    written = StoredTable(ROWS, PROVENANCE)
    any_storage.tables.write(written, "raw_data", Partition("b1"))
    read = any_storage.tables.read("raw_data", Partition("b1"))
    assert read.frame.equals(ROWS)
    assert dict(read.frame.schema) == tables.dtypes(tables.RawData)
    assert read.provenance == PROVENANCE
    assert (read.data_version, read.provenance_id) == (written.data_version, written.provenance_id)
    assert any_storage.tables.has("raw_data", Partition("b1"))
    assert not any_storage.tables.has("raw_data", Partition("b2"))


def test_the_footer_of_the_file_says_what_made_it(storage: Storage) -> None:
    table = StoredTable(ROWS, PROVENANCE)
    storage.tables.write(table, "raw_data", Partition("b1"))
    footer = json.loads(pl.read_parquet_metadata(table_file(storage))["qaq_pipeline"])
    assert footer.pop("file_hash")
    assert footer == {"provenance": PROVENANCE, "data_version": table.data_version}


@pytest.mark.parametrize("name", list(PIPELINE.tables()))
def test_a_table_without_rows_is_stored_too(storage: Storage, name: str) -> None:
    storage.tables.write(StoredTable(empty(PIPELINE.tables()[name])), name, Partition("b1"))
    assert storage.tables.read(name, Partition("b1")).frame.equals(empty(PIPELINE.tables()[name]))


def test_partitions_of_a_table_do_not_mix(storage: Storage) -> None:
    scores = empty(tables.RmiScores)
    for role in ("strong", "weak"):
        storage.tables.write(StoredTable(scores, {"role": role}), "rmi_scores", Partition("b1", role))
    assert storage.tables.read("rmi_scores", Partition("b1", "weak")).provenance == {"role": "weak"}
    assert storage.tables.read("rmi_scores", Partition("b1", "strong")).provenance == {"role": "strong"}


def test_a_frame_that_does_not_fit_is_not_written(storage: Storage) -> None:
    storage.tables.write(StoredTable(ROWS), "raw_data", Partition("b1"))
    before = table_file(storage).read_bytes()
    with pytest.raises(TableError, match="RawData"):
        storage.tables.write(StoredTable(ROWS.drop("answer")), "raw_data", Partition("b1"))
    assert table_file(storage).read_bytes() == before


def test_a_table_that_is_not_declared_is_refused_with_those_that_are(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"'surprise' is no table; known: raw_data, signatures, screened_data"):
        storage.tables.read("surprise", Partition("b1"))


def test_a_missing_table_is_named_with_its_remedy(any_storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"raw_data/b1/table\.parquet: not stored yet; materialise raw_data first"):
        any_storage.tables.read("raw_data", Partition("b1"))


@given(cuts=st.lists(st.integers(0, 8), max_size=4), order=st.permutations(range(8)))
def test_equal_content_has_an_equal_version_however_the_frame_came_about(cuts: list[int], order: list[int]) -> None:
    frame = raw_rows(*[{}] * 8)
    edges = [0, *sorted(cuts), 8]
    pieces = [frame[start:stop] for start, stop in itertools.pairwise(edges)]
    rebuilt = pl.concat(pieces, rechunk=False)[order].sort("source_row")
    assert StoredTable(rebuilt).data_version == StoredTable(frame).data_version
    changed = frame.with_columns(answer=pl.when(pl.col("source_row") == 3).then(pl.lit("!")).otherwise("answer"))
    assert StoredTable(changed).data_version != StoredTable(frame).data_version


def test_the_version_knows_content_only_and_the_provenance_id_provenance_only() -> None:
    table, told = StoredTable(ROWS), StoredTable(ROWS, PROVENANCE)
    assert table.data_version == told.data_version
    assert table.provenance_id != told.provenance_id == hash_json(PROVENANCE)
    assert StoredTable(ROWS[:1], PROVENANCE).provenance_id == told.provenance_id


def test_the_version_of_a_stored_table_does_not_depend_on_who_reads_it(storage: Storage) -> None:
    """A newer Polars may write other bytes for the same rows; a table that lies there keeps its version."""
    other_bytes = StoredTable(ROWS, {}, stored_version="0" * 32)
    assert other_bytes.data_version == "0" * 32
    storage.tables.write(StoredTable(ROWS), "raw_data", Partition("b1"))
    assert storage.tables.read("raw_data", Partition("b1")).stored_version == StoredTable(ROWS).data_version


def foreign(footer: str | None = None, frame: pl.DataFrame = ROWS) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata=None if footer is None else {"qaq_pipeline": footer})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"PAR1" * 4,
        foreign(),
        foreign("[]"),
        foreign("{}"),
        foreign("{"),
        foreign('{"provenance": {}}'),
        foreign('{"provenance": {}, "data_version": "0"}'),
        foreign('{"provenance": {}, "data_version": "0"}', ROWS.drop("answer")),
        foreign('{"provenance": {}, "data_version": "0"}', ROWS.with_columns(pl.col("source_row").cast(pl.Int32))),
    ],
)
def test_a_foreign_file_or_one_of_an_old_schema_is_named_with_its_remedy(storage: Storage, content: bytes) -> None:
    storage.files.write_bytes(content, *TABLE)
    with pytest.raises(StorageError, match=r"raw_data/b1/table\.parquet: .*materialise it again"):
        storage.tables.read("raw_data", Partition("b1"))


def test_a_file_of_an_old_schema_is_told_from_a_damaged_one(storage: Storage) -> None:
    storage.files.write_bytes(foreign('{"provenance": {}, "data_version": "0"}', ROWS.drop("answer")), *TABLE)
    with pytest.raises(StorageError, match="it has other columns than raw_data has now"):
        storage.tables.read("raw_data", Partition("b1"))


@pytest.mark.filterwarnings("ignore")
def test_a_torn_table_is_an_error_wherever_it_ends(storage: Storage) -> None:
    storage.tables.write(StoredTable(ROWS, PROVENANCE), "raw_data", Partition("b1"))
    whole = storage.files.read_bytes(*TABLE)
    for length in range(0, len(whole), 41):
        storage.files.write_bytes(whole[:length], *TABLE)
        with pytest.raises(StorageError, match=r"raw_data/b1/table\.parquet: .*materialise it again"):
            storage.tables.read("raw_data", Partition("b1"))


def test_a_changed_byte_never_gives_other_rows(storage: Storage) -> None:
    storage.tables.write(StoredTable(ROWS, PROVENANCE), "raw_data", Partition("b1"))
    whole = storage.files.read_bytes(*TABLE)
    refused = 0
    for position in range(0, len(whole), 41):
        changed = bytearray(whole)
        changed[position] ^= 0x5A
        storage.files.write_bytes(bytes(changed), *TABLE)
        try:
            assert storage.tables.read("raw_data", Partition("b1")).frame.equals(ROWS)
        except StorageError:
            refused += 1
    assert refused > 0


# --- names ----------------------------------------------------------------------------------------------------------

PATH_TAKING: dict[str, Callable[[Storage, str], Any]] = {
    "write_table": lambda storage, name: storage.tables.write(StoredTable(ROWS), "raw_data", Partition(name)),
    "write_table_of_model": lambda storage, name: storage.tables.write(
        StoredTable(ROWS), "raw_data", Partition("b1", name)
    ),
    "read_table": lambda storage, name: storage.tables.read("raw_data", Partition(name)),
    "has_table": lambda storage, name: storage.tables.has("raw_data", Partition(name)),
    "table_url": lambda storage, name: storage.tables.url("raw_data", Partition(name)),
    "store_delivery": lambda storage, name: storage.deliveries.store(name, FILES),
    "current_delivery": lambda storage, name: storage.deliveries.current(name),
    "read_delivery": lambda storage, name: storage.deliveries.read(Delivery(name, {"a.jsonl": "0"})),
    "lock": lambda storage, name: storage.locks.hold("raw_data", name).__enter__(),
    "lock_of_model": lambda storage, name: storage.locks.hold("raw_data", "b1", name).__enter__(),
}


@pytest.mark.parametrize("function", list(PATH_TAKING))
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_batch_name_is_refused_and_nothing_is_written(
    storage: Storage, tmp_path: Path, function: str, name: str
) -> None:
    with pytest.raises(ValueError, match=r"batch name .* cannot be used: give a letter or digit"):
        PATH_TAKING[function](storage, name)
    assert files_under(tmp_path) == []


# --- deliveries -----------------------------------------------------------------------------------------------------


def test_a_delivery_comes_back(any_storage: Storage) -> None:
    delivery = any_storage.deliveries.store("b1", FILES, limit=3)
    assert any_storage.deliveries.current("b1") == delivery
    assert list(delivery.files) == ["a.jsonl", "b.jsonl"]
    assert any_storage.deliveries.read(delivery) == FILES


def test_a_new_delivery_of_a_batch_keeps_the_old_copy(any_storage: Storage) -> None:
    first = any_storage.deliveries.store("b1", FILES)
    second = any_storage.deliveries.store("b1", FILES | {"b.jsonl": b"other"})
    assert any_storage.deliveries.current("b1") == second
    assert first.content_hash != second.content_hash
    assert any_storage.deliveries.read(first) == FILES
    assert any_storage.deliveries.read(second)["b.jsonl"] == b"other"


def test_the_same_delivery_twice_is_stored_once(storage: Storage, tmp_path: Path) -> None:
    first = storage.deliveries.store("b1", FILES)
    copy = Path(storage.files.url("deliveries", "b1", first.content_hash, "a.jsonl"))
    written = copy.stat().st_mtime_ns
    assert storage.deliveries.store("b1", FILES) == first
    assert copy.stat().st_mtime_ns == written
    assert len(files_under(tmp_path / "storage" / "deliveries")) == len(FILES) + 1


def test_the_hash_of_a_delivery_knows_its_files_their_names_and_its_limit(storage: Storage) -> None:
    first = FILES["a.jsonl"]
    deliveries = [
        storage.deliveries.store("b1", {"a.jsonl": first}),
        storage.deliveries.store("b1", {"a.jsonl": first}, limit=3),
        storage.deliveries.store("b1", {"c.jsonl": first}),
        storage.deliveries.store("b1", {"a.jsonl": first + b" "}),
    ]
    assert len({delivery.content_hash for delivery in deliveries}) == len(deliveries)
    assert all(storage.deliveries.read(delivery) for delivery in deliveries)


def test_a_flipped_byte_in_a_delivered_copy_is_found_and_named(any_storage: Storage) -> None:
    delivery = any_storage.deliveries.store("b1", FILES)
    copy = ("deliveries", "b1", delivery.content_hash, "a.jsonl")
    flipped = bytes([FILES["a.jsonl"][0] ^ 1]) + FILES["a.jsonl"][1:]
    any_storage.files.write_bytes(flipped, *copy)
    with pytest.raises(StorageError, match=r"a\.jsonl: changed since it was delivered; deliver the batch again"):
        any_storage.deliveries.read(delivery)


def test_delivering_again_mends_a_changed_copy(storage: Storage) -> None:
    delivery = storage.deliveries.store("b1", FILES)
    storage.files.write_bytes(b"damaged", "deliveries", "b1", delivery.content_hash, "a.jsonl")
    assert storage.deliveries.read(storage.deliveries.store("b1", FILES)) == FILES


def test_a_batch_that_was_never_delivered_is_named_with_its_remedy(any_storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"batch 'b9' was never delivered; .*`qaq run FILE --batch b9`"):
        any_storage.deliveries.current("b9")


# --- score cache ----------------------------------------------------------------------------------------------------


def pair_ids(*numbers: int) -> pl.Series:
    return pl.Series([pair_name(number) for number in numbers], dtype=pl.String)


def keys(scores: pl.DataFrame) -> list[tuple[str, str]]:
    return sorted(scores.select("pair_id", "quantity").iter_rows())


def test_cached_scores_come_back_for_the_pairs_that_are_asked_for(any_storage: Storage) -> None:
    any_storage.scores.append(IDENTITY, cached(1, 2, 3), SCORED_WITH)
    any_storage.scores.append(IDENTITY, cached(4), SCORED_WITH)
    any_storage.scores.append(IDENTITY, cached(1, quantity=Quantity.A), SCORED_WITH)
    found = any_storage.scores.read(IDENTITY, pair_ids(1, 4, 9)).drop("scored_with")
    assert keys(found) == [(pair_name(1), "a"), (pair_name(1), "q"), (pair_name(4), "q")]
    assert dict(found.schema) == tables.dtypes(tables.CachedScores)


def test_a_cache_without_shards_has_no_scores(any_storage: Storage) -> None:
    assert any_storage.scores.read(IDENTITY, pair_ids(1)).drop("scored_with").equals(empty(tables.CachedScores))


def test_a_score_that_two_writers_stored_is_read_once(any_storage: Storage) -> None:
    for sum_nll in (1.5, 1.5000001):
        any_storage.scores.append(IDENTITY, cached(1, 2, sum_nll=sum_nll), SCORED_WITH)
    found = any_storage.scores.read(IDENTITY, pair_ids(1, 2)).drop("scored_with")
    assert keys(found) == [(pair_name(1), "q"), (pair_name(2), "q")]
    assert found.equals(any_storage.scores.read(IDENTITY, pair_ids(1, 2)).drop("scored_with"))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(IDENTITY)])
def test_scores_of_another_identity_are_not_read(storage: Storage, field: str) -> None:
    value = getattr(IDENTITY, field)
    changes: dict[str, Any] = {field: value * 2}
    other = dataclasses.replace(IDENTITY, **changes)
    storage.scores.append(other, cached(1), SCORED_WITH)
    assert storage.scores.read(IDENTITY, pair_ids(1)).is_empty()
    assert storage.scores.read(other, pair_ids(1)).height == 1


def test_the_folder_of_the_scores_says_whose_they_are(any_storage: Storage) -> None:
    any_storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    stored = any_storage.files.read_json("score_cache", IDENTITY.digest(), "identity.json")
    assert stored == dataclasses.asdict(IDENTITY)


def shards(storage: Storage) -> list[Path]:
    return sorted(Path(storage.files.url("score_cache", IDENTITY.digest())).glob("*.parquet"))


def flip_a_byte(data: bytes) -> bytes:
    """The data with one bit of its 40th byte changed: amid the columns."""
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


def shard_of(scores: pl.DataFrame) -> bytes:
    return parquet_file.encode(scores, {"data_version": StoredTable(scores).data_version, "scored_with": SCORED_WITH})


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"hello",
    "foreign": lambda _: foreign(),
    "torn": lambda data: data[:-9],
    "changed": flip_a_byte,
    "without a column": lambda _: shard_of(cached(1).drop("num_tokens")),
    "of other types": lambda _: shard_of(cached(1).cast({"sum_nll": pl.Float32})),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_no_shard_is_set_aside_named_and_never_read(
    storage: Storage, spoil: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    (spoiled,) = shards(storage)
    spoiled.write_bytes(content := spoil(spoiled.read_bytes()))
    storage.scores.append(IDENTITY, cached(2), SCORED_WITH)
    assert keys(storage.scores.read(IDENTITY, pair_ids(1, 2))) == [(pair_name(2), "q")]
    assert f"{spoiled}: no shard of scores" in caplog.text
    assert (spoiled.parent / "set_aside" / spoiled.name).read_bytes() == content
    assert not spoiled.exists()
    caplog.clear()
    storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    assert keys(storage.scores.read(IDENTITY, pair_ids(1, 2))) == [(pair_name(1), "q"), (pair_name(2), "q")]
    assert caplog.text == ""
    (entry,) = storage.scores.models()
    assert (entry.num_shards, entry.num_set_aside, entry.num_scores) == (2, 1, 2)


def test_the_cache_lists_what_it_holds_by_model_and_removes_it(any_storage: Storage) -> None:
    other = dataclasses.replace(IDENTITY, model="another")
    assert any_storage.scores.models() == []
    for identity, numbers in ((IDENTITY, (1, 2, 3)), (IDENTITY, (4,)), (other, (1,))):
        any_storage.scores.append(identity, cached(*numbers), SCORED_WITH)
    for number in (3, 4):
        any_storage.scores.count_hits(IDENTITY, number)
    by_model = {entry.identity["model"]: entry for entry in any_storage.scores.models()}
    assert by_model.keys() == {IDENTITY.model, "another"}
    ours = by_model[IDENTITY.model]
    assert (ours.digest, ours.num_shards, ours.num_scores, ours.num_hits) == (IDENTITY.digest(), 2, 4, 7)
    assert ours.num_bytes > 1000
    any_storage.scores.prune(ours.digest)
    assert [entry.identity["model"] for entry in any_storage.scores.models()] == ["another"]
    assert any_storage.scores.read(IDENTITY, pair_ids(1)).is_empty()


def test_a_shard_that_is_still_being_written_is_not_read(storage: Storage) -> None:
    storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    (shard,) = shards(storage)
    shard.with_name(".0123.tmp").write_bytes(b"half")
    assert storage.scores.read(IDENTITY, pair_ids(1)).height == 1


SCORERS = [{"libraries": {"torch": version}, "device": "cpu"} for version in ("2.13", "2.14")]


def scorers(storage: Storage, *numbers: int) -> list[Any]:
    found = storage.scores.read(IDENTITY, pair_ids(*numbers))
    return [json.loads(scorer) for scorer in found["scored_with"]]


def test_every_score_says_which_libraries_and_device_made_it(any_storage: Storage) -> None:
    for number, scorer in enumerate(SCORERS, start=1):
        any_storage.scores.append(IDENTITY, cached(number), scorer)
    assert scorers(any_storage, 1, 2) == SCORERS


def test_columns_of_a_shard_that_nobody_reads_do_no_harm(storage: Storage) -> None:
    wider = cached(1).with_columns(token_logprobs=pl.lit(None, pl.List(pl.Float32)))
    storage.files.write_bytes(shard_of(wider), "score_cache", IDENTITY.digest(), "0123456789abcdef.parquet")
    assert storage.scores.read(IDENTITY, pair_ids(1)).drop("scored_with").equals(cached(1))


def test_a_shard_is_named_by_the_hash_of_its_bytes_and_an_equal_one_is_the_same_file(storage: Storage) -> None:
    for _ in range(2):
        storage.scores.append(IDENTITY, cached(1), SCORERS[0])
    (shard,) = shards(storage)
    assert shard.name == f"{hashlib.sha256(shard.read_bytes()).hexdigest()}.parquet"
    storage.scores.append(IDENTITY, cached(1), SCORERS[1])
    assert len(shards(storage)) == 2
    assert scorers(storage, 1) == [SCORERS[0]]


def test_scores_that_do_not_fit_are_not_appended(storage: Storage) -> None:
    with pytest.raises(TableError, match="CachedScores"):
        storage.scores.append(IDENTITY, cached(1).with_columns(sum_nll=pl.lit(-1.0)), SCORED_WITH)
    assert shards(storage) == []


# --- locks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(tmp_path: Path) -> Storage:
    """Waits a tenth of a second for a lock."""
    return Storage(str(tmp_path / "storage"), tmp_path / "locks", lock_timeout_seconds=0.1)


def test_a_lock_holds_between_processes_and_is_freed_when_its_holder_is_killed(
    impatient: Storage, lock_holder: LockHolder, tmp_path: Path
) -> None:
    holder = lock_holder(tmp_path / "locks", "logprobs", "b1", "strong")
    with pytest.raises(PartitionBusyError) as caught, impatient.locks.hold("logprobs", "b1", "strong"):
        pytest.fail("two processes hold one lock")
    text = str(caught.value)
    assert "logprobs/b1/strong is being written by another process" in text
    assert str(tmp_path / "locks" / "logprobs__b1__strong.lock") in text
    assert "wait for it to end" in text
    with impatient.locks.hold("logprobs", "b1", "weak"), impatient.locks.hold("logprobs", "b2", "strong"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with impatient.locks.hold("logprobs", "b1", "strong"):
        pass


def test_the_holder_of_a_lock_may_take_it_again(impatient: Storage) -> None:
    with impatient.locks.hold("raw_data", "b1"):
        with impatient.locks.hold("raw_data", "b1"):
            pass
        impatient.tables.write(StoredTable(ROWS), "raw_data", Partition("b1"))
    with impatient.locks.hold("raw_data", "b1"):
        pass


def test_a_lock_is_freed_when_its_work_fails(impatient: Storage) -> None:
    with pytest.raises(KeyError), impatient.locks.hold("raw_data", "b1"):
        raise KeyError
    with impatient.locks.hold("raw_data", "b1"):
        pass


def test_a_stored_file_knows_of_every_single_byte_that_changed(storage: Storage) -> None:
    storage.tables.write(StoredTable(raw_rows({}, {}), {"note": "Größe"}), "raw_data", Partition("b1"))
    data = storage.files.read_bytes("raw_data", "b1", "table.parquet")
    assert file_fault(data) is None
    for offset in range(len(data)):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        assert file_fault(bytes(changed)) is not None, offset
    assert file_fault(data[:-1]) is not None
    assert file_fault(b"") is not None
