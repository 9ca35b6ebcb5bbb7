"""files: atomic writes, JSON, names; on disk, in memory and in an object store."""

from __future__ import annotations

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qaq_pipeline.storage.files import Files, StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.storage.conftest import files_under
from qaq_pipeline_tests.support.sentences import Check


def test_the_second_write_replaces_the_first_and_leaves_nothing_else(any_storage: Storage) -> None:
    any_storage.files.write_bytes(b"old", "folder", "file")
    any_storage.files.write_bytes(b"new", "folder", "file")
    assert any_storage.files.read_bytes("folder", "file") == b"new"
    assert any_storage.files.names("folder") == ["file"]


def test_what_a_killed_process_left_unfinished_is_removed_after_a_day(storage: Storage) -> None:
    storage.files.write_bytes(b"old", "folder", "file")
    folder = Path(storage.files.url("folder"))
    for age, name in ((2, "old"), (0.5, "new")):
        (folder / f".{name}.folder.tmp").mkdir()
        (folder / f".{name}.folder.tmp" / "rows").touch()
        (folder / f".{name}.tmp").touch()
        for left in folder.glob(f".{name}*"):
            os.utime(left, (time.time() - age * 24 * 3600,) * 2)
    storage.files.write_bytes(b"new", "folder", "file")
    assert storage.files.names("folder") == [".new.folder.tmp", ".new.tmp", "file"]


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


def test_what_is_missing_is_named(any_storage: Storage, check_sentence: Check) -> None:
    with pytest.raises(StorageError) as error:
        any_storage.files.read_bytes("no", "such")
    check_sentence(error.value)
    assert not any_storage.files.exists("no", "such")


def test_json_comes_back(any_storage: Storage) -> None:
    any_storage.files.write_json({"ä": [1, None]}, "value.json")
    assert any_storage.files.read_json("value.json") == {"ä": [1, None]}
    any_storage.files.remove("value.json")
    assert not any_storage.files.exists("value.json")


def test_a_json_value_is_replaced_by_what_a_function_makes_of_it(any_storage: Storage) -> None:
    files = any_storage.files
    for number in range(3):
        files.update_json(lambda known, one=number: [*known, one], "record.json", at_first=[])
    assert files.read_json("record.json") == [0, 1, 2]


def test_an_equal_value_is_not_written(any_storage: Storage) -> None:
    any_storage.files.update_json(lambda known: known, "record.json", at_first=[])
    assert not any_storage.files.exists("record.json")


@pytest.mark.parametrize("first", [None, [0]])
def test_on_s3_a_writer_that_others_came_before_begins_again(s3_storage: Storage, first: list[int] | None) -> None:
    files, seen = s3_storage.files, []
    if first is not None:
        files.write_json(first, "record.json")

    def add(known: list[int]) -> list[int]:
        seen.append(known)
        if len(seen) <= 2:  # Another writer.
            Files(files.url()).write_json([*known, len(seen)], "record.json")
        return [*known, 9]

    files.update_json(add, "record.json", at_first=[])
    before = first or []
    assert seen == [before, [*before, 1], [*before, 1, 2]]
    assert files.read_json("record.json") == [*before, 1, 2, 9]


def test_on_s3_no_writer_s_value_is_lost_without_a_lock(s3_storage: Storage) -> None:
    def add(name: int) -> None:
        files = Files(s3_storage.files.url())
        for number in range(5):
            files.update_json(lambda known, one=(name, number): [*known, one], "record.json", at_first=[])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(4)))
    found = s3_storage.files.read_json("record.json")
    assert sorted(map(tuple, found)) == [(name, number) for name in range(4) for number in range(5)]


def test_what_another_machine_wrote_is_listed_at_once(any_storage: Storage) -> None:
    files, other = any_storage.files, Files(any_storage.files.url())
    files.write_json(1, "folder", "a.json")
    assert files.names("folder") == ["a.json"]
    assert not files.exists("folder", "b.json")
    other.write_json(2, "folder", "b.json")
    assert files.exists("folder", "b.json")
    assert files.names("folder") == ["a.json", "b.json"]
    assert files.files_below("folder") == ["a.json", "b.json"]
    other.remove("folder", "a.json")
    assert files.names("folder") == ["b.json"]


def test_an_error_of_the_store_that_is_no_conflict_is_raised(
    s3_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(s3_storage.files._fs, "pipe_file", refuse)
    with pytest.raises(PermissionError):
        s3_storage.files.update_json(lambda known: [*known, 1], "record.json", at_first=[])
