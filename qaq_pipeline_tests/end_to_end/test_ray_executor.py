"""Every step of a run as a job of a real Ray cluster of two nodes, with tiny models."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs.deployment import open_instance
from qaq_pipeline_tests.end_to_end.test_pipeline import curate
from qaq_pipeline_tests.support.ray_cluster import LOOPBACK, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

VARIABLES = ["QAQ_CONFIG", "QAQ_HOME", "DAGSTER_HOME", "OMP_NUM_THREADS"]
"""What a step needs of the environment of its run."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    """The address of the cluster, and that of its server of jobs."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    with two_nodes(job_port=port) as address:
        yield address, f"http://{LOOPBACK}:{port}"


@pytest.mark.parametrize("pool", ["in_process", "ray"])
def test_steps_as_jobs_of_a_cluster_give_the_same_dataset(
    pool: str,
    cluster: tuple[str, str],
    settings_for: Callable[..., Settings],
    settings_file: Callable[[Settings], Path],
    instance: dg.DagsterInstance,
    delivered: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    address, jobs = cluster
    here = curate(settings_for(), instance, delivered)
    monkeypatch.setenv("QAQ_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    of_pool: dict[str, Any] = {"kind": pool} | ({"size": 1, "address": address} if pool == "ray" else {})
    config = {"ray": {"address": jobs, "env_vars": VARIABLES}}
    settings = settings_for(runtime={"executor": "ray", "executor_config": config, "pool": of_pool})
    monkeypatch.setenv("QAQ_CONFIG", str(settings_file(settings)))
    with open_instance() as home:
        there = curate(settings, home, delivered)
        started = [
            event
            for run in home.get_runs()
            for event in home.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTING)
        ]
    assert there.rows_by_decision == here.rows_by_decision
    if pool == "in_process":  # Chunks have other batches, whose sums differ in the last digits.
        assert Path(there.dataset_url).name == Path(here.dataset_url).name
    assert {event.get_dagster_event().step_key for event in started} >= {"logprobs", "decisions", "curated_dataset"}
    assert all(" in Ray job " in event.message for event in started)
