"""files: atomic writes, JSON, names; on disk and in memory."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from qaq_pipeline.storage.files import StorageError
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
