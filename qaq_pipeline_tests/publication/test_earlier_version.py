"""earlier_version: what a version takes from the one before it, with the bytes of a version made from nothing."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import polars as pl
import pytest

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.publication import curated_dataset, exports, flat_scores, versions
from qaq_pipeline.publication.curated_dataset import Publication, publish, read_batches
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.publication.test_versions import version_files
from qaq_pipeline_tests.support.frames import store_batch
from qaq_pipeline_tests.support.sentences import Check

SETTINGS = """
models:
  strong: {hub: tiny/strong}
  weak: {hub: tiny/weak}
selections: [{name: diff_high, strategy: diff_high}]
"""
JSON = "{formats: [messages, prompt_completion, alpaca, sharegpt]}"
EXPORTS = [
    JSON,
    "{formats: [alpaca], meta: true}",
    "{rows: conversation}\nrecords: {multi_turn: last, context: history}",
    "{formats: [messages, parquet, hf]}",
]
QUERIES = {"a": tuple("klmnopqr"), "b": tuple("abcd"), "c": (), "d": tuple("stuvwx")}


def settings_of(export: str) -> Settings:
    return parse_settings(f"{SETTINGS}export: {export}\n")


def published(storage: Storage, settings: Settings, *batches: str) -> tuple[Publication, list[str]]:
    """A publication, and the batches of which something was written, not taken."""
    entering, excluded = read_batches(storage, batches, settings)
    rows_of, write = mock.Mock(wraps=curated_dataset._rows_of), mock.Mock(wraps=flat_scores.write)
    with mock.patch.object(curated_dataset, "_rows_of", rows_of), mock.patch.object(flat_scores, "write", write):
        found = publish(storage, settings, entering, excluded)
    of_tables = {id(batch["decisions"]): batch.batch for batch in entering}
    written = {call.args[0].batch for call in rows_of.mock_calls} | {
        of_tables[id(call.args[0])] for call in write.mock_calls
    }
    return found, sorted(written - {""})


def store_in(storage: Storage, elsewhere: Storage, settings: Settings, *batches: str) -> None:
    """Store batches in both."""
    for batch in batches:
        for one in (storage, elsewhere):
            store_batch(one, settings, batch, QUERIES[batch])


@pytest.fixture
def elsewhere(tmp_path: Path) -> Storage:
    """Another storage, where nothing was published."""
    return Storage(str(tmp_path / "elsewhere"), tmp_path / "elsewhere-locks")


@pytest.mark.parametrize(
    ("export", "before"),
    [(JSON, before) for before in (("b",), ("b", "c"), ("a", "b", "d"))] + [(one, ("a", "c", "d")) for one in EXPORTS],
)
def test_a_version_made_from_an_earlier_one_is_that_made_from_nothing(
    storage: Storage, elsewhere: Storage, export: str, before: tuple[str, ...]
) -> None:
    settings = settings_of(export)
    store_in(storage, elsewhere, settings, *QUERIES)
    published(storage, settings, *before)
    taken_over, written = published(storage, settings, *QUERIES)
    from_nothing, all_batches = published(elsewhere, settings, *QUERIES)
    assert taken_over.manifest == from_nothing.manifest
    assert version_files(storage, taken_over.version) == version_files(elsewhere, from_nothing.version)
    assert all_batches == list(QUERIES)
    is_json = all(exports.WRITTEN[name].is_json for name in settings.export.written)
    assert written == (sorted(set(QUERIES) - set(before)) if is_json else all_batches)


def test_a_batch_that_was_decided_again_is_written_again(storage: Storage, elsewhere: Storage) -> None:
    settings = settings_of(JSON)
    for batch in ("a", "b"):
        store_batch(storage, settings, batch, QUERIES[batch])
    published(storage, settings, "a", "b")
    for one in (storage, elsewhere):
        store_batch(one, settings, "b", tuple("abcdef"))
    store_batch(elsewhere, settings, "a", QUERIES["a"])
    again, written = published(storage, settings, "a", "b")
    assert written == ["b"]
    assert version_files(storage, again.version) == version_files(
        elsewhere, published(elsewhere, settings, "a", "b")[0].version
    )
    assert published(storage, settings, "a")[1] == []


def test_everything_is_written_again_under_other_settings(storage: Storage) -> None:
    for export in (JSON, "{formats: [alpaca]}"):
        settings = settings_of(export)
        store_batch(storage, settings, "a", QUERIES["a"])
        assert published(storage, settings, "a")[1] == ["a"]


def test_scores_are_written_again_where_another_batch_has_more_columns(storage: Storage) -> None:
    settings = settings_of(JSON)
    other = parse_settings(f"{SETTINGS.replace('}]', '}, {name: x, strategy: length}]')}export: {JSON}\n")
    store_batch(storage, settings, "a", QUERIES["a"])
    published(storage, settings, "a")
    store_batch(storage, other, "b", QUERIES["b"])
    entering = [*read_batches(storage, ["a"], settings)[0], *read_batches(storage, ["b"], other)[0]]
    version = publish(storage, settings, entering, {}).version
    scores = versions.read_scores(storage, version)
    judged = scores.filter(pl.col("is_selected:x").is_not_null())
    assert judged["batch"].to_list() == ["b"] * 4
    assert scores.height == 9 + 5


def test_nothing_is_taken_from_a_version_whose_manifest_was_changed(
    storage: Storage, elsewhere: Storage, caplog: pytest.LogCaptureFixture, check_sentence: Check
) -> None:
    settings = settings_of(JSON)
    store_in(storage, elsewhere, settings, "a", "b")
    first, _ = published(storage, settings, "a")
    place = versions.place(first.version, versions.MANIFEST)
    manifest = storage.files.read_json(*place)
    manifest["spans"]["diff_high/alpaca.json"]["a"][1] -= 5
    storage.files.write_json(manifest, *place)
    second, written = published(storage, settings, "a", "b")
    assert written == ["a", "b"]
    assert version_files(storage, second.version) == version_files(
        elsewhere, published(elsewhere, settings, "a", "b")[0].version
    )
    check_sentence(caplog.messages[0])


@pytest.mark.parametrize("name", ["diff_high/alpaca.json", "diff_high/keys.parquet", "scores/a.parquet"])
def test_nothing_is_taken_from_a_version_with_a_damaged_file(
    storage: Storage, elsewhere: Storage, name: str, caplog: pytest.LogCaptureFixture, check_sentence: Check
) -> None:
    settings = settings_of(JSON)
    store_in(storage, elsewhere, settings, "a", "b")
    first, _ = published(storage, settings, "a")
    damaged = Path(storage.files.path(*versions.place(first.version, name)))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    second, written = published(storage, settings, "a", "b")
    assert written == ["a", "b"]
    assert version_files(storage, second.version) == version_files(
        elsewhere, published(elsewhere, settings, "a", "b")[0].version
    )
    check_sentence(caplog.messages[0])
    damaged.unlink()  # Nor from one of which a file is gone.
    store_batch(storage, settings, "c", QUERIES["d"])
    versions.record(storage, first.version, {}, None)
    assert published(storage, settings, "a", "b", "c")[1] == ["a", "b", "c"]
