"""tables: stored with their provenance and version, refused if truncated, foreign or changed."""

from __future__ import annotations

import io
import itertools
import json
import tempfile
from pathlib import Path
from unittest import mock

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import TableError
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline_tests.support.frames import raw_rows, rejected
from qaq_pipeline_tests.support.sentences import Check

PROVENANCE = {"code_version": "1-abc", "inputs": {}, "files": {"größe.jsonl": "12"}, "partition": ["b1"]}


ROWS = raw_rows({"query": "Größe?\n", "system": "Be brief."}, rejected(), {"answer": ""})


TABLE = ("raw_data", "b1", "table.parquet")


def table_file(storage: Storage, batch: str = "b1") -> Path:
    return Path(storage.tables.url("raw_data", Partition(batch)))


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


def test_a_scan_gives_the_named_columns_and_as_many_characters_as_are_wanted(any_storage: Storage) -> None:
    any_storage.tables.write(StoredTable(ROWS), "raw_data", Partition("b1"))
    columns = ["source_row", "query", "system"]
    (whole,) = any_storage.tables.scan("raw_data", Partition("b1"), columns)
    assert whole.equals(ROWS.select(columns))
    (begun,) = any_storage.tables.scan("raw_data", Partition("b1"), columns, begins={"query": 3})
    assert begun.equals(ROWS.select(columns).with_columns(pl.col("query").str.slice(0, 3)))
    assert "Grö" in begun["query"]
    with pytest.raises(StorageError, match="no_column"):
        next(any_storage.tables.scan("raw_data", Partition("b1"), columns, begins={"no_column": 3}))


def test_a_table_without_rows_is_scanned_as_one_part(storage: Storage) -> None:
    storage.tables.write(StoredTable(empty(tables.RawData)), "raw_data", Partition("b1"))
    (part,) = storage.tables.scan("raw_data", Partition("b1"), ["query", "source_row"], begins={"query": 3})
    assert part.is_empty()
    assert part.columns == ["query", "source_row"]


def test_a_table_that_is_written_is_read_from_its_file_from_then_on(any_storage: Storage) -> None:
    table, whole = StoredTable(ROWS, PROVENANCE), StoredTable(ROWS, PROVENANCE)
    any_storage.tables.write(table, "raw_data", Partition("b1"))
    assert table.file is not None
    assert table.frame.equals(ROWS)
    assert (table.data_version, table.provenance_id) == (whole.data_version, whole.provenance_id)


def test_rows_that_were_replaced_since_the_table_was_opened_are_not_read(storage: Storage) -> None:
    storage.tables.write(StoredTable(ROWS, PROVENANCE), "raw_data", Partition("b1"))
    opened = storage.tables.read("raw_data", Partition("b1"))
    storage.tables.write(StoredTable(ROWS[:1], PROVENANCE), "raw_data", Partition("b1"))
    with pytest.raises(StorageError, match="replaced while it was read"):
        opened.select("pair_id")
    with pytest.raises(StorageError, match="replaced while it was read"):
        next(opened.parts("pair_id"))


MANY = raw_rows(*[{"query": f"query {number}"} for number in range(7)])


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 7), max_size=4))
def test_a_table_made_in_parts_is_the_same_file_as_one_made_at_once(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("root")), tmp_path_factory.mktemp("locks"))
    with (
        mock.patch.object(parquet_file, "ROWS_PER_GROUP", 3),
        storage.tables.begin("raw_data", Partition("b1")) as writer,
    ):
        for start, stop in itertools.pairwise([0, *sorted(cuts), 7]):
            writer.append(MANY[start:stop])
        made = writer.finish(PROVENANCE)
        at_once = StoredTable(MANY, PROVENANCE)
        assert (made.num_rows, made.data_version) == (7, at_once.data_version)
        storage.tables.write(made, "raw_data", Partition("b1"))
        in_parts = storage.files.read_bytes(*TABLE)
        assert storage.tables.fault("raw_data", Partition("b1")) is None
        storage.tables.write(at_once, "raw_data", Partition("b1"))
        assert storage.files.read_bytes(*TABLE) == in_parts
        read = storage.tables.read("raw_data", Partition("b1"))
        assert pl.concat(read.parts()).equals(MANY)
        assert [part.height for part in read.parts("query", "batch")] == [3, 3, 1]
        assert pl.concat(read.parts("query", "batch")).equals(MANY.select("query", "batch"))
    assert read.select("query", "batch").equals(MANY.select("query", "batch"))


def test_a_table_in_parts_leaves_no_file_behind_where_it_is_not_stored(any_storage: Storage, tmp_path: Path) -> None:
    def files() -> set[Path]:
        unfinished = Path(tempfile.gettempdir()).glob(".*.tmp")
        return {path for path in (*tmp_path.rglob("*"), *unfinished) if path.is_file()}

    before = files()
    with any_storage.tables.begin("raw_data", Partition("b1")) as writer:
        writer.append(MANY)
        made = writer.finish({})
    assert made.frame.equals(MANY)
    del made, writer
    with pytest.raises(KeyError), any_storage.tables.begin("raw_data", Partition("b1")):
        raise KeyError
    assert files() == before


@pytest.mark.parametrize("parts", [(MANY[3:], MANY[:3]), (MANY[:3], MANY[2:]), (MANY[[1, 0]],)])
def test_parts_whose_keys_do_not_grow_are_refused(storage: Storage, parts: tuple[pl.DataFrame, ...]) -> None:
    with storage.tables.begin("raw_data", Partition("b1")) as writer:
        for part in parts[:-1]:
            writer.append(part)
        with pytest.raises(TableError, match="not in the order of batch, source_file, source_row, turn_index"):
            writer.append(parts[-1])


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


def test_a_table_that_is_not_declared_is_refused_with_those_that_are(storage: Storage, check_sentence: Check) -> None:
    with pytest.raises(StorageError) as error:
        storage.tables.read("surprise", Partition("b1"))
    check_sentence(error.value)


def test_a_missing_table_is_named_with_its_remedy(any_storage: Storage, check_sentence: Check) -> None:
    with pytest.raises(StorageError) as error:
        any_storage.tables.read("raw_data", Partition("b1"))
    check_sentence(error.value)


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
    """A newer Polars may write other bytes for the same rows; a stored table keeps its version."""
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
def test_a_foreign_file_or_one_of_an_old_schema_is_named_with_its_remedy(
    storage: Storage, content: bytes, check_sentence: Check
) -> None:
    storage.files.write_bytes(content, *TABLE)
    with pytest.raises(StorageError) as error:
        storage.tables.read("raw_data", Partition("b1"))
    check_sentence(error.value)


def test_a_file_of_an_old_schema_is_told_from_a_damaged_one(storage: Storage, check_sentence: Check) -> None:
    storage.files.write_bytes(foreign('{"provenance": {}, "data_version": "0"}', ROWS.drop("answer")), *TABLE)
    with pytest.raises(StorageError) as error:
        storage.tables.read("raw_data", Partition("b1"))
    check_sentence(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_torn_table_is_an_error_wherever_it_ends(storage: Storage, check_sentence: Check) -> None:
    storage.tables.write(StoredTable(ROWS, PROVENANCE), "raw_data", Partition("b1"))
    whole = storage.files.read_bytes(*TABLE)
    for length in range(0, len(whole), 41):
        storage.files.write_bytes(whole[:length], *TABLE)
        with pytest.raises(StorageError) as error:
            storage.tables.read("raw_data", Partition("b1"))
        check_sentence(error.value)


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


def test_a_changed_table_has_a_fault_and_a_missing_one_is_an_error(any_storage: Storage, check_sentence: Check) -> None:
    any_storage.tables.write(StoredTable(ROWS, PROVENANCE), "raw_data", Partition("b1"))
    assert any_storage.tables.fault("raw_data", Partition("b1")) is None
    whole = any_storage.files.read_bytes(*TABLE)
    any_storage.files.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], *TABLE)
    check_sentence(any_storage.tables.fault("raw_data", Partition("b1")))
    with pytest.raises(StorageError) as error:
        any_storage.tables.fault("raw_data", Partition("b2"))
    check_sentence(error.value)
