"""Which of the driver's runs died with their process, so that nothing waits for them.

Belongs here: the lock by which a driver shows that it lives, and what is owed to runs whose driver is dead.
Does not belong here: ending runs that were started from the UI; of these it can only say that they hold a slot.

A killed run would stand as started for ever and, worse, keep its slot in the GPU pool: the next run would wait for it
without end. The kernel frees a dead driver's lock, whatever killed it. The locks lie in the Dagster home, beside the
runs that they speak of.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from filelock import FileLock, Timeout

TAG = "qaq/driver"

_UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


@contextlib.contextmanager
def living(lock_directory: Path) -> Iterator[dict[str, str]]:
    """Show that this driver lives, for as long as the context lasts; gives the tags that its runs carry."""
    lock_directory.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    lock = FileLock(_lock_file(lock_directory, name))
    try:
        with lock:
            yield {TAG: name}
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)


def end_dead_runs(instance: dg.DagsterInstance, lock_directory: Path) -> list[str]:
    """Mark the runs of dead drivers as failed and free their slots in pools; gives their run ids."""
    runs = instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))
    dead = [run for run in runs if TAG in run.tags and _is_dead(lock_directory, run.tags[TAG])]
    for run in dead:
        instance.report_run_failed(run, "the process of the driver that ran it is gone")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in dead]


def holders_of_pools(instance: dg.DagsterInstance) -> list[str]:
    """Ids of the runs that hold a slot of a pool now: whoever wants it waits for them."""
    storage = instance.event_log_storage
    claimed = [
        slot for key in storage.get_concurrency_keys() for slot in storage.get_concurrency_info(key).claimed_slots
    ]
    return sorted({slot.run_id for slot in claimed})


def _is_dead(lock_directory: Path, name: str) -> bool:
    try:
        with FileLock(_lock_file(lock_directory, name), timeout=0):
            return True
    except Timeout:
        return False


def _lock_file(lock_directory: Path, name: str) -> str:
    return str(lock_directory / f"driver-{name}.lock")
