"""api: what a notebook gets is what the tables, the files and the command line say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from qaq_pipeline import api
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.curated_dataset import publish, read_batches
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.support.frames import store_batch


@pytest.fixture
def home(settings_for: Callable[..., Settings], settings_file: Callable[[Settings], Path]) -> api.Home:
    """Two batches and two versions: the first without b2."""
    settings = settings_for()
    storage = open_storage(settings)
    store_batch(storage, settings, "b1")
    publish(storage, settings, *read_batches(storage, ["b1"], settings))
    store_batch(storage, settings, "b2", ("e", "f"))
    publish(storage, settings, *read_batches(storage, ["b1", "b2"], settings))
    return api.open_home(settings.home, settings_file(settings))


def test_the_rows_of_a_version_are_the_lines_of_its_training_files(home: api.Home) -> None:
    assert home.versions().select("number", "is_kept").rows() == [(1, True), (2, True)]
    rows = home.version()
    version = home.versions()["version"][-1]
    selection = home.settings.published.name
    lines = home.storage.files.read_bytes(*versions.place(version, f"{selection}/messages.jsonl")).splitlines()
    assert rows["query"].to_list() == [json.loads(line)["messages"][0]["content"] for line in lines]
    assert rows["line"].to_list() == list(range(1, len(lines) + 1))
    assert home.version("1")["batch"].unique().to_list() == ["b1"]


def test_decisions_and_explanations_are_those_of_the_tables(home: api.Home) -> None:
    stored = home.storage.tables.read("decisions", Partition("b1")).frame
    assert home.decisions("b1").equals(flat_scores(stored))
    assert home.explain("b1", "a.jsonl:2") == stored.filter(source_row=2)["explanation"][0]
    with pytest.raises(LookupError, match="no row"):
        home.explain("b1", "a.jsonl:99")
    with pytest.raises(StorageError, match="nothing of a batch 'b9' is stored"):
        home.decisions("b9")


def test_the_difference_of_two_versions_has_the_rows_that_entered(home: api.Home) -> None:
    found = home.difference("1", "2")
    assert found["batch"].unique().to_list() == ["b2"]
    assert found["is_added"].all()
    assert home.difference("2", "2").is_empty()


def test_pairs_are_scored_in_their_order_under_every_model(home: api.Home) -> None:
    pairs = [("zebra query", "an answer"), ("a query", "another answer")]
    scores = home.score(pairs)
    assert scores["model"].to_list() == ["strong", "strong", "weak", "weak"]
    assert scores.select("query", "answer").rows() == pairs * 2
    assert scores["rmi"].is_not_null().all()
    difference = scores["rmi"] - (scores["log_ppl_q"] - scores["log_ppl_q_given_a"])
    assert difference.abs().max() == pytest.approx(0.0, abs=1e-12)
    assert home.score(pairs[:1])["rmi"].to_list() == scores.filter(pl.col("query") == "zebra query")["rmi"].to_list()
