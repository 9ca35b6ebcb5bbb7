"""Brings batches up to date: re-curation of what is out of date, and what a withdrawal asks for; then publishes.

Belongs here: running what `recuration` finds, until nothing is left. Does not belong here: what is out of date, and a
new batch's way through the stages (`driver`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness import staleness
from qaq_pipeline.orchestration.jobs import present
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.publication import curated_dataset, versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.runs.audit_pages import make_page, make_pages
from qaq_pipeline.runs.job_runs import Events, InterruptedRunError, RunError, Runner, materialisation_metadata, running
from qaq_pipeline.schema.partition import Partition, check_batch_name
from qaq_pipeline.schema.row_place import row_place
from qaq_pipeline.schema.vocabularies import DuplicateReason
from qaq_pipeline.screening import withdrawals
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline.storage.storage import Storage, open_storage

_MOST_TRIES = 3
"""Of one partition of a stage: more would mean that it never comes up to date."""


@dataclass(frozen=True)
class Renewal:
    """What was brought up to date."""

    num_batches: int
    """Batches that were looked at."""
    remade: list[str]
    """Stages and partitions that were run, in order."""
    failed: dict[str, str]
    """Batches whose data could not be brought up to date, and why."""
    unmade: tuple[str, ...] = ()
    """Calibrations and audit pages that could not be made, and why: nothing that is published waits for one."""
    version: str | None = None
    """The version of the dataset that was published; None: nothing changed."""

    @property
    def batches(self) -> list[str]:
        """The batches of which a stage was run."""
        return list(dict.fromkeys(label.split(" ")[1].partition("|")[0] for label in self.remade))

    @property
    def sentence(self) -> str:
        """The same in words."""
        made = f"{len(self.remade)} stages of {self.num_batches} batches were run again"
        published = "nothing was published" if self.version is None else f"version {self.version} was published"
        return "; ".join([made, published, *(one.partition(":")[0] for one in self.unmade)])


@dataclass(frozen=True)
class Withdrawal:
    """What a person withdraws, and why."""

    batch: str
    row: str | None
    """`file:row`, `file:row.turn`, a row's number, or the first digits of a pair_id; None: the batch."""
    reason: str
    is_withdrawn: bool = True
    """False: what was withdrawn is so no longer."""


def recurate(settings: Settings, instance: dg.DagsterInstance, events: Events | None = None) -> Renewal:
    """Make anew what is out of date, batch by batch, the oldest first, and publish if something changed.

    Raises:
        RunError: a batch could not be brought up to date; the others were, and published.
    """
    events = events or Events()
    with running(settings, instance, events) as run:
        done = renew(settings, instance, run, only_screening=False)
        done = _with_pages(settings, run, done, instance.get_dynamic_partitions("batch"))
        return _published(settings, instance, run, done, events)


def withdraw(
    settings: Settings, instance: dg.DagsterInstance, what: Withdrawal, events: Events | None = None
) -> Renewal:
    """Withdraw a batch, or what rows of it say wherever it is said, and publish without it; or take that back.

    Raises:
        RunError: there is no such batch or row, or what follows failed.
        ValueError: the name of the batch cannot be used.
    """
    storage = open_storage(settings)
    check_batch_name(what.batch)
    if what.batch not in instance.get_dynamic_partitions("batch"):
        raise RunError(f"there is no batch {what.batch!r}; `qaq status` lists the batches")
    rows = {} if what.row is None else _contents(storage, what.batch, what.row)
    known = withdrawals.read(storage)
    if not what.is_withdrawn and not (set(rows) & set(known.contents) if rows else what.batch in known.batches):
        raise RunError(f"{what.batch}{'/' + what.row if what.row else ''} is not withdrawn: nothing to take back")
    withdrawals.add(storage, what.batch, rows, what.reason, is_withdrawn=what.is_withdrawn)
    events = events or Events()
    with running(settings, instance, events) as run:
        done = renew(settings, instance, run, only_screening=True)
        page_store.forget(storage, done.batches)
        done = _with_pages(settings, run, done, done.batches)
        return _published(settings, instance, run, done, events)


def _contents(storage: Storage, batch: str, row: str) -> dict[str, str]:
    """The content hash of the row that is meant, with its place."""
    if not storage.tables.has("signatures", Partition(batch)):
        raise RunError(f"batch {batch!r} was not screened yet, so its rows are not known; withdraw the batch, or wait")
    signatures = storage.tables.read("signatures", Partition(batch)).frame
    found = row_lookup.find_rows(signatures, row, batch)
    if found.is_empty():
        raise RunError(f"batch {batch!r} has no readable row {row!r}; give file:row, a number, or a pair_id")
    if found["content_hash"].n_unique() > 1:
        raise RunError(f"batch {batch!r} has {found.height} rows {row!r}, of different text; say which: file:row.turn")
    return {found["content_hash"][0]: found.select(row_place()).item(0, 0)}


def near_rows(settings: Settings, instance: dg.DagsterInstance, batch: str, row: str) -> list[str]:
    """Rows of other text that the row stands for as near duplicates: withdrawn, it stands for them no longer."""
    storage = open_storage(settings)
    place = next(iter(_contents(storage, batch, row).values()))
    found = []
    for name in instance.get_dynamic_partitions("batch"):
        if storage.tables.has("screened_data", Partition(name)):
            rows = storage.tables.read("screened_data", Partition(name)).frame.filter(
                (pl.col("duplicate_of") == place) & (pl.col("reason") == DuplicateReason.NEAR_DUPLICATE.value)
            )
            found += rows.select(row_place()).to_series().to_list()
    return found


def renew(settings: Settings, instance: dg.DagsterInstance, run: Runner, *, only_screening: bool) -> Renewal:
    """Run what is out of date until nothing is.

    Args:
        settings: the settings in force.
        instance: the Dagster instance.
        run: runs a job.
        only_screening: only batches that were screened against other older batches, or withdrawals, than stand now.
    """
    storage = open_storage(settings)
    remade: list[str] = []
    failed: dict[str, str] = {}
    uncalibrated: dict[str, str] = {}
    meant: set[str] = set()
    calibrating = PIPELINE.jobs(Purpose.CALIBRATION)
    while True:
        registered = instance.get_dynamic_partitions("batch")
        review = staleness.Review(storage, registered, present(settings, storage))
        batches = review.batches()
        meant |= {batch for batch in batches if not only_screening or review.screened_otherwise(batch) is not None}
        due = [one for batch in batches if batch in meant - set(failed) for one in review.outdated(batch)]
        # Where only screening is wanted, a publication waits for it; the night calibrates.
        left = batches if only_screening else uncalibrated
        due = [one for one in due if one.job not in calibrating or one.batch not in left]
        if not due:
            unmade = (f"the calibration of batch {batch} was not made: {why}" for batch, why in uncalibrated.items())
            return Renewal(len(batches), remade, failed, tuple(unmade))
        for one in due:
            failures = uncalibrated if one.job in calibrating else failed
            reason = None if one.batch in failures else _run_again(storage, run, one, remade)
            if reason is not None:
                failures[one.batch] = reason


def _run_again(storage: Storage, run: Runner, one: staleness.Outdated, remade: list[str]) -> str | None:
    """Why it could not be run; None: it was."""
    label = f"{one.job} {one.partition}"
    if remade.count(label) >= _MOST_TRIES:
        return f"{label} stays out of date ({one.reason}): report this fault"
    try:
        with storage.locks.hold("batch", one.batch):
            run(one.job, one.partition)
    except InterruptedRunError:
        raise
    except (RunError, PartitionBusyError) as error:
        return str(error)
    remade.append(label)
    return None


def _with_pages(settings: Settings, run: Runner, done: Renewal, batches: Iterable[str]) -> Renewal:
    """The same, after the pages of these batches were made."""
    return dataclasses.replace(done, unmade=(*done.unmade, *make_pages(settings, run, batches)))


def _published(settings: Settings, instance: dg.DagsterInstance, run: Runner, done: Renewal, events: Events) -> Renewal:
    registered: Sequence[str] = instance.get_dynamic_partitions("batch")
    if not curated_dataset.is_current(open_storage(settings), registered, settings):
        metadata = materialisation_metadata(instance, run(PIPELINE["curated_dataset"].job, None), versions.FOLDER)
        done = dataclasses.replace(done, version=metadata["version"] if metadata["is_new_version"] else None)
        if fault := make_page(settings, run, PIPELINE["dataset_report"].job, None):
            done = dataclasses.replace(done, unmade=(*done.unmade, fault))
    for sentence in done.unmade:
        events.on_notice(sentence)
    if done.failed:
        reasons = "\n".join(f"batch {batch}: {reason}" for batch, reason in done.failed.items())
        raise RunError(f"{done.sentence}; not brought up to date:\n{reasons}")
    return done
