"""The published dataset: which batches enter it, its files, its manifest, and where it lies. No Dagster.

Belongs here: what a version consists of. Does not belong here: the formats of the files, or when it is published.

    curated_dataset/<manifest hash>/manifest.json, scores.parquet, <selection>/<format's file>
    curated_dataset/latest.json                points to the newest version, and lists the batches left out

The hash is taken of the manifest: equal content is one version, however often it is published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline import exports, gates, ledger, schema
from qaq_pipeline.config import CONTROL_PREFIX, CONTROL_STRATEGIES, Settings, settings_hash
from qaq_pipeline.storage import Storage, StorageError, StoredTable, empty, hash_json

FOLDER = "curated_dataset"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class BatchTables:
    """What of a batch enters the dataset."""

    batch: str
    raw_data: StoredTable
    decisions: StoredTable
    selected_subset: StoredTable


@dataclass(frozen=True)
class Publication:
    """A version of the dataset, as published."""

    version: str
    manifest: dict[str, Any]
    url: str
    is_new: bool


def read_batches(
    storage: Storage, registered: Sequence[str], settings: Settings
) -> tuple[list[BatchTables], dict[str, str]]:
    """The batches that are complete and consistent, and for every other registered one why it is left out."""
    included, excluded = [], {}
    for batch in sorted(registered):
        try:
            tables = _read_batch(storage, batch)
            fault = _inconsistency(tables, settings)
        except ValueError as error:  # A name that the UI let pass, or a StorageError.
            excluded[batch] = str(error)
            continue
        if fault:
            excluded[batch] = fault
        else:
            included.append(tables)
    return included, excluded


def _read_batch(storage: Storage, batch: str) -> BatchTables:
    names = ("raw_data", "decisions", "selected_subset")
    missing = [name for name in names if not storage.has_table(name, batch)]
    if missing:
        raise StorageError(f"not materialised: {', '.join(missing)}")
    return BatchTables(batch, *(storage.read_table(name, batch) for name in names))


def _inconsistency(tables: BatchTables, settings: Settings) -> str | None:
    gate = gates.of_provenance(tables.decisions.provenance)
    if gate is not None:
        return f"gated ({gate.reason.value}): {gate.sentence}"
    made_of = tables.selected_subset.provenance
    if made_of["selection"] != settings.published.name:
        return f"selected by {made_of['selection']}, not by {settings.published.name}; materialise decisions"
    if tables.decisions.provenance["published_hash"] != settings_hash(settings.published):
        return f"decided under other settings of {settings.published.name}; materialise decisions"
    if made_of["inputs"]["decisions"] != tables.decisions.data_version:
        return "selected_subset is older than decisions; materialise it"
    if tables.decisions.provenance["inputs"]["raw_data"] != tables.raw_data.data_version:
        return "decisions are older than raw_data; materialise the batch"
    return None


def publish(
    storage: Storage, settings: Settings, batches: Sequence[BatchTables], excluded: dict[str, str]
) -> Publication:
    """Write a version and point to it; a version that exists is left as it is."""
    files = dataset_files(settings, batches)
    manifest = {
        "format": MANIFEST_FORMAT,
        "selection": settings.published.model_dump(mode="json"),
        "batches": [_entry(tables) for tables in batches],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    version = hash_json(manifest)
    is_new = not storage.exists(FOLDER, version, "manifest.json")
    if is_new:
        for name, data in files.items():
            storage.write_bytes(data, FOLDER, version, *name.split("/"))
        storage.write_json(manifest, FOLDER, version, "manifest.json")
    storage.write_json({"version": version, "excluded_batches": excluded}, FOLDER, "latest.json")
    return Publication(version, manifest, storage.url(FOLDER, version), is_new)


def dataset_files(settings: Settings, batches: Sequence[BatchTables]) -> dict[str, bytes]:
    """The files of a version by their path in it: each format for the published selection and its controls."""
    names = [settings.published.name, *(CONTROL_PREFIX + strategy for strategy in CONTROL_STRATEGIES)]
    files = {"scores.parquet": exports.scores_parquet(_concat([t.decisions.frame for t in batches], "decisions"))}
    for selection in names:
        rows = _concat([_rows(selection, tables, settings) for tables in batches], "selected_subset")
        for export_format in settings.export.formats:
            file_name, write = exports.EXPORTERS[export_format]
            files[f"{selection}/{file_name}"] = write(rows)
    return files


def _rows(selection: str, tables: BatchTables, settings: Settings) -> pl.DataFrame:
    if selection == settings.published.name:
        return tables.selected_subset.frame
    return ledger.selected_rows(selection, tables.raw_data.frame, tables.decisions.frame)


def _concat(frames: Sequence[pl.DataFrame], table: str) -> pl.DataFrame:
    return pl.concat([empty(schema.TABLES[table]), *frames])


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
        "settings_hash": decisions.provenance["settings_hash"],
        "provenance_id": decisions.provenance_id,
    }
