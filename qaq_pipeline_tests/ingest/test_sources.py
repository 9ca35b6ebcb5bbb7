"""sources: files, folders, patterns and URLs of a delivery, and which files hold no rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import HfFileSystem

from qaq_pipeline.ingest.sources import SourceError, is_named_as_rows, read, split_off
from qaq_pipeline_tests.support.hub_server import READER, Repository, point_to, running_hub
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.server import served

ROWS = b'{"query": "q", "answer": "a"}\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder as a clone of a hub's repository."""
    folder = tmp_path / "clone"
    for name in ("README.md", ".gitattributes", ".git/config", "data/train-0.jsonl", "data/train-1.jsonl", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(ROWS if name.endswith(".jsonl") else b"text")
    (folder / "data/_SUCCESS").touch()
    (folder / "data/part-3.jsonl").touch()
    return folder


def test_files_folders_and_patterns_are_read(clone: Path) -> None:
    assert read([clone / "data" / "train-0.jsonl"]) == {"train-0.jsonl": ROWS}
    assert read([str(clone / "data" / "train-*.jsonl")]) == {"train-0.jsonl": ROWS, "train-1.jsonl": ROWS}
    assert read([clone]).keys() >= {"README.md", "data/train-0.jsonl", "data/_SUCCESS"}


def test_what_holds_no_rows_is_left_aside_and_named(clone: Path) -> None:
    data, aside = split_off({name: len(content) for name, content in read([clone]).items()})
    assert data == ["LICENSE", "data/train-0.jsonl", "data/train-1.jsonl"]
    assert aside == [".gitattributes", "README.md", "data/_SUCCESS", "data/part-3.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON.gz", "b/a.csv-00001-of-00002", "a.py.tsv", "a.parquet"])
def test_names_of_files_with_rows(name: str) -> None:
    assert is_named_as_rows(name)


@pytest.mark.parametrize("name", ["LICENSE", "a.txt", "a.json/README", "a.jsonlines.bib", "csv"])
def test_other_names(name: str) -> None:
    assert not is_named_as_rows(name)


@pytest.mark.parametrize("only", [{"README.md": 4}, {"rows.jsonl": 0}])
def test_a_file_that_is_alone_is_read_whatever_its_name(only: dict[str, int]) -> None:
    assert split_off(only) == ([*only], [])


def test_files_of_one_name_in_folders_of_a_pattern_are_told_apart(tmp_path: Path) -> None:
    for split in ("a", "b"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "train.jsonl").write_bytes(ROWS)
    assert read([str(tmp_path / "*" / "train.jsonl")]) == {"a/train.jsonl": ROWS, "b/train.jsonl": ROWS}


def test_any_url_of_fsspec_is_a_source() -> None:
    fsspec.filesystem("memory").pipe("/sources/data/rows.jsonl", ROWS)
    for url in ("memory://sources/data/rows.jsonl", "memory://sources/data/*.jsonl"):
        assert read([url]) == {"rows.jsonl": ROWS}
    assert read(["memory://sources"]) == {"data/rows.jsonl": ROWS}


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "rows[1].jsonl").write_bytes(ROWS)
    assert read([tmp_path / "rows[1].jsonl"]) == {"rows[1].jsonl": ROWS}


CARD = """---
configs:
- {config_name: main, data_files: [{split: train, path: data/*.jsonl}, {split: test, path: other.jsonl}]}
- {config_name: small, data_files: small.jsonl}
---
"""


@pytest.fixture
def hub_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A dataset of two configurations on a stub of the hub."""
    datasets = pytest.importorskip("datasets")
    with running_hub() as hub:
        point_to(monkeypatch, hub.url)
        monkeypatch.setenv("HF_TOKEN", READER)
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": tmp_path}.items():
            monkeypatch.setattr(datasets.config, name, value)
        files = {f"{name}.jsonl": f"{name}\n".encode() for name in ("data/0", "data/1", "other", "small")}
        hub.repositories["org/name"] = Repository(False, {"main": {"README.md": CARD.encode(), **files}})
        HfFileSystem.clear_instance_cache()
        yield
        HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("?config=main&split=train", ["data/0.jsonl", "data/1.jsonl"]),
        ("?config=main", ["data/0.jsonl", "data/1.jsonl", "other.jsonl"]),
        ("@main?config=small&split=train", ["small.jsonl"]),
        ("/data/*.jsonl", ["0.jsonl", "1.jsonl"]),
        ("", ["README.md", "data/0.jsonl", "data/1.jsonl", "other.jsonl", "small.jsonl"]),
    ],
)
def test_a_dataset_of_the_hub_is_read_by_file_configuration_or_split(
    source: str, names: list[str], hub_dataset: None
) -> None:
    found = read([f"hf://datasets/org/name{source}"])
    assert list(found) == names
    assert all(f"{found[name].decode().strip()}.jsonl".endswith(name) for name in names if name != "README.md")


@pytest.mark.parametrize("asked", ["split=train", "config=none", "config=main&split=none", "config=main&part=1"])
def test_a_split_that_is_not_there_is_named_with_those_that_are(
    asked: str, hub_dataset: None, check_sentence: Check
) -> None:
    with pytest.raises(SourceError) as error:
        read([f"hf://datasets/org/name?{asked}"])
    check_sentence(str(error.value))


@pytest.mark.parametrize("source", ["-", "{}/missing.jsonl", "{}/none-*.jsonl", "{}/empty", "nowhere://rows.jsonl"])
def test_a_source_that_cannot_be_read_is_named_with_the_remedy(
    source: str, tmp_path: Path, check_sentence: Check
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError) as error:
        read([source.format(tmp_path)])
    check_sentence(str(error.value).replace(str(tmp_path), "TMP"))


def test_two_files_of_one_name_are_refused(tmp_path: Path, check_sentence: Check) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_bytes(ROWS)
    with pytest.raises(SourceError) as error:
        read([tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"])
    check_sentence(str(error.value).replace(str(tmp_path), "TMP"))


def test_what_gives_access_to_an_address_is_in_no_name_and_no_message(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    with served(tmp_path) as address:
        assert read([f"{address}/rows.jsonl?X-Amz-Signature=planted"]) == {"rows.jsonl": ROWS}
        with pytest.raises(SourceError, match=r"missing\.jsonl\?token=…") as error:
            read([f"{address}/missing.jsonl?token=planted"])
    assert "planted" not in str(error.value)
