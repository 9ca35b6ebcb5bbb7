"""page_rows: the parts of a batch or a version give the columns of the whole, and examples are found by place."""

from __future__ import annotations

import polars as pl
import pytest

from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.reports import page_rows, summaries
from qaq_pipeline.storage import parquet_file
from qaq_pipeline_tests.reports.test_summaries import SETTINGS
from qaq_pipeline_tests.support import synthetic
from qaq_pipeline_tests.support.frames import rejected

NUM_ROWS = 130


@pytest.fixture(params=[1, 7, 1_000])
def tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BatchTables:
    """A batch that is read so many rows at a time. Its first rows are no pairs."""
    monkeypatch.setattr(parquet_file, "ROWS_PER_GROUP", request.param)
    unreadable = {number: rejected(detail="cut off") for number in (1, 2)}
    return synthetic.batch(SETTINGS, NUM_ROWS, changes=unreadable).tables


def in_words(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.cast({pl.Categorical: pl.String})


def test_the_rows_of_a_batch_are_those_of_the_whole(tables: BatchTables) -> None:
    flat, raw = flat_scores(tables["decisions"].frame), tables["raw_data"].frame
    whole = flat.with_columns(raw["source"], raw["language"])
    rows = page_rows.of_batch(tables)
    assert rows.height == NUM_ROWS
    assert in_words(rows).equals(whole.select(rows.columns))
    assert set(rows.columns) == set(page_rows.read_of(whole.columns)) - {"batch"}
    assert "is_selected:control_random" in rows.columns
    assert not {"rank_sum", "explanation", "num_a_tokens_untruncated_strong"} & set(rows.columns)


def test_the_rows_of_a_version_are_those_of_its_scores(tables: BatchTables) -> None:
    flat = flat_scores(tables["decisions"].frame)
    rows = page_rows.of_version(flat.iter_slices(50))
    assert in_words(rows).equals(flat.select(rows.columns))
    assert set(rows.columns) == set(page_rows.read_of(flat.columns))
    assert page_rows.of_version([]).columns == ["pair_id", "gap", "decision", "reason", "batch"]


def test_a_batch_without_rows_has_no_scores_to_count() -> None:
    rows = page_rows.of_batch(synthetic.batch(SETTINGS, 0).tables)
    assert rows.is_empty()
    assert summaries.pairs(rows).is_empty()


def test_examples_are_the_rows_at_their_places(tables: BatchTables) -> None:
    decided, raw = tables["decisions"].frame, tables["raw_data"].frame
    found = page_rows.of_examples(tables, {0, 6, 7, NUM_ROWS - 1})
    assert sorted(found) == [0, 6, 7, NUM_ROWS - 1]
    for place, row in found.items():
        assert row["place"] == f"b1/rows.jsonl:{place + 1}.0"
        assert (row["explanation"], row["query"]) == (decided["explanation"][place], raw["query"][place])
        assert row["status"] == tables["screened_data"].frame["status"][place]
        assert row["scores"] == decided["scores"][place].to_list()
    assert page_rows.of_examples(tables, []) == {}
