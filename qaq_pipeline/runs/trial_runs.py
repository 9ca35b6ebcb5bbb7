"""Run the training trial of a published version.

Belongs here: the run of its job, and what it stored. Does not belong here: the trial itself (`trial`), and printing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline.orchestration.partitions import VERSIONS
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import Events, driving
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.trial.trial import TrialCost, TrialRuntime

_TRIAL = PIPELINE["training_trial"]


@dataclass(frozen=True)
class StoredTrial:
    """A trial as stored."""

    version: str
    frame: pl.DataFrame
    """TrainingTrial."""
    provenance: dict[str, Any]
    page: str | None
    """URL of its page; None: pages are switched off."""


def run_trial(deployment: Deployment, name: str, events: Events) -> StoredTrial:
    """Try a version. Trainings whose results are stored are not repeated.

    Args:
        deployment: settings and storage.
        name: number of the version, first digits of its hash, or `latest`.
        events: callbacks that report the progress.

    Raises:
        RunError: the trial failed, or the version cannot be tried; finished trainings are stored.
        StorageError: there is no such version.
    """
    version = versions.find_version(deployment.storage, name).version
    deployment.instance.add_dynamic_partitions(str(VERSIONS.name), [version])
    partition = Partition(version)
    with driving(deployment, events) as driver:
        driver.run(_TRIAL.job, partition)
    stored, files = deployment.storage.tables.read(_TRIAL.name, partition), deployment.storage.files
    page = versions.trial_page_place(version)
    url = files.url(*page) if files.exists(*page) else None
    return StoredTrial(version, stored.frame, stored.provenance, url)


def estimate(deployment: Deployment, name: str) -> TrialCost:
    """The cost of the trial of a version. Raises as `run_trial`, but TrialError where the version cannot be tried."""
    storage, runtime = deployment.storage, TrialRuntime(deployment.settings)
    plan = runtime.plan(storage, versions.find_version(storage, name).version)
    return runtime.estimate(plan, storage)
