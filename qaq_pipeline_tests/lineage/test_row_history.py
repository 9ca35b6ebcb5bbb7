"""row_history: a row is found by place, pair and text, in decisions and in every version."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from qaq_pipeline.cli import row_view
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lineage import dossier, row_history
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.curated_dataset import publish, read_batches
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.frames import pair_name, store_batch
from qaq_pipeline_tests.support.sentences import Check

MODELS = """
models:
  strong: {hub: tiny/strong}
  weak: {hub: tiny/weak}
"""
SETTINGS = MODELS + "selections: [{name: diff_high, strategy: diff_high}]\n"
KEEP_ONE = "publication: {keep_versions: 1}"


@pytest.fixture
def settings() -> Settings:
    return parse_settings(SETTINGS)


def publish_all(storage: Storage, settings: Settings, *registered: str) -> str:
    batches, excluded = read_batches(storage, registered, settings)
    return publish(storage, settings, batches, excluded, run_id="run").version


def rows_of(answer: row_history.Answer) -> list[tuple[str, int]]:
    return [(row["batch"], row["source_row"]) for row in answer.rows]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_found_by_its_place_and_by_its_pair(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    for name in ("3", "a.jsonl:3", "a.jsonl:3.0", "b1/a.jsonl:3.0", pair_name(3)):
        assert rows_of(row_history.find_row(storage, "b1", name)) == [("b1", 3)]
    assert row_history.find_row(storage, "b1", "99") == row_history.Answer([])


def test_a_file_in_a_folder_that_is_called_like_the_batch_is_meant_as_it_is_given(
    storage: Storage, settings: Settings
) -> None:
    store_batch(storage, settings, source_file="b1/a.jsonl")
    (row,) = row_history.find_row(storage, "b1", "b1/a.jsonl:3").rows
    assert (row["source_file"], row["source_row"]) == ("b1/a.jsonl", 3)
    assert row_history.find_row(storage, "b1", "b1/b1/a.jsonl:3").rows == [row]


def test_a_pair_of_many_batches_is_found_in_each_of_a_version(storage: Storage, settings: Settings) -> None:
    batches = [f"b{n:02}" for n in range(row_history.MOST_ROWS + 3)]
    for batch in batches:
        store_batch(storage, settings, batch)
    publish_all(storage, settings, *batches)
    version = versions.find_version(storage, "1")
    for batch in (batches[0], batches[-1]):
        assert rows_of(row_history.find_pair(storage, pair_name(3), version, [batch])) == [(batch, 3)]


def test_a_pair_is_found_in_any_batch_by_its_first_digits(storage: Storage, settings: Settings) -> None:
    for batch in ("b1", "b2"):
        store_batch(storage, settings, batch)
    found = row_history.find_pair(storage, pair_name(3))
    assert rows_of(found) == [("b1", 3), ("b2", 3)]
    assert found.unindexed == ()
    assert len(row_history.find_pair(storage, pair_name(3)[:31]).rows) == 2 * 4


def test_what_is_found_is_what_the_whole_table_has(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    whole = storage.tables.read("decisions", Partition("b1")).frame.filter(source_row=3).row(0, named=True)
    assert row_history.find_row(storage, "b1", "3").rows == [whole]
    assert row_history.find_pair(storage, pair_name(3)).rows == [whole]


def test_an_index_of_another_table_than_the_stored_one_is_not_used_and_named(
    storage: Storage, settings: Settings
) -> None:
    store_batch(storage, settings)
    stale = storage.files.read_bytes("decisions", "b1", "pair_index.parquet")
    store_batch(storage, settings, queries=("a", "b", "c", "changed"))
    storage.files.write_bytes(stale, "decisions", "b1", "pair_index.parquet")
    found = row_history.find_pair(storage, pair_name(3))
    assert (rows_of(found), found.unindexed) == ([("b1", 3)], ("decisions of b1",))
    storage.files.write_bytes(b"torn", "decisions", "b1", "pair_index.parquet")
    assert row_history.find_pair(storage, pair_name(3)).unindexed == ("decisions of b1",)
    storage.files.remove("decisions", "b1", "pair_index.parquet")
    assert row_history.find_pair(storage, pair_name(3)).unindexed == ("decisions of b1",)


def test_a_batch_without_decisions_is_named(storage: Storage, check_sentence: Check) -> None:
    with pytest.raises(StorageError) as error:
        row_history.find_row(storage, "b9", "1")
    check_sentence(error.value)


def test_a_text_is_found_in_query_answer_and_record_whatever_its_white_space(
    storage: Storage, settings: Settings
) -> None:
    store_batch(storage, settings, queries=("one  two\nthree", "b", "c", "d"))
    (found,) = row_history.find_text(storage, "two three")
    assert ([row["source_row"] for row in found.rows], found.number) == ([1], 1)
    (found,) = row_history.find_text(storage, "nowhere")
    assert (found.rows, found.number) == ([], 0)
    assert row_history.text_of(storage, row_history.find_row(storage, "b1", "1").rows[0])["query"] == "one  two\nthree"


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def thrice(storage: Storage) -> Storage:
    """Version 1 without the batch, version 2 with row 3 of it selected, version 3 with row 3 not selected."""
    half = parse_settings(MODELS + "selections: [{name: diff_high, strategy: diff_high, budget: {count: 2}}]")
    whole = parse_settings(SETTINGS)
    store_batch(storage, whole, "b0")
    publish_all(storage, whole, "b0")
    for settings in (half, whole):
        for batch in ("b0", "b1"):
            store_batch(storage, settings, batch)
        publish_all(storage, settings, "b0", "b1")
    return storage


def test_every_version_says_what_became_of_a_row(thrice: Storage) -> None:
    row = row_history.find_row(thrice, "b1", "3").rows[0]
    fates = row_history.fates(thrice, row)
    assert [fate.published.number for fate in fates] == [1, 2, 3]
    assert [(fate.has_batch, fate.is_published) for fate in fates] == [(False, False), (True, True), (True, False)]
    assert fates[2].row is not None
    assert fates[2].row["explanation"] == row["explanation"]
    assert re.search(r"rank \d\.\d{3} .* number \d of 4 pairs; ", row["explanation"])


def test_a_row_of_a_version_is_shown_and_no_character_of_it_reaches_the_terminal(thrice: Storage) -> None:
    second = versions.find_version(thrice, "2")
    (row,) = row_history.find_row(thrice, "b1", "3", second).rows
    gathered = dossier.gather(thrice, row, second, with_versions=False)
    gathered.text["query"] = "hi\x1b[2J\x1b]0;owned"
    stream = io.StringIO()
    row_view.show(Console(file=stream, width=80), gathered, with_template=True)
    shown = stream.getvalue()
    assert "in version 2" in shown
    assert "\x1b" not in shown
    assert "hi⟦U+001B⟧[2J" in shown


@pytest.mark.parametrize(
    ("verdict", "shown"),
    [
        ({"is_selected": False, "score": 0.7763, "cut": 0.2454, "position": 96}, "≤ 0.2454"),
        ({"is_selected": True, "score": 0.2188, "cut": 0.2454, "position": 20}, "≤ 0.2454"),
        ({"is_selected": True, "score": 0.9, "cut": 0.5, "position": 1}, "≥ 0.5000"),
        ({"is_selected": False, "score": 0.1, "cut": 0.5, "position": 9}, "≥ 0.5000"),
        ({"is_selected": True, "score": 0.5, "cut": 0.5, "position": 5}, "0.5000"),
        ({"is_selected": False, "score": 0.9, "cut": 0.5, "position": None}, "0.5000"),
        ({"is_selected": False, "score": None, "cut": 0.5}, "0.5000"),
        ({"is_selected": False, "score": 0.5, "cut": None, "position": None}, "-"),
    ],
)
def test_a_cut_is_shown_with_the_side_that_is_taken(verdict: dict[str, Any], shown: str) -> None:
    assert dossier.cut_of(verdict) == shown


def test_another_text_at_the_place_is_not_the_row_s_history(storage: Storage, settings: Settings) -> None:
    whole = parse_settings(MODELS + "selections: [{name: diff_high, strategy: diff_high, budget: {fraction: 1.0}}]")
    store_batch(storage, whole)
    publish_all(storage, whole, "b1")
    store_batch(storage, settings, queries=("a", "b", {"query": "c", "source_row": 4}, {"query": "d", "source_row": 3}))
    publish_all(storage, settings, "b1")
    row = row_history.find_row(storage, "b1", "3").rows[0]
    stream = io.StringIO()
    row_view.show(
        Console(file=stream, width=200),
        dossier.gather(storage, row, None, with_versions=True),
        with_template=False,
    )
    assert "this file and row number had another text" in stream.getvalue()
    assert "dropped, had been in" not in stream.getvalue()


def test_versions_in_a_row_that_say_the_same_of_a_row_are_one_line(thrice: Storage, settings: Settings) -> None:
    for batch in ("b2", "b3"):
        store_batch(thrice, settings, batch)
        publish_all(thrice, settings, *(name for name in ("b0", "b1", "b2", "b3") if name <= batch))
    row = row_history.find_row(thrice, "b1", "3").rows[0]
    stream = io.StringIO()
    gathered = dossier.gather(thrice, row, None, with_versions=True)
    row_view.show(Console(file=stream, width=200), gathered, with_template=False)
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("version")]
    assert len(lines) == 4
    assert lines[0].endswith("the version does not contain its batch")
    assert re.search(r"^version 2 \(.*: published[:,] ", lines[1])
    assert lines[2].startswith("version 3 (")
    assert "dropped (it was in version 2)" in lines[2]
    assert re.fullmatch(r"versions 4 to 5 \(\w{8} to \w{8}\): not published, for the same reason", lines[3])


def test_a_version_is_asked_by_its_number_or_hash_and_answers_from_its_own_file(thrice: Storage) -> None:
    second = versions.find_version(thrice, "2")
    assert versions.find_version(thrice, second.version[:8]) == second
    (row,) = row_history.find_row(thrice, "b1", "3", second).rows
    assert row["decision"] == "selected"
    assert [score["model"] for score in row["scores"]] == ["strong", "weak"]
    now = row_history.find_row(thrice, "b1", "3").rows[0]
    assert [score["rmi"] for score in row["scores"]] == [score["rmi"] for score in now["scores"]]
    assert row["verdicts"][0]["is_selected"]
    by_pair = row_history.find_pair(thrice, pair_name(3), second)
    assert (rows_of(by_pair), by_pair.unindexed) == ([("b0", 3), ("b1", 3)], ())


def test_a_row_that_left_the_decisions_is_found_in_the_newest_version_with_it(
    storage: Storage, settings: Settings
) -> None:
    store_batch(storage, settings)
    version = publish_all(storage, settings, "b1")
    storage.files.remove("decisions", "b1", "table.parquet")
    answer, found_in = row_history.find_anywhere(
        storage, lambda version: row_history.find_row(storage, "b1", "3", version)
    )
    assert rows_of(answer) == [("b1", 3)]
    assert found_in is not None
    assert found_in.version == version


def test_of_a_version_whose_files_are_gone_nothing_is_claimed(storage: Storage, check_sentence: Check) -> None:
    settings = parse_settings(SETTINGS + KEEP_ONE)
    for last in ("x", "y"):
        store_batch(storage, settings, queries=("a", "b", "c", last))
        publish_all(storage, settings, "b1")
    first, second = row_history.fates(storage, row_history.find_row(storage, "b1", "3").rows[0])
    assert (first.fault, first.row, second.fault) == ("its files were not kept", None, None)
    with pytest.raises(StorageError) as error:
        row_history.find_row(storage, "b1", "3", first.published)
    check_sentence(error.value)
    assert not storage.files.exists(*versions.index_place(first.published.version))


def test_a_version_that_cannot_be_read_is_said_so_and_hides_nothing_else(thrice: Storage) -> None:
    row = row_history.find_row(thrice, "b1", "3").rows[0]
    second = versions.find_version(thrice, "2")
    parts = versions.place(second.version, versions.scores_name("b1"))
    thrice.files.write_bytes(thrice.files.read_bytes(*parts)[:-9], *parts)
    first, torn, third = row_history.fates(thrice, row)
    assert (first.fault, third.fault) == (None, None)
    assert third.row is not None
    assert torn.fault is not None
    assert second.version in torn.fault
    stream = io.StringIO()
    gathered = dossier.gather(thrice, row, None, with_versions=True)
    row_view.show(Console(file=stream, width=200), gathered, with_template=False)
    assert "the row's fate is unknown" in stream.getvalue()


def test_a_version_of_before_sentences_were_kept_is_read_too(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings)
    version = publish_all(storage, settings, "b1")
    scores = Path(storage.files.url(*versions.place(version, versions.scores_name("b1"))))
    old = pl.read_parquet(scores).drop("explanation", "similarity", "evidence", "reason:diff_high")
    old.write_parquet(scores)
    storage.files.remove(*versions.index_place(version))
    (fate,) = row_history.fates(storage, row_history.find_row(storage, "b1", "4").rows[0])
    assert fate.is_published
    found = row_history.find_pair(storage, pair_name(4), fate.published)
    assert found.unindexed == ("version 1",)
    assert found.rows[0]["verdicts"][0]["is_selected"]
