"""The state of every batch: stored tables, stale tables, and the reason if it is left out of the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import dagster as dg

from qaq_pipeline.freshness import eligibility, staleness
from qaq_pipeline.orchestration import liveness
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.storage.locks import Locks

_UNFINISHED = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
_MOST_LINES = 100
"""Newest events of a run that are searched for a line of its log."""


@dataclass(frozen=True, slots=True)
class TableStatus:
    """The stored part of a table of a batch."""

    num_rows: int | None
    """None: nothing is stored, or it cannot be read."""
    num_stored: int
    """Stored partitions: one per model for some tables."""
    num_wanted: int
    is_readable: bool = True
    """Whether the footers can be read; changed bytes elsewhere are found by `qaq lineage --verify`."""

    @property
    def sentence(self) -> str:
        """The status in words."""
        if not self.is_readable:
            return "unreadable"
        if self.num_rows is None:
            return "-"
        return f"{self.num_rows:,} rows{'' if self.is_whole else f' ({self.of_models})'}"

    @property
    def is_whole(self) -> bool:
        """True if every partition is stored and can be read."""
        return self.is_readable and self.num_stored == self.num_wanted

    @property
    def of_models(self) -> str:
        """The number of models it is stored for."""
        return f"{self.num_stored} of {self.num_wanted} models"


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """The state of a batch."""

    batch: str
    tables: Mapping[str, TableStatus]
    """In the order in which they are built."""
    left_out: str | None
    """The reason why a publication would leave it out now."""
    stale: staleness.Stale | None
    """Its first stale table, and why."""

    @property
    def state(self) -> str:
        """The first table that is missing, unreadable or stale, in a few words."""
        for name, table in self.tables.items():
            if not table.is_readable:
                return f"{name} unreadable"
            if not table.num_stored:
                return f"no {name} yet"
            if not table.is_whole:
                return f"{name}: {table.of_models}"
        if self.left_out is not None and self.left_out.startswith("gated"):
            return "gated"
        if self.stale is not None:
            return f"{self.stale.table} stale"
        return "up to date" if self.left_out is None else "left out"


def batch_status(deployment: Deployment) -> list[BatchStatus]:
    """The state of every registered batch."""
    freshness, left_out = deployment.freshness(), batches_left_out(deployment)
    stale = {one.batch: one for batch in freshness.batches() for one in freshness.stale(batch)[:1]}
    names = deployment.pipeline.tables_of_batch()
    return [
        BatchStatus(
            batch,
            {name: _table_status(deployment, name, batch) for name in names},
            left_out.get(batch),
            stale.get(batch),
        )
        for batch in sorted(deployment.batches)
    ]


def running(instance: dg.DagsterInstance, locks: Locks) -> list[str]:
    """A sentence for each run that waits or works: its assets, its partition, and the newest line of its log.

    A run whose process is gone is left out: the next driver, or Dagster's daemon, ends it.

    Args:
        instance: of the runs.
        locks: of the runs.
    """
    runs = reversed(instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)))
    return [_sentence(instance, run) for run in runs if not liveness.is_dead(instance, locks, run)]


def _sentence(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    assets = sorted(key.to_user_string() for key in run.asset_selection or ())
    name = ", ".join(assets) if assets and run.job_name.startswith("__") else run.job_name
    of = run.tags.get("dagster/partition")
    said = f"{name}{f' of {of}' if of else ''} ({run.status.value.lower()}, run {run.run_id[:8]})"
    records = instance.get_records_for_run(run.run_id, limit=_MOST_LINES, ascending=False).records
    lines = (one.event_log_entry.user_message for one in records if one.event_log_entry.dagster_event is None)
    line = next(lines, None)
    return said if line is None else f"{said}: {line}"


def batches_left_out(deployment: Deployment) -> dict[str, str]:
    """The registered batches that a publication would leave out now, and why."""
    settings = deployment.settings
    return eligibility.split_by_eligibility(
        deployment.storage, deployment.batches, settings.ranking, settings.selections, settings.export
    )[1]


def _table_status(deployment: Deployment, name: str, batch: str) -> TableStatus:
    tables = deployment.storage.tables
    try:
        partitions = deployment.partitions(name, batch)
        rows = [tables.footer(name, one).num_rows for one in partitions if tables.has(name, one)]
    except ValueError:  # A StorageError, or a name that the UI let pass.
        return TableStatus(None, 0, 1, is_readable=False)
    return TableStatus(rows[0] if rows else None, len(rows), len(partitions))
