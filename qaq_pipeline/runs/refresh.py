"""Rebuild the stale tables of every batch, and publish if something changed.

Belongs here: running what `freshness.staleness` finds, until nothing is stale. Does not belong here: the definition of
stale, and the stages of a new batch (`run_batch`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from qaq_pipeline.freshness.staleness import Stale
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.publication import curated_dataset, versions
from qaq_pipeline.runs.audit_pages import make_page, make_pages
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import SILENT, Driver, Events, FailedJobError, RunError, driving
from qaq_pipeline.runs.run_results import materialisation_metadata
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.locks import PartitionBusyError

_MOST_TRIES = 3
"""Tries of one partition of a stage. One that is still stale then would be stale for ever."""


@dataclass(frozen=True)
class Refreshed:
    """The result of a refresh."""

    num_batches: int
    """Batches that were examined."""
    rebuilt: list[tuple[str, Partition]]
    """Jobs and partitions that were run, in order."""
    failed: dict[str, str]
    """Batches that are still stale, and why."""
    not_made: tuple[str, ...] = ()
    """Calibrations and audit pages that could not be made, and why. Publication does not wait for them."""
    version: str | None = None
    """The version of the dataset that is the newest now and was not before; None: it is the same one."""

    @property
    def batches(self) -> list[str]:
        """The batches in which a stage was run."""
        return list(dict.fromkeys(partition.batch for _, partition in self.rebuilt))

    @property
    def sentence(self) -> str:
        """The result in words."""
        made = f"{len(self.rebuilt)} stages of {self.num_batches} batches were run again"
        published = "nothing was published" if self.version is None else f"version {self.version} was published"
        return "; ".join([made, published, *(one.partition(":")[0] for one in self.not_made)])


def refresh_all(deployment: Deployment, events: Events = SILENT) -> Refreshed:
    """Rebuild what is stale in every batch, the oldest batch first, and publish if something changed.

    Raises:
        RunError: a batch is still stale; the others were refreshed and published.
    """
    with driving(deployment, events) as driver:
        done = refresh_stale(driver, only_screening=False)
        return publish(driver, done, deployment.batches)


def refresh_stale(driver: Driver, *, only_screening: bool) -> Refreshed:
    """Run stale stages until none is left.

    Args:
        driver: runs the jobs.
        only_screening: only batches whose screening is stale, as older batches or withdrawals changed, and those that
            were screened again and not decided since.
    """
    rebuilt: list[tuple[str, Partition]] = []
    failed: dict[str, str] = {}
    uncalibrated: dict[str, str] = {}
    meant: set[str] = set()
    calibrating = PIPELINE.jobs(Purpose.CALIBRATION)
    while True:
        freshness = driver.deployment.freshness()
        batches = freshness.batches()
        meant |= {batch for batch in batches if not only_screening or freshness.is_screened_anew(batch)}
        due = [one for batch in batches if batch in meant - set(failed) for one in freshness.stale(batch)]
        # A publication waits for the screening; calibration is left to `refresh_all`.
        left = batches if only_screening else uncalibrated
        due = [one for one in due if one.job not in calibrating or one.batch not in left]
        if not due:
            not_made = (f"the calibration of batch {batch} was not made: {why}" for batch, why in uncalibrated.items())
            return Refreshed(len(batches), rebuilt, failed, tuple(not_made))
        for one in due:
            failures = uncalibrated if one.job in calibrating else failed
            reason = None if one.batch in failures else _run_again(driver, one, rebuilt)
            if reason is not None:
                failures[one.batch] = reason


def _run_again(driver: Driver, one: Stale, rebuilt: list[tuple[str, Partition]]) -> str | None:
    """Run a stale stage; the reason if it could not be run."""
    if rebuilt.count((one.job, one.partition)) >= _MOST_TRIES:
        return f"{one.job} {one.partition} is still stale ({one.reason}): report this fault"
    try:
        with driver.deployment.lock_batch(one.batch):
            driver.run(one.job, one.partition)
    except (FailedJobError, PartitionBusyError) as error:
        return str(error)
    rebuilt.append((one.job, one.partition))
    return None


def publish(driver: Driver, done: Refreshed, batches: Iterable[str]) -> Refreshed:
    """Make the pages of these batches, publish if a batch changed, and report what could not be made.

    Raises:
        RunError: a batch is still stale.
    """
    deployment, version = driver.deployment, None
    not_made = [*done.not_made, *make_pages(driver, batches)]
    if not curated_dataset.is_current(deployment.storage, deployment.batches, deployment.settings):
        asset, newest = PIPELINE["curated_dataset"], versions.latest(deployment.storage)
        made = materialisation_metadata(deployment.instance, driver.run(asset.job), asset.name)["version"]
        version = None if newest is not None and made == newest.version else made
        not_made += make_page(driver, PIPELINE["dataset_report"].job)
    for sentence in not_made:
        driver.events.on_notice(sentence)
    done = dataclasses.replace(done, not_made=tuple(not_made), version=version)
    if done.failed:
        reasons = "\n".join(f"batch {batch}: {reason}" for batch, reason in done.failed.items())
        raise RunError(f"{done.sentence}; not refreshed:\n{reasons}")
    return done
