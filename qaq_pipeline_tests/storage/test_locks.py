"""locks: held between processes and threads, freed when their holder ends; in files, and in a database."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.locks import FileLocks, Locks, PartitionBusyError, open_locks
from qaq_pipeline.storage.postgres_locks import LockServerError, PostgresLocks, locks_from_environment
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import raw_rows
from qaq_pipeline_tests.support.postgres import PASSWORD, PostgresServer

IMPATIENT = 0.3
"""Seconds that a writer waits."""
_HOLDER = """
import sys, time
from pathlib import Path
from qaq_pipeline.storage.locks import FileLocks
from qaq_pipeline.storage.postgres_locks import PostgresLocks
kind, place, *partition = sys.argv[1:]
locks = FileLocks(Path(place)) if kind == "files" else PostgresLocks(place, "here")
with locks.hold(*partition):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as one:
        yield one


class Place:
    """Locks of one kind, and other processes that hold them."""

    def __init__(self, kind: str, place: str) -> None:
        self.arguments = (kind, place)
        self._started: list[subprocess.Popen[str]] = []

    def locks(self, seconds: float = IMPATIENT) -> Locks:
        kind, place = self.arguments
        return FileLocks(Path(place), seconds) if kind == "files" else PostgresLocks(place, "here", seconds)

    def hold_elsewhere(self, *partition: str) -> subprocess.Popen[str]:
        """A process that holds a lock until it is killed."""
        command = [sys.executable, "-c", _HOLDER, *self.arguments, *partition]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


@pytest.fixture(params=["files", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "files":
        one = Place("files", str(tmp_path / "locks"))
    else:
        one = Place("postgres", request.getfixturevalue("server").url)
    yield one
    one.end()


def test_a_lock_holds_between_processes_and_is_freed_when_its_holder_is_killed(place: Place) -> None:
    locks = place.locks()
    assert not locks.is_held("logprobs", "b1", "strong")
    holder = place.hold_elsewhere("logprobs", "b1", "strong")
    with pytest.raises(PartitionBusyError) as caught, locks.hold("logprobs", "b1", "strong"):
        pytest.fail("two processes hold one lock")
    text = str(caught.value)
    assert "logprobs/b1/strong is being written by another process" in text
    assert "wait for it to end" in text
    named = f"process {holder.pid}" if place.arguments[0] == "postgres" else "logprobs__b1__strong.lock"
    assert named in text
    assert locks.is_held("logprobs", "b1", "strong")
    with locks.hold("logprobs", "b1", "weak"), locks.hold("logprobs", "b2", "strong"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with place.locks(10).hold("logprobs", "b1", "strong"):
        pass
    assert not locks.is_held("logprobs", "b1", "strong")


def test_the_holder_of_a_lock_may_take_it_again(place: Place, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"), place.locks())
    with storage.locks.hold("raw_data", "b1"):
        with storage.locks.hold("raw_data", "b1"):
            assert place.locks().is_held("raw_data", "b1")
        storage.tables.write(StoredTable(raw_rows({})), "raw_data", Partition("b1"))
        assert place.locks().is_held("raw_data", "b1")
    assert not place.locks().is_held("raw_data", "b1")


def test_a_lock_is_freed_when_its_work_fails(place: Place) -> None:
    locks = place.locks()
    with locks.hold("batch", "b1"):
        with pytest.raises(KeyError), locks.hold("raw_data", "b1"):
            raise KeyError
        assert not place.locks().is_held("raw_data", "b1")
        assert place.locks().is_held("batch", "b1")


def test_a_lock_holds_between_the_threads_of_a_process(place: Place) -> None:
    locks, found = place.locks(), []

    def take() -> None:
        try:
            with locks.hold("raw_data", "b1"):
                found.append("held")
        except PartitionBusyError:
            found.append("busy")

    with locks.hold("raw_data", "b1"):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    take()
    assert found == ["busy", "held"]


def test_one_that_waits_gets_the_lock_when_it_is_free(place: Place) -> None:
    holder = place.hold_elsewhere("dataset")
    timer = threading.Timer(3 * IMPATIENT, holder.kill)
    timer.start()
    with place.locks().hold("dataset", waits=True):
        assert holder.wait() == -signal.SIGKILL
    timer.join()


def test_nothing_is_left_of_a_lock_that_is_forgotten(place: Place) -> None:
    locks = place.locks()
    with locks.hold("run", "r1"):
        pass
    locks.forget("run", "r1")
    locks.forget("run", "never-held")
    if place.arguments[0] == "files":
        assert list(Path(place.arguments[1]).iterdir()) == []
    assert not locks.is_held("run", "r1")


@pytest.mark.parametrize("name", ["../b1", "b1/strong", ""])
def test_a_name_that_is_no_file_s_is_refused(place: Place, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used"), place.locks().hold("raw_data", name):
        pytest.fail("it is held")
    with pytest.raises(ValueError, match="cannot be used"):
        place.locks().is_held("raw_data", name)


def test_two_storages_in_one_database_have_locks_of_their_own(server: PostgresServer) -> None:
    one, other = PostgresLocks(server.url, "s3://one", IMPATIENT), PostgresLocks(server.url, "s3://other", IMPATIENT)
    with one.hold("raw_data", "b1"), other.hold("raw_data", "b1"):
        assert one.is_held("raw_data", "b1")


def test_a_lock_that_the_server_ended_is_an_error_at_its_end_and_the_next_one_holds(server: PostgresServer) -> None:
    locks = PostgresLocks(server.url, "here", 20)
    said = r"ended the lock of raw_data/b1 .* run again"
    with pytest.raises(LockServerError, match=said) as caught, locks.hold("raw_data", "b1"):
        server.restart()
    assert PASSWORD not in str(caught.value)
    with locks.hold("raw_data", "b1"):
        assert locks.is_held("raw_data", "b1")


def test_the_error_of_the_work_counts_where_the_server_ended_the_lock_too(server: PostgresServer) -> None:
    locks = PostgresLocks(server.url, "here", 20)

    def work() -> None:
        with locks.hold("batch", "b1"), locks.hold("raw_data", "b1"):
            server.restart()
            raise KeyError

    with pytest.raises(KeyError):
        work()


def test_a_server_that_restarts_is_waited_for(server: PostgresServer) -> None:
    server.kill()
    timer = threading.Timer(1, server.start)
    timer.start()
    with PostgresLocks(server.url, "here", 30).hold("raw_data", "b1"):
        pass
    timer.join()


def test_a_server_that_cannot_be_reached_is_named_without_the_password(server: PostgresServer) -> None:
    server.kill()
    try:
        locks, said = PostgresLocks(server.url, "here", IMPATIENT), r"of the locks cannot be reached .*127\.0\.0\.1"
        with pytest.raises(LockServerError, match=said) as caught, locks.hold("raw_data", "b1"):
            pytest.fail("it is held")
        assert PASSWORD not in str(caught.value)
        assert PASSWORD.replace(" ", "%20") not in str(caught.value)
    finally:
        server.start()


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2"])
def test_the_settings_name_the_variable_with_the_address(
    settings_for: Callable[..., Settings],
    server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    settings = settings_for(storage={"locks": {"kind": "postgres", "url_from": "DATABASE"}})
    monkeypatch.setenv("DATABASE", server.address.replace("postgresql:", f"{scheme}:"))
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    locks = open_locks(settings, tmp_path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locks.hold("raw_data", "b1"))
        assert PostgresLocks(server.url, settings.storage_root).is_held("raw_data", "b1")
    assert isinstance(open_locks(settings_for(), tmp_path), FileLocks)


@pytest.mark.parametrize("address", [None, "", "no address: secret-8f3c1d"])
def test_a_variable_without_an_address_is_named_and_its_value_is_not(
    settings_for: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    settings = settings_for(storage={"locks": {"kind": "postgres", "url_from": "DATABASE"}})
    if address is None:
        monkeypatch.delenv("DATABASE", raising=False)
    else:
        monkeypatch.setenv("DATABASE", address)
    with pytest.raises(SettingsError, match="variable DATABASE has no URL of a database, such as") as caught:
        open_locks(settings, tmp_path)
    assert "8f3c1d" not in str(caught.value)


def test_locks_go_to_another_process_without_their_password(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_URL", server.url.replace("postgresql:", "postgresql+psycopg2:"))
    sent = pickle.dumps(locks_from_environment("PLANTED_URL", "here", IMPATIENT))
    assert not any(secret.encode() in sent for secret in (PASSWORD, PASSWORD.replace(" ", "%20"), server.url))
    there = pickle.loads(sent)
    with PostgresLocks(server.url, "here").hold("batch"), pytest.raises(PartitionBusyError):
        there.hold("batch").__enter__()
    monkeypatch.delenv("PLANTED_URL")
    with pytest.raises(SettingsError, match="the environment variable PLANTED_URL has no URL of a database"):
        pickle.loads(sent)
