"""Rebuild the stale tables of every batch, and publish if something changed.

Belongs here: running what `freshness.staleness` finds, until nothing is stale. Does not belong here: the definition of
stale, and the stages of a new batch (`run_batch`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness import staleness
from qaq_pipeline.orchestration.jobs import present
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.publication import curated_dataset
from qaq_pipeline.runs.audit_pages import make_page, make_pages
from qaq_pipeline.runs.job_runs import Events, InterruptedRunError, RunError, Runner, running
from qaq_pipeline.runs.run_results import materialisation_metadata
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline.storage.storage import Storage, open_storage

_MOST_TRIES = 3
"""Tries of one partition of a stage. One that is still stale then would be stale for ever."""


@dataclass(frozen=True)
class Refreshed:
    """The result of a refresh."""

    num_batches: int
    """Batches that were examined."""
    rebuilt: list[str]
    """Stages and partitions that were run, in order."""
    failed: dict[str, str]
    """Batches that are still stale, and why."""
    not_made: tuple[str, ...] = ()
    """Calibrations and audit pages that could not be made, and why. Publication does not wait for them."""
    version: str | None = None
    """The published version of the dataset; None: nothing changed."""

    @property
    def batches(self) -> list[str]:
        """The batches in which a stage was run."""
        return list(dict.fromkeys(label.split(" ")[1].partition("|")[0] for label in self.rebuilt))

    @property
    def sentence(self) -> str:
        """The result in words."""
        made = f"{len(self.rebuilt)} stages of {self.num_batches} batches were run again"
        published = "nothing was published" if self.version is None else f"version {self.version} was published"
        return "; ".join([made, published, *(one.partition(":")[0] for one in self.not_made)])


def refresh_all(settings: Settings, instance: dg.DagsterInstance, events: Events | None = None) -> Refreshed:
    """Rebuild what is stale in every batch, the oldest batch first, and publish if something changed.

    Raises:
        RunError: a batch is still stale; the others were refreshed and published.
    """
    events = events or Events()
    with running(settings, instance, events) as run:
        done = refresh_stale(settings, instance, run, only_screening=False)
        return publish(settings, instance, run, done, instance.get_dynamic_partitions("batch"), events)


def refresh_stale(settings: Settings, instance: dg.DagsterInstance, run: Runner, *, only_screening: bool) -> Refreshed:
    """Run stale stages until none is left.

    Args:
        settings: the settings in force.
        instance: the Dagster instance.
        run: runs a job.
        only_screening: only batches whose screening is stale: the older batches or the withdrawals changed since.
    """
    storage = open_storage(settings)
    rebuilt: list[str] = []
    failed: dict[str, str] = {}
    uncalibrated: dict[str, str] = {}
    meant: set[str] = set()
    calibrating = PIPELINE.jobs(Purpose.CALIBRATION)
    while True:
        registered = instance.get_dynamic_partitions("batch")
        freshness = staleness.Freshness(storage, registered, present(settings, storage))
        batches = freshness.batches()
        meant |= {batch for batch in batches if not only_screening or freshness.stale_screening(batch) is not None}
        due = [one for batch in batches if batch in meant - set(failed) for one in freshness.stale(batch)]
        # A publication waits for the screening; calibration is left to `refresh_all`.
        left = batches if only_screening else uncalibrated
        due = [one for one in due if one.job not in calibrating or one.batch not in left]
        if not due:
            not_made = (f"the calibration of batch {batch} was not made: {why}" for batch, why in uncalibrated.items())
            return Refreshed(len(batches), rebuilt, failed, tuple(not_made))
        for one in due:
            failures = uncalibrated if one.job in calibrating else failed
            reason = None if one.batch in failures else _run_again(storage, run, one, rebuilt)
            if reason is not None:
                failures[one.batch] = reason


def _run_again(storage: Storage, run: Runner, one: staleness.Stale, rebuilt: list[str]) -> str | None:
    """Run a stale stage; the reason if it could not be run."""
    label = f"{one.job} {one.partition}"
    if rebuilt.count(label) >= _MOST_TRIES:
        return f"{label} is still stale ({one.reason}): report this fault"
    try:
        with storage.locks.hold("batch", one.batch):
            run(one.job, one.partition)
    except InterruptedRunError:
        raise
    except (RunError, PartitionBusyError) as error:
        return str(error)
    rebuilt.append(label)
    return None


def publish(
    settings: Settings,
    instance: dg.DagsterInstance,
    run: Runner,
    done: Refreshed,
    batches: Iterable[str],
    events: Events,
) -> Refreshed:
    """Make the pages of these batches, publish if a batch changed, and report what could not be made.

    Raises:
        RunError: a batch is still stale.
    """
    done = dataclasses.replace(done, not_made=(*done.not_made, *make_pages(settings, run, batches)))
    registered: Sequence[str] = instance.get_dynamic_partitions("batch")
    if not curated_dataset.is_current(open_storage(settings), registered, settings):
        asset = PIPELINE["curated_dataset"]
        metadata = materialisation_metadata(instance, run(asset.job, None), asset.name)
        done = dataclasses.replace(done, version=metadata["version"] if metadata["is_new_version"] else None)
        if fault := make_page(settings, run, PIPELINE["dataset_report"].job, None):
            done = dataclasses.replace(done, not_made=(*done.not_made, fault))
    for sentence in done.not_made:
        events.on_notice(sentence)
    if done.failed:
        reasons = "\n".join(f"batch {batch}: {reason}" for batch, reason in done.failed.items())
        raise RunError(f"{done.sentence}; not refreshed:\n{reasons}")
    return done
