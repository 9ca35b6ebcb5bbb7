"""curated_dataset: the files and the manifest of a version, from the batches that enter it.

Does not belong here: the formats of the files (`exports`), where versions lie (`versions`), or when one is published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness.eligibility import ENTERING, sort_out
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import dataset_card, exports
from qaq_pipeline.publication.difference import store_difference
from qaq_pipeline.publication.versions import (
    FOLDER,
    MANIFEST_FORMAT,
    index_pairs,
    latest,
    log_publication,
    published_withdrawn,
    read_manifest,
    retire,
)
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.selection import decisions
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable, empty


class NothingToPublishError(ValueError):
    """There is nothing to publish, or nothing is published yet. The text says why."""


@dataclass(frozen=True)
class BatchTables:
    """What of a batch enters the dataset."""

    batch: str
    raw_data: StoredTable
    screened_data: StoredTable
    decisions: StoredTable
    selected_subset: StoredTable


@dataclass(frozen=True)
class Publication:
    """A version of the dataset, as published."""

    version: str
    manifest: dict[str, Any]
    url: str
    is_new: bool
    """Whether its files were written now."""
    previous: str | None = None
    """The version that was the newest before, where it is another."""
    difference: pl.DataFrame | None = None
    """What is in and out since then, as Difference; None where there is no version before, or its files are gone."""
    retired: tuple[str, ...] = ()
    """Versions whose files were removed now."""


def read_batches(
    storage: Storage, registered: Sequence[str], settings: Settings
) -> tuple[list[BatchTables], dict[str, str]]:
    """The batches that enter the dataset, and for every other registered one why it is left out."""
    included, excluded = sort_out(storage, registered, settings)
    batches = []
    for batch in included:
        try:
            batches.append(BatchTables(batch, *(storage.tables.read(name, Partition(batch)) for name in ENTERING)))
        except StorageError as error:  # Changed since it was written.
            excluded[batch] = str(error)
    return batches, excluded


def require_batches(storage: Storage, batches: Sequence[BatchTables], excluded: Mapping[str, str]) -> None:
    """Refuse an empty version, unless it removes withdrawn rows. Raises NothingToPublishError."""
    if not batches and not published_withdrawn(storage):
        why = "; ".join(f"{batch}: {reason}" for batch, reason in excluded.items()) or "none is registered"
        raise NothingToPublishError(f"curated_dataset: no batch can be published; {why}")


def publish(
    storage: Storage,
    settings: Settings,
    batches: Sequence[BatchTables],
    excluded: dict[str, str],
    run_id: str | None = None,
) -> Publication:
    """Write a version and point to it; a version that exists is left as it is. Call it under the folder's lock."""
    files = dataset_files(settings, batches)
    manifest = {
        "format": MANIFEST_FORMAT,
        "selection": settings.published.model_dump(mode="json"),
        "export": settings.export.model_dump(mode="json"),
        "batches": [_entry(tables) for tables in batches],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    version = hash_json(manifest)
    is_new = not storage.files.exists(FOLDER, version, "manifest.json")
    if is_new:
        for name, data in files.items():
            storage.files.write_bytes(data, FOLDER, version, *name.split("/"))
        storage.files.write_json(manifest, FOLDER, version, "manifest.json")
    index_pairs(storage, version, manifest, _decisions(batches))
    log_publication(storage, version, run_id)
    previous = latest(storage)
    difference = None
    if previous is not None and storage.files.exists(FOLDER, previous, "manifest.json"):
        difference = store_difference(storage, previous, version)
    storage.files.write_json({"version": version, "excluded_batches": excluded}, FOLDER, "latest.json")
    retired = retire(storage, version, settings.publication.keep_versions)
    return Publication(version, manifest, storage.files.url(FOLDER, version), is_new, previous, difference, retired)


def is_current(storage: Storage, registered: Sequence[str], settings: Settings) -> bool:
    """Whether the newest version is what would be published now, by footers and settings alone."""
    included, _ = sort_out(storage, registered, settings)
    published = read_manifest(storage)
    if published is None:
        return not included
    return (
        {entry["batch"]: {name: entry["data_versions"][name] for name in ENTERING} for entry in published["batches"]}
        == {batch: footers.versions for batch, footers in included.items()}
        and published["format"] == MANIFEST_FORMAT
        and published["selection"] == settings.published.model_dump(mode="json")
        and published["export"] == settings.export.model_dump(mode="json")
    )


def _decisions(batches: Sequence[BatchTables]) -> pl.DataFrame:
    return _concat([tables.decisions.frame for tables in batches], "decisions")


def dataset_files(settings: Settings, batches: Sequence[BatchTables]) -> dict[str, bytes]:
    """The files of a version by their path in it: the exported selections in each format, scores, what readers need."""
    decisions = _decisions(batches)
    files, exported = {"scores.parquet": exports.scores_parquet(decisions)}, {}
    for selection in settings.exported:
        rows = _rows(selection, batches, settings)
        for export_format in settings.export.formats:
            written = exports.export(export_format, rows)
            files |= {f"{selection}/{name}": data for name, data in written.items()}
        exported[selection] = rows.height
    files["dataset_info.json"] = exports.llama_factory_info(exported, settings.export.formats)
    files["README.md"] = dataset_card.dataset_card(
        settings.published,
        exported,
        settings.export,
        [_entry(tables) for tables in batches],
        _concat([tables.screened_data.frame for tables in batches], "screened_data"),
        decisions,
        {tables.batch: tables.screened_data.provenance["benchmarks"] for tables in batches},
    )
    return files


def _rows(selection: str, batches: Sequence[BatchTables], settings: Settings) -> pl.DataFrame:
    """The rows of all batches under a selection, batch by batch, best first."""
    rows = _concat([_rows_of_batch(selection, tables, settings) for tables in batches], "selected_subset")
    if not settings.export.meta:
        return rows
    screened = _concat([tables.screened_data.frame for tables in batches], "screened_data")
    barred = screened.filter(pl.col("status").is_in([Status.WITHDRAWN.value, Status.CONTAMINATED.value]))
    return exports.with_meta(rows, _concat([tables.raw_data.frame for tables in batches], "raw_data"), barred)


def _rows_of_batch(selection: str, tables: BatchTables, settings: Settings) -> pl.DataFrame:
    if selection == settings.published.name:
        return tables.selected_subset.frame
    return decisions.selected_rows(selection, tables.raw_data.frame, tables.decisions.frame)


def _concat(frames: Sequence[pl.DataFrame], table: str) -> pl.DataFrame:
    return pl.concat([empty(PIPELINE[table].table), *frames])


def _entry(tables: BatchTables) -> dict[str, Any]:
    decisions = tables.decisions
    return {
        "batch": tables.batch,
        "rows_in": tables.raw_data.frame.height,
        "rows_selected": tables.selected_subset.frame.height,
        "files": tables.raw_data.provenance["files"],
        "data_versions": {
            "raw_data": tables.raw_data.data_version,
            "decisions": decisions.data_version,
            "selected_subset": tables.selected_subset.data_version,
            **decisions.provenance["inputs"],
        },
        "models": decisions.provenance["models"],
        "pool": decisions.provenance["pool_id"],
        "settings_hash": decisions.provenance["settings_hash"],
        "provenance_id": decisions.provenance_id,
    }
