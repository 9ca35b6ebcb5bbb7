"""Run a job of the pipeline from this process.

Belongs here: one run of one job, its failure in words, signals between runs. Does not belong here: the order of jobs
(`run_batch`, `refresh`), and the results of a run (`run_results`).
"""

from __future__ import annotations

import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import dagster as dg
from dagster._utils.interrupts import capture_interrupts

from qaq_pipeline.config.base import SettingsError, settings_hash
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.orchestration import liveness
from qaq_pipeline.orchestration.conditions import BY_DRIVER
from qaq_pipeline.orchestration.failures import describe
from qaq_pipeline.orchestration.jobs import build_job_defs
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.runs import submission
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.submission import Ended
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.storage.locks import Locks
from qaq_pipeline.trial.trial import TrialProgress

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""Keeps Dagster's log off the console; the event log has all of it."""


class RunError(RuntimeError):
    """The work cannot be done. The text names the cause and the remedy."""

    exit_code = 1
    """Of the command that did not do it."""


class FailedJobError(RunError):
    """A job failed, or cannot be run. The text names the job, its partition, the cause and the remedy."""


class InterruptedRunError(RunError):
    """A signal ended the driver."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number  # As shells have it.


def _ignore(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Events:
    """Callbacks that report the progress of runs."""

    on_stage: Callable[[str, str], None] = _ignore
    """Called with the job and the partition when a stage begins."""
    on_progress: Callable[[Progress], None] = _ignore
    """Called after every scored batch, where steps run in this process."""
    on_training: Callable[[TrialProgress], None] = _ignore
    """Called after every logged training step, where steps run in this process."""
    on_notice: Callable[[str], None] = _ignore
    """Called with a message for the user."""


_ENDING = (signal.SIGINT, signal.SIGTERM)

SILENT = Events()
"""Reports nothing."""


@dataclass(frozen=True)
class Driver:
    """Runs jobs of a deployment from this process."""

    deployment: Deployment
    events: Events
    _jobs: dg.Definitions
    _locks: Locks
    """Of runs."""
    _signal_come: Callable[[], int | None]
    """The number of a signal that came since it was last asked."""

    def run(self, job_name: str, partition: Partition | None = None) -> str:
        """Run a job; return the id of the run. The rank reference is built before the first job that needs it.

        Raises:
            FailedJobError: the job failed, or cannot be run.
            InterruptedRunError: a signal came.
        """
        if job_name == PIPELINE["disagreement_scores"].job and _is_reference_missing(self.deployment):
            self.run(PIPELINE["rank_reference"].job)
        self.events.on_stage(job_name, str(partition or ""))
        run_id = self._run_job(job_name, partition)
        self._end_if_interrupted(f"after {_name(job_name, partition)}")
        return run_id

    def _end_if_interrupted(self, when: str) -> None:
        if (number := self._signal_come()) is not None:
            raise InterruptedRunError(
                f"interrupted by a signal {when}; what was finished is stored, run again to go on", number
            )

    def _run_job(self, job_name: str, partition: Partition | None) -> str:
        tags = {BY_DRIVER: "true", **_partition_tags(partition)}
        submits = self.deployment.settings.runtime.submit_to is not None
        done = self._submit(job_name, tags) if submits else self._execute(job_name, tags)
        if not done.is_success:
            self._end_if_interrupted(f"during {_name(job_name, partition)}")
            failures = [event for event in done.events if event.is_step_failure or event.is_run_failure]
            raise FailedJobError(describe(_name(job_name, partition), failures, done.run_id))
        return done.run_id

    def _submit(self, job_name: str, tags: dict[str, str]) -> Ended:
        with capture_interrupts():  # A signal ends nothing by itself; it is looked for below.
            try:
                submitted = submission.submit(self.deployment, job_name, tags)
                while (ended := submitted.ended()) is None:
                    if (number := self._signal_come()) is not None:
                        submitted.terminate()
                        raise InterruptedRunError(
                            f"interrupted by a signal; run {submitted.run_id} of {job_name} is being ended, and what "
                            "it stored is kept: run again to go on",
                            number,
                        )
                    if submitted.is_waiting_long():
                        self.events.on_notice(f"run {submitted.run_id} of {job_name} waits in the queue of Dagster")
            except submission.SubmissionError as error:
                raise FailedJobError(str(error)) from error
        return ended

    def _execute(self, job_name: str, tags: dict[str, str]) -> Ended:
        if self.deployment.settings.runtime.executor != "in_process":
            result = _run_in_processes(self.deployment, job_name, tags)
            return Ended(result.run_id, result.success, result.all_events)
        job, run_id = self._jobs.resolve_job_def(job_name), str(uuid.uuid4())
        with liveness.living(self._locks, run_id) as tag:
            done = job.execute_in_process(
                instance=self.deployment.instance,
                run_id=run_id,
                run_config=_QUIET,
                tags=tags | tag,
                raise_on_error=False,
            )
        return Ended(done.run_id, done.success, done.all_events)


def _name(job_name: str, partition: Partition | None) -> str:
    return f"{job_name} of {partition}" if partition else job_name


@contextmanager
def driving(deployment: Deployment, events: Events) -> Iterator[Driver]:
    """Yield a driver of the deployment, after runs of dead processes are ended."""
    jobs = build_job_defs(deployment.settings, on_progress=events.on_progress, on_training=events.on_training)
    locks = liveness.run_locks(deployment.settings)
    liveness.end_dead_runs(deployment.instance, locks)
    for run_id in liveness.holders_of_pools(deployment.instance):
        events.on_notice(f"run {run_id} holds the GPU pool, and scoring waits for it; it can be terminated in the UI")
    with _signals_to_end() as signal_come:
        yield Driver(deployment, events, jobs, locks, signal_come)


@contextmanager
def _signals_to_end() -> Iterator[Callable[[], int | None]]:
    """Yield a function that gives the number of a SIGINT or SIGTERM that came; Dagster drops one between two steps."""
    if threading.current_thread() is not threading.main_thread():  # Signals come to the main thread only.
        yield lambda: None
        return
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield lambda: next((one for one in _received(reader) if one in _ENDING), None)
        finally:
            signal.set_wakeup_fd(before)


def _received(reader: socket.socket) -> bytes:
    """The numbers of the signals since the last call."""
    try:
        return reader.recv(4096)
    except BlockingIOError:
        return b""


def _is_reference_missing(deployment: Deployment) -> bool:
    """Tell whether the rank reference is configured and not stored yet.

    Raises:
        FailedJobError: it is not stored, and one of its batches is not scored.
    """
    ranking, tables = deployment.settings.ranking, deployment.storage.tables
    wanted = ranking.reference
    if ranking.pool != "reference" or wanted is None or tables.has("rank_reference", Partition(wanted.name)):
        return False
    unscored = [
        batch
        for batch in wanted.batches
        if not all(tables.has("rmi_scores", partition) for partition in deployment.partitions("rmi_scores", batch))
    ]
    if unscored:
        raise FailedJobError(
            f"the reference {wanted.name} is not built yet, and its batches {', '.join(unscored)} are not scored; run "
            "them first, with ranking.pool: batch"
        )
    return True


def _run_in_processes(deployment: Deployment, job_name: str, tags: Mapping[str, str]) -> dg.JobExecutionResult:
    if deployment.settings != load_settings():
        raise FailedJobError(
            f"executor {deployment.settings.runtime.executor}: its processes read QAQ_CONFIG, which names other "
            "settings; set it to this file"
        )
    job = dg.build_reconstructable_job(
        __name__,
        resolve_job.__name__,
        reconstructable_args=(job_name,),
        reconstructable_kwargs={"of_settings": settings_hash(deployment.settings)},
    )
    return dg.execute_job(job, deployment.instance, run_config=_QUIET, tags=tags)


def resolve_job(job_name: str, of_settings: str) -> dg.JobDefinition:
    """The job of this name, under the settings of the environment: another process finds it by this function.

    Raises:
        SettingsError: the environment of that process names other settings than those of the run.
    """
    settings = load_settings()
    if settings_hash(settings) != of_settings:
        raise SettingsError(
            "a step reads other settings than its run; give the machines of the executor QAQ_CONFIG and QAQ_HOME of "
            "the run, such as by runtime.executor_config"
        )
    return build_job_defs(settings).resolve_job_def(job_name)


def _partition_tags(partition: Partition | None) -> dict[str, str]:
    """Dagster's tags of the partition of a run, and of its dimensions if there are two."""
    if partition is None:
        return {}
    tags = {"dagster/partition": partition.key}
    if partition.model is not None:
        tags |= {"dagster/partition/batch": partition.batch, "dagster/partition/model": partition.model}
    return tags
