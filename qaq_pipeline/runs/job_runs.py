"""Run a job of the pipeline from this process.

Belongs here: one run of one job, its failure in words, signals between runs. Does not belong here: the order of jobs
(`run_batch`, `refresh`), and the results of a run (`run_results`).
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from qaq_pipeline.config.load import dagster_home, load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration import liveness
from qaq_pipeline.orchestration.failures import cause
from qaq_pipeline.orchestration.jobs import build_job_defs
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.storage.storage import open_storage

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""Keeps Dagster's log off the console; the event log has all of it."""


class RunError(RuntimeError):
    """A stage failed. The text names the stage, the partition, the cause and the remedy."""


class InterruptedRunError(RunError):
    """A signal ended the driver between two runs."""


def _ignore(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Events:
    """Callbacks that report the progress of runs."""

    on_stage: Callable[[str, str], None] = _ignore
    """Called with the job and the partition when a stage begins."""
    on_progress: Callable[[Progress], None] = _ignore
    """Called after every scored batch, where steps run in this process."""
    on_notice: Callable[[str], None] = _ignore
    """Called with a message for the user."""


Runner = Callable[[str, str | None], str]
"""Runs a job on a partition, and returns the run's id. Raises `RunError`."""


def lock_directory() -> Path:
    """The folder with a lock file for each living driver."""
    return dagster_home() / "driver_locks"


@contextmanager
def running(settings: Settings, instance: dg.DagsterInstance, events: Events) -> Iterator[Runner]:
    """Yield the function that runs jobs. Its runs carry a tag that tells whether this process still lives.

    Runs of dead processes are ended first. A signal between two runs ends the driver, as one inside a run does. The
    rank reference is built before the first job that needs it.
    """
    jobs = build_job_defs(settings, on_progress=events.on_progress)
    liveness.end_dead_runs(instance, lock_directory())
    for run_id in liveness.holders_of_pools(instance):
        events.on_notice(f"run {run_id} holds the GPU pool, and scoring waits for it; it can be terminated in the UI")
    with liveness.living(lock_directory()) as tags, _signals_to_end() as has_signal_come:

        def run(job_name: str, partition: str | None) -> str:
            if job_name == PIPELINE["disagreement_scores"].job and _is_reference_missing(settings):
                run(PIPELINE["rank_reference"].job, None)
            events.on_stage(job_name, partition or "")
            run_id = _run_job(settings, instance, jobs, job_name, partition, tags)
            if has_signal_come():
                raise InterruptedRunError(
                    f"interrupted by a signal after {job_name} of {partition or 'all'}; run again to go on"
                )
            return run_id

        yield run


@contextmanager
def _signals_to_end() -> Iterator[Callable[[], bool]]:
    """Yield a test for SIGINT and SIGTERM: Dagster raises them inside a step, and drops them between steps."""
    if threading.current_thread() is not threading.main_thread():  # Signals come to the main thread only.
        yield lambda: False
        return
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield lambda: not {signal.SIGINT, signal.SIGTERM}.isdisjoint(_received(reader))
        finally:
            signal.set_wakeup_fd(before)


def _received(reader: socket.socket) -> bytes:
    """The numbers of the signals since the last call."""
    try:
        return reader.recv(4096)
    except BlockingIOError:
        return b""


def _is_reference_missing(settings: Settings) -> bool:
    """Tell whether the rank reference is configured and not stored yet.

    Raises:
        RunError: it is not stored, and one of its batches is not scored.
    """
    storage, wanted = open_storage(settings), settings.ranking.reference
    if (
        settings.ranking.pool != "reference"
        or wanted is None
        or storage.tables.has("rank_reference", Partition(wanted.name))
    ):
        return False
    roles = settings.models
    unscored = [
        name
        for name in wanted.batches
        if not all(storage.tables.has("rmi_scores", Partition(name, role)) for role in roles)
    ]
    if unscored:
        raise RunError(
            f"the reference {wanted.name} is not built yet, and its batches {', '.join(unscored)} are not scored; run "
            "them first, with ranking.pool: batch"
        )
    return True


def _run_job(
    settings: Settings,
    instance: dg.DagsterInstance,
    jobs: dg.Definitions,
    job_name: str,
    partition: str | None,
    tags: dict[str, str],
) -> str:
    if settings.runtime.executor == "multiprocess":
        result = _run_in_processes(settings, instance, job_name, tags | _partition_tags(partition))
    else:
        result = jobs.resolve_job_def(job_name).execute_in_process(
            instance=instance,
            partition_key=_partition_key(partition),
            run_config=_QUIET,
            tags=tags,
            raise_on_error=False,
        )
    _require_success(result, job_name, partition)
    return result.run_id


def _run_in_processes(
    settings: Settings, instance: dg.DagsterInstance, job_name: str, tags: dict[str, str]
) -> dg.JobExecutionResult:
    if settings != load_settings():
        raise RunError(
            "executor multiprocess: its processes read QAQ_CONFIG, which names other settings; set it to this file"
        )
    job = dg.build_reconstructable_job("qaq_pipeline.runs.job_runs", "resolve_job", reconstructable_args=(job_name,))
    return dg.execute_job(job, instance, run_config=_QUIET, tags=tags)


def resolve_job(job_name: str) -> dg.JobDefinition:
    """The job of this name, under the settings of the environment: another process finds it by this function."""
    return build_job_defs(load_settings()).resolve_job_def(job_name)


def _partition_key(partition: str | None) -> str | None:
    if partition is None:
        return None
    parsed = Partition.parse(partition)
    if parsed.model is None:
        return partition
    return dg.MultiPartitionKey({"batch": parsed.batch, "model": parsed.model})


def _partition_tags(partition: str | None) -> dict[str, str]:
    """Dagster's tags of the partition of a run, and of its dimensions if there are two."""
    if partition is None:
        return {}
    tags, parsed = {"dagster/partition": partition}, Partition.parse(partition)
    if parsed.model is not None:
        tags |= {"dagster/partition/batch": parsed.batch, "dagster/partition/model": str(parsed.model)}
    return tags


def _require_success(result: Any, job_name: str, partition: str | None) -> None:
    if result.success:
        return
    failures = [event for event in result.all_events if event.is_step_failure or event.is_run_failure]
    where = f"{job_name} of {partition}" if partition else job_name
    raise RunError(
        f"{where} failed: {cause(failures)}\n"
        f"Run {result.run_id}; earlier results are kept. Fix the cause and run again."
    )
