"""Sentences about the daemon and the last nightly refresh."""

from datetime import UTC, datetime

import dagster as dg

from qaq_pipeline.automation.nightly import NIGHTLY

_HEARTBEAT_PATIENCE_S = 120.0
"""A daemon sends a heartbeat every 30 seconds."""


def unattended(instance: dg.DagsterInstance, now: datetime) -> list[str]:
    """Return two sentences: whether the daemon runs, and how the last nightly refresh ended."""
    return [_daemon_sentence(instance, now), _night_sentence(instance)]


def _daemon_sentence(instance: dg.DagsterInstance, now: datetime) -> str:
    seen = [heartbeat.timestamp for heartbeat in instance.get_daemon_heartbeats().values()]
    if not seen:
        return "No daemon has run here: nothing is curated automatically. `qaq ui` starts one."
    if now.timestamp() - max(seen) <= _HEARTBEAT_PATIENCE_S:
        return "The daemon runs."
    return f"The daemon was last seen on {_time(max(seen))}: nothing is curated automatically. `qaq ui` starts it."


def _night_sentence(instance: dg.DagsterInstance) -> str:
    records = instance.get_run_records(dg.RunsFilter(job_name=NIGHTLY), limit=1)
    if not records:
        return "No nightly refresh has run yet."
    record = records[0]
    return f"Last nightly refresh: {record.dagster_run.status.value}, {_time(record.create_timestamp.timestamp())}."


def _time(timestamp: float) -> str:
    return f"{datetime.fromtimestamp(timestamp, UTC):%Y-%m-%d %H:%M} UTC"
