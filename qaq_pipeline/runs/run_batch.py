"""Runs the pipeline for a batch without the UI: registers it, runs the jobs in order, and sums up what came out.

Belongs here: what `qaq run` does, less the printing. Does not belong here: anything that the UI could not do as well.

Dagster's own CLI cannot register a dynamic partition, nor mix partitions definitions in one run: hence the driver. It
works on the instance in DAGSTER_HOME, so that every run, event and partition is visible in the UI afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.jobs import CURATING
from qaq_pipeline.pipeline import PIPELINE, Asset, Partitioning, Purpose
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.runs.audit_pages import make_page, make_pages
from qaq_pipeline.runs.job_runs import (
    Events,
    InterruptedRunError,
    RunError,
    Runner,
    failed_checks,
    materialisation_metadata,
    running,
)
from qaq_pipeline.runs.refresh import renew
from qaq_pipeline.runs.summary import BatchSummary, summarise
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import open_storage


def run_batch(
    settings: Settings, instance: dg.DagsterInstance, batch: str, events: Events | None = None
) -> BatchSummary:
    """Run every stage for a registered batch, screen newer batches again where this one is another now, publish.

    Raises:
        RunError: a stage failed; what the stages before it made stays.
    """
    results: dict[str, Mapping[str, Any]] = {}
    unpassed: list[str] = []
    events = events or Events()
    with running(settings, instance, events) as run:
        for job_name, names in PIPELINE.jobs(*CURATING).items():
            asset = PIPELINE[names[0]]
            if asset.purpose is Purpose.PAGE:
                partition = None if asset.partitioning is Partitioning.NONE else batch
                unpassed += filter(None, [make_page(settings, run, job_name, partition)])
                continue
            if asset.purpose is Purpose.PUBLICATION:
                renewed = renew(settings, instance, run, only_screening=True)
                for other, reason in renewed.failed.items():
                    events.on_notice(f"batch {other} was not screened again: {reason}")
                unpassed += make_pages(settings, run, renewed.batches)
            for partition in _partitions(settings, asset, batch):
                run_id = run(job_name, partition)
                unpassed += failed_checks(instance, run_id)
                for name in names:
                    results[f"{name}|{partition or ''}"] = materialisation_metadata(instance, run_id, name)
        if settings.is_calibrated:
            unpassed += _calibrate(settings, instance, run, batch)
    return summarise(settings, batch, results, unpassed)


def _calibrate(settings: Settings, instance: dg.DagsterInstance, run: Runner, batch: str) -> list[str]:
    """Run the calibration of a published batch: the checks that did not pass, or why there is none."""
    unpassed: list[str] = []
    try:
        for job_name, names in PIPELINE.jobs(Purpose.CALIBRATION).items():
            for partition in _partitions(settings, PIPELINE[names[0]], batch):
                unpassed += failed_checks(instance, run(job_name, partition))
    except InterruptedRunError:
        raise
    except RunError as error:
        unpassed.append(f"batch {batch} was published, and not calibrated: {error}")
    return unpassed


def _partitions(settings: Settings, asset: Asset, batch: str) -> list[str | None]:
    """Keys of an asset's partitions of a batch; None: it has none."""
    if asset.partitioning is Partitioning.NONE:
        return [None]
    return [partition.key for partition in asset.partitions(batch, list(settings.models))]


def find_page(
    settings: Settings, instance: dg.DagsterInstance, batch: str | None, version: str | None, events: Events
) -> str:
    """Where the audit page of a batch or of a version lies; it is made where it is missing or out of date.

    Raises:
        RunError: there is no such batch or version, or its page cannot be made.
        ValueError: the name of the batch cannot be used.
    """
    storage = open_storage(settings)
    if batch is not None:
        if check_batch_name(batch) not in instance.get_dynamic_partitions("batch"):
            raise RunError(f"there is no batch {batch!r}; `qaq status` lists the batches")
        place = page_store.batch_page(batch)
        with running(settings, instance, events) as run:
            faults = make_pages(settings, run, [batch])
        missing = f"batch {batch!r} has no page yet: it is not selected from; `qaq run` it to the end"
    else:
        try:
            version = versions.find_version(storage, version or "latest").version
        except StorageError as error:
            raise RunError(str(error)) from error
        place, faults, missing = page_store.version_page(version), [], f"version {version!r} has no page"
        if not storage.files.exists(*place):
            made = Made(datetime.now(UTC).isoformat(timespec="seconds"), "qaq report", "")
            page_store.write_version_page(storage, settings, version, made)
    if faults or not storage.files.exists(*place):
        off = "" if settings.reports.pages else " (reports.pages is false)"
        raise RunError("; ".join(faults) or f"{missing}{off}")
    return storage.files.url(*place)
