"""The content of a version of the dataset, made from the batches that enter it, and its publication. No Dagster.

Belongs here: files and manifest of a version. Does not belong here: the formats of the files (`exports`,
`flat_scores`, `dataset_card`), where versions are stored (`versions`), and when one is published (`orchestration`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import polars as pl

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import ExportSettings, Settings
from qaq_pipeline.freshness.eligibility import split_by_eligibility
from qaq_pipeline.pipeline import PIPELINE, Pipeline
from qaq_pipeline.publication import dataset_card, exports, flat_scores, versions
from qaq_pipeline.publication.difference import Changes, store_difference
from qaq_pipeline.publication.earlier_version import EarlierVersion
from qaq_pipeline.publication.withdrawn import withdrawn_batches
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY, may_be_in
from qaq_pipeline.schema.tables import RawData, ScreenedData
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.selection import decisions
from qaq_pipeline.storage.files import sha256_of
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty

_WRITERS = 2
_BARRED = [status.value for status in (Status.WITHDRAWN, Status.CONTAMINATED, Status.HELD_OUT, Status.BETWEEN)]
"""Statuses of the rows whose text no published record shows, not even as another turn of its conversation."""


class NothingToPublishError(ValueError):
    """There is nothing to publish, or nothing is published yet. The text says why."""


@dataclass(frozen=True)
class BatchTables:
    """The tables of a batch that go into the dataset."""

    batch: str
    tables: Mapping[str, StoredTable]
    """By name: those that the pipeline declares as published."""

    def __getitem__(self, name: str) -> StoredTable:
        return self.tables[name]


@dataclass(frozen=True)
class Publication:
    """A version of the dataset, as published."""

    version: str
    manifest: dict[str, Any]
    url: str
    is_new: bool
    """True if its files were written now."""
    previous: str | None = None
    """The newest version before this publication."""
    changes: Changes | None = None
    """Counts of the rows that entered and left since then; None: there is no version before, or no files of it."""
    retired: tuple[str, ...] = ()
    """Versions whose files were removed now."""


def read_batches(
    storage: Storage, registered: Sequence[str], settings: Settings, pipeline: Pipeline = PIPELINE
) -> tuple[list[BatchTables], dict[str, str]]:
    """The batches that enter the dataset, and for every other registered batch the reason why it does not.

    Raises:
        StorageError: a table of a batch cannot be read, or was changed since it was written. The batch is not left out:
            a damaged disk must not take rows from the dataset.
    """
    included, excluded = split_by_eligibility(
        storage,
        registered,
        settings.ranking,
        settings.selections,
        settings.export,
        pipeline,
        refuses_damage=True,
    )
    tables = storage.tables
    batches = [
        BatchTables(batch, {name: tables.read(name, Partition(batch)) for name in footers})
        for batch, footers in included.items()
    ]
    return batches, excluded


def require_batches(storage: Storage, batches: Sequence[BatchTables], excluded: Mapping[str, str]) -> None:
    """Refuse an empty version, unless it removes withdrawn rows. Raises NothingToPublishError."""
    if not batches and not withdrawn_batches(storage, versions.latest(storage)):
        why = "; ".join(f"{batch}: {reason}" for batch, reason in excluded.items()) or "none is registered"
        raise NothingToPublishError(f"curated_dataset: no batch can be published; {why}")


def publish(
    storage: Storage,
    settings: Settings,
    batches: Sequence[BatchTables],
    excluded: Mapping[str, str],
    run_id: str | None = None,
) -> Publication:
    """Write a version, log it as the newest one, and retire old ones. Call it under `versions.lock`."""
    recipe, entries = _recipe(settings.published, settings.export), [_entry(batch) for batch in batches]
    with versions.unfinished(storage) as folder:
        earlier = EarlierVersion.newest(storage, recipe, entries)
        spans = write_files(folder, settings.published, settings.exported, settings.export, batches, earlier)
        manifest = {**recipe, "batches": entries, "files": _hashes(folder), "spans": spans}
        version, is_new = versions.store(storage, manifest, folder)
    keys = (part for batch in batches for part in batch["decisions"].parts(*ROW_KEY, "pair_id"))
    versions.index_pairs(storage, version, keys)
    newest = versions.latest(storage)
    previous = None if newest is None else newest.version
    changes = None
    if previous is not None and versions.is_kept(storage, previous):
        changes = store_difference(storage, previous, version)
    versions.record(storage, version, excluded, run_id)
    retired = versions.retire_oldest(storage, settings.publication.keep_versions)
    url = storage.files.url(*versions.place(version))
    return Publication(version, manifest, url, is_new, previous, changes, retired)


def is_current(storage: Storage, registered: Sequence[str], settings: Settings) -> bool:
    """True if a publication would repeat the newest version, judged by footers and settings alone."""
    included, _ = split_by_eligibility(storage, registered, settings.ranking, settings.selections, settings.export)
    newest = versions.latest(storage)
    if newest is None or not versions.is_kept(storage, newest.version):
        return not included
    published = versions.read_manifest(storage, newest.version)
    entered = {entry["batch"]: entry["data_versions"] for entry in published["batches"]}
    return (
        entered.keys() == included.keys()
        and all(
            entered[batch].get(name) == footer.data_version
            for batch, footers in included.items()
            for name, footer in footers.items()
        )
        and published | _recipe(settings.published, settings.export) == published
    )


def _recipe(published: Selection, export: ExportSettings) -> dict[str, Any]:
    """The part of a manifest that the settings determine."""
    return {
        "format": versions.MANIFEST_FORMAT,
        "selection": published.model_dump(mode="json"),
        "export": export.model_dump(mode="json"),
    }


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file in a folder, by its path there."""

    def sha256(path: Path) -> str:
        with path.open("rb") as stream:
            return sha256_of(stream)

    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = sorted(files)
    with ThreadPoolExecutor(_WRITERS) as pool:
        return dict(zip(names, pool.map(sha256, [files[name] for name in names]), strict=True))


def write_files(
    folder: Path,
    published: Selection,
    selections: Sequence[str],
    export: ExportSettings,
    batches: Sequence[BatchTables],
    earlier: EarlierVersion,
) -> dict[str, dict[str, exports.Span]]:
    """Write the files of a version: each exported selection in each format, the scores, and the card.

    The rows of one batch are in memory at a time.

    Returns:
        The bytes of each batch in each file of JSON.
    """
    exported, spans = {}, {}
    with ThreadPoolExecutor(_WRITERS) as pool:  # Polars and pyarrow do the work, so files are written side by side.
        scores = pool.submit(_write_scores, folder / versions.SCORES_FOLDER, batches, earlier)
        for selection in selections:
            chosen = None if selection == published.name else selection
            taken = earlier.unchanged_in(selection, export.written)
            with _SelectionFiles(folder / selection, export, pool) as files:
                for batch in batches:
                    if batch.batch in taken:
                        files.take(batch.batch, earlier)
                    else:
                        files.append(batch.batch, _rows_of(batch, chosen, export))
            exported[selection] = files.num_rows
            spans |= files.spans
        scores.result()
    turns = None
    if export.rows == "conversation":
        with (folder / published.name / exports.WRITTEN[exports.CONVERSATION].path).open(encoding="utf-8") as records:
            turns = exports.field_of_turns(records)
    entries = exports.llama_factory_entries(exported, export.written, turns)
    (folder / "dataset_info.json").write_bytes(json.dumps(entries, indent=2).encode() + b"\n")
    card = dataset_card.dataset_card(
        published,
        exported,
        export,
        next(iter(entries), None),
        [_entry(batch) for batch in batches],
        {batch.batch: batch.tables for batch in batches},
    )
    (folder / versions.CARD).write_bytes(card)
    return spans


def _write_scores(folder: Path, batches: Sequence[BatchTables], earlier: EarlierVersion) -> None:
    """Write the scores of each batch; all files have the same columns."""
    columns = flat_scores.head(batch["decisions"] for batch in batches)
    folder.mkdir()
    for batch in batches:
        file = folder / Path(versions.scores_name(batch.batch)).name
        if not earlier.copy_scores(batch.batch, columns.columns, file):
            flat_scores.write(batch["decisions"], columns, file)


class _SelectionFiles:
    """The files of a selection, which are written batch by batch, side by side.

    Args:
        folder: of the selection.
        export: what the files are.
        pool: writes them.
    """

    def __init__(self, folder: Path, export: ExportSettings, pool: Executor) -> None:
        folder.mkdir()
        self._selection, self._pool, self._open = folder.name, pool, ExitStack()
        self._records = {
            name: self._open.enter_context(exports.open_file(name, folder, has_meta=export.meta))
            for name in export.written
        }
        self._keys = self._open.enter_context(exports.KeysFile(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def append(self, batch: str, rows: pl.DataFrame) -> None:
        """Write the rows of a batch, best first."""
        self._write(batch, dict.fromkeys(self._records, rows))
        self._keys.append(exports.keys(rows))

    def take(self, batch: str, earlier: EarlierVersion) -> None:
        """Write the rows of an unchanged batch with the bytes of the version before."""
        found = {name: earlier.records(self._selection, name, batch) for name in self._records}
        self._write(batch, {name: records for name, records in found.items() if records is not None})
        self._keys.append(earlier.keys(self._selection, batch))

    def _write(self, batch: str, records: Mapping[str, Any]) -> None:
        list(self._pool.map(lambda name: self._records[name].append(batch, records[name]), records))

    @property
    def num_rows(self) -> int:
        """Number of records."""
        return self._keys.num_rows

    @property
    def spans(self) -> dict[str, dict[str, exports.Span]]:
        """The bytes of each batch in each file of JSON."""
        of_files = {
            f"{self._selection}/{exports.WRITTEN[name].path}": file.spans for name, file in self._records.items()
        }
        return {path: spans for path, spans in of_files.items() if spans is not None}


def _rows_of(batch: BatchTables, selection: str | None, export: ExportSettings) -> pl.DataFrame:
    """The rows of a selection of one batch."""
    rows = (
        batch["selected_subset"].frame
        if selection is None
        else decisions.selected_rows(selection, batch["raw_data"], batch["decisions"])
    )
    if export.reasoning == "leave_out":
        rows = rows.with_columns(reasoning=pl.lit(None, pl.String))
    if export.rows == "conversation":
        return exports.with_records(rows, _records(batch, rows))
    if not export.meta:
        return rows
    return exports.with_meta(rows, _records(batch, rows), _barred(batch))


def _records(batch: BatchTables, rows: pl.DataFrame) -> pl.DataFrame:
    """The delivered records of these rows of a batch."""
    columns = (*ROW_KEY, "record")
    found = [part.join(may_be_in(rows, part), on=ROW_KEY, how="semi") for part in batch["raw_data"].parts(*columns)]
    return pl.concat([empty(RawData).select(columns), *found])


def _barred(batch: BatchTables) -> pl.DataFrame:
    """The keys of the rows of a batch whose text no published record shows."""
    parts = batch["screened_data"].parts(*ROW_KEY, "status")
    barred = [part.filter(pl.col("status").is_in(_BARRED)).select(ROW_KEY) for part in parts]
    return pl.concat([empty(ScreenedData).select(ROW_KEY), *barred])


def _entry(batch: BatchTables) -> dict[str, Any]:
    """The entry of a batch in the manifest."""
    decided = batch["decisions"]
    return {
        "batch": batch.batch,
        "rows_in": batch["raw_data"].num_rows,
        "rows_selected": batch["selected_subset"].num_rows,
        "files": batch["raw_data"].provenance["files"],
        "data_versions": {
            **{name: table.data_version for name, table in batch.tables.items()},
            **decided.provenance["inputs"],
        },
        "models": decided.provenance["models"],
        "pool": decided.provenance["pool_id"],
        "settings_hash": decided.provenance["settings_hash"],
        "provenance_id": decided.provenance_id,
    }
