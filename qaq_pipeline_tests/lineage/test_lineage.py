"""From a version back to the delivery: every file on the way, one row's path, and any changed byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from qaq_pipeline.cli import app
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lineage import lineage, trace, verify
from qaq_pipeline.lineage.lineage import Lineage, LineageError, State, Table
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.conftest import (
    NO_CALIBRATION,
    NO_REPORTS,
    REJECTED_ROW,
    REPEATED_ROW,
    delivered_rows,
    write_jsonl,
)
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.uncalibrated import TABLES

NUM_TABLES = len(TABLES) + 2
"""Two of them are there for each of two models."""

QAQ = {"name": "qaq", "strategy": "diff_high", "valid": True}


@pytest.fixture(scope="module")
def published(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Two batches, run and published by tiny models; a test that changes a file puts it back."""
    yield from run_through(tiny_model_dir, tmp_path_factory.mktemp("home"))


def run_through(
    tiny_model_dir: Callable[..., Path], home: Path, sections: dict[str, Any] | None = None, **ranking: Any
) -> Iterator[Settings]:
    """The settings of a home in which two batches were run and published."""
    models = {
        role: {"directory": str(tiny_model_dir(seed=seed)), "device": "cpu", "dtype": "float32"}
        for seed, role in enumerate(("strong", "weak"))
    }
    values = {
        "models": models,
        "scoring": {"max_tokens": 512},
        "ranking": {"num_strata": 2, "min_rows_per_stratum": 2} | ranking,
        "screening": {"duplicates": {"across_batches": False}},
        **(sections or NO_CALIBRATION),
        "reports": NO_REPORTS,
    }
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setenv("QAQ_HOME", str(home))
        settings = parse_settings(yaml.safe_dump(values), "test.yaml")
        for batch, rows in {"b1": delivered_rows(), "b2": delivered_rows()[:6]}.items():
            registration.register(
                Deployment(settings, instance), batch, [write_jsonl(home / f"{batch}.jsonl", rows)], None
            )
            run_batch.run_batch(Deployment(settings, instance), batch)
        (home / "settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        yield settings


@pytest.fixture(scope="module")
def calibrated(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Two published batches whose pairs are judged by planted rows."""
    sections = {"calibration": {"mismatches": 20, "rows_per_defect": 20}, "selections": [QAQ]}
    yield from run_through(tiny_model_dir, tmp_path_factory.mktemp("calibrated"), sections)


@pytest.fixture
def storage(published: Settings) -> Storage:
    return open_storage(published)


@pytest.fixture
def walked(storage: Storage) -> Lineage:
    return walk_newest(storage)


def walk_newest(storage: Storage) -> Lineage:
    return lineage.walk(storage, versions.find_version(storage, "latest").version)


def files_of(walked: Lineage, kind: str) -> list[Path]:
    """Paths of the files of a kind that a lineage is made of."""
    batches = walked.batches
    paths = {
        "version": [file.path for file in walked.files],
        "delivery": [file.path for batch in batches for file in batch.delivery.files],
        "shard": [f"{shards.path}/{name}" for batch in batches for shards in batch.scores for name in shards.names],
        "table": [table.path for batch in batches for table in batch.tables],
    }
    return [Path(path) for path in dict.fromkeys(paths[kind])]


@contextmanager
def flipped(path: Path, offset: int) -> Iterator[None]:
    """One byte of the file is another."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[offset] ^= 1
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(data)


@contextmanager
def away(path: Path) -> Iterator[None]:
    """The file is not there."""
    data = path.read_bytes()
    path.unlink()
    try:
        yield
    finally:
        path.write_bytes(data)


NUM_OFFSETS = 6


def offsets(path: Path) -> list[int]:
    """First, middle, three where a Parquet file has its footer, and last."""
    size = path.stat().st_size
    return [0, size // 2, size - 200, size - 40, size - 6, size - 1]


def found(storage: Storage) -> list[str]:
    """Paths of what is not what it was, of the newest version."""
    return [finding.path for finding in verify.verify(storage, walk_newest(storage))]


# --- the walk -------------------------------------------------------------------------------------------------------


def test_a_version_goes_back_to_every_table_shard_and_delivered_file(walked: Lineage, storage: Storage) -> None:
    for file in walked.files:
        assert hashlib.sha256(Path(file.path).read_bytes()).hexdigest() == file.sha256
    assert [batch.name for batch in walked.batches] == ["b1", "b2"]
    for batch in walked.batches:
        names = [table.name for table in batch.tables]
        assert len(names) == NUM_TABLES
        assert set(names) == set(TABLES)
        assert {table.state for table in batch.tables} == {State.AS_PUBLISHED}
        for table in batch.tables:
            assert storage.tables.version(table.name, table.partition) == table.entered == table.stored
        assert [shards.model for shards in batch.scores] == ["strong", "weak"]
        (delivered,) = batch.delivery.files
        assert hashlib.sha256(Path(delivered.path).read_bytes()).hexdigest() == delivered.sha256


def test_a_good_storage_verifies_file_by_file(walked: Lineage, storage: Storage) -> None:
    assert list(verify.verify(storage, walked)) == []


@pytest.mark.parametrize("kind", ["version", "delivery", "shard", "table"])
def test_a_changed_byte_anywhere_is_found_and_its_file_named(kind: str, walked: Lineage, storage: Storage) -> None:
    paths = files_of(walked, kind)
    assert len(paths) >= 2
    for place in range(NUM_OFFSETS):
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(flipped(path, offsets(path)[place]))
            assert found(storage) == [str(path) for path in paths], place
    with flipped(paths[1], 99):
        assert found(storage) == [str(paths[1])]


def test_a_changed_byte_of_the_manifest_is_found_before_anything_is_read_of_it(storage: Storage) -> None:
    version = versions.find_version(storage, "latest").version
    path = Path(storage.files.url(*versions.place(version, versions.MANIFEST)))
    for offset in range(0, path.stat().st_size, 31):
        with flipped(path, offset), pytest.raises(LineageError) as error:
            lineage.walk(storage, version)
        assert str(path) in str(error.value)
        assert "restore it from a backup" in str(error.value)


def test_a_changed_record_of_what_made_the_rows_is_found_and_not_believed(
    walked: Lineage, storage: Storage, check_sentence: Check
) -> None:
    ident = walked.batches[0].provenance_id
    path = Path(storage.files.url("provenance", f"{ident}.json"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"settings_hash": "', b'"settings_hash": "f', 1))
    assert path.read_bytes() != data
    try:
        assert found(storage) == [str(path)]
        with pytest.raises(StorageError) as error:
            storage.provenance.read(ident)
        check_sentence(error.value)
    finally:
        path.write_bytes(data)


def test_a_file_that_is_none_of_the_version_is_named(walked: Lineage, storage: Storage) -> None:
    stranger = Path(storage.files.url(*versions.place(walked.version, "diff_high/extra.jsonl")))
    stranger.write_text("{}")
    try:
        assert found(storage) == [str(stranger)]
    finally:
        stranger.unlink()


def test_white_space_in_the_manifest_is_a_changed_byte_too(storage: Storage, check_sentence: Check) -> None:
    version = versions.find_version(storage, "latest").version
    path = Path(storage.files.url(*versions.place(version, versions.MANIFEST)))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"  ", b" \n", 1))
    try:
        with pytest.raises(LineageError) as error:
            lineage.walk(storage, version)
        check_sentence(error.value)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["version", "delivery", "table"])
def test_a_missing_file_is_named(kind: str, walked: Lineage, storage: Storage) -> None:
    path = files_of(walked, kind)[0]
    with away(path):
        (finding,) = verify.verify(storage, lineage.walk(storage, walked.version))
    assert finding.path == str(path)
    assert "it is missing" in finding.fault


def test_every_finding_says_the_remedy(walked: Lineage, storage: Storage) -> None:
    remedies = {
        "version": "do not train on this version",
        "delivery": "deliver the same files again (`qaq run FILE --batch b1`)",
        "shard": "leave it: the next scoring sets it aside and computes its scores again",
        "table": "remove it and run `qaq refresh`",
    }
    for kind, remedy in remedies.items():
        path = files_of(walked, kind)[0]
        with flipped(path, 20):
            (finding,) = verify.verify(storage, lineage.walk(storage, walked.version))
        assert finding.sentence.startswith(f"{path}: ")
        assert remedy in finding.sentence


def state_of(storage: Storage, name: str, batch: str = "b1") -> Table:
    walked = walk_newest(storage)
    of_batch = next(one for one in walked.batches if one.name == batch)
    return next(table for table in of_batch.tables if table.name == name)


@contextmanager
def restored(*paths: Path) -> Iterator[None]:
    before = {path: path.read_bytes() for path in paths}
    try:
        yield
    finally:
        for path, data in before.items():
            path.write_bytes(data)


@pytest.mark.slow
def test_a_frozen_reference_is_on_the_way_and_a_changed_byte_of_it_is_named(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    reference = {"name": "r1", "batches": ["b1"]}
    for settings in run_through(tiny_model_dir, tmp_path, pool="reference", reference=reference):
        storage = open_storage(settings)
        tables = [table for batch in walk_newest(storage).batches for table in batch.tables]
        (path,) = {Path(table.path) for table in tables if table.name == "rank_reference"}
        assert found(storage) == []
        for offset in offsets(path):
            with flipped(path, offset):
                assert set(found(storage)) == {str(path)}, offset
        assert found(storage) == []


def test_a_calibrated_version_goes_back_to_the_cuts_and_the_planted_rows(calibrated: Settings) -> None:
    storage = open_storage(calibrated)
    walked = walk_newest(storage)
    for batch in walked.batches:
        names = [table.name for table in batch.tables]
        assert {table.state for table in batch.tables} == {State.AS_PUBLISHED}
        assert names.index("decisions") < names.index("validity") < names.index("validity_cuts")
        assert names.index("validity_cuts") < names.index("planted_scores") < names.index("planted_rows")
        assert names.count("planted_scores") == 2
    assert found(storage) == []
    for name in ("validity", "validity_cuts", "planted_rows"):
        path = Path(storage.tables.url(name, Partition("b1")))
        with flipped(path, path.stat().st_size // 2):
            assert found(storage) == [str(path)]
        with away(path):
            assert found(storage) == [str(path)]


def test_a_table_that_was_rebuilt_since_is_no_fault_and_is_reported_as_replaced(storage: Storage) -> None:
    table = storage.tables.read("rmi_scores", Partition("b1", "strong"))
    with restored(Path(storage.tables.url("rmi_scores", Partition("b1", "strong")))):
        storage.tables.write(
            StoredTable(table.frame.head(3), table.provenance), "rmi_scores", Partition("b1", "strong")
        )
        now = state_of(storage, "rmi_scores")
        assert now.state is State.REPLACED
        assert (now.entered, now.stored) == (
            table.data_version,
            storage.tables.version("rmi_scores", Partition("b1", "strong")),
        )
        assert state_of(storage, "logprobs").state is State.UNKNOWN  # Only that table's footer said of which.
        assert found(storage) == []


def test_the_same_content_of_other_inputs_is_told_apart(storage: Storage) -> None:
    table = storage.tables.read("selected_subset", Partition("b1"))
    other = {**table.provenance, "inputs": {**table.provenance["inputs"], "decisions": "0" * 32}}
    with restored(Path(storage.tables.url("selected_subset", Partition("b1")))):
        storage.tables.write(StoredTable(table.frame, other), "selected_subset", Partition("b1"))
        assert state_of(storage, "selected_subset").state is State.SAME_CONTENT
        assert found(storage) == []


def test_decisions_that_claim_another_origin_are_found(storage: Storage) -> None:
    table = storage.tables.read("decisions", Partition("b1"))
    path = Path(storage.tables.url("decisions", Partition("b1")))
    with restored(path):
        storage.tables.write(
            StoredTable(table.frame, table.provenance | {"pool_id": "batch:b9"}), "decisions", Partition("b1")
        )
        assert found(storage) == [str(path)]


def test_a_delivery_is_found_where_raw_data_was_replaced(walked: Lineage, storage: Storage) -> None:
    raw = storage.tables.read("raw_data", Partition("b1"))
    with restored(Path(storage.tables.url("raw_data", Partition("b1")))):
        storage.tables.write(StoredTable(raw.frame.head(2), raw.provenance), "raw_data", Partition("b1"))
        again = lineage.walk(storage, walked.version)
        assert again.batches[0].delivery == walked.batches[0].delivery
        with flipped(files_of(walked, "delivery")[0], 9):
            assert found(storage) == [str(files_of(walked, "delivery")[0])]


# --- which version --------------------------------------------------------------------------------------------------


def test_of_a_retired_version_the_manifest_and_what_it_was_made_from_are_left(
    walked: Lineage, storage: Storage, tmp_path: Path
) -> None:
    copy = Storage(str(shutil.copytree(storage.files.url(), tmp_path / "copy")), tmp_path)
    versions.retire(copy, walked.version)
    retired = lineage.walk(copy, versions.find_version(copy, walked.version[:8]).version)
    assert not retired.is_kept
    assert [batch.tables[0].entered for batch in retired.batches] == [b.tables[0].entered for b in walked.batches]
    assert list(verify.verify(copy, retired)) == []
    with pytest.raises(LineageError, match="were not kept"):
        trace.trace(copy, retired, "b1/b1.jsonl:1")


def test_one_file_of_a_version_alone(walked: Lineage, check_sentence: Check) -> None:
    assert [file.name for file in lineage.only(walked, "scores/b1.parquet").files] == ["scores/b1.parquet"]
    with pytest.raises(LineageError) as error:
        lineage.only(walked, "x.json")
    check_sentence(error.value)


# --- one row --------------------------------------------------------------------------------------------------------


def test_each_exported_record_is_the_row_that_is_said_to_stand_there(walked: Lineage, storage: Storage) -> None:
    root = Path(storage.files.url(*versions.place(walked.version)))
    held = dict.fromkeys(("diff_high", "control_random", "control_stratified_random"), 0)
    for batch in walked.batches:
        rows = [json.loads(line) for line in Path(batch.delivery.files[0].path).read_text("utf-8").splitlines()]
        for number, row in enumerate(rows, start=1):
            (path,) = trace.trace(storage, walked, f"{batch.name}/{batch.name}.jsonl:{number}")
            assert (path.delivered, path.source_row) == (batch.delivery.files[0], number)
            for name, record in path.exported.items():
                text = (root / name).read_text("utf-8")
                texts = _texts(json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines()))
                assert texts[record - 1] == (row["query"], row["response"])
                held[name.partition("/")[0]] += 1
    exported = {name: len((root / name / "messages.jsonl").read_text("utf-8").splitlines()) for name in held}
    assert held == {name: 3 * count for name, count in exported.items()}  # In each of the three formats.
    assert min(exported.values()) >= 2


def _texts(records: Any) -> list[tuple[str, str]]:
    return [_text(record) for record in records]


def _text(record: dict[str, Any]) -> tuple[str, str]:
    if "instruction" in record:
        return record["instruction"], record["output"]
    messages = record["messages"] if "messages" in record else record["prompt"] + record["completion"]
    return messages[-2]["content"], messages[-1]["content"]


def test_of_a_saved_folder_only_the_arrow_file_holds_records() -> None:
    files = ("diff_high/alpaca.json", "diff_high/hf/state.json", "diff_high/hf/data.arrow", "other/alpaca.json")
    held = [name for name in files if trace._holds_records(name, "diff_high")]
    assert held == ["diff_high/alpaca.json", "diff_high/hf/data.arrow"]


def test_a_row_goes_through_its_tables_and_the_shards_of_its_pair(walked: Lineage, storage: Storage) -> None:
    (path,) = trace.trace(storage, walked, "b1/b1.jsonl:1")
    rows = {row.table.name: row for row in path.tables}
    assert set(TABLES) - {"selected_subset"} <= set(rows)
    for row in path.tables:
        frame = storage.tables.read(row.table.name, row.table.partition).frame
        shown = to_columns(frame, "ranks") if row.table.name == "disagreement_scores" else frame
        stored = shown.row(row.number - 1, named=True)
        assert stored["pair_id"] == path.pair_id
        assert row.facts == {name: stored[name] for name in row.facts}
    assert len(path.shards) == 2
    assert all(path.pair_id in pl.read_parquet(shard)["pair_id"].to_list() for shard in path.shards)


def test_rows_that_were_not_scored_have_a_shorter_path(walked: Lineage, storage: Storage) -> None:
    (rejected,) = trace.trace(storage, walked, f"b1/b1.jsonl:{REJECTED_ROW}.0")
    assert (rejected.pair_id, rejected.exported, rejected.shards) == (None, {}, ())
    assert [row.table.name for row in rejected.tables] == ["decisions", "screened_data", "raw_data"]
    (repeated,) = trace.trace(storage, walked, f"b1/b1.jsonl:{REPEATED_ROW}")
    screened = next(row for row in repeated.tables if row.table.name == "screened_data")
    assert screened.facts["duplicate_of"] == "b1/b1.jsonl:1.0"
    assert repeated.exported == {}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("b9/b1.jsonl:1", "has no batch 'b9'; it has b1, b2"),
        ("b1/b1.jsonl:99", "has no such row"),
        ("b1/other.jsonl:1", "has no such row"),
        ("b1", "has no such row"),
    ],
)
def test_a_row_that_is_none_is_refused(row: str, said: str, walked: Lineage, storage: Storage) -> None:
    with pytest.raises(LineageError, match=said):
        trace.trace(storage, walked, row)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def qaq(published: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command's exit code and what it prints."""
    monkeypatch.setenv("QAQ_HOME", str(published.home))
    monkeypatch.setenv("DAGSTER_HOME", str(published.home / "dagster"))

    def call(*arguments: str) -> tuple[int, str]:
        config = ["--config", str(published.home / "settings.yaml")]
        result = CliRunner().invoke(app.app, ["lineage", *arguments, *config])
        return result.exit_code, result.output

    monkeypatch.setenv("QAQ_CONFIG", "")  # What `--config` sets is undone with it.
    return call


def test_the_command_prints_the_tree_and_verifies(qaq: Callable[..., tuple[int, str]], walked: Lineage) -> None:
    code, said = qaq(walked.version[:8], "--verify")
    assert code == 0
    assert f"Verified: every file of {walked.version} is unchanged." in said
    for text in ("batch b1: ", "rmi_scores[b1|weak]: ", "raw_data[b2]: ", walked.files[0].sha256, "delivered files"):
        assert text in said
    path = files_of(walked, "table")[3]
    with flipped(path, 50):
        code, said = qaq("--verify")
        assert code == 1
        assert f"{path}: it was changed since it was written" in said
        assert qaq()[0] == 0  # Nothing was asked.
    code, said = qaq("nosuchversion")
    assert (code, "no version, or more than one, matches 'nosuchversion'" in said) == (1, True)


def test_the_command_prints_json(qaq: Callable[..., tuple[int, str]], walked: Lineage) -> None:
    path = files_of(walked, "shard")[0]
    with flipped(path, 50):
        code, said = qaq("--verify", "--json")
    assert code == 1
    shown = json.loads(said)
    assert shown["lineage"]["version"] == walked.version
    assert shown["lineage"]["batches"][0]["tables"][0]["state"] == "as published"
    assert [finding["path"] for finding in shown["findings"]] == [str(path)]


def test_the_command_shows_one_row_and_one_file(qaq: Callable[..., tuple[int, str]], walked: Lineage) -> None:
    code, said = qaq("--row", "b1/b1.jsonl:1")
    assert code == 0
    assert "raw_data[b1] row 1: status accepted" in said
    assert walked.batches[0].delivery.files[0].sha256 in said
    code, said = qaq("--file", "scores/b1.parquet")
    assert (code, "alpaca.json" in said) == (0, False)


def test_the_command_shows_where_columns_come_from(qaq: Callable[..., tuple[int, str]]) -> None:
    code, said = qaq("--columns", "rmi_scores.rmi")
    assert code == 0
    assert [line.strip("│├└─ ").split("  ")[0] for line in said.splitlines()][:3] == [
        "rmi_scores.rmi",
        "logprobs.sum_nll_q",
        "raw_data.system",
    ]
    code, said = qaq("--columns", "decisions")
    assert "disagreement_scores: gap" in said
    assert json.loads(qaq("--columns", "decisions.gap", "--json")[1])[0]["sources"] == [["disagreement_scores", "gap"]]
    assert qaq("--columns", "nothing")[0] == 2
