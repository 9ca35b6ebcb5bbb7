"""Run every stage for a registered batch, and publish.

Belongs here: the order of the jobs, without printing. Does not belong here: anything that the UI could not do as well.

Dagster's own CLI cannot register a dynamic partition, nor mix partitions definitions in one run, so this driver does.
It works on the instance in DAGSTER_HOME: every run, event and partition is visible in the UI afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from qaq_pipeline.orchestration.jobs import CURATING
from qaq_pipeline.orchestration.materialisation import Recorded, newest_materialisation
from qaq_pipeline.pipeline import PIPELINE, Asset, Partitioning, Purpose
from qaq_pipeline.publication import curated_dataset, versions
from qaq_pipeline.runs.audit_pages import make_page, make_pages
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import SILENT, Driver, Events, FailedJobError, driving
from qaq_pipeline.runs.refresh import refresh_stale
from qaq_pipeline.runs.run_results import Results, failed_checks, materialisation_metadata, repeated
from qaq_pipeline.runs.status import batches_left_out
from qaq_pipeline.runs.summary import BatchSummary, summarise
from qaq_pipeline.schema.partition import Partition


def run_batch(deployment: Deployment, batch: str, events: Events = SILENT) -> BatchSummary:
    """Run every stage for a registered batch, screen newer batches again if this one changed, and publish.

    A stage is not run again where code, settings, models and inputs are those of its last run.

    Raises:
        RunError: a stage failed; the results of earlier stages are kept.
    """
    results: Results = {}
    unpassed: list[str] = []
    with driving(deployment, events) as driver:
        for job_name, names in deployment.pipeline.jobs(*CURATING).items():
            asset = PIPELINE[names[0]]
            if asset.purpose is Purpose.PAGE:
                unpassed += _make_pages(driver, asset, batch, results)
                continue
            if asset.purpose is Purpose.PUBLICATION:
                unpassed += _screen_again(driver)
            for partition in _partitions(deployment, asset, batch):
                unpassed += _run(driver, job_name, names, batch, partition, results)
        unpassed += _calibrate(driver, batch)
    return summarise(deployment, batch, results, unpassed)


def _run(
    driver: Driver, job_name: str, names: Sequence[str], batch: str, partition: Partition | None, results: Results
) -> list[str]:
    """Run a job, unless its last run still holds, and add its results; return the checks that failed."""
    instance = driver.deployment.instance
    earlier = _earlier(driver.deployment, job_name, names, batch, partition)
    if earlier is None:
        run_id = driver.run(job_name, partition)
        results |= {(name, partition): materialisation_metadata(instance, run_id, name) for name in names}
        return failed_checks(instance, run_id)
    results |= {(name, partition): repeated(one.metadata) for name, one in earlier.items()}
    runs = dict.fromkeys(one.run_id for one in earlier.values())
    return [sentence for run_id in runs for sentence in failed_checks(instance, run_id)]


def _earlier(
    deployment: Deployment, job_name: str, names: Sequence[str], batch: str, partition: Partition | None
) -> dict[str, Recorded] | None:
    """The last materialisation of each asset of a job; None: it has to run, because its result may be another now.

    Asked for one job after the other: an earlier one of the batch is not stale.
    """
    storage = deployment.storage
    if partition is None:
        newest = versions.latest(storage)
        if newest is None or newest.excluded_batches != batches_left_out(deployment):
            return None
        if not curated_dataset.is_current(storage, deployment.batches, deployment.settings):
            return None
        stored: dict[str, str | None] = dict.fromkeys(names, newest.version)
    else:
        stale = deployment.freshness().stale(batch)
        if any((one.job, one.partition) == (job_name, partition) for one in stale):
            return None
        if partition.model is not None and not _is_same_model(deployment, names[0], partition):
            return None
        stored = {name: storage.tables.version(name, partition) for name in names}
    key = None if partition is None else partition.key
    found = {name: newest_materialisation(deployment.instance, dg.AssetKey(name), key) for name in names}
    earlier = {name: one for name, one in found.items() if one is not None and one.data_version == stored[name]}
    return earlier if len(earlier) == len(names) else None


def _is_same_model(deployment: Deployment, table: str, partition: Partition) -> bool:
    """Whether the model that made a table is the one that would make it now: its files can change under one name."""
    stored = deployment.storage.tables.footer(table, partition).provenance
    return stored["identity_hash"] == deployment.model_runtime.identity(str(partition.model)).digest()


def _make_pages(driver: Driver, asset: Asset, batch: str, results: Results) -> list[str]:
    """Make the page of the batch, or of the version, unless it shows what is stored; return why it was not made."""
    if asset.partitioning is not Partitioning.NONE:
        return make_pages(driver, [batch])
    storage, published = driver.deployment.storage, results["curated_dataset", None]
    has_page = storage.files.exists(*versions.page_place(published["version"]))
    return [] if has_page and not published["is_new_version"] else make_page(driver, asset.job)


def _screen_again(driver: Driver) -> list[str]:
    """Screen newer batches again if an older one changed; return the pages that could not be made."""
    refreshed = refresh_stale(driver, only_screening=True)
    for other, reason in refreshed.failed.items():
        driver.events.on_notice(f"batch {other} was not screened again: {reason}")
    return make_pages(driver, refreshed.batches)


def _calibrate(driver: Driver, batch: str) -> list[str]:
    """Calibrate a published batch, if that is wanted; return the checks that failed, or why it is not calibrated."""
    unpassed: list[str] = []
    try:
        for job_name, names in driver.deployment.pipeline.jobs(Purpose.CALIBRATION).items():
            for partition in _partitions(driver.deployment, PIPELINE[names[0]], batch):
                unpassed += _run(driver, job_name, names, batch, partition, {})
    except FailedJobError as error:
        unpassed.append(f"batch {batch} was published but not calibrated: {error}")
    return unpassed


def _partitions(deployment: Deployment, asset: Asset, batch: str) -> Sequence[Partition | None]:
    """An asset's partitions of a batch; None for an asset without partitions."""
    return [None] if asset.partitioning is Partitioning.NONE else deployment.partitions(asset.name, batch)
