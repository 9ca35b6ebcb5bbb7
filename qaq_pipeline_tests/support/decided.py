"""The decisions of a whole batch at once, from frames that are no stored tables."""

from __future__ import annotations

import polars as pl

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection import decisions
from qaq_pipeline.selection.decisions import DecidedPairs
from qaq_pipeline.storage.stored_table import StoredTable


def decide(
    raw: pl.DataFrame,
    screened: pl.DataFrame,
    candidates: pl.DataFrame,
    verdicts: pl.DataFrame,
    published: Selection,
    provenance_id: str,
    gate: Gate | None = None,
    why_invalid: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The Decisions of a batch, from its RawData and ScreenedData; the rest as `decisions.decide`."""
    rows = screened.join(raw.select(*ROW_KEY, "detail"), on=ROW_KEY, validate="1:1")
    pairs = DecidedPairs(candidates, verdicts, published)
    return decisions.decide(rows, pairs, provenance_id, gate, why_invalid)


def selected_rows(selection: str, raw: pl.DataFrame, decided: pl.DataFrame) -> pl.DataFrame:
    """The SelectedSubset of a selection, from RawData and Decisions."""
    return decisions.selected_rows(selection, StoredTable(raw), StoredTable(decided))


def kept_rows(raw: pl.DataFrame, screened: pl.DataFrame) -> list[pl.DataFrame]:
    """The rows of the distinct pairs with their clusters, one at a time."""
    accepted = screened.filter(pl.col("status") == Status.ACCEPTED.value).select(*ROW_KEY, "cluster")
    rows = raw.join(accepted, on=ROW_KEY, validate="1:1", maintain_order="left")
    return list(rows.iter_slices(1))
