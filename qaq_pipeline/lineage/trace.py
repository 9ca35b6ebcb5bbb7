"""The path of one row of a version, through every table back to its delivered record. No Dagster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from qaq_pipeline.lineage import row_history
from qaq_pipeline.lineage.lineage import Batch, File, Lineage, LineageError, Shards, State, Table
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import exports, versions
from qaq_pipeline.publication.flat_scores import lines
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.row_place import ROW_KEY, RowPlace
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import empty

# --- one row --------------------------------------------------------------------------------------------------------

_SHOWN = {
    "selected_subset": ("position",),
    "decisions": ("decision", "reason"),
    "validity": ("invalid_by",),
    "disagreement_scores": ("gap", "ranks"),
    "rmi_scores": ("rmi", "log_ppl_q", "log_ppl_q_given_a"),
    "logprobs": ("sum_nll_q", "sum_nll_q_given_a", "num_q_tokens"),
    "screened_data": ("status", "reason", "duplicate_of"),
    "signatures": ("content_hash",),
    "raw_data": ("status", "reason", "record"),
}
"""Columns that are shown of a row, by table."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row's place in a table, from 1, and its values there."""

    table: Table
    number: int
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowPath:
    """The path of one delivered row, or of one turn of it, into a version."""

    row: str
    """batch/file:row.turn"""
    pair_id: str | None
    exported: dict[str, int]
    """Number of its record, from 1, in each exported file that contains it."""
    tables: tuple[TableRow, ...]
    """The rows of this delivered row, in those tables that have not changed since the version was published."""
    shards: tuple[str, ...]
    """Paths of the shards that contain scores of the pair."""
    delivered: File
    source_row: int


def trace(storage: Storage, lineage: Lineage, row: str) -> list[RowPath]:
    """The paths of the rows that match `batch/file:row`, with or without `.turn`: one for each turn.

    Tables are read one at a time.

    Raises:
        LineageError: the version has no such batch, or no such row, or its files are not kept.
        StorageError: a file cannot be read.
    """
    name, _, place = row.partition("/")
    batch = next((batch for batch in lineage.batches if batch.name == name), None)
    if batch is None:
        known = ", ".join(one.name for one in lineage.batches) or "none"
        raise LineageError(f"{row!r}: version {lineage.version} has no batch {name!r}; it has {known}")
    if not lineage.is_kept:
        raise LineageError(f"the files of version {lineage.version} were not kept; only its manifest is stored")
    columns = (*ROW_KEY, "pair_id")
    for where in row_lookup.meant(place):
        keys = versions.find_rows(storage, lineage.version, [("batch", "==", name), *where], columns)
        if not keys.is_empty():
            break
    else:
        raise LineageError(f"{row!r}: batch {name} has no such row; give it as {name}/FILE:ROW or {name}/FILE:ROW.TURN")
    exported = _record_numbers(storage, lineage, keys)
    in_tables = [_rows_of(storage, table, keys) for table in batch.tables]
    return [
        _path(storage, batch, key, numbers, rows)
        for key, numbers, *rows in zip(keys.iter_rows(named=True), exported, *in_tables, strict=True)
    ]


def _record_numbers(storage: Storage, lineage: Lineage, keys: pl.DataFrame) -> list[dict[str, int]]:
    """Number of each row in each exported file: batches in the order of the manifest, rows as selected."""
    batches = [batch.name for batch in lineage.batches]
    known = versions.columns_of_scores(storage, lineage.version)
    numbers: list[dict[str, int]] = [{} for _ in range(keys.height)]
    for selection in {file.name.partition("/")[0] for file in lineage.files if "/" in file.name}:
        if f"is_selected:{selection}" not in known:
            continue
        of_selection = (*ROW_KEY, f"is_selected:{selection}", f"position:{selection}")
        taken = lines(versions.find_rows(storage, lineage.version, [], of_selection), batches, selection)
        found = keys.join(taken, on=ROW_KEY, how="left", maintain_order="left")["line"]
        files = [file.name for file in lineage.files if _holds_records(file.name, selection)]
        for row, number in enumerate(found):
            numbers[row] |= {} if number is None else dict.fromkeys(files, number)
    return numbers


def _holds_records(file: str, selection: str) -> bool:
    """True if a file contains records of a selection: in a folder saved by `datasets`, only the Arrow file does."""
    folder, _, name = file.partition("/")
    is_training_file = folder == selection and exports.format_of(name) is not None
    return is_training_file and ("/" not in name or name.endswith(".arrow"))


def _rows_of(storage: Storage, table: Table, keys: pl.DataFrame) -> list[TableRow | None]:
    """The table's row for each key; None: it has none, or the table has changed since the version was published."""
    if table.name not in _SHOWN or table.state not in (State.AS_PUBLISHED, State.SAME_CONTENT):
        return [None] * keys.height
    known, shown = PIPELINE[table.name].table.columns(), _SHOWN[table.name]
    on = [name for name in ROW_KEY if name in known] or ["pair_id"]
    of_keys = [empty(PIPELINE[table.name].table).select(*on, *shown, number=pl.lit(None, pl.Int64))]
    start = 1
    for part in storage.tables.read(table.name, table.partition).parts(*on, *shown):
        numbered = part.with_columns(number=pl.int_range(start, start + part.height, dtype=pl.Int64))
        of_keys.append(numbered.join(keys, on=on, how="semi"))
        start += part.height
    rows = pl.concat(of_keys)
    found = keys.select(on).join(rows, on=on, how="left", maintain_order="left", validate="m:1").drop(on)
    if "ranks" in shown:
        found = to_columns(found, "ranks", fields=["rank"])
    return [
        None if facts["number"] is None else TableRow(table, facts.pop("number"), facts)
        for facts in found.iter_rows(named=True)
    ]


def _is_hidden(storage: Storage, key: Mapping[str, Any]) -> bool:
    """Whether a turn of the record was withdrawn, or nobody knows."""
    try:
        return bool(row_history.withdrawn_turns(storage, key))
    except StorageError:
        return True


def _path(
    storage: Storage, batch: Batch, key: Mapping[str, Any], exported: dict[str, int], rows: Iterable[TableRow | None]
) -> RowPath:
    known = [row for row in rows if row is not None]
    if _is_hidden(storage, key):
        known = [replace(row, facts=row.facts | dict.fromkeys(row.facts.keys() & {"record"})) for row in known]
    return RowPath(
        row=str(RowPlace.of(key)),
        pair_id=key["pair_id"],
        exported=exported,
        tables=tuple(known),
        shards=tuple(_holding(storage, batch.scores, key["pair_id"])),
        delivered=next(file for file in batch.delivery.files if file.name == key["source_file"]),
        source_row=key["source_row"],
    )


def _holding(storage: Storage, scores: Iterable[Shards], pair_id: str | None) -> Iterator[str]:
    for shards in scores:
        for name in storage.scores.holding(shards.digest, pair_id) if pair_id else ():
            yield f"{shards.path}/{name}"
