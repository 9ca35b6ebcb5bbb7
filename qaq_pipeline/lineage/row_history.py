"""The history of a row: its decision now and in every published version, and what made it. Reads only. No Dagster.

Belongs here: finding rows by place, pair or text, and their fates.
Does not belong here: texts for people (`selection.explanations`, `cli`), and the reasons of decisions.

Only a search by text reads whole tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline.publication import versions
from qaq_pipeline.publication.flat_scores import nested_row
from qaq_pipeline.publication.versions import Published
from qaq_pipeline.schema import vocabularies
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import RECORD_KEY, ROW_KEY, without_records_of
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import FoundRows

MOST_ROWS = 20
"""Maximum number of rows that a search returns."""

_READERS = 16
"""Number of batches that are searched for a pair at the same time."""

_FATE = (*ROW_KEY, "pair_id", "decision", "reason", "explanation", "provenance_id")


@dataclass(frozen=True, slots=True)
class Fate:
    """The state of a row in a published version."""

    published: Published
    fault: str | None
    """Why nothing is known about the row: the version's files were not kept, or cannot be read."""
    has_batch: bool
    """True if the row's batch is in the version."""
    left_out: str | None
    """Why it did not; None: it did, or it was not registered then."""
    row: dict[str, Any] | None
    """Some columns of the version's scores; None: the row was not delivered then."""

    @property
    def is_published(self) -> bool:
        """True if the row is in the published selection of the version."""
        return self.row is not None and self.row["decision"] == vocabularies.Decision.SELECTED.value


@dataclass(frozen=True, slots=True)
class Matches:
    """The rows of a batch that contain a text."""

    batch: str
    rows: list[dict[str, Any]]
    """The rows found, at most the first `MOST_ROWS`, each with key, pair_id, query and answer. The texts of a row that
    was withdrawn, or not screened yet, are left out."""
    number: int
    """Number of all rows found."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The rows found for a question."""

    rows: list[dict[str, Any]]
    """Rows in the form of decisions."""
    unindexed: tuple[str, ...] = ()
    """Tables that were searched completely because they have no current index."""


# --- rows ------------------------------------------------------------------------------------------------------------


def find_row(storage: Storage, batch: str, row: str, version: Published | None = None) -> Answer:
    """The rows of a batch that match a name, in the current decisions or in a published version.

    Args:
        storage: where they are stored.
        batch: name of the batch.
        row: as `row_lookup.meant` reads it.
        version: None: the current decisions.

    Raises:
        StorageError: the batch has no decisions, or the version's files are gone.
    """
    for where in row_lookup.meant_in(batch, row):
        column, _, value = where[0]
        if column == "pair_id":
            answer = find_pair(storage, value, version, [batch])
        else:
            answer = Answer(_rows(storage, [("batch", "==", batch), *where], version, batch))
        if answer.rows:
            return answer
    if version is None:
        storage.tables.footer("decisions", Partition(batch))
    return Answer([])


def find_pair(
    storage: Storage, start: str, version: Published | None = None, batches: Sequence[str] | None = None
) -> Answer:
    """The rows whose pair_id begins with `start`, in these batches or in all.

    Raises:
        StorageError: a batch has no decisions, or the version's files are gone.
    """
    if version is not None:
        _check_kept(storage, version)
        found = versions.find_pair(storage, version.version, start, MOST_ROWS, batches or ())
        return Answer(_nested(found.frame), () if found.is_indexed else (f"version {version.number}",))
    asked = storage.tables.batches_with("decisions") if batches is None else batches

    def find(batch: str) -> FoundRows:
        return storage.tables.find_pair(start, MOST_ROWS, "decisions", Partition(batch))

    with ThreadPoolExecutor(_READERS) as readers:  # In a remote storage each batch takes several round trips.
        answers = dict(zip(asked, readers.map(find, asked), strict=True))
    rows = [row for found in answers.values() for row in _dicts(found.frame)]
    unindexed = tuple(f"decisions of {batch}" for batch, found in answers.items() if not found.is_indexed)
    return Answer(rows[:MOST_ROWS], unindexed)


def _rows(storage: Storage, where: row_lookup.Where, version: Published | None, batch: str) -> list[dict[str, Any]]:
    if version is not None:
        _check_kept(storage, version)
        return _nested(versions.find_rows(storage, version.version, where))[:MOST_ROWS]
    return _dicts(storage.tables.find(where, "decisions", Partition(batch)))[:MOST_ROWS]


def _dicts(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [] if frame.is_empty() else list(frame.sort(ROW_KEY).iter_rows(named=True))


def _nested(flat: pl.DataFrame) -> list[dict[str, Any]]:
    return [nested_row(row) for row in _dicts(flat)]


def find_anywhere(storage: Storage, find: Callable[[Published | None], Answer]) -> tuple[Answer, Published | None]:
    """The rows of the current decisions, else of the newest version that has any; and which that is.

    Raises:
        StorageError: none has anything, and the decisions could not be read.
    """
    failure = None
    for version in [None, *reversed(versions.publications(storage))]:
        try:
            answer = find(version)
        except StorageError as error:
            failure = error if version is None else failure
            continue
        if answer.rows:
            return answer, version
    if failure is not None:
        raise failure
    return Answer([]), None


def text_of(storage: Storage, row: dict[str, Any]) -> dict[str, str | None]:
    """Query, answer and delivered record of a row as its batch is delivered now, as far as they may be shown.

    Empty if the batch has no such row any more, or another text in its place, or if the row was withdrawn. Without the
    record if another turn of it was withdrawn.
    """
    where = row_lookup.of_key([row[name] for name in ROW_KEY])
    columns = ("pair_id", "query", "answer", "record")
    try:
        found = storage.tables.find(where, "raw_data", Partition(row["batch"]), columns=columns)
        withdrawn = withdrawn_turns(storage, row)
    except StorageError:
        return {}
    same = found.filter(pl.col("pair_id").eq_missing(pl.lit(row["pair_id"], pl.String)))
    if same.is_empty() or row["turn_index"] in withdrawn:
        return {}
    return same.select(columns[1:-1] if withdrawn else columns[1:]).row(0, named=True)


def withdrawn_turns(storage: Storage, row: Mapping[str, Any]) -> list[int]:
    """The turns of the record of a row that were withdrawn."""
    where = row_lookup.of_record([row[name] for name in RECORD_KEY])
    columns = ["turn_index", "status"]
    turns = storage.tables.find(where, "screened_data", Partition(row["batch"]), columns=columns)
    return turns.filter(status=Status.WITHDRAWN.value)["turn_index"].to_list()


def validity_of(storage: Storage, row: dict[str, Any], inputs: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """What each signal says of the pair of a row: signal, evidence, cut, null_reason (of the cut), is_raised and
    is_reason (it is the one that declares the pair invalid), in the order of the signals; empty: it was not judged.

    Args:
        storage: where it is stored.
        row: the row of decisions.
        inputs: data versions of the inputs of its decision.

    Returns:
        None where the validity that the decision used is no longer stored.
    """
    partition, names = Partition(row["batch"]), ("validity", "validity_cuts")
    if row["pair_id"] is None or not row["scores"] or not inputs.keys() >= set(names):
        return []
    if any(storage.tables.version(name, partition) != inputs[name] for name in names):
        return None
    where: row_lookup.Where = [("pair_id", "==", row["pair_id"])]
    judged = storage.tables.find(where, "validity", partition).to_dicts()
    cuts = {cut["signal"]: cut for cut in storage.tables.read("validity_cuts", partition).frame.to_dicts()}
    return [
        found
        | {name: cuts[found["signal"]][name] for name in ("cut", "null_reason")}
        | {"is_reason": found["signal"] == pair["invalid_by"]}
        for pair in judged
        for found in pair["signals"]
    ]


def find_text(storage: Storage, text: str, batches: Sequence[str] | None = None) -> Iterator[Matches]:
    """The rows of each batch whose query, answer or record contains a text; each run of white space counts as a space.

    Every row of raw_data is read, some thousand at a time.

    Raises:
        StorageError: a batch has no raw_data, or it cannot be read.
        ValueError: the text is only white space, which every row holds.
    """
    for batch in storage.tables.batches_with("raw_data") if batches is None else batches:
        rows: list[dict[str, Any]] = []
        number = 0
        for found in with_text(storage, text, batch):
            number += found.height
            rows += _with_shown_texts(storage, batch, found[: MOST_ROWS - len(rows)]).iter_rows(named=True)
        yield Matches(batch, rows, number)


def _with_shown_texts(storage: Storage, batch: str, rows: pl.DataFrame) -> pl.DataFrame:
    """The rows without the texts of those that were withdrawn; without any where the batch was not screened yet."""
    try:
        hidden = withdrawn_rows(storage, batch)
    except StorageError:
        hidden = rows.select(ROW_KEY)
    marked = rows.join(hidden.with_columns(is_hidden=True), on=ROW_KEY, how="left", maintain_order="left")
    return marked.with_columns(pl.when(pl.col("is_hidden").is_null()).then(pl.col("query", "answer"))).drop("is_hidden")


def with_text(storage: Storage, text: str, batch: str, withdrawn: pl.DataFrame | None = None) -> Iterator[pl.DataFrame]:
    """All rows of a batch that contain a text, as `find_text` finds them: key, pair_id, query, answer.

    Args:
        storage: where they are stored.
        text: what to look for.
        batch: name of the batch.
        withdrawn: keys of rows that are not found, and whose records are not searched, for the other turns neither.

    Raises:
        StorageError: the batch has no raw_data, or it cannot be read.
        ValueError: the text is only white space, which every row holds.
    """
    wanted = " ".join(text.split())
    if not wanted:
        raise ValueError("the text to look for is empty or only white space; give some words of the row")
    columns = [*ROW_KEY, "pair_id", "query", "answer", "record"]
    parts = pl.col("query", "answer", "record").fill_null("").str.replace_all(r"\s+", " ")
    holds = pl.any_horizontal(parts.str.contains(wanted, literal=True))
    for chunk in storage.tables.scan("raw_data", Partition(batch), columns=columns):
        searched = chunk
        if withdrawn is not None:
            searched = without_records_of(
                chunk.join(withdrawn, on=ROW_KEY, how="anti", maintain_order="left"), withdrawn
            )
        yield searched.filter(holds).drop("record")


def withdrawn_rows(storage: Storage, batch: str) -> pl.DataFrame:
    """Keys of the rows of a batch that were withdrawn."""
    parts = storage.tables.scan("screened_data", Partition(batch), [*ROW_KEY, "status"])
    return pl.concat(part.filter(status=Status.WITHDRAWN.value).select(ROW_KEY) for part in parts)


# --- versions --------------------------------------------------------------------------------------------------------


def fates(storage: Storage, row: dict[str, Any]) -> list[Fate]:
    """The fate of the row at this place in each published version, by version number."""
    key = [row[name] for name in ROW_KEY]
    return [_fate(storage, published, key) for published in versions.publications(storage)]


def _fate(storage: Storage, published: Published, key: Sequence[Any]) -> Fate:
    version = published.version
    if not versions.is_kept(storage, version):
        return Fate(published, "its files were not kept", has_batch=False, left_out=None, row=None)
    try:
        entries = versions.read_manifest(storage, version)["batches"]
        has_batch = any(entry["batch"] == key[0] for entry in entries)
        where = row_lookup.of_key(key)
        found = _dicts(versions.find_rows(storage, version, where, _FATE)) if has_batch else []
    except StorageError as error:
        return Fate(published, str(error), has_batch=False, left_out=None, row=None)
    left_out = None if has_batch else published.excluded_batches.get(key[0])
    return Fate(published, None, has_batch, left_out, row=found[0] if found else None)


def _check_kept(storage: Storage, published: Published) -> None:
    if not versions.is_kept(storage, published.version):
        raise StorageError(
            f"version {published.number} ({published.version}): its files were not kept (publication.keep_versions); "
            "its manifest is in retired/"
        )
