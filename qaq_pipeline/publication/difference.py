"""The difference between two versions: the rows that entered and left, and why. No Dagster.

Belongs here: the comparison. Does not belong here: where it is stored (`versions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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

Changes = list[tuple[str, str, int]]
"""Counts of a Difference by cause: `entered` or `left`, the change, rows. Those that entered are first."""

COUNTED = ["is_added", "change"]
"""The columns of a Difference that `count_changes` reads."""

_KEY = [*ROW_KEY, "pair_id"]
_NO_DIFFERENCE = empty(tables.Difference)
_DECISIONS = tables.dtypes(tables.Decisions)
_NO_SCORES = pl.DataFrame(schema={name: _DECISIONS[name] for name in (*_KEY, "decision", "reason")})
_NO_KEYS = pl.DataFrame(schema={name: _DECISIONS[name] for name in _KEY})


def store_difference(storage: Storage, older: str, newer: str) -> Changes:
    """Compare two stored versions, store the difference if they are not the same version, and count its rows."""
    if older == newer:
        return []
    counts = [_count(_NO_DIFFERENCE)]
    with storage.files.writing(*versions.difference_place(older, newer)) as stream:
        writer = parquet_file.Writer(stream, _NO_DIFFERENCE.schema)
        try:
            for found in _of_batches(storage, older, newer):
                writer.append(found)
                counts.append(_count(found))
        finally:  # Else it would be closed after its stream.
            writer.close({})
    return _sorted(pl.concat(counts))


def compare(storage: Storage, older: str, newer: str) -> pl.DataFrame:
    """Compare two stored versions, named by their hashes. Raises StorageError."""
    return pl.concat([_NO_DIFFERENCE, *_of_batches(storage, older, newer)])


def _of_batches(storage: Storage, older: str, newer: str) -> Iterator[pl.DataFrame]:
    """The difference in each batch, by its name.

    Batches that both versions have with the same decisions have no difference, and are not read.
    """
    before, after = (versions.decided_batches(storage, version) for version in (older, newer))
    columns = (*_KEY, "decision", "reason")

    def scores(version: str, batches: Mapping[str, str], batch: str) -> Scores:
        return partial(versions.scan_batch, storage, version, batch, columns) if batch in batches else list

    for batch in sorted({batch for batch, _ in before.items() ^ after.items()}):
        yield difference(scores(older, before, batch), scores(newer, after, batch))


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
    found, batches = [_NO_KEYS], set()
    for part in scores():
        found.append(part.filter(decision=Decision.SELECTED.value).select(_KEY))
        batches |= set(part["batch"].unique())
    return pl.concat(found), sorted(batches)


def count_changes(found: pl.DataFrame) -> Changes:
    """Count the rows of a Difference, of which it needs the columns `COUNTED`."""
    return _sorted(_count(found))


def _count(found: pl.DataFrame) -> pl.DataFrame:
    return found.group_by(COUNTED).agg(rows=pl.len())


def _sorted(counts: pl.DataFrame) -> Changes:
    """The sums of `_count` of some differences."""
    sums = counts.group_by(COUNTED).agg(pl.col("rows").sum())
    ordered = sums.sort(COUNTED, descending=[True, False])
    return [("entered" if added else "left", change, rows) for added, change, rows in ordered.iter_rows()]
