"""The stored tables of a batch and of its planted rows, as two test modules need them."""

from __future__ import annotations

from typing import Any

import polars as pl

from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.schema.tables import PlantedRows, RmiScores
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline.validity.planted_sample import PlantedSample
from qaq_pipeline_tests.support.frames import raw_rows, rmi_rows

ROLES = ("strong", "weak")
SCORED: dict[str, Any] = {
    "partition": ["b1", "m"],
    "identity_hash": "0",
    "scoring": {},
    "min_scorable_share": None,
}


def planted_sample(
    planted: dict[str, Any] | None = None,
    planted_scores: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    screened: dict[str, Any] | None = None,
    *,
    score: dict[str, Any] | None = None,
    rows: pl.DataFrame | None = None,
    rows_scores: pl.DataFrame | None = None,
) -> PlantedSample:
    """A batch of two pairs with nothing planted.

    Args:
        planted: changes of the provenance of planted_rows.
        planted_scores: changes of that of planted_scores.
        scores: changes of that of rmi_scores.
        screened: changes of that of screened_data.
        score: changes of the scores of both pairs.
        rows: the planted rows.
        rows_scores: their scores.
    """
    raw = raw_rows({}, {})
    raw_data = StoredTable(raw, {"partition": ["b1"]})
    made_of = {"partition": ["b1"], "inputs": {"raw_data": raw_data.data_version}} | (screened or {})
    screened_data = StoredTable(screen_alone(raw, ScreeningSettings()), made_of)
    both = {"raw_data": raw_data.data_version, "screened_data": screened_data.data_version}
    made_of = SCORED | {"scored_from": both} | (scores or {})
    rmi = {role: StoredTable(rmi_rows(score or {}, score or {}), made_of) for role in ROLES}
    texts = empty(PlantedRows) if rows is None else rows
    drawn = StoredTable(texts, {"partition": ["b1"], "inputs": both} | (planted or {}))
    made_of = SCORED | {"inputs": {"planted_rows": drawn.data_version}} | (planted_scores or {})
    of_rows = empty(RmiScores) if rows_scores is None else rows_scores
    return PlantedSample(raw_data, screened_data, rmi, drawn, {role: StoredTable(of_rows, made_of) for role in ROLES})
