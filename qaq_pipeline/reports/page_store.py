"""The audit pages in the storage: what each is made of, where it lies, and whether it is still of what stands now.

Belongs here: reading the tables that a page shows, storing it. Does not belong here: what stands on it (`report`), who
asks for it (assets, `runs.audit_pages`), and Dagster.

    reports/<batch>/report.html                  and made_of.json: versions of what it was made of
    reports/<batch>/calibration.html             written with the table
    The page of a version lies with the versions: `versions.page_place`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from pydantic import TypeAdapter

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.reports import pages
from qaq_pipeline.reports.pages import Made, Scoring
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.origin import OriginError, require_inputs
from qaq_pipeline.storage.storage import Storage

FOLDER = "reports"
_INPUTS = [name for name in PIPELINE["batch_report"].inputs if not PIPELINE[name].has_models]
_REFERENCE = "rank_reference"
Frozen = tuple[str, pl.DataFrame]
"""Name and rows of a reference."""


def batch_page(batch: str) -> tuple[str, ...]:
    """Where the page of a batch lies."""
    return (FOLDER, batch, "report.html")


def calibration_page(batch: str) -> tuple[str, ...]:
    """Where the page of a batch's calibration lies."""
    return (FOLDER, batch, "calibration.html")


def forget(storage: Storage, batches: Sequence[str]) -> None:
    """Remove the pages of batches, which show texts as they stood; they are made again, where they are wanted."""
    for batch in batches:
        for page in (batch_page(batch), calibration_page(batch)):
            if storage.files.exists(*page):
                storage.files.remove(*page)


def made_of(storage: Storage, batch: str, code_version: str | None) -> dict[str, Any] | None:
    """What the page of a batch would be made of now; None: a table is missing, so there is nothing to show yet."""
    inputs = {name: storage.tables.version(name, Partition(batch)) for name in _INPUTS}
    return None if None in inputs.values() else {"code_version": code_version, "inputs": inputs}


def is_stale(storage: Storage, batch: str, code_version: str | None) -> bool:
    """Whether the page of a batch is missing, or of other tables or code than would make it now."""
    wanted = made_of(storage, batch, code_version)
    if wanted is None:
        return False
    try:
        return storage.files.read_json(FOLDER, batch, "made_of.json") != wanted or not storage.files.exists(
            *batch_page(batch)
        )
    except StorageError:
        return True


def require_one_decision(tables: BatchTables, settings: Settings) -> None:
    """Refuse tables of a batch that were not decided together, by the published selection of the settings.

    Raises:
        OriginError: they were not.
    """
    rows = {name: tables[name] for name in ("raw_data", "screened_data")}
    require_inputs("decisions", tables["decisions"], rows)
    require_inputs("selected_subset", tables["selected_subset"], {"decisions": tables["decisions"]})
    if tables["decisions"].provenance["published_hash"] != settings_hash(settings.published):
        raise OriginError(
            f"batch {tables.batch} was decided by another published selection than the settings name; run `qaq refresh`"
        )


def write_batch_page(
    storage: Storage, settings: Settings, tables: BatchTables, scorings: Sequence[Scoring], made: Made
) -> str:
    """Make and store the page of a batch; the hash of what it is made of."""
    frozen = read_reference(storage, settings)
    calibration = calibration_page(tables.batch)[-1] if settings.is_calibrated and settings.reports.pages else None
    page = pages.batch_page(tables, scorings, settings.published, frozen, made, settings.reports.examples, calibration)
    inputs = {name: tables[name].data_version for name in _INPUTS}
    stands = {"code_version": made.code_version, "inputs": inputs}
    storage.files.write_bytes(page, *batch_page(tables.batch))
    storage.files.write_json(stands, FOLDER, tables.batch, "made_of.json")
    return hash_json(stands)


def write_version_page(storage: Storage, settings: Settings, version: str, made: Made) -> pl.DataFrame:
    """Make and store the page of a version whose files are kept; its scores.

    Raises:
        StorageError: there is no such version, or its files were not kept.
    """
    if not versions.is_kept(storage, version):
        raise StorageError(f"version {version!r} is not kept; kept are {', '.join(versions.kept_versions(storage))}")
    manifest = versions.read_manifest(storage, version)
    flat = versions.read_scores(storage, version)
    page = pages.version_page(
        version,
        manifest,
        flat,
        TypeAdapter(Selection).validate_python(manifest["selection"]),
        _neighbours(storage, version, manifest),
        {name: storage.files.size(*versions.place(version, name)) for name in manifest["files"]},
        read_reference(storage, settings),
        made,
    )
    storage.files.write_bytes(page, *versions.page_place(version))
    return flat


def read_reference(storage: Storage, settings: Settings) -> Frozen | None:
    """The reference that drift is measured against; None: none is configured, or it is not made yet."""
    wanted = settings.ranking.reference
    if wanted is None or not storage.tables.has(_REFERENCE, Partition(wanted.name)):
        return None
    return wanted.name, storage.tables.read(_REFERENCE, Partition(wanted.name)).frame


def _neighbours(storage: Storage, version: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The version before, the difference to it, the batches left out, and the pages of batches."""
    kept = versions.kept_versions(storage)
    place = kept.index(version) if version in kept else 0
    previous = kept[place - 1] if place else None
    difference = None if previous is None else versions.read_difference(storage, previous, version)
    excluded = versions.find_version(storage, version).excluded_batches
    batches = [*(entry["batch"] for entry in manifest["batches"]), *excluded]
    return {
        "previous": previous,
        "difference": difference,
        "excluded": excluded,
        "pages": {batch: "/".join(("..", "..", *batch_page(batch))) for batch in batches if _has_page(storage, batch)},
    }


def _has_page(storage: Storage, batch: str) -> bool:
    return storage.files.exists(*batch_page(batch))
