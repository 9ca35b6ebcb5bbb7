"""The decisions as a flat table: `scores.parquet` of a version. No Dagster.

Belongs here: a column for each score and model, and for each verdict and selection, and the way back. Does not belong
here: the training files (`exports`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import polars as pl

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.storage import row_lookup

_VERDICT = ("is_selected", "reason", "score", "position")


def scores_parquet(decisions: pl.DataFrame) -> bytes:
    """Decision and scores of every input row, flat: joins on the row key or on pair_id."""
    return parquet(flat_scores(decisions))


def parquet(rows: pl.DataFrame) -> bytes:
    """The rows as a Parquet file in which single rows are found quickly."""
    buffer = io.BytesIO()
    rows.write_parquet(buffer, compression="zstd", row_group_size=row_lookup.rows_per_group(rows.height))
    return buffer.getvalue()


def flat_scores(decisions: pl.DataFrame) -> pl.DataFrame:
    """Decisions with a column for each score and model (`rmi_strong`) and each selection (`is_selected:diff_high`)."""
    return to_columns(to_columns(decisions, "scores"), "verdicts", ":", _VERDICT)


def nested_row(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `flat_scores` with its scores and verdicts in lists, as in decisions, as far as it has them."""
    roles = [name.removeprefix("num_strata_") for name in flat if name.startswith("num_strata_")]
    selections = [name.removeprefix("is_selected:") for name in flat if name.startswith("is_selected:")]
    fields = [name for name in tables.MODEL_SCORE.inner if name != "model"]
    scores = [
        {"model": role} | {name: flat.get(f"{name}_{role}") for name in fields}
        for role in roles
        if flat[f"num_strata_{role}"] is not None
    ]
    verdicts = [
        {"selection": name} | {field: flat[f"{field}:{name}"] for field in _VERDICT if f"{field}:{name}" in flat}
        for name in selections
        if flat[f"is_selected:{name}"] is not None
    ]
    return {**flat, "scores": scores, "verdicts": verdicts}
