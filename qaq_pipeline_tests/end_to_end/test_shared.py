"""Machines that share an object store and a database: what they make is as on one disk, and nothing is lost or doubled.

Each machine is a home of its own. The servers are real: SeaweedFS and Postgres.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import polars as pl
import psycopg2
import pytest
import yaml
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from polars.testing import assert_frame_equal

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.publication import versions
from qaq_pipeline.runs.deployment import open_instance
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.files import Files
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline_tests.cli.conftest import write_settings
from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.end_to_end.test_recomputation import EXAMPLES
from qaq_pipeline_tests.support.cached_scores import quantities_in
from qaq_pipeline_tests.support.postgres import PASSWORD, PostgresServer
from qaq_pipeline_tests.support.s3_server import BUCKET, SECRET, S3Server
from qaq_pipeline_tests.support.server import free_port, running_ui, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QAQ = Path(sys.executable).with_name("qaq")
NUM_PAIRS = 120
PATIENCE_S = 400.0
TOKEN = "hf_" + "plantedTokenOfTheHub"
SIGNATURE = "plantedSignatureOfAnAddress"
SECRETS = (PASSWORD, PASSWORD.replace(" ", "%20"), SECRET, TOKEN)
NUM_QUANTITIES = 5
"""Of a pair and a model."""
MODELS = ("strong", "weak")


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    with PostgresServer() as one:
        yield one


@pytest.fixture(scope="module")
def store() -> Iterator[S3Server]:
    with S3Server() as one:
        yield one


@dataclass(frozen=True)
class Machine:
    """A home, and the settings and secrets that it is used with."""

    environment: dict[str, str]

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(QAQ), *command],
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *command: str) -> str:
        process = self.start(*command)
        shown, _ = process.communicate()
        assert process.returncode == 0, shown
        return shown

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """The environment of this machine, for this process."""
        with mock.patch.dict(os.environ, self.environment):
            yield

    @contextlib.contextmanager
    def storage(self) -> Iterator[Storage]:
        with self.here():
            yield open_storage(load_settings())

    def num_shards(self) -> int:
        with self.storage() as storage:
            return sum(len(storage.scores.names(digest)) for digest in storage.files.names("score_cache"))

    def num_scores(self) -> int:
        """Scores in the cache, also while others write it."""
        with self.storage() as storage:
            return sum(one.num_scores for one in storage.scores.models())

    def cached(self) -> pl.DataFrame:
        """Quantities in the score cache, by model."""
        with self.storage() as storage:
            return quantities_in(storage)

    def stored(self) -> Iterator[tuple[str, str]]:
        """Every file of the storage as text: tables, pages, manifests, scores."""
        with self.storage() as storage:
            for name in storage.files.files_below():
                data = storage.files.read_bytes(*name.split("/"))
                yield name, text_of(name, data)

    def log(self, *statuses: dg.DagsterRunStatus) -> str:
        """The events of the runs with one of these statuses, or of all."""
        with self.here(), open_instance() as instance:
            runs = instance.get_runs(dg.RunsFilter(statuses=statuses) if statuses else None)
            return "\n".join(str(entry) for run in runs for entry in instance.all_logs(run.run_id))


def text_of(name: str, data: bytes) -> str:
    """The content of a file: a table with its metadata."""
    if not name.endswith(".parquet"):
        return data.decode("utf-8", "replace")
    metadata = pl.read_parquet_metadata(io.BytesIO(data))
    return json.dumps([pl.read_parquet(io.BytesIO(data)).to_dicts(), metadata], default=str, ensure_ascii=False)


def files_of(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file of the homes: instances, logs of steps, settings."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "models" not in path.parts):
        yield str(path), text_of(path.name, path.read_bytes())


def rows_of(database: PostgresServer) -> Iterator[tuple[str, str]]:
    """Every table of the database: runs, tags, events, ticks, cursors."""
    with contextlib.closing(psycopg2.connect(database.url)) as session, session.cursor() as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT * FROM "{table}"')
            yield f"table {table}", str(cursor.fetchall())


@pytest.fixture
def machine(
    database: PostgresServer, store: S3Server, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> Callable[..., Machine]:
    """Factory: a machine with a home of this name, on the shared servers or on its own disk."""

    def make(
        name: str,
        *,
        is_shared: bool = True,
        is_demo: bool = False,
        runtime: dict[str, Any] | None = None,
        **sections: Any,
    ) -> Machine:
        home = tmp_path / name
        (home / "dagster").mkdir(parents=True)
        storage = {"root": f"s3://{BUCKET}/{tmp_path.name}", "locks": {"kind": "postgres"}} if is_shared else {}
        if is_demo:
            config = write_demo_settings(home / "settings.yaml", storage=storage, **sections)
        else:
            small = {"batch_tokens": 300, "shard_seconds": 0, "retry_seconds": 2, "lock_timeout_seconds": 60}
            models = {role: tiny_model_dir(seed=seed) for seed, role in enumerate(MODELS)}
            config = write_settings(
                home / "settings.yaml", models, runtime=small | (runtime or {}), storage=storage, **sections
            )
        if is_shared:
            address = {"postgres_url": {"env": "QAQ_POSTGRES_URL"}}
            several = {"runs": {"max_concurrent_runs": 4}}
            text = yaml.safe_dump(
                {"storage": {"postgres": address}, "telemetry": {"enabled": False}, "concurrency": several}
            )
            (home / "dagster" / "dagster.yaml").write_text(text, encoding="utf-8")
        return Machine(
            {
                "QAQ_HOME": str(home),
                "DAGSTER_HOME": str(home / "dagster"),
                "QAQ_CONFIG": str(config),
                "QAQ_POSTGRES_URL": database.url.replace("postgresql:", "postgresql+psycopg2:"),
                "HF_TOKEN": TOKEN,
                "OMP_NUM_THREADS": "1",
                **store.environment,
            }
        )

    return make


def write_demo_settings(path: Path, **sections: Any) -> Path:
    """The demo's settings with its fetched models."""
    values = load_settings("demo").model_dump(mode="json", exclude_defaults=True)
    models = load_settings("demo").model_cache_dir.absolute()
    if not (models / "SmolLM2-135M-Instruct.Q4_1.gguf").exists():
        pytest.fail(f"{models}: no models; `make test-slow` fetches them")
    path.write_text(yaml.safe_dump(values | {"model_cache": str(models)} | sections), encoding="utf-8")
    return path


def delivery(folder: Path, batch: str) -> str:
    """The file of a batch of pairs that no other batch has."""
    rows = [
        {"query": f"Sum the list number {number} of {batch}.", "response": f"return sum({'x' * (number % 40)}{number})"}
        for number in range(NUM_PAIRS)
    ]
    return str(write_jsonl(folder / f"{batch}.jsonl", rows))


def decided(machine: Machine, *batches: str) -> pl.DataFrame:
    """What was decided of each row of the batches."""
    with machine.storage() as storage:
        frames = [storage.tables.read("decisions", Partition(batch)).frame for batch in batches]
    return pl.concat(frames).select("batch", "source_row", "pair_id", "decision", "reason", "duplicate_of")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_what_one_machine_began_another_finishes_as_on_one_disk(
    machine: Callable[..., Machine], tmp_path: Path
) -> None:
    file = delivery(tmp_path, "b1")
    alone, one, other = machine("alone", is_shared=False), machine("one"), machine("other")
    alone.run("run", file, "--batch", "b1")

    process = one.start("run", file, "--batch", "b1")
    wait_for(lambda: one.num_shards() >= 20, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < one.cached().height < NUM_PAIRS * NUM_QUANTITIES * len(MODELS)

    other.run("run", file, "--batch", "b1")
    found = other.cached()
    assert found.is_unique().all(), "a quantity was scored twice"
    assert found.height == NUM_PAIRS * NUM_QUANTITIES * len(MODELS)
    assert_frame_equal(decided(other, "b1"), decided(alone, "b1"))
    assert "up to date" in one.run("status")
    one.run("lineage", "latest", "--verify")
    assert "the process that ran it is gone" in one.log(dg.DagsterRunStatus.FAILURE)


@pytest.mark.real_model
@pytest.mark.timeout(5400)
def test_the_demo_with_its_real_models_is_on_the_servers_as_on_one_disk(machine: Callable[..., Machine]) -> None:
    alone, one, other = (machine(name, is_shared=name != "alone", is_demo=True) for name in ("alone", "one", "other"))
    first, second = (str(path) for path in sorted(EXAMPLES.parent.iterdir()))
    batches = [Path(file).name.split(".")[0] for file in (first, second)]
    for file, batch in zip((first, second), batches, strict=True):
        alone.run("run", file, "--batch", batch)

    one.run("run", first, "--batch", batches[0])
    before = one.num_scores()
    process = one.start("run", second, "--batch", batches[1])
    wait_for(lambda: one.num_scores() > before, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    print(other.run("run", second, "--batch", batches[1]))
    assert_frame_equal(decided(other, *batches), decided(alone, *batches))
    assert other.cached().is_unique().all(), "a quantity was scored twice"
    assert_frame_equal(other.cached(), alone.cached(), check_row_order=False)
    one.run("lineage", "latest", "--verify")


def test_two_machines_curate_at_once_and_both_batches_are_published(
    machine: Callable[..., Machine], tmp_path: Path
) -> None:
    alone, one, other = machine("alone", is_shared=False), machine("one"), machine("other")
    files = {batch: delivery(tmp_path, batch) for batch in ("b1", "b2")}
    for batch, file in files.items():
        alone.run("run", file, "--batch", batch)
    processes = [one.start("run", files["b1"], "--batch", "b1"), other.start("run", files["b2"], "--batch", "b2")]
    shown = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    with one.storage() as storage:
        newest = versions.latest(storage)
        assert newest is not None
        assert set(versions.decided_batches(storage, newest.version)) == {"b1", "b2"}
        # One, if both batches were decided before the first was published.
        assert [entry.number for entry in versions.log(storage)] in ([1], [1, 2])
    assert_frame_equal(decided(one, "b1", "b2"), decided(alone, "b1", "b2"))
    assert one.cached().is_unique().all()


def test_scoring_processes_share_the_store_and_the_locks(machine: Callable[..., Machine], tmp_path: Path) -> None:
    alone, file = machine("alone", is_shared=False), delivery(tmp_path, "b1")
    several = machine("several", runtime={"pool": {"kind": "processes", "size": 2}})
    alone.run("run", file, "--batch", "b1")
    several.run("run", file, "--batch", "b1")
    assert_frame_equal(decided(several, "b1"), decided(alone, "b1"))
    assert several.cached().is_unique().all()


@pytest.mark.parametrize("name", ["database", "store"])
def test_a_server_that_is_killed_and_comes_back_costs_nothing(
    machine: Callable[..., Machine], tmp_path: Path, name: str, database: PostgresServer, store: S3Server
) -> None:
    alone, one, server = machine("alone", is_shared=False), machine("one"), {"database": database, "store": store}[name]
    file = delivery(tmp_path, "b1")
    alone.run("run", file, "--batch", "b1")
    process = one.start("run", file, "--batch", "b1")
    wait_for(lambda: one.num_shards() >= 20, process)
    server.kill()
    time.sleep(3)
    server.start()
    shown, _ = process.communicate()
    assert "Traceback" not in shown
    if process.returncode != 0:
        one.run("run", file, "--batch", "b1")
    found = one.cached().unique()
    assert found.height == NUM_PAIRS * NUM_QUANTITIES * len(MODELS)
    assert_frame_equal(decided(one, "b1"), decided(alone, "b1"))
    for secret in SECRETS:
        assert secret not in shown
        assert secret not in one.log()


def status_of(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def published(machine: Machine) -> set[str]:
    """The batches of the newest version."""
    with machine.storage() as storage:
        newest = versions.latest(storage)
        return set() if newest is None else set(versions.decided_batches(storage, newest.version))


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, log.read_text(encoding="utf-8")[-5000:]
        time.sleep(0.5)


@pytest.fixture
def deployed(machine: Callable[..., Machine], tmp_path: Path) -> Iterator[tuple[Callable[[str], Machine], Path]]:
    """Webserver and daemon on one machine; a function that gives another machine under the same settings, and their
    log."""
    port = free_port()
    sections = {
        "landing": {"url": f"s3://{BUCKET}/{tmp_path.name}-landing", "require_marker": True, "interval_seconds": 3},
        "automation": {"started": True, "interval_seconds": 5},
        "reports": {"plots": True},
        "runtime": {"submit_to": f"http://127.0.0.1:{port}", "max_runtime_seconds": 3600, "run_tags": {"team": "data"}},
    }
    cluster, log = machine("cluster", **sections), tmp_path / "ui.log"
    with running_ui(os.environ | cluster.environment, log, port=port):
        yield lambda name: machine(name, **sections), log


def test_a_delivery_to_the_object_store_is_published_unattended_though_both_servers_restart(
    deployed: tuple[Callable[[str], Machine], Path],
    machine: Callable[..., Machine],
    tmp_path: Path,
    database: PostgresServer,
    store: S3Server,
) -> None:
    another, log = deployed
    watching, alone, file = another("watching"), machine("alone", is_shared=False), delivery(tmp_path, "b1")
    alone.run("run", file, "--batch", "b1")
    with watching.here():
        landing = Files(load_settings().landing_url)
        landing.write_bytes(Path(file).read_bytes(), "b1.jsonl")
        landing.write_bytes(b"", "b1.jsonl._SUCCESS")
    wait_until(lambda: watching.num_shards() >= 20, log)
    for server in (database, store):
        server.kill()
        time.sleep(3)
        server.start()
        time.sleep(5)
    wait_until(lambda: published(watching) == {"b1"}, log)
    assert_frame_equal(decided(watching, "b1"), decided(alone, "b1"))
    assert watching.cached().is_unique().all()
    shown = "".join(watching.run(command) for command in ("doctor", "status", "cache"))
    texts = {"commands": shown, "the log of the daemon": log.read_text(encoding="utf-8"), "events": watching.log()}
    texts |= dict(watching.stored()) | dict(files_of(tmp_path)) | dict(rows_of(database))
    assert len(texts) > 100
    assert {name for name, text in texts.items() if any(secret in text for secret in SECRETS)} == set()


def test_a_command_on_another_machine_submits_its_runs_to_the_webserver(
    deployed: tuple[Callable[[str], Machine], Path],
    machine: Callable[..., Machine],
    tmp_path: Path,
    database: PostgresServer,
) -> None:
    another, log = deployed
    laptop, alone, file = another("laptop"), machine("alone", is_shared=False), delivery(tmp_path, "b1")
    alone.run("run", file, "--batch", "b1")
    with served(tmp_path) as address:
        shown = laptop.run("run", f"{address}/b1.jsonl?X-Amz-Signature={SIGNATURE}", "--batch", "b1")
    assert "selected" in shown
    texts = {"command": shown} | dict(laptop.stored()) | dict(rows_of(database))
    assert {name for name, text in texts.items() if SIGNATURE in text} == set()
    assert_frame_equal(decided(laptop, "b1"), decided(alone, "b1"))
    with laptop.here(), open_instance() as instance:
        runs = instance.get_runs(dg.RunsFilter(tags={"qaq/driver": "true", "team": "data"}))
        assert {"ingest_batch", "score_batch", "select_from_batch", "publish_dataset"} <= {run.job_name for run in runs}
        for run in runs:
            assert run.tags["dagster/max_runtime"] == "3600"
            assert run.remote_job_origin is not None, "it came through the webserver"

    before = laptop.num_scores()
    process = laptop.start("run", delivery(tmp_path, "b2"), "--batch", "b2")
    wait_for(lambda: laptop.num_scores() > before + NUM_PAIRS, process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "is being ended, and what it stored is kept" in shown
    with laptop.here(), open_instance() as instance:
        ended = instance.get_runs(dg.RunsFilter(tags={"dagster/partition/batch": "b2"}), limit=1)
        wait_until(lambda: status_of(instance, ended[0].run_id) in FINISHED_STATUSES, log)
        assert status_of(instance, ended[0].run_id) == dg.DagsterRunStatus.CANCELED

    settings = Path(laptop.environment["QAQ_CONFIG"])
    settings.write_text(settings.read_text(encoding="utf-8").replace("num_strata: 2", "num_strata: 1"))
    process = laptop.start("run", file, "--batch", "b1")
    shown, _ = process.communicate()
    assert process.returncode == 1
    assert "reads other settings than the command that submitted the run" in shown
    assert "Traceback" not in shown
