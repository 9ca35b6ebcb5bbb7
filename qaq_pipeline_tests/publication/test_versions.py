"""publication: the content of a version, when there is a new one, and which batches are left out, and why."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import polars as pl
import pytest

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.assets.publication.curated_dataset import build_curated_dataset
from qaq_pipeline.publication import curated_dataset, difference, versions
from qaq_pipeline.publication.curated_dataset import Publication, _rows_of, publish, read_batches
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.storage import parquet_file, tables
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.ordered_rows import OrderedRows
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import store_batch, store_selection
from qaq_pipeline_tests.support.sentences import Check

MODELS = """
models:
  strong: {hub: tiny/strong}
  weak: {hub: tiny/weak}
"""
SETTINGS = MODELS + "selections: [{name: diff_high, strategy: diff_high}]\n"


@pytest.fixture
def settings() -> Settings:
    return parse_settings(SETTINGS)


def publish_registered(storage: Storage, settings: Settings, *registered: str) -> Publication:
    batches, excluded = read_batches(storage, registered, settings)
    return publish(storage, settings, batches, excluded)


def version_files(storage: Storage, version: str) -> dict[str, bytes]:
    folder = Path(storage.files.url(*versions.place(version)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_version_has_the_published_rows_the_controls_and_the_scores(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    published = publish_registered(storage, settings, "b1")
    assert sorted(version_files(storage, published.version)) == [
        "README.md",
        "control_random/alpaca.json",
        "control_random/keys.parquet",
        "control_random/messages.jsonl",
        "control_random/prompt_completion.jsonl",
        "control_stratified_random/alpaca.json",
        "control_stratified_random/keys.parquet",
        "control_stratified_random/messages.jsonl",
        "control_stratified_random/prompt_completion.jsonl",
        "dataset_info.json",
        "diff_high/alpaca.json",
        "diff_high/keys.parquet",
        "diff_high/messages.jsonl",
        "diff_high/prompt_completion.jsonl",
        "manifest.json",
        "scores/b1.parquet",
    ]
    assert published.url == storage.files.url(*versions.place(published.version))
    assert published.is_new


def test_the_manifest_hashes_the_files_and_names_what_entered(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    published = publish_registered(storage, settings, "b1")
    files = version_files(storage, published.version)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest == published.manifest
    assert manifest["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert published.version == hash_json(manifest)
    (entry,) = manifest["batches"]
    tables = {name: storage.tables.read(name, Partition("b1")) for name in ("raw_data", "decisions", "selected_subset")}
    assert {name: entry["data_versions"][name] for name in tables} == {n: t.data_version for n, t in tables.items()}
    assert (entry["batch"], entry["rows_in"], entry["rows_selected"]) == ("b1", 5, 1)
    assert entry["models"] == tables["decisions"].provenance["models"]
    assert entry["files"] == tables["raw_data"].provenance["files"]
    assert entry["provenance_id"] == tables["decisions"].frame["provenance_id"][0]
    assert manifest["selection"]["name"] == "diff_high"


def test_the_manifest_holds_no_time_no_run_and_no_path(storage: Storage, settings: Settings, tmp_path: Path) -> None:
    store_batch(storage, settings)
    manifest = json.dumps(publish_registered(storage, settings, "b1").manifest)
    assert str(tmp_path) not in manifest
    assert "run_id" not in manifest
    assert "published_at" not in manifest


def test_publishing_the_same_content_again_writes_no_version(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    first = publish_registered(storage, settings, "b1")
    folder = Path(storage.files.url(*versions.place(first.version)))
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    store_batch(storage, settings)
    second = publish_registered(storage, settings, "b1")
    assert (second.version, second.is_new) == (first.version, False)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_the_rows_of_other_batches_are_not_in_memory_while_a_batch_is_read(storage: Storage) -> None:
    settings = parse_settings(SETTINGS + "export: {formats: [messages, parquet]}")
    names = ["b1", "b2", "b3", "b4"]
    for name in names:
        store_batch(storage, settings, name)
    read: list[weakref.ref[pl.DataFrame]] = []
    in_memory: list[int] = []

    def rows_of(*arguments: Any) -> pl.DataFrame:
        in_memory.append(sum(one() is not None for one in read))
        rows = _rows_of(*arguments)
        read.append(weakref.ref(rows))
        return rows

    with mock.patch.object(curated_dataset, "_rows_of", rows_of):
        publish_registered(storage, settings, *names)
    assert len(in_memory) == len(settings.exported) * len(names)
    assert max(in_memory) <= 1  # A thread may just be letting go of the batch before.


@pytest.mark.parametrize("at_once", [3, 100])
def test_an_index_of_pairs_is_the_same_however_many_rows_are_in_memory(
    storage: Storage, settings: Settings, at_once: int
) -> None:
    for name in ("b2", "b1"):
        store_batch(storage, settings, name, queries=tuple("abcdefgh"))
    with mock.patch.object(tables, "OrderedRows", functools.partial(OrderedRows, rows_at_once=at_once)):
        version = publish_registered(storage, settings, "b1", "b2").version
    scores = versions.read_scores(storage, version)
    expected = scores.select("pair_id", *ROW_KEY).drop_nulls("pair_id").sort("pair_id", *ROW_KEY)
    assert expected.height == 2 * 8
    stored = storage.files.read_bytes(*versions.index_place(version))
    assert stored == parquet_file.encode(expected, {"data_version": version})


def test_equal_content_has_an_equal_version_in_another_storage(
    storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    elsewhere = Storage(f"memory://{tmp_path.name}", tmp_path / "locks")
    for place in (storage, elsewhere):
        store_batch(place, settings, "b2")
        store_batch(place, settings, "b1")
    here, there = (publish_registered(place, settings, "b2", "b1") for place in (storage, elsewhere))
    assert here.version == there.version
    assert versions.read_manifest(elsewhere, there.version) == here.manifest
    fsspec.filesystem("memory").store.clear()


def test_changed_content_is_a_new_version_and_the_old_one_stays(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    old = publish_registered(storage, settings, "b1")
    before = version_files(storage, old.version)
    store_batch(storage, settings, queries=("a", "b", "c", "changed"))
    new = publish_registered(storage, settings, "b1")
    assert new.version != old.version
    assert new.is_new
    assert version_files(storage, old.version) == before
    assert versions.find_version(storage, "latest").version == new.version


@pytest.mark.parametrize("change", ["selections: [{name: diff_high, strategy: diff_high, budget: {count: 2}}]"])
def test_another_setting_of_the_selection_is_another_version(storage: Storage, settings: Settings, change: str) -> None:
    store_batch(storage, settings)
    old = publish_registered(storage, settings, "b1")
    changed = parse_settings(MODELS + change)
    store_batch(storage, changed)
    new = publish_registered(storage, changed, "b1")
    assert new.version != old.version
    assert new.manifest["batches"][0]["rows_selected"] == 2


def test_only_the_wanted_formats_are_written(storage: Storage) -> None:
    settings = parse_settings(SETTINGS + "export: {formats: [alpaca]}")
    store_batch(storage, settings)
    files = publish_registered(storage, settings, "b1").manifest["files"]
    always = {"README.md", "dataset_info.json", "b1.parquet", "keys.parquet"}
    assert {name.rpartition("/")[2] for name in files} == {"alpaca.json", *always}


def test_each_line_of_a_training_file_leads_to_its_row_in_the_scores(storage: Storage, settings: Settings) -> None:
    for batch in ("b2", "b1"):
        store_batch(storage, settings, batch, tuple(f"query {n} of {batch}" for n in range(8)))
    files = version_files(storage, publish_registered(storage, settings, "b2", "b1").version)
    scores = pl.concat(pl.read_parquet(io.BytesIO(files[f"scores/{batch}.parquet"])) for batch in ("b1", "b2"))
    raw = pl.concat(storage.tables.read("raw_data", Partition(batch)).frame for batch in ("b1", "b2"))
    for selection in ("diff_high", "control_random"):
        keys = pl.read_parquet(io.BytesIO(files[f"{selection}/keys.parquet"]))
        lines = [json.loads(line) for line in files[f"{selection}/messages.jsonl"].splitlines()]
        assert keys["line"].to_list() == list(range(1, len(lines) + 1))
        rows = keys.join(scores, on=[*ROW_KEY, "pair_id"], validate="1:1").sort("line")
        assert rows[f"is_selected:{selection}"].to_list() == [True] * len(lines)
        texts = keys.join(raw, on=[*ROW_KEY, "pair_id"], validate="1:1").sort("line")
        assert texts["query"].to_list() == [line["messages"][0]["content"] for line in lines]
        assert [one["instruction"] for one in json.loads(files[f"{selection}/alpaca.json"])] == texts["query"].to_list()


THREE = """
selections:
  - {name: diff_high, strategy: diff_high}
  - {name: rmi_top, strategy: rmi_top}
  - {name: longest, strategy: length}
"""


@pytest.mark.parametrize(
    ("selections", "others"),
    [("published", []), ("all", ["longest", "rmi_top"]), ("[longest]", ["longest"]), ("[]", [])],
)
def test_other_selections_are_exported_where_they_are_asked_for(
    storage: Storage, selections: str, others: list[str]
) -> None:
    settings = parse_settings(f"{MODELS}{THREE}export: {{formats: [messages], selections: {selections}}}")
    store_batch(storage, settings)
    published = publish_registered(storage, settings, "b1")
    folders = {name.partition("/")[0] for name in published.manifest["files"] if "/" in name}
    assert folders == {"scores", "diff_high", "control_random", "control_stratified_random", *others}
    lines = storage.files.read_bytes(*versions.place(published.version, "diff_high/messages.jsonl"))
    top = (
        storage.files.read_bytes(*versions.place(published.version, others[-1], "messages.jsonl")) if others else lines
    )
    assert len(top.splitlines()) == len(lines.splitlines()) == 1


def test_a_batch_whose_other_selections_were_decided_otherwise_is_left_out_where_they_are_exported(
    storage: Storage, check_sentence: Check
) -> None:
    store_batch(storage, parse_settings(SETTINGS))
    alone = parse_settings(MODELS + THREE)
    assert read_batches(storage, ["b1"], alone)[1] == {}
    every = parse_settings(f"{MODELS}{THREE}export: {{selections: all}}")
    _, excluded = read_batches(storage, ["b1"], every)
    check_sentence(excluded["b1"])


@pytest.mark.parametrize("export", ["meta: true", "formats: [alpaca]", "formats: [alpaca, messages]"])
def test_another_export_is_no_longer_current(storage: Storage, settings: Settings, export: str) -> None:
    store_batch(storage, settings)
    publish_registered(storage, settings, "b1")
    assert curated_dataset.is_current(storage, ["b1"], settings)
    changed = parse_settings(f"{SETTINGS}export: {{{export}}}")
    assert not curated_dataset.is_current(storage, ["b1"], changed)
    publish_registered(storage, changed, "b1")
    assert curated_dataset.is_current(storage, ["b1"], changed)


def test_a_version_of_an_older_format_is_not_current(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    published = publish_registered(storage, settings, "b1")
    older = {key: value for key, value in published.manifest.items() if key != "export"} | {"format": 1}
    storage.files.write_json(older, *versions.place(published.version, versions.MANIFEST))
    assert not curated_dataset.is_current(storage, ["b1"], settings)


def test_a_format_whose_package_is_missing_is_refused_when_the_asset_is_defined(
    monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingsError) as error:
        build_curated_dataset(parse_settings(SETTINGS + "export: {formats: [hf]}"))
    check_sentence(error.value)


def test_meta_leads_back_to_the_delivered_row(storage: Storage) -> None:
    settings = parse_settings(SETTINGS + "export: {formats: [messages], meta: true}")
    store_batch(storage, settings)
    version = publish_registered(storage, settings, "b1").version
    raw = storage.tables.read("raw_data", Partition("b1")).frame.rows_by_key(["source_row"], named=True, unique=True)
    for selection in ("diff_high", "control_random"):
        (line,) = storage.files.read_bytes(*versions.place(version, f"{selection}/messages.jsonl")).splitlines()
        record = json.loads(line)
        meta = json.loads(record["meta"])
        row = raw[meta["source_row"]]
        assert [turn["content"] for turn in record["messages"]] == [row["query"], row["answer"]]
        assert (meta["batch"], meta["pair_id"], meta["record"]) == ("b1", row["pair_id"], row["record"])


def test_batches_lie_in_the_order_of_their_names(storage: Storage, settings: Settings) -> None:
    for batch in ("b10", "b1", "a"):
        store_batch(storage, settings, batch)
    published = publish_registered(storage, settings, "b10", "b1", "a")
    assert [entry["batch"] for entry in published.manifest["batches"]] == ["a", "b1", "b10"]
    rows = json.loads(version_files(storage, published.version)["diff_high/alpaca.json"])
    assert len(rows) == 3
    scores = versions.read_scores(storage, published.version)
    assert scores["batch"].unique(maintain_order=True).to_list() == ["a", "b1", "b10"]
    assert scores.height == 15


def test_the_log_names_the_newest_version_and_the_batches_left_out(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    published = publish_registered(storage, settings, "b1", "b2")
    newest = versions.latest(storage)
    assert newest is not None
    assert newest.version == published.version
    assert newest.excluded_batches == {"b2": "not materialised: raw_data, screened_data, decisions, selected_subset"}


def test_a_batch_left_out_later_is_logged_under_the_same_version_and_number(
    storage: Storage, settings: Settings
) -> None:
    store_batch(storage, settings)
    first = publish_registered(storage, settings, "b1")
    again = publish_registered(storage, settings, "b1", "b2")
    assert again.version == first.version
    assert [(one.number, list(one.excluded_batches)) for one in versions.log(storage)] == [(1, []), (1, ["b2"])]
    (published,) = versions.publications(storage)
    assert list(published.excluded_batches) == ["b2"]
    assert published.published_at == versions.log(storage)[0].published_at


def test_a_version_that_was_left_half_written_is_finished(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    published = publish_registered(storage, settings, "b1")
    whole = version_files(storage, published.version)
    storage.files.remove(*versions.place(published.version, versions.MANIFEST))
    storage.files.write_bytes(b"[", *versions.place(published.version, "diff_high/alpaca.json"))
    assert publish_registered(storage, settings, "b1").is_new
    assert version_files(storage, published.version) == whole


# --- batches that are left out --------------------------------------------------------------------------------------


def _lose_table(storage: Storage, _: Settings) -> None:
    storage.files.remove("decisions", "b1", "table.parquet")


def _select_otherwise(storage: Storage, _: Settings) -> None:
    other = parse_settings(MODELS + "selections: [{name: other, strategy: sum_high}]")
    store_batch(storage, other)


def _change_the_budget(storage: Storage, _: Settings) -> None:
    other = parse_settings(MODELS + "selections: [{name: diff_high, strategy: diff_high, budget: {count: 2}}]")
    store_batch(storage, other)


def _tear(storage: Storage, _: Settings) -> None:
    storage.files.write_bytes(b"torn", "decisions", "b1", "table.parquet")


def _decide_again(storage: Storage, _: Settings) -> None:
    table = storage.tables.read("decisions", Partition("b1"))
    changed = table.frame.with_columns(explanation=pl.lit("Otherwise."))
    storage.tables.write(StoredTable(changed, table.provenance), "decisions", Partition("b1"))


def _read_again(storage: Storage, _: Settings) -> None:
    table = storage.tables.read("raw_data", Partition("b1"))
    storage.tables.write(StoredTable(table.frame[:3], table.provenance), "raw_data", Partition("b1"))


def _no_change(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)


def _rank_otherwise(of: str, value: str) -> Callable[[Storage, Settings], None]:
    def change(storage: Storage, settings: Settings) -> None:
        table = storage.tables.read("decisions", Partition("b1"))
        storage.tables.write(StoredTable(table.frame, table.provenance | {of: value}), "decisions", Partition("b1"))

    return change


LEFT_OUT: dict[str, tuple[Callable[[Storage, Settings], None], str]] = {
    "missing": (_lose_table, "not materialised: decisions"),
    "other_selection": (_select_otherwise, "selected by other, not by diff_high; `qaq refresh` selects again"),
    "other_budget": (_change_the_budget, "decided under other settings of diff_high; `qaq refresh` decides again"),
    "other_pool": (
        _rank_otherwise("pool_id", "reference:r1:0"),
        "in the pool reference:r1:0, not in batch:b1; `qaq refresh`",
    ),
    "other_strata": (_rank_otherwise("ranking_hash", "0"), "ranked under other settings of ranking; `qaq refresh`"),
    "older_selection": (
        _decide_again,
        "selected_subset is older than decisions; `qaq refresh` makes it again",
    ),
    "older_decisions": (_read_again, "decisions is older than raw_data; `qaq refresh` makes it again"),
}


@pytest.mark.parametrize("why", list(LEFT_OUT))
def test_a_batch_that_is_incomplete_or_stale_is_left_out_with_the_reason(
    storage: Storage, settings: Settings, why: str
) -> None:
    change, reason = LEFT_OUT[why]
    for batch in ("b1", "b2"):
        store_batch(storage, settings, batch)
    change(storage, settings)
    batches, excluded = read_batches(storage, ["b1", "b2"], settings)
    assert [tables.batch for tables in batches] == ["b2"]
    assert list(excluded) == ["b1"]
    assert reason in excluded["b1"]


def test_a_batch_with_a_damaged_table_is_not_left_out_but_stops_the_publication(
    storage: Storage, settings: Settings
) -> None:
    for batch in ("b1", "b2"):
        store_batch(storage, settings, batch)
    _tear(storage, settings)
    with pytest.raises(StorageError, match=r"batch b1: .*decisions/b1/table.parquet: it cannot be read"):
        read_batches(storage, ["b1", "b2"], settings)


def test_a_batch_that_was_made_again_alike_is_not_stale(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    _no_change(storage, settings)
    batches, excluded = read_batches(storage, ["b1"], settings)
    assert [tables.batch for tables in batches] == ["b1"]
    assert excluded == {}


def test_the_older_batch_enters_again_once_it_is_materialised(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    _decide_again(storage, settings)
    store_selection(storage, settings)
    assert read_batches(storage, ["b1"], settings)[1] == {}


def test_a_batch_whose_name_cannot_be_used_is_left_out_and_stops_nobody(
    storage: Storage, settings: Settings, check_sentence: Check
) -> None:
    store_batch(storage, settings)
    batches, excluded = read_batches(storage, ["../evil", "b1"], settings)
    assert [tables.batch for tables in batches] == ["b1"]
    assert list(excluded) == ["../evil"]
    check_sentence(excluded["../evil"])


def test_no_batch_is_no_batch(storage: Storage, settings: Settings) -> None:
    assert read_batches(storage, [], settings) == ([], {})


def test_what_enters_is_what_lies_there(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    ((tables,), _) = read_batches(storage, ["b1"], settings)
    assert tables.batch == "b1"
    assert {name: table.frame.height for name, table in tables.tables.items()} == {
        "raw_data": 5,
        "screened_data": 5,
        "decisions": 5,
        "selected_subset": 1,
    }


# --- from one version to the next -----------------------------------------------------------------------------------


def changed_rows(storage: Storage, published: Publication) -> pl.DataFrame:
    assert published.previous is not None
    return difference.compare(storage, published.previous, published.version)


def changes(storage: Storage, published: Publication) -> list[tuple[Any, ...]]:
    found = changed_rows(storage, published)
    assert published.changes == difference.count_changes(found)
    return found.select("batch", "source_row", "is_added", "change", "decision_before", "decision_after").rows()


def test_the_first_version_has_no_difference_and_the_same_again_an_empty_one(
    storage: Storage, settings: Settings
) -> None:
    store_batch(storage, settings)
    first = publish_registered(storage, settings, "b1")
    assert (first.previous, first.changes) == (None, None)
    again = publish_registered(storage, settings, "b1")
    assert (again.previous, changes(storage, again)) == (first.version, [])
    assert versions.read_difference(storage, first.version, again.version) is None


def test_a_batch_that_enters_or_leaves_is_the_cause_of_its_rows(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings, "b1")
    first = publish_registered(storage, settings, "b1")
    store_batch(storage, settings, "b2", queries=("e", "f", "g", "h"))
    second = publish_registered(storage, settings, "b1", "b2")
    assert changes(storage, second) == [("b2", 4, True, "batch_entered", None, "selected")]
    third = publish_registered(storage, settings, "b2")
    assert changes(storage, third) == [("b1", 4, False, "batch_left", "selected", None)]
    stored = versions.read_difference(storage, second.version, third.version)
    assert stored is not None
    assert changed_rows(storage, third).equals(stored)
    assert first.version != third.version


def test_a_row_of_another_text_is_another_row_and_another_decision_says_its_reasons(
    storage: Storage, settings: Settings
) -> None:
    store_batch(storage, settings)
    publish_registered(storage, settings, "b1")
    half = parse_settings(MODELS + "selections: [{name: diff_high, strategy: diff_high, budget: {count: 2}}]")
    store_batch(storage, half)
    second = publish_registered(storage, half, "b1")
    assert changes(storage, second) == [("b1", 3, True, "decided_otherwise", "not_selected", "selected")]
    (row,) = changed_rows(storage, second).iter_rows(named=True)
    assert (row["reason_before"], row["reason_after"]) == ("below_cut", "within_budget")


def test_only_batches_that_were_decided_again_are_compared(storage: Storage, settings: Settings) -> None:
    for name, queries in {"b1": "abcd", "b2": "efgh", "b3": "ijkl"}.items():
        store_batch(storage, settings, name, queries=tuple(queries))
    first = publish_registered(storage, settings, "b1", "b2", "b3")
    store_batch(storage, settings, "b2", queries=tuple("efghx"))
    second = publish_registered(storage, settings, "b1", "b2", "b3")
    columns = ["batch", "source_file", "source_row", "turn_index", "pair_id", "decision", "reason"]
    whole = [functools.partial(versions.scan_scores, storage, one.version, columns) for one in (first, second)]
    scan = mock.Mock(wraps=versions.scan_batch)
    with mock.patch.object(versions, "scan_batch", scan):
        found = changed_rows(storage, second)
    assert found.equals(difference.difference(*whole))
    assert {call.args[2] for call in scan.mock_calls} == set(found["batch"]) == {"b2"}


def test_no_difference_from_a_damaged_version_is_stored(storage: Storage, settings: Settings) -> None:
    found = []
    for last in ("x", "y"):
        store_batch(storage, settings, queries=("a", "b", "c", last))
        found.append(publish_registered(storage, settings, "b1").version)
    storage.files.remove(*versions.difference_place(*found))
    storage.files.write_bytes(b"torn", *versions.place(found[0], versions.scores_name("b1")))
    with pytest.raises(StorageError):
        difference.store_difference(storage, *found)
    assert versions.read_difference(storage, *found) is None


def decided(*rows: tuple[str, int, str, str]) -> pl.DataFrame:
    """The columns of the scores that a difference reads: batch, row, pair, decision."""
    return pl.DataFrame(
        [
            {"batch": b, "source_file": "a", "source_row": n, "turn_index": 0, "pair_id": pair * 32, "decision": d}
            for b, n, pair, d in rows
        ],
        schema_overrides={"source_row": pl.Int64, "turn_index": pl.Int64},
    ).with_columns(reason=pl.lit("why"))


def test_a_row_delivered_again_with_another_text_left_and_entered() -> None:
    before = decided(("b1", 1, "a", "selected"), ("b1", 2, "b", "selected"), ("b1", 3, "c", "selected"))
    after = decided(("b1", 1, "a", "selected"), ("b1", 2, "d", "selected"), ("b1", 3, "c", "duplicate"))
    found = difference.difference(lambda: [before], lambda: after.iter_slices(2))
    assert found.select("source_row", "pair_id", "is_added", "change").rows() == [
        (2, "b" * 32, False, "row_gone"),
        (2, "d" * 32, True, "row_delivered"),
        (3, "c" * 32, False, "decided_otherwise"),
    ]
    assert difference.difference(lambda: [after], lambda: [before])["is_added"].to_list() == [True, False, True]


def test_rows_that_no_version_selects_are_no_difference() -> None:
    before = decided(("b1", 1, "a", "not_selected"), ("b1", 2, "b", "selected"))
    after = decided(("b1", 1, "a", "duplicate"), ("b1", 2, "b", "selected"), ("b2", 1, "c", "not_selected"))
    assert difference.difference(lambda: [before], lambda: [after]).is_empty()
    assert difference.difference(list, list).is_empty()


def test_only_the_newest_versions_keep_their_files_and_all_their_manifests(storage: Storage) -> None:
    settings = parse_settings(SETTINGS + "publication: {keep_versions: 2}")
    published = []
    for last in ("x", "y", "z"):
        store_batch(storage, settings, queries=("a", "b", "c", last))
        published.append(publish_registered(storage, settings, "b1"))
    first, second, third = (one.version for one in published)
    assert published[2].retired == (first,)
    assert not storage.files.exists(*versions.place(first))
    assert storage.files.read_json(*versions.manifest_place(storage, first)) == published[0].manifest
    assert all(
        storage.files.exists(*versions.place(version, versions.scores_name("b1"))) for version in (second, third)
    )
    # The content of the retired one comes back: its files are written again, and the oldest of the others goes.
    store_batch(storage, settings, queries=("a", "b", "c", "x"))
    back = publish_registered(storage, settings, "b1")
    assert (back.version, back.is_new, back.retired) == (first, True, (second,))
    assert versions.kept_versions(storage) == [third, first]
    assert back.previous == third


def test_without_a_limit_every_version_keeps_its_files(storage: Storage, settings: Settings) -> None:
    made = []
    for last in ("x", "y", "z"):
        store_batch(storage, settings, queries=("a", "b", "c", last))
        published = publish_registered(storage, settings, "b1")
        assert published.retired == ()
        made.append(published.version)
    assert versions.kept_versions(storage) == made
    assert all(versions.is_kept(storage, version) for version in made)


# --- numbers for people ---------------------------------------------------------------------------------------------


def numbers(storage: Storage) -> list[tuple[int, str]]:
    return [(one.number, one.version) for one in versions.publications(storage)]


def test_a_version_keeps_the_number_of_its_first_publication(storage: Storage, settings: Settings) -> None:
    made = []
    for last in ("x", "y", "y", "x"):
        store_batch(storage, settings, queries=("a", "b", "c", last))
        made.append(publish_registered(storage, settings, "b1").version)
    assert numbers(storage) == [(1, made[0]), (2, made[1])]
    logged = versions.log(storage)
    assert [entry.number for entry in logged] == [1, 2, 1]
    assert logged[0].published_at.startswith("20")


class InterruptionError(Exception):
    """Stops a publication."""


def cut_off(monkeypatch: pytest.MonkeyPatch, *, at: str) -> None:
    """Stop a publication where it calls this function of `versions`."""

    def stop(*_: object) -> None:
        raise InterruptionError

    monkeypatch.setattr(versions, at, stop)


@pytest.mark.parametrize("at", ["index_pairs", "record"])
def test_a_publication_that_is_cut_off_publishes_nothing_and_the_next_one_continues_it(
    storage: Storage, settings: Settings, at: str
) -> None:
    for last in ("x", "y"):
        before = versions.publications(storage)
        store_batch(storage, settings, queries=("a", "b", "c", last))
        with pytest.MonkeyPatch.context() as monkeypatch:
            cut_off(monkeypatch, at=at)
            with pytest.raises(InterruptionError):
                publish_registered(storage, settings, "b1")
        assert versions.publications(storage) == before
        assert not curated_dataset.is_current(storage, ["b1"], settings)
        published = publish_registered(storage, settings, "b1")
        assert numbers(storage)[-1] == (len(before) + 1, published.version)
        assert storage.files.exists(*versions.index_place(published.version))
        assert (published.changes is None) == (not before)
        assert curated_dataset.is_current(storage, ["b1"], settings)


def test_the_first_publication_is_unknown_until_it_ends(
    storage: Storage, settings: Settings, check_sentence: Check
) -> None:
    store_batch(storage, settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_off(monkeypatch, at="record")
        with pytest.raises(InterruptionError):
            publish_registered(storage, settings, "b1")
    with pytest.raises(StorageError) as error:
        versions.find_version(storage, "latest")
    check_sentence(error.value)


def test_a_retirement_that_is_cut_off_is_continued(storage: Storage) -> None:
    settings = parse_settings(SETTINGS + "publication: {keep_versions: 1}")
    store_batch(storage, settings)
    first = publish_registered(storage, settings, "b1").version
    store_batch(storage, settings, queries=("a", "b", "c", "x"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_off(monkeypatch, at="retire")
        with pytest.raises(InterruptionError):
            publish_registered(storage, settings, "b1")
    second = versions.find_version(storage, "latest").version
    assert versions.kept_versions(storage) == [first, second]
    assert publish_registered(storage, settings, "b1").retired == (first,)
    assert versions.kept_versions(storage) == [second]


@pytest.mark.parametrize("name", ["9", "abcd", "", "0"])
def test_a_version_that_is_none_is_named_with_those_that_are(storage: Storage, settings: Settings, name: str) -> None:
    store_batch(storage, settings)
    version = publish_registered(storage, settings, "b1").version
    known = rf"no version, or more than one, matches '{name}'; published versions: 1 \({version[:8]}\)"
    with pytest.raises(StorageError, match=known):
        versions.find_version(storage, name)
