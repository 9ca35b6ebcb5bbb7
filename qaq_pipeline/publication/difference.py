"""The difference between two versions: the rows that entered and left, and why. No Dagster.

Belongs here: the comparison. Does not belong here: where it is stored (`versions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import polars as pl

from qaq_pipeline.publication import versions
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Change, Decision
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import empty

Scores = Callable[[], Iterable[pl.DataFrame]]
"""Returns the key, pair_id, decision and reason of the rows of a version, part by part."""

_KEY = [*ROW_KEY, "pair_id"]
_NO_SCORES = empty(tables.Decisions).select(*_KEY, "decision", "reason")


def store_difference(storage: Storage, older: str, newer: str) -> pl.DataFrame:
    """Compare two stored versions, and store the difference if they are not the same version."""
    found = compare(storage, older, newer)
    if older != newer:
        storage.files.write_bytes(parquet_file.encode(found, {}), *versions.difference_place(older, newer))
    return found


def compare(storage: Storage, older: str, newer: str) -> pl.DataFrame:
    """Compare two stored versions, named by their hashes. Raises StorageError.

    Batches that both have with the same decisions have no difference, and are not read.
    """
    columns = (*_KEY, "decision", "reason")
    before, after = (versions.decided_batches(storage, version) for version in (older, newer))
    changed = [{batch for batch, _ in one.items() - other.items()} for one, other in ((before, after), (after, before))]
    scores = zip((older, newer), changed, strict=True)
    return difference(*(partial(versions.scan_scores, storage, version, columns, only) for version, only in scores))


def difference(before: Scores, after: Scores) -> pl.DataFrame:
    """Difference between two versions, from their scores, each of which is read twice.

    A row is the same if its place and its text are. If a row was delivered again with another text, the old row left
    and the new one entered.
    """
    (old, batches_before), (new, batches_after) = _selected(before), _selected(after)
    changed = pl.concat([old.join(new, on=_KEY, how="anti"), new.join(old, on=_KEY, how="anti")])
    was, is_now = (
        pl.concat([_NO_SCORES, *(part.join(changed, on=_KEY, how="semi") for part in scores())])
        for scores in (before, after)
    )
    both = was.join(is_now, on=_KEY, how="full", suffix="_after", coalesce=True)
    change = (
        pl.when(~pl.col("batch").is_in(batches_before))
        .then(pl.lit(Change.BATCH_ENTERED.value))
        .when(~pl.col("batch").is_in(batches_after))
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
        both.select(
            *_KEY,
            is_added=pl.col("decision_after").eq_missing(Decision.SELECTED.value),
            change=change,
            decision_before="decision",
            reason_before="reason",
            decision_after="decision_after",
            reason_after="reason_after",
        ).sort(_KEY),
    )


def _selected(scores: Scores) -> tuple[pl.DataFrame, list[str]]:
    """The key of each selected row, and the batches of all rows."""
    found, batches = [_NO_SCORES.select(_KEY)], set()
    for part in scores():
        found.append(part.filter(decision=Decision.SELECTED.value).select(_KEY))
        batches |= set(part["batch"].unique())
    return pl.concat(found), sorted(batches)


def count_changes(found: pl.DataFrame) -> list[tuple[str, str, int]]:
    """Count the rows of a Difference that entered, then those that left, by cause."""
    counts = found.group_by("is_added", "change").len().sort("is_added", "change", descending=[True, False])
    return [("entered" if added else "left", change, n) for added, change, n in counts.iter_rows()]
