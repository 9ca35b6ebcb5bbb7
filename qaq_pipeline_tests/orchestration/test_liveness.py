"""liveness: a run whose process is gone is ended, and no other; of drivers, and of what the daemon started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster._core.events import EngineEventData

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.orchestration import liveness


@dg.job
def nothing() -> None:
    """A job to make runs of."""


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def zombie() -> Iterator[int]:
    """The number of a process that has ended, and that nobody has asked for its end."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    yield process.pid
    process.wait()


def started_run(instance: dg.DagsterInstance, pid: int | None, tags: dict[str, str] | None = None) -> str:
    """A run that stands as started, by that process as Dagster's code server logs it."""
    run = instance.create_run_for_job(nothing, tags=tags)
    if pid is not None:
        instance.report_engine_event(f"Started process for run (pid: {pid}).", run, EngineEventData.in_process(pid))
    instance.report_dagster_event(
        dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, nothing.name, message="started"), run.run_id
    )
    return run.run_id


def status_of(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def test_a_run_whose_process_is_gone_is_ended_and_no_other(
    instance: dg.DagsterInstance, tmp_path: Path, gone: int, zombie: int
) -> None:
    dead = [started_run(instance, gone), started_run(instance, zombie)]
    alive = [started_run(instance, os.getpid()), started_run(instance, None)]
    assert set(liveness.end_dead_runs(instance, tmp_path)) == set(dead)
    assert {status_of(instance, run_id) for run_id in dead} == {dg.DagsterRunStatus.FAILURE}
    assert {status_of(instance, run_id) for run_id in alive} == {dg.DagsterRunStatus.STARTED}
    assert liveness.end_dead_runs(instance, tmp_path) == []


def test_another_process_that_got_the_number_since_is_not_taken_for_the_run_s(gone: int) -> None:
    began = psutil.Process().create_time()
    assert liveness._lives(os.getpid(), began)
    assert not liveness._lives(os.getpid(), began - 60)
    assert not liveness._lives(gone, began)


def test_a_run_of_a_driver_is_dead_when_its_lock_is_free(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    with liveness.living(tmp_path) as tags:
        run_id = started_run(instance, None, tags)
        assert liveness.end_dead_runs(instance, tmp_path) == []
    assert liveness.end_dead_runs(instance, tmp_path) == [run_id]
    assert status_of(instance, run_id) == dg.DagsterRunStatus.FAILURE


def test_the_sensor_ends_what_stands_as_started_without_a_process(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, gone: int
) -> None:
    sensor = build_defs(settings_for()).resolve_sensor_def("dead_runs")
    context = dg.build_sensor_context(instance=instance)
    assert sensor(context) == dg.SkipReason("no run is dead")
    run_id = started_run(instance, gone)
    assert sensor(context) == dg.SkipReason("1 dead runs ended")
    assert status_of(instance, run_id) == dg.DagsterRunStatus.FAILURE
