"""liveness: a run whose process is gone is ended, and no other, on whatever machine it was."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.instance.ref import InstanceRef

from qaq_pipeline.automation.nightly import NIGHTLY
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.orchestration import liveness
from qaq_pipeline.storage.locks import FileLocks, Locks
from qaq_pipeline.storage.postgres_locks import PostgresLocks
from qaq_pipeline_tests.support.postgres import PASSWORD, PostgresServer


@dg.job
def nothing() -> None:
    """A job to make runs of."""


@pytest.fixture
def locks(tmp_path: Path) -> FileLocks:
    """Locks of runs, in files."""
    return FileLocks(tmp_path / "run_locks")


def started_run(instance: dg.DagsterInstance, tag: str | None = None, run_id: str | None = None) -> str:
    """A run that stands as started, with the tag of its process."""
    tags = {} if tag is None else {liveness.TAG: tag}
    run = instance.create_run_for_job(nothing, tags=tags, run_id=run_id)
    instance.report_dagster_event(
        dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, nothing.name, message="started"), run.run_id
    )
    return run.run_id


def killed_run(instance: dg.DagsterInstance, locks: Locks, machine: str | None = None) -> str:
    """A run that stands as started, and whose process is gone; of this machine or another."""
    run_id = started_run(instance)
    with liveness.living(locks, run_id) as tag:
        instance.add_run_tags(
            run_id, {liveness.TAG: tag[liveness.TAG].replace(platform.node(), machine or platform.node())}
        )
    return run_id


def status_of(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def test_a_run_whose_process_is_gone_is_ended_and_no_other(instance: dg.DagsterInstance, locks: FileLocks) -> None:
    dead = killed_run(instance, locks)
    not_begun = started_run(instance)
    again = started_run(instance, f"{dead} {platform.node()}")  # A run again has the tags of the first one.
    alive = started_run(instance)
    with liveness.living(locks, alive) as tag:
        instance.add_run_tags(alive, tag)
        assert liveness.end_dead_runs(instance, locks) == [dead]
        assert status_of(instance, dead) == dg.DagsterRunStatus.FAILURE
        assert {status_of(instance, one) for one in (not_begun, again, alive)} == {dg.DagsterRunStatus.STARTED}
        assert liveness.end_dead_runs(instance, locks) == []
    assert liveness.end_dead_runs(instance, locks) == [alive]


_EXECUTE = """
    import sys, time
    from pathlib import Path
    import dagster as dg
    from dagster._core.instance.ref import InstanceRef
    from qaq_pipeline.orchestration import liveness
    from qaq_pipeline.storage.locks import FileLocks

    @dg.op
    def wait():
        print("working", flush=True)
        sys.stdin.read()

    @dg.op
    def fail():
        raise ValueError

    kind, home, folder = sys.argv[1:]
    executor = liveness.in_living_process(dg.in_process_executor, FileLocks(Path(folder)), "")

    @dg.job(executor_def=executor)
    def work():
        wait() if kind == "wait" else fail()

    if __name__ == "__main__":
        with dg.DagsterInstance.from_ref(InstanceRef.from_dir(home)) as instance:
            dg.execute_job(dg.reconstructable(work), instance)
"""


def execute(kind: str, home: Path, locks: Path) -> subprocess.Popen[str]:
    """A process that executes a run: of a step that waits for the end of its input, or of one that fails."""
    script = home.parent / f"execute_{kind}.py"
    script.write_text(textwrap.dedent(_EXECUTE), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(script), kind, str(home), str(locks)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_the_process_that_executes_a_run_is_known_to_be_alive_until_it_is_killed(tmp_path: Path) -> None:
    home, folder = tmp_path / "dagster", tmp_path / "run_locks"
    home.mkdir()
    with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home))) as instance:
        process = execute("wait", home, folder)
        assert process.stdout is not None
        while process.stdout.readline() != "working\n":
            assert process.poll() is None
        (run,) = instance.get_runs()
        assert run.tags[liveness.TAG] == f"{run.run_id} {platform.node()}"
        assert liveness.end_dead_runs(instance, FileLocks(folder)) == []
        process.kill()
        process.communicate()
        assert liveness.end_dead_runs(instance, FileLocks(folder)) == [run.run_id]
        assert list(folder.iterdir()) == []


def test_a_run_that_ends_leaves_no_lock(tmp_path: Path) -> None:
    home, folder = tmp_path / "dagster", tmp_path / "run_locks"
    home.mkdir()
    execute("fail", home, folder).communicate()
    with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home))) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.FAILURE
        assert list(folder.iterdir()) == []


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A database."""
    with PostgresServer() as one:
        yield one


def test_of_two_homes_with_one_database_neither_ends_a_run_of_the_other(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_URL", server.url.replace("postgresql:", "postgresql+psycopg2:"))
    (tmp_path / "dagster.yaml").write_text(
        yaml.safe_dump({"storage": {"postgres": {"postgres_url": {"env": "DAGSTER_URL"}}}}), encoding="utf-8"
    )
    one, other = FileLocks(tmp_path / "one"), FileLocks(tmp_path / "other")
    with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as instance:
        elsewhere, here = killed_run(instance, one, machine="elsewhere"), killed_run(instance, other)
        alive = started_run(instance)
        with liveness.living(one, alive) as tag:
            of_other = tag[liveness.TAG].replace(platform.node(), "elsewhere")
            instance.add_run_tags(alive, {liveness.TAG: of_other})
            assert liveness.end_dead_runs(instance, other) == [here]
        assert {status_of(instance, run) for run in (elsewhere, alive)} == {dg.DagsterRunStatus.STARTED}

        shared = PostgresLocks(server.url, "runs")
        dead, alive = killed_run(instance, shared, machine="elsewhere"), started_run(instance)
        with liveness.living(shared, alive) as tag:
            instance.add_run_tags(alive, {liveness.TAG: tag[liveness.TAG].replace(platform.node(), "elsewhere")})
            ended = liveness.end_dead_runs(instance, PostgresLocks(server.url, "runs"))
        assert dead in ended
        assert alive not in ended
        logged = [str(entry) for run in instance.get_runs() for entry in instance.all_logs(run.run_id)]
        assert PASSWORD not in "".join(logged)


def test_the_sensor_ends_what_stands_as_started_without_a_process(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    sensor = build_defs(settings).resolve_sensor_def("dead_runs")
    context = dg.build_sensor_context(instance=instance)
    assert sensor(context) == dg.SkipReason("no run is dead")
    run_id = killed_run(instance, liveness.run_locks(settings))
    assert sensor(context) == dg.SkipReason("1 dead runs ended")
    assert status_of(instance, run_id) == dg.DagsterRunStatus.FAILURE


@pytest.mark.parametrize("executor", ["in_process", "multiprocess"])
def test_every_job_runs_under_the_executor_of_the_settings_in_a_living_process(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, executor: str
) -> None:
    definitions = build_defs(settings_for(runtime={"executor": executor}))
    for job in definitions.get_repository_def().get_all_jobs():
        assert job.executor_def.name == ("in_process" if job.name == NIGHTLY else executor)
        assert "in_living_process" in str(job.executor_def.executor_creation_fn)
