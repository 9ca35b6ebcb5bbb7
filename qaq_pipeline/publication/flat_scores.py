"""The decisions as a flat table: the scores of a version, a file for each batch. No Dagster.

Belongs here: a column for each score and model, and for each verdict and selection, and the way back. Does not belong
here: the training files (`exports`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty

_VERDICT = ("is_selected", "reason", "score", "position")


def head(decisions: Iterable[StoredTable]) -> pl.DataFrame:
    """No row, with a column for each model and selection of any of these batches."""
    return flat_scores(pl.concat([empty(tables.Decisions), *(_one_of_each(table) for table in decisions)])).clear()


def write(decisions: StoredTable, columns: pl.DataFrame, file: Path) -> None:
    """Write decision and scores of every input row of a batch, flat, part by part: joins on the row key or on pair_id.

    Args:
        decisions: of the batch.
        columns: as `head` gives them for all batches of the version, so that all its files have the same.
        file: that is written.
    """
    with file.open("wb") as stream:
        writer = parquet_file.Writer(stream, columns.schema)
        for part in decisions.parts():
            writer.append(pl.concat([columns, flat_scores(part)], how="diagonal"))
        writer.close({})


def _one_of_each(decisions: StoredTable) -> pl.DataFrame:
    """A row of a batch with scores and one with verdicts, as far as there are any: all others have the same models and
    selections.
    """
    scored, judged = (pl.col(name).list.len() > 0 for name in ("scores", "verdicts"))
    found = empty(tables.Decisions)
    for part in decisions.parts():
        found = pl.concat([found, part.filter(scored).head(1), part.filter(judged).head(1)])
        if not found.filter(judged).is_empty():
            break
    return found


def flat_scores(decisions: pl.DataFrame) -> pl.DataFrame:
    """Decisions with a column for each score and model (`rmi_strong`) and each selection (`is_selected:diff_high`)."""
    return to_columns(to_columns(decisions, "scores"), "verdicts", ":", _VERDICT)


def lines(scores: pl.DataFrame, batches: Sequence[str], selection: str) -> pl.DataFrame:
    """The key and the `line`, from 1, of each record of a selection in the training files of a version.

    Args:
        scores: of the version, with at least the key, `is_selected:` and `position:` of the selection.
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
