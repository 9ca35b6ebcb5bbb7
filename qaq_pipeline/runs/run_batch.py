"""Run every stage for a registered batch, and publish.

Belongs here: the order of the jobs, without printing. Does not belong here: anything that the UI could not do as well.

Dagster's own CLI cannot register a dynamic partition, nor mix partitions definitions in one run, so this driver does.
It works on the instance in DAGSTER_HOME: every run, event and partition is visible in the UI afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.jobs import CURATING
from qaq_pipeline.pipeline import PIPELINE, Asset, Partitioning, Purpose
from qaq_pipeline.runs.audit_pages import make_page, make_pages
from qaq_pipeline.runs.job_runs import Events, InterruptedRunError, RunError, Runner, running
from qaq_pipeline.runs.refresh import refresh_stale
from qaq_pipeline.runs.run_results import failed_checks, materialisation_metadata
from qaq_pipeline.runs.summary import BatchSummary, summarise


def run_batch(
    settings: Settings, instance: dg.DagsterInstance, batch: str, events: Events | None = None
) -> BatchSummary:
    """Run every stage for a registered batch, screen newer batches again if this one changed, and publish.

    Raises:
        RunError: a stage failed; the results of earlier stages are kept.
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
                refreshed = refresh_stale(settings, instance, run, only_screening=True)
                for other, reason in refreshed.failed.items():
                    events.on_notice(f"batch {other} was not screened again: {reason}")
                unpassed += make_pages(settings, run, refreshed.batches)
            for partition in _partitions(settings, asset, batch):
                run_id = run(job_name, partition)
                unpassed += failed_checks(instance, run_id)
                for name in names:
                    results[f"{name}|{partition or ''}"] = materialisation_metadata(instance, run_id, name)
        if settings.is_calibrated:
            unpassed += _calibrate(settings, instance, run, batch)
    return summarise(settings, batch, results, unpassed)


def _calibrate(settings: Settings, instance: dg.DagsterInstance, run: Runner, batch: str) -> list[str]:
    """Calibrate a published batch; return the checks that failed, or the reason why there is no calibration."""
    unpassed: list[str] = []
    try:
        for job_name, names in PIPELINE.jobs(Purpose.CALIBRATION).items():
            for partition in _partitions(settings, PIPELINE[names[0]], batch):
                unpassed += failed_checks(instance, run(job_name, partition))
    except InterruptedRunError:
        raise
    except RunError as error:
        unpassed.append(f"batch {batch} was published but not calibrated: {error}")
    return unpassed


def _partitions(settings: Settings, asset: Asset, batch: str) -> list[str | None]:
    """Keys of an asset's partitions of a batch; None for an asset without partitions."""
    if asset.partitioning is Partitioning.NONE:
        return [None]
    return [partition.key for partition in asset.partitions(batch, list(settings.models))]
