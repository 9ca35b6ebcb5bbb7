"""What became of a row, now and in every published version. Reading only; no Dagster.

Belongs here: finding rows by place, pair or text, and their fates.
Does not belong here: words for people (`explanations`, `cli`), and why a row was decided as it was.

Rows are found without reading whole tables, but for a search by text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline.publication import versions
from qaq_pipeline.publication.versions import Published
from qaq_pipeline.schema import tables, vocabularies
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import FoundRows

MOST_ROWS = 20
"""Rows of one answer, at most."""

_READERS = 16
"""Batches that are asked for a pair at once."""

_FATE = (*ROW_KEY, "pair_id", "decision", "reason", "explanation", "provenance_id")


@dataclass(frozen=True, slots=True)
class Fate:
    """What a published version says of a row."""

    published: Published
    fault: str | None
    """Why nothing is known of the row: the version's files were not kept, or cannot be read."""
    has_batch: bool
    """Whether the row's batch entered the version."""
    left_out: str | None
    """Why it did not, where that is recorded."""
    row: dict[str, Any] | None
    """As in scores.parquet, as far as a fate is told by it; None: it was not delivered then."""

    @property
    def is_published(self) -> bool:
        """Whether the version has the row in its published selection."""
        return self.row is not None and self.row["decision"] == vocabularies.Decision.SELECTED.value


@dataclass(frozen=True, slots=True)
class Matches:
    """The rows of a batch that hold a text."""

    batch: str
    rows: list[dict[str, Any]]
    """The first of them, `MOST_ROWS` at most: their key, pair_id, query and answer."""
    number: int
    """Of all."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The rows that were asked for."""

    rows: list[dict[str, Any]]
    """As in decisions; of a version, as in scores.parquet."""
    unindexed: tuple[str, ...] = ()
    """Where there was no index of the table as it is, so that all of it was looked through."""


# --- rows ------------------------------------------------------------------------------------------------------------


def find_row(storage: Storage, batch: str, row: str, version: Published | None = None) -> Answer:
    """The rows of a batch that a person means, in the current decisions or in a published version.

    Args:
        storage: where they lie.
        batch: name of the batch.
        row: as `lookup.meant` reads it.
        version: None: the current decisions.

    Raises:
        StorageError: the batch has no decisions, or the version's files are gone.
    """
    for where in row_lookup.meant_in(batch, row):
        is_pair = where[0][0] == "pair_id"
        answer = (
            find_pair(storage, where[0][2], version, [batch])
            if is_pair
            else Answer(_rows(storage, [("batch", "==", batch), *where], version, batch))
        )
        if answer.rows:
            return answer
    if version is None:
        storage.tables.footer("decisions", Partition(batch))
    return Answer([])


def find_pair(
    storage: Storage, start: str, version: Published | None = None, batches: Sequence[str] | None = None
) -> Answer:
    """The rows whose pair_id begins so, of these batches or of any.

    Raises:
        StorageError: a batch has no decisions, or the version's files are gone.
    """
    if version is not None:
        where = _scores_of(storage, version)
        sha256 = _manifest(storage, version.version)["files"]["scores.parquet"]
        index = versions.pair_index(version.version)
        found = storage.tables.find_pair_in_file(start, where, index, sha256, MOST_ROWS, batches)
        return Answer(_nested(found.frame), () if found.is_indexed else (f"version {version.number}",))
    rows, unindexed = [], []
    asked = storage.tables.batches_with("decisions") if batches is None else batches

    def find(batch: str) -> FoundRows:
        return storage.tables.find_pair(start, "decisions", Partition(batch), most=MOST_ROWS)

    with ThreadPoolExecutor(_READERS) as readers:  # Of a remote storage each batch takes some round trips.
        answers = list(readers.map(find, asked))
    for batch, found in zip(asked, answers, strict=True):
        rows += _dicts(found.frame)
        unindexed += [] if found.is_indexed else [f"decisions of {batch}"]
    return Answer(rows[:MOST_ROWS], tuple(unindexed))


def _rows(storage: Storage, where: row_lookup.Where, version: Published | None, batch: str) -> list[dict[str, Any]]:
    if version is not None:
        return _nested(storage.tables.find_in_file(where, *_scores_of(storage, version)))[:MOST_ROWS]
    return _dicts(storage.tables.find(where, "decisions", Partition(batch)))[:MOST_ROWS]


def _dicts(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [] if frame.is_empty() else list(frame.sort(ROW_KEY).iter_rows(named=True))


def _nested(flat: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of scores.parquet with their scores and verdicts in lists, as in decisions, as far as the file has them."""
    roles = [name.removeprefix("num_strata_") for name in flat.columns if name.startswith("num_strata_")]
    selections = [name.removeprefix("is_selected:") for name in flat.columns if name.startswith("is_selected:")]
    rows = []
    for row in _dicts(flat):
        scores = [
            {"model": role} | {name: row.get(f"{name}_{role}") for name in tables.MODEL_SCORE.inner if name != "model"}
            for role in roles
            if row[f"num_strata_{role}"] is not None
        ]
        verdicts = [
            {"selection": name}
            | {f: row[f"{f}:{name}"] for f in ("is_selected", "reason", "score", "position") if f"{f}:{name}" in row}
            for name in selections
            if row[f"is_selected:{name}"] is not None
        ]
        rows.append(row | {"scores": scores, "verdicts": verdicts})
    return rows


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
    """Query, answer and delivered record of a row, as its batch stands delivered now; empty where it has no such row.

    Of a row that was delivered anew with another text, nothing.
    """
    where = row_lookup.of_key([row[name] for name in ROW_KEY])
    columns = ("pair_id", "query", "answer", "record")
    try:
        found = storage.tables.find(where, "raw_data", Partition(row["batch"]), columns=columns)
    except StorageError:
        return {}
    same = found.filter(pl.col("pair_id").eq_missing(pl.lit(row["pair_id"], pl.String)))
    return {} if same.is_empty() else same.select(columns[1:]).row(0, named=True)


def find_text(storage: Storage, text: str, batches: Sequence[str] | None = None) -> Iterator[Matches]:
    """Batch after batch, the rows whose query, answer or record holds a text, every run of white space being one space.

    Every row of raw_data is read, some thousand at a time.

    Raises:
        StorageError: a batch has no raw_data, or it cannot be read.
        ValueError: the text is only white space, which every row holds.
    """
    wanted = " ".join(text.split())
    if not wanted:
        raise ValueError("the text to look for is empty or only white space; give some of its words")
    columns = [*ROW_KEY, "pair_id", "query", "answer", "record"]
    parts = pl.col("query", "answer", "record").fill_null("").str.replace_all(r"\s+", " ")
    holds = pl.any_horizontal(parts.str.contains(wanted, literal=True))
    for batch in storage.tables.batches_with("raw_data") if batches is None else batches:
        rows: list[dict[str, Any]] = []
        number = 0
        for chunk in storage.tables.scan("raw_data", Partition(batch), columns=columns):
            found = chunk.filter(holds).drop("record")
            number += found.height
            rows += found[: MOST_ROWS - len(rows)].iter_rows(named=True)
        yield Matches(batch, rows, number)


# --- versions --------------------------------------------------------------------------------------------------------


def fates(storage: Storage, row: dict[str, Any]) -> list[Fate]:
    """What each published version says of the row at that place, in the order of the versions' numbers."""
    key = [row[name] for name in ROW_KEY]
    return [_fate(storage, published, key) for published in versions.publications(storage)]


def _fate(storage: Storage, published: Published, key: Sequence[Any]) -> Fate:
    where = _scores(published)
    if not storage.files.exists(*where):
        return Fate(published, "its files were not kept", has_batch=False, left_out=None, row=None)
    try:
        entries = _manifest(storage, published.version)["batches"]
        has_batch = any(entry["batch"] == key[0] for entry in entries)
        found = _dicts(storage.tables.find_in_file(row_lookup.of_key(key), *where, columns=_FATE)) if has_batch else []
        left_out = None if has_batch else (versions.left_out(storage, published) or {}).get(key[0])
    except StorageError as error:
        return Fate(published, str(error), has_batch=False, left_out=None, row=None)
    return Fate(published, None, has_batch, left_out, row=found[0] if found else None)


def _scores_of(storage: Storage, published: Published) -> tuple[str, ...]:
    parts = _scores(published)
    if not storage.files.exists(*parts):
        raise StorageError(
            f"version {published.number} ({published.version}): its files were not kept (publication.keep_versions); "
            "its manifest is in retired/"
        )
    return parts


def _scores(published: Published) -> tuple[str, ...]:
    return versions.FOLDER, published.version, "scores.parquet"


def _manifest(storage: Storage, version: str) -> dict[str, Any]:
    return storage.files.read_json(versions.FOLDER, version, "manifest.json")
