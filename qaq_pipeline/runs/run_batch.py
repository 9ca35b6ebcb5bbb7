"""Run every stage for a registered batch, and publish.

Belongs here: the order of the jobs, without printing. Does not belong here: anything that the UI could not do as well.

Dagster's own CLI cannot register a dynamic partition, nor mix partitions definitions in one run, so this driver does.
It works on the instance in DAGSTER_HOME: every run, event and partition is visible in the UI afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from qaq_pipeline.orchestration.jobs import CURATING
from qaq_pipeline.pipeline import PIPELINE, Asset, Partitioning, Purpose
from qaq_pipeline.runs import unchanged
from qaq_pipeline.runs.audit_pages import make_page, make_pages
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import SILENT, Driver, Events, FailedJobError, driving
from qaq_pipeline.runs.refresh import refresh_stale
from qaq_pipeline.runs.run_results import Results, failed_checks, materialisation_metadata
from qaq_pipeline.runs.summary import BatchSummary, summarise
from qaq_pipeline.schema.partition import Partition


def run_batch(deployment: Deployment, batch: str, events: Events = SILENT) -> BatchSummary:
    """Run every stage for a registered batch, screen newer batches again if this one changed, and publish.

    Nothing runs where every result would be the same.

    Raises:
        RunError: a stage failed; the results of earlier stages are kept.
    """
    stored = unchanged.stored_results(deployment, batch)
    if stored is not None:
        return summarise(deployment, batch, *stored)
    results: Results = {}
    unpassed: list[str] = []
    with driving(deployment, events) as driver:
        for job_name, names in deployment.pipeline.jobs(*CURATING).items():
            asset = PIPELINE[names[0]]
            if asset.purpose is Purpose.PUBLICATION:
                unpassed += _screen_again(driver)
            for partition in _partitions(deployment, asset, batch):
                if asset.purpose is Purpose.PAGE:
                    unpassed += make_page(driver, job_name, partition)
                    continue
                run_id = driver.run(job_name, partition)
                unpassed += failed_checks(deployment.instance, run_id)
                for name in names:
                    results[name, partition] = materialisation_metadata(deployment.instance, run_id, name)
        unpassed += _calibrate(driver, batch)
    return summarise(deployment, batch, results, unpassed)


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
                unpassed += failed_checks(driver.deployment.instance, driver.run(job_name, partition))
    except FailedJobError as error:
        unpassed.append(f"batch {batch} was published but not calibrated: {error}")
    return unpassed


def _partitions(deployment: Deployment, asset: Asset, batch: str) -> Sequence[Partition | None]:
    """An asset's partitions of a batch; None for an asset without partitions."""
    return [None] if asset.partitioning is Partitioning.NONE else deployment.partitions(asset.name, batch)
