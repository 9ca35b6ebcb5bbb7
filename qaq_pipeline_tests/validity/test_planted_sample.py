"""planted_sample: planted rows of other rows, or scored otherwise than the batch, are refused."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.tables import PlantedRows, dtypes
from qaq_pipeline.schema.vocabularies import Defect
from qaq_pipeline.scoring.pairs import TEXTS, accepted_parts, pairs_of
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import pair_name, raw_rows, rejected, rmi_rows
from qaq_pipeline_tests.support.planted import planted_sample

OTHERS = {"raw_data": "1", "screened_data": "2"}


def test_tables_that_belong_together_are_inputs_by_name() -> None:
    assert sorted(planted_sample().inputs) == [
        "planted_rows",
        "planted_scores|strong",
        "planted_scores|weak",
        "raw_data",
        "rmi_scores|strong",
        "rmi_scores|weak",
        "screened_data",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"screened": {"inputs": {"raw_data": "0"}}}, "screened_data of batch b1 was made from another raw_data"),
        (
            {"planted": {"inputs": OTHERS}},
            r"planted_rows of batch b1 were not drawn from the rows that rmi_scores\|strong, rmi_scores\|weak scored",
        ),
        (
            {"planted": {"inputs": OTHERS}, "scores": {"scored_from": OTHERS}},
            "planted_rows of batch b1 was made from another raw_data, screened_data",
        ),
        (
            {"planted_scores": {"inputs": {}}},
            r"planted_scores\|strong of batch b1 was made from another planted_rows",
        ),
        (
            {"planted_scores": {"identity_hash": "1"}},
            r"were made by other models .* as \['strong', 'weak'\]; materialise logprobs",
        ),
        (
            {"planted_scores": {"scoring": {"max_tokens": 8}}},
            r"or asked differently, as \['strong', 'weak'\]; materialise logprobs",
        ),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OriginError, match=message):
        planted_sample(**changes)


def test_the_sample_has_every_pair_and_every_planted_row_under_both_models_with_its_defect() -> None:
    texts = {"pair_id": pair_name(9), "defect": Defect.ECHO.value, "query": "query 1", "answer": "query 1"}
    planted = pl.DataFrame([texts], schema=dtypes(PlantedRows))
    scores = rmi_rows({"pair_id": pair_name(9), "rmi": 1.5})
    sample = planted_sample(rows=planted, rows_scores=scores).sample
    assert sample.batches == ("b1",)
    assert sample.pairs.select("model", "pair_id").rows() == [
        (role, pair_name(number)) for role in ("strong", "weak") for number in (1, 2)
    ]
    assert sample.planted.select("model", "pair_id", "defect", "rmi", "query_in_answer").rows() == [
        (role, pair_name(9), "echo", 1.5, 1.0) for role in ("strong", "weak")
    ]


def test_rows_are_planted_among_the_distinct_accepted_ones() -> None:
    raw = raw_rows({"query": "one"}, {"query": "two"}, rejected(), {"pair_id": pair_name(1), "query": "one"})
    pairs = pl.concat(accepted_parts(StoredTable(raw), StoredTable(screen_alone(raw, ScreeningSettings())), *TEXTS))
    assert pairs.select("pair_id", "query").rows() == [(pair_name(1), "one"), (pair_name(2), "two")]


def test_planted_rows_are_scored_with_their_texts() -> None:
    texts = {"pair_id": pair_name(1), "query": "q", "answer": "a"}
    planted = pl.DataFrame([texts], schema=dtypes(PlantedRows))
    assert pairs_of(planted) == [Pair(pair_name(1), None, "q", "a")]
