"""The decisions as a flat table: `scores.parquet` of a version. No Dagster.

Belongs here: a column for each score and model, and for each verdict and selection, and the way back. Does not belong
here: the training files (`exports`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.storage import parquet_file

_VERDICT = ("is_selected", "reason", "score", "position")


def scores_parquet(decisions: pl.DataFrame) -> bytes:
    """Decision and scores of every input row, flat: joins on the row key or on pair_id."""
    return parquet_file.encode(flat_scores(decisions), {})


def flat_scores(decisions: pl.DataFrame) -> pl.DataFrame:
    """Decisions with a column for each score and model (`rmi_strong`) and each selection (`is_selected:diff_high`)."""
    return to_columns(to_columns(decisions, "scores"), "verdicts", ":", _VERDICT)


def lines(scores: pl.DataFrame, batches: Sequence[str], selection: str) -> pl.DataFrame:
    """The key and the `line`, from 1, of each record of a selection in the training files of a version.

    Args:
        scores: scores.parquet of the version, with at least the key, `is_selected:` and `position:` of the selection.
        batches: names of its batches, in the order of its manifest.
        selection: name of the selection.
    """
    order = {batch: place for place, batch in enumerate(batches)}
    taken = scores.filter(pl.col(f"is_selected:{selection}"))
    return taken.sort(pl.col("batch").replace_strict(order, return_dtype=pl.Int64), f"position:{selection}").select(
        *ROW_KEY, line=pl.int_range(1, pl.len() + 1)
    )


def nested_row(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `flat_scores` with its scores and verdicts in lists, as in decisions, as far as it has them."""
    known = [name for name, value in flat.items() if value is not None]
    roles = [name.removeprefix("num_strata_") for name in known if name.startswith("num_strata_")]
    selections = [name.removeprefix("is_selected:") for name in known if name.startswith("is_selected:")]
    fields = [name for name in tables.MODEL_SCORE.inner if name != "model"]
    scores = [{"model": role} | {name: flat.get(f"{name}_{role}") for name in fields} for role in roles]
    verdicts = [
        {"selection": name} | {field: flat[f"{field}:{name}"] for field in _VERDICT if f"{field}:{name}" in flat}
        for name in selections
    ]
    return {**flat, "scores": scores, "verdicts": verdicts}
