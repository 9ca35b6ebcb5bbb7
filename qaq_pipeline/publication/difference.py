"""The difference of two versions: rows that entered and left, and why."""

from __future__ import annotations

import polars as pl

from qaq_pipeline.publication import exports
from qaq_pipeline.publication.versions import FOLDER
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Change, Decision
from qaq_pipeline.storage.storage import Storage


def store_difference(storage: Storage, older: str, newer: str) -> pl.DataFrame:
    """The difference of two stored versions; it is stored beside them."""
    before, after = (_read_scores(storage, version) for version in (older, newer))
    found = difference(before, after)
    if older != newer:
        storage.files.write_bytes(exports.parquet(found), FOLDER, "differences", f"{newer}_from_{older}.parquet")
    return found


def _read_scores(storage: Storage, version: str) -> pl.DataFrame:
    return storage.files.read_frame(FOLDER, version, "scores.parquet")


def difference(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """The Difference of two versions, from their scores.parquet.

    A row is the same where its place and its text are: of a row that was delivered anew with another text, the old one
    left and the new one entered.
    """
    key = [*ROW_KEY, "pair_id"]
    old, new = (frame.select(*key, "decision", "reason").drop_nulls("pair_id") for frame in (before, after))
    both = old.join(new, on=key, how="full", suffix="_after", coalesce=True)
    was, is_now = (pl.col(name).eq_missing(Decision.SELECTED.value) for name in ("decision", "decision_after"))
    batch_of = {"before": set(before["batch"]), "after": set(after["batch"])}
    changed = both.filter(was != is_now)
    change = (
        pl.when(~pl.col("batch").is_in(batch_of["before"]))
        .then(pl.lit(Change.BATCH_ENTERED.value))
        .when(~pl.col("batch").is_in(batch_of["after"]))
        .then(pl.lit(Change.BATCH_LEFT.value))
        .when(pl.col("decision").is_null())
        .then(pl.lit(Change.ROW_DELIVERED.value))
        .when(pl.col("decision_after").is_null())
        .then(pl.lit(Change.ROW_GONE.value))
        .otherwise(pl.lit(Change.DECIDED_OTHERWISE.value))
    )
    return tables.enforce(
        tables.Difference,
        changed.select(
            *key,
            is_added=is_now,
            change=change,
            decision_before="decision",
            reason_before="reason",
            decision_after="decision_after",
            reason_after="reason_after",
        ).sort(key),
    )
