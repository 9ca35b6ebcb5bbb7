"""imported_tables: the same values from every format, and errors that name the file, the place and the remedy."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest

from qaq_pipeline.config.settings import TableSettings
from qaq_pipeline.ingest.imported_tables import ImportedTableError, load_table, read_tables
from qaq_pipeline_tests.support.frames import pair_name
from qaq_pipeline_tests.support.sentences import Check

FRAME = pl.DataFrame(
    {
        "pair_id": [pair_name(1), pair_name(2), pair_name(3)],
        "score": [7.5, None, 1.0],
        "passed": [True, False, None],
        "licence": ['MIT, or "Apache"', "é\nx", None],
        "tags": [["a"], [], None],
    }
)


def as_csv(frame: pl.DataFrame) -> bytes:
    return frame.write_csv(None).encode()


def as_jsonl(frame: pl.DataFrame) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in frame.iter_rows(named=True)).encode()


def as_parquet(frame: pl.DataFrame, path: Path) -> bytes:
    frame.write_parquet(path)
    return path.read_bytes()


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., TableSettings]:
    """Factory: settings of a table with these bytes."""

    def build(data: bytes, **values: Any) -> TableSettings:
        path = tmp_path / "judge"
        path.write_bytes(data)
        return TableSettings.model_validate({"name": "judge", "path": str(path), "key": "pair_id"} | values)

    return build


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_has_the_same_values(kind: str, table: Callable[..., TableSettings], tmp_path: Path) -> None:
    frame = FRAME.drop("tags")
    writers = {"csv": as_csv, "jsonl": as_jsonl, "parquet": lambda one: as_parquet(one, tmp_path / "frame")}
    data = writers[kind](frame)
    found = load_table(table(data), ["score", "passed", "licence"])
    assert found.rows.rows() == [
        (pair_name(1), "7.5", "true", 'MIT, or "Apache"'),
        (pair_name(2), None, "false", "é\nx"),
        (pair_name(3), "1.0", None, None),
    ]
    assert found.sha256 == hashlib.sha256(data).hexdigest()


ONE, TWO = pair_name(1), pair_name(2)
PLAIN = f"pair_id,score\n{ONE},7\n".encode()


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        codecs.BOM_UTF8 + PLAIN,
        PLAIN.replace(b"\n", b"\r\n") + b"\r\n\n",
        gzip.compress(PLAIN),
        codecs.BOM_UTF8 + f'{{"pair_id": "{ONE}", "score": 7}}\r\n\n'.encode(),
    ],
    ids=["plain", "bom", "crlf", "gzip", "jsonl with bom"],
)
def test_marks_and_empty_lines_around_the_rows_do_not_matter(data: bytes, table: Callable[..., TableSettings]) -> None:
    assert load_table(table(data), ["score"]).rows.rows() == [(ONE, "7")]


def test_only_named_columns_are_read(table: Callable[..., TableSettings]) -> None:
    named = {"judge": ["score"]}
    found = read_tables([table(as_csv(FRAME.drop("tags")))], named)
    assert found["judge"].rows.columns == ["key", "score"]


def test_a_table_is_read_from_a_url() -> None:
    url = "memory://tables/judge.csv"
    with fsspec.open(url, "wb") as stream:
        stream.write(b"row,score\nb1/a.jsonl:1.0,7\n")  # type: ignore[union-attr]
    settings = TableSettings(name="judge", path=url, key="row")
    assert load_table(settings, ["score"]).rows.rows() == [("b1/a.jsonl:1.0", "7")]


FAULTS = {
    "no key in csv": (b"id,score\n1,2\n", ["score"], ["column pair_id", "id, score"]),
    "no column in csv": (f"pair_id,score\n{ONE},2\n".encode(), ["passed"], ["judge.passed", "pair_id, score"]),
    "no key in jsonl": (b'{"id": 1, "score": 2}\n', ["score"], ["column pair_id", "id, score"]),
    "no column in jsonl": (f'{{"pair_id": "{ONE}"}}\n{{"pair_id": "{TWO}", "score": 2}}\n'.encode(), ["passed"], []),
    "a repeated key": (f"pair_id,score\n{ONE},2\n{TWO},2\n{ONE},3\n".encode(), ["score"], ["rows 1 and 3", ONE]),
    "a malformed key": (f"pair_id,score\n{ONE},2\nab12,2\n".encode(), ["score"], ["row 2", "'ab12'"]),
    "a missing key": (f'{{"pair_id": "{ONE}"}}\n{{"score": 2}}\n'.encode(), ["score"], ["row 2", "None"]),
    "a list of jsonl": (f'{{"pair_id": "{ONE}"}}\n[1]\n'.encode(), ["score"], ["judge.score", "pair_id"]),
    "broken gzip": (b"\x1f\x8b and nothing else", ["score"], ["cannot be read"]),
    "broken json": (b'{"pair_id": \n', ["score"], ["cannot be read", "Parquet, CSV or JSONL"]),
    "broken parquet": (b"PAR1 and nothing else", ["score"], ["cannot be read"]),
    "nothing": (b"", ["score"], ["cannot be read"]),
}


@pytest.mark.parametrize(("data", "columns", "named"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_place(
    data: bytes, columns: list[str], named: list[str], table: Callable[..., TableSettings]
) -> None:
    settings = table(data)
    with pytest.raises(ImportedTableError) as error:
        load_table(settings, columns)
    for words in ("table judge", settings.path, *named):
        assert words in str(error.value)


def test_a_nested_column_is_refused(table: Callable[..., TableSettings], tmp_path: Path) -> None:
    with pytest.raises(ImportedTableError, match=r"column tags is List\(String\)"):
        load_table(table(as_parquet(FRAME, tmp_path / "frame")), ["tags"])


def test_a_place_needs_its_turn(table: Callable[..., TableSettings]) -> None:
    with pytest.raises(ImportedTableError, match=r"row 1: row is 'b1/a.jsonl:4', not batch/file:row.turn"):
        load_table(table(b"row,score\nb1/a.jsonl:4,1\n", key="row"), ["score"])


def test_a_missing_file_is_named(check_sentence: Check) -> None:
    with pytest.raises(ImportedTableError) as error:
        load_table(TableSettings(name="judge", path="memory://tables/absent.csv", key="row"), ["score"])
    check_sentence(error.value)
