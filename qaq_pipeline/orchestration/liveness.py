"""Runs that died with their process: they are found and ended, so that nothing waits for them.

Belongs here: the signs that a run's process is alive, and the end of runs whose process is dead.
Does not belong here: the callers (`runs`, `automation`).

A killed run would stay started for ever and keep its place in the queue and its slot in the GPU pool: the next run
would wait for it without end. Dagster notices the death of a run only while the code server that started it is alive,
and a reboot ends both.

A driver holds a lock, which the kernel frees however the driver ends; the locks lie in the Dagster home, beside the
runs. For a run that the daemon or the UI started, the event log names the process on this machine.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
from filelock import FileLock, Timeout

TAG = "qaq/driver"

_STARTED = "Started process for run"
"""How Dagster's message begins when the process of a run starts (dagster/_grpc/impl.py). The message of a step's
process begins differently."""
_CLOCK_S = 2.0
"""A process reports its start after the start: the tolerance for a clock that is off."""

_UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


@contextlib.contextmanager
def living(lock_directory: Path) -> Iterator[dict[str, str]]:
    """Show that this driver is alive while the context lasts; gives the tags of its runs."""
    lock_directory.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    file = _lock_file(lock_directory, name)
    try:
        with FileLock(file):
            yield {TAG: name}
    finally:
        file.unlink(missing_ok=True)


def end_dead_runs(instance: dg.DagsterInstance, lock_directory: Path) -> list[str]:
    """Mark the runs of dead processes as failed and free their slots in pools; gives their run ids.

    Dagster's daemon retries those that it had started itself (`run_retries`).
    """
    ended = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        is_gone = is_dead(instance, lock_directory, run)
        now = instance.get_run_by_id(run.run_id)
        if is_gone and now is not None and not now.is_finished:  # It may have ended since the query.
            instance.report_run_failed(now, "the process that ran it is gone")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            ended.append(run.run_id)
    return ended


def holders_of_pools(instance: dg.DagsterInstance) -> list[str]:
    """Ids of the runs that hold a slot of a pool now: other runs wait for them."""
    storage = instance.event_log_storage
    pools = [storage.get_concurrency_info(key) for key in storage.get_concurrency_keys()]
    return sorted({slot.run_id for pool in pools for slot in pool.claimed_slots})


def is_dead(instance: dg.DagsterInstance, lock_directory: Path, run: dg.DagsterRun) -> bool:
    """Whether the process that executed a run is gone."""
    if TAG in run.tags:
        return _is_free(lock_directory, run.tags[TAG])
    process = _process_of(instance, run.run_id)
    return process is not None and not _lives(*process)


def _process_of(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """Id of the process that executes a run launched by Dagster, and the time of its report; None: not begun."""
    found = None
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        if event is not None and (event.message or "").startswith(_STARTED):
            found = int(str(event.engine_event_data.metadata["pid"].value)), entry.timestamp
    return found


def _lives(pid: int, since: float) -> bool:
    """Whether the process is alive, and its id was not given to another one since."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + _CLOCK_S
    except psutil.NoSuchProcess:
        return False


def _is_free(lock_directory: Path, name: str) -> bool:
    try:
        with FileLock(_lock_file(lock_directory, name), timeout=0):
            return True
    except Timeout:
        return False


def _lock_file(lock_directory: Path, name: str) -> Path:
    return lock_directory / f"driver-{name}.lock"
