"""The audit pages in the storage: the place of each, the tables that it shows, and the test if it is stale.

Belongs here: reading the tables of a page and storing it. Does not belong here: its content (`pages`), the callers
(assets, `runs.audit_pages`), and Dagster.

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
from qaq_pipeline.config.settings import ReferenceSettings, ReportSettings, Settings
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import difference, versions
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.reports import drift, page_rows, pages, trial_page
from qaq_pipeline.reports.pages import Frozen, Made, Scoring
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.origin import OriginError, require_inputs
from qaq_pipeline.storage.storage import Storage

_FOLDER = "reports"
_INPUTS = [name for name in PIPELINE["batch_report"].inputs if not PIPELINE[name].has_models]


def batch_page(batch: str) -> tuple[str, ...]:
    """Return the place of the page of a batch."""
    return (_FOLDER, batch, "report.html")


def calibration_page(batch: str) -> tuple[str, ...]:
    """Return the place of the page of a batch's calibration."""
    return (_FOLDER, batch, "calibration.html")


def _made_of(batch: str) -> tuple[str, ...]:
    return (_FOLDER, batch, "made_of.json")


def forget(storage: Storage, batches: Sequence[str]) -> None:
    """Remove the pages of batches, which show old texts; pages that are wanted are rendered again."""
    for batch in batches:
        for page in (batch_page(batch), calibration_page(batch)):
            if storage.files.exists(*page):
                storage.files.remove(*page)


def is_stale(storage: Storage, batch: str, code_version: str | None) -> bool:
    """Return true if the page of a batch is missing, or of other tables or code; false if a table is missing."""
    inputs = {name: storage.tables.version(name, Partition(batch)) for name in _INPUTS}
    if None in inputs.values():
        return False
    try:
        is_same = storage.files.read_json(*_made_of(batch)) == {"code_version": code_version, "inputs": inputs}
    except StorageError:
        return True
    return not is_same or not storage.files.exists(*batch_page(batch))


def require_one_decision(tables: BatchTables, published: Selection) -> None:
    """Refuse tables of a batch that were not decided together, by the published selection of the settings.

    Raises:
        OriginError: they were not.
    """
    rows = {name: tables[name] for name in ("raw_data", "screened_data")}
    require_inputs("decisions", tables["decisions"], rows)
    require_inputs("selected_subset", tables["selected_subset"], {"decisions": tables["decisions"]})
    if tables["decisions"].provenance["published_hash"] != settings_hash(published):
        raise OriginError(
            f"batch {tables.batch} was decided by another published selection than the settings name; run `qaq refresh`"
        )


def write_batch_page(
    storage: Storage,
    tables: BatchTables,
    scorings: Sequence[Scoring],
    published: Selection,
    reference: ReferenceSettings | None,
    settings: ReportSettings,
    made: Made,
    *,
    is_calibrated: bool,
) -> tuple[str, pl.DataFrame]:
    """Render and store the page of a batch; return the hash of its inputs and its code, and its `page_rows`."""
    flat, frozen = page_rows.of_batch(tables), read_reference(storage, reference)
    links = {
        "calibration": calibration_page(tables.batch)[-1] if is_calibrated and settings.pages else None,
        "rows": settings.rows_of_batch(tables.batch),
    }
    page = pages.batch_page(tables, flat, scorings, published, frozen, made, settings.examples, links)
    stands = {"code_version": made.code_version, "inputs": {name: tables[name].data_version for name in _INPUTS}}
    storage.files.write_bytes(page, *batch_page(tables.batch))
    storage.files.write_json(stands, *_made_of(tables.batch))
    return hash_json(stands), flat


def write_version_page(storage: Storage, version: str, settings: Settings, made: Made) -> pl.DataFrame:
    """Render and store the page of a version whose files are kept; return its `page_rows`.

    Raises:
        StorageError: there is no such version, or its files were not kept.
    """
    if not versions.is_kept(storage, version):
        raise StorageError(f"version {version!r} is not kept; kept are {', '.join(versions.kept_versions(storage))}")
    manifest = versions.read_manifest(storage, version)
    columns = versions.columns_of_scores(storage, version)
    flat = page_rows.of_version(versions.scan_scores(storage, version, page_rows.read_of(columns)))
    page = pages.version_page(
        version,
        manifest,
        flat,
        columns,
        TypeAdapter(Selection).validate_python(manifest["selection"]),
        _neighbours(storage, version, manifest) | {"rows": settings.reports.rows_of_version(version)},
        read_reference(storage, settings.ranking.reference),
        made,
    )
    storage.files.write_bytes(page, *versions.page_place(version))
    return flat


def _verdict(storage: Storage, version: str) -> str | None:
    """Find the verdict of the stored training trial of a version."""
    name, partition = "training_trial", Partition(version)
    if not storage.tables.has(name, partition):
        return None
    stored = storage.tables.read(name, partition)
    return trial_page.of_stored(version, stored.frame, stored.provenance).verdict


def read_reference(storage: Storage, reference: ReferenceSettings | None) -> Frozen | None:
    """Read the reference to measure drift against; None if none is configured, or if it is not built yet."""
    if reference is None or not storage.tables.has(stored_reference.NAME, Partition(reference.name)):
        return None
    stored = storage.tables.read(stored_reference.NAME, Partition(reference.name))
    return reference.name, stored.select("model", *drift.QUANTITIES)


def _link(storage: Storage, version: str) -> dict[str, str | None]:
    """Return what a page says of another version: its hash, its name, and the link to its page if it has one."""
    place = versions.page_place(version)
    page = place[-1] if storage.files.exists(*place) else None
    return {"version": version, "name": versions.find_version(storage, version).name, "page": page}


def _neighbours(storage: Storage, version: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Find the previous version, the difference to it, the batches left out, and the pages of batches and the trial."""
    kept = versions.kept_versions(storage)
    previous = [None, *kept][kept.index(version)]
    found = None if previous is None else versions.read_difference(storage, previous, version, difference.COUNTED)
    excluded = versions.find_version(storage, version).excluded_batches
    batches = [*(entry["batch"] for entry in manifest["batches"]), *excluded]
    trial_page_place = versions.trial_page_place(version)
    return {
        "name": versions.find_version(storage, version).name,
        "of_trial": _verdict(storage, version),
        "trial": "/".join(("..", *trial_page_place[1:])) if storage.files.exists(*trial_page_place) else None,
        "previous": None if previous is None else _link(storage, previous),
        "difference": found,
        "excluded": excluded,
        "sizes": {name: storage.files.size(*versions.place(version, name)) for name in manifest["files"]},
        "pages": {
            batch: "/".join(("..", "..", *batch_page(batch)))
            for batch in batches
            if storage.files.exists(*batch_page(batch))
        },
    }
