"""Submit runs to a Dagster webserver, and wait for their end.

Belongs here: one run, from its submission to its last event. Does not belong here: which runs there are (`job_runs`).

Only the webserver and the instance are asked, so that this works wherever runs are executed: in processes of the
daemon, in pods of Kubernetes, on a Ray cluster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import dagster as dg

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import RuntimeSettings
from qaq_pipeline.orchestration.executors import run_tags
from qaq_pipeline.orchestration.liveness import SETTINGS_TAG
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.storage import server_faults

if TYPE_CHECKING:
    from dagster_graphql import DagsterGraphQLClient, DagsterGraphQLClientError

POLL_SECONDS = 1.0
LONG_SECONDS = 60.0
"""A run that waits so long in the queue is reported, once."""
OUTAGE_SECONDS = 300.0
"""Time for which the instance may not answer."""
_WAITING = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED)


class SubmissionError(RuntimeError):
    """A run could not be submitted. The text names the cause and the remedy."""


@dataclass(frozen=True)
class Ended:
    """A run that ended."""

    run_id: str
    is_success: bool
    events: Sequence[dg.DagsterEvent]


def submit(deployment: Deployment, job_name: str, tags: Mapping[str, str]) -> Submitted:
    """Submit a run of a job to the webserver of the settings.

    Raises:
        SubmissionError: it cannot be reached, or refuses the run.
    """
    from dagster_graphql import DagsterGraphQLClientError

    address = str(deployment.settings.runtime.submit_to)
    told = {**run_tags(deployment.settings.runtime), **tags, SETTINGS_TAG: settings_hash(deployment.settings)}
    try:
        client = _client(address)
        run_id = client.submit_job_execution(job_name, tags=told, run_config={})
    except DagsterGraphQLClientError as error:
        raise SubmissionError(
            f"{job_name} could not be submitted to {address} ({_cause(error)}); start the webserver with the code "
            "location of this project, or correct runtime.submit_to"
        ) from error
    return Submitted(client, deployment.instance, run_id)


@dataclass
class Submitted:
    """A run that was submitted."""

    _client: DagsterGraphQLClient
    _instance: dg.DagsterInstance
    run_id: str
    _since: float = field(default_factory=time.monotonic)
    _seen: float = field(default_factory=time.monotonic)
    """When the instance last answered."""
    _is_told: bool = False

    def ended(self) -> Ended | None:
        """Wait for `POLL_SECONDS`, and return the run if it has ended.

        Raises:
            SubmissionError: the instance of this process does not have it, or no longer.
        """
        time.sleep(POLL_SECONDS)
        try:
            return self._ended()
        except Exception as error:
            if not server_faults.may_pass(error):
                raise
            if time.monotonic() - self._seen > OUTAGE_SECONDS:
                raise SubmissionError(
                    f"the database of Dagster does not answer any more; run {self.run_id} may go on: look at it in the "
                    "UI, and run this command again when it has ended"
                ) from error
            return None

    def _ended(self) -> Ended | None:
        run = self._instance.get_run_by_id(self.run_id)
        self._seen = time.monotonic()
        if run is None:
            raise SubmissionError(
                f"run {self.run_id} was submitted, but the Dagster instance of this command does not have it; give the "
                "webserver and this command the same instance (dagster.yaml in DAGSTER_HOME)"
            )
        if not run.is_finished:
            return None
        entries = self._instance.all_logs(self.run_id)
        events = [entry.dagster_event for entry in entries if entry.dagster_event is not None]
        return Ended(self.run_id, run.is_success, events)

    def is_waiting_long(self) -> bool:
        """Return True once, when the run has been queued for `LONG_SECONDS`."""
        if self._is_told or time.monotonic() - self._since < LONG_SECONDS:
            return False
        self._is_told = True
        run = self._instance.get_run_by_id(self.run_id)
        return run is not None and run.status in _WAITING

    def terminate(self) -> None:
        """Ask for its end.

        Raises:
            SubmissionError: the webserver refuses, or cannot be reached.
        """
        from dagster_graphql import DagsterGraphQLClientError

        try:
            self._client.terminate_run(self.run_id)
        except DagsterGraphQLClientError as error:
            raise SubmissionError(
                f"run {self.run_id} could not be ended ({_cause(error)}); terminate it in the UI"
            ) from error


def refuse_single_slot(runtime: RuntimeSettings, instance: dg.DagsterInstance) -> None:
    """Raise `SubmissionError` where a run that submits others would wait for itself."""
    queue = instance.get_concurrency_config().run_queue_config
    if runtime.submit_to is not None and queue is not None and queue.max_concurrent_runs == 1:
        raise SubmissionError(
            "the nightly run submits other runs (runtime.submit_to), and dagster.yaml allows one run at a time: they "
            "would wait for each other; raise concurrency.runs.max_concurrent_runs"
        )


def _client(address: str) -> DagsterGraphQLClient:
    from dagster_graphql import DagsterGraphQLClient

    parts = urlsplit(address)
    return DagsterGraphQLClient(
        parts.hostname or "", parts.port, use_https=parts.scheme == "https", path_prefix=parts.path.rstrip("/")
    )


def _cause(error: DagsterGraphQLClientError) -> str:
    """The error in one line."""
    return " ".join(str(part) for part in error.args if part).partition("\n")[0]
