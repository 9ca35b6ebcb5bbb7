"""The difference between two versions: the rows that entered and left, and why. No Dagster.

Belongs here: the comparison. Does not belong here: where it is stored (`versions`).
"""

from __future__ import annotations

import polars as pl

from qaq_pipeline.publication import versions
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Change, Decision
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.storage import Storage


def store_difference(storage: Storage, older: str, newer: str) -> pl.DataFrame:
    """Compare two stored versions, and store the difference if they are not the same version."""
    found = compare(storage, older, newer)
    if older != newer:
        storage.files.write_bytes(parquet_file.encode(found, {}), *versions.difference_place(older, newer))
    return found


def compare(storage: Storage, older: str, newer: str) -> pl.DataFrame:
    """Compare two stored versions, named by their hashes. Raises StorageError."""
    return difference(versions.read_scores(storage, older), versions.read_scores(storage, newer))


def difference(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Difference between two versions, from their scores.

    A row is the same if its place and its text are. If a row was delivered again with another text, the old row left
    and the new one entered.
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
        .when(pl.col("decision_after") == Decision.WITHDRAWN.value)
        .then(pl.lit(Change.WITHDRAWN.value))
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


def count_changes(found: pl.DataFrame) -> list[tuple[str, str, int]]:
    """Count the rows of a Difference that entered, then those that left, by cause."""
    counts = found.group_by("is_added", "change").len().sort("is_added", "change", descending=[True, False])
    return [("entered" if added else "left", change, n) for added, change, n in counts.iter_rows()]
