"""Where the disturbed commands keep what they make, and how it is put back to what it was.

Belongs here: homes, disks, servers. Does not belong here: what is compared (`contents`).
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import fsspec
import psycopg2
import yaml

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline_tests.chaos import warm
from qaq_pipeline_tests.chaos.proxies import Proxies, port_of
from qaq_pipeline_tests.chaos.warm import Moment, Running
from qaq_pipeline_tests.support.postgres import PostgresServer
from qaq_pipeline_tests.support.s3_server import BUCKET, KEY, SECRET, S3Server

ROOM = 200_000_000
"""Bytes of the disk of a home."""


class Place(Protocol):
    """A home with everything that its commands read and write."""

    environment: Mapping[str, str]
    """Of its commands."""
    own_environment: Mapping[str, str]
    """Of the process that compares: it reaches the servers directly."""

    def settings(self) -> Settings:
        """Its settings, read in its environment."""
        ...

    def keep(self, name: str) -> None:
        """Keep a copy of all that is stored now."""
        ...

    def put_back(self, name: str) -> None:
        """Make all that is stored what it was when the copy was kept."""
        ...

    def counted(self, start: Callable[[Moment | None], Running]) -> tuple[Running, int, dict[str, int]]:
        """Start a command; how it ended, and how often each thing happened at which it can be disturbed."""
        ...


class Disk:
    """A home on a disk of its own, in memory; Dagster's instance is SQLite.

    Args:
        folder: where the disk is mounted, and copies are kept.
        config: file of settings.
    """

    def __init__(self, folder: Path, config: Path) -> None:
        self.disk = folder / "disk"
        self._home, self._copies = self.disk / "home", folder / "copies"
        self.environment: Mapping[str, str] = environment_of(self._home, config)
        self.own_environment: Mapping[str, str] = self.environment

    def settings(self) -> Settings:
        """Its settings."""
        return load_settings(self.environment["QAQ_CONFIG"])

    def counted(self, start: Callable[[Moment | None], Running]) -> tuple[Running, int, dict[str, int]]:
        """Changes of files."""
        running = start(Moment("count", 0, str(self.disk)))
        code = running.wait()
        return running, code, {"changes": int(running.output.rpartition("changes: ")[2])}

    def keep(self, name: str) -> None:
        """Copy the home."""
        shutil.copytree(self._home, self._copies / name)

    def put_back(self, name: str) -> None:
        """Replace the home by a copy."""
        warm.resize(self.disk, ROOM)
        shutil.rmtree(self._home)
        shutil.copytree(self._copies / name, self._home)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mount the disk for the time of the context. Raises CalledProcessError without the right to."""
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(self.disk)], check=True)
        try:
            self._home.mkdir()
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)


class Servers:
    """A home whose storage is an object store, and whose instance and locks are a database, behind proxies that fail.

    Args:
        folder: for the home and copies of it.
        config: file of settings, with the storage below `ROOT`.
    """

    ROOT = f"s3://{BUCKET}/live"
    _DATABASE = "live"

    def __init__(self, folder: Path, config: Path) -> None:
        self._home, self._copies, self._config = folder / "home", folder / "copies", config
        self.environment: Mapping[str, str] = {}
        self.own_environment: Mapping[str, str] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run both servers and their proxies for the time of the context."""
        with PostgresServer() as database, S3Server() as store:
            self._admin = database.url
            self._execute(f'CREATE DATABASE "{self._DATABASE}"')
            endpoint = store.environment["AWS_ENDPOINT_URL"]
            with Proxies(endpoint, port_of(database.url)) as self.proxies:
                base = environment_of(self._home, self._config) | store.environment
                live = database.url.replace("postgresql:", "postgresql+psycopg2:").removesuffix("postgres")
                live += self._DATABASE
                behind = live.replace(f":{port_of(database.url)}/", f":{self.proxies.port_of_database}/")
                self.own_environment = base | {"QAQ_POSTGRES_URL": live}
                self.environment = base | {"QAQ_POSTGRES_URL": behind, "AWS_ENDPOINT_URL": self.proxies.store_url}
                self._files = fsspec.filesystem(
                    "s3", key=KEY, secret=SECRET, endpoint_url=endpoint, use_listings_cache=False
                )
                (self._home / "dagster").mkdir(parents=True)
                instance = {"storage": {"postgres": {"postgres_url": {"env": "QAQ_POSTGRES_URL"}}}}
                (self._home / "dagster" / "dagster.yaml").write_text(
                    yaml.safe_dump(instance | {"telemetry": {"enabled": False}}), encoding="utf-8"
                )
                yield

    def settings(self) -> Settings:
        """Its settings."""
        return load_settings(str(self._config))

    def counted(self, start: Callable[[Moment | None], Running]) -> tuple[Running, int, dict[str, int]]:
        """Requests to the store, and messages to the database."""
        self.proxies.expect()
        running = start(None)
        code = running.wait()
        return running, code, {"requests": self.proxies.num_requests, "messages": self.proxies.num_messages}

    def keep(self, name: str) -> None:
        """Copy the home, the objects and the database."""
        shutil.copytree(self._home, self._copies / name)
        self._copy_objects("live", f"copies/{name}")
        self._copy_database(self._DATABASE, f"copy of {name}")

    def put_back(self, name: str) -> None:
        """Replace the home, the objects and the database by copies."""
        self.proxies.expect()
        shutil.rmtree(self._home)
        shutil.copytree(self._copies / name, self._home)
        self._copy_objects(f"copies/{name}", "live")
        self._copy_database(f"copy of {name}", self._DATABASE)

    def _copy_objects(self, source: str, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(f"{BUCKET}/{target}", recursive=True)
        for path in self._files.find(f"{BUCKET}/{source}"):
            self._files.copy(path, path.replace(f"{BUCKET}/{source}", f"{BUCKET}/{target}", 1))

    def _copy_database(self, source: str, target: str) -> None:
        for name in (source, target):
            self._execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        self._execute(f'DROP DATABASE IF EXISTS "{target}"')
        self._execute(f'CREATE DATABASE "{target}" TEMPLATE "{source}"')

    def _execute(self, command: str) -> None:
        with contextlib.closing(psycopg2.connect(self._admin)) as session:
            session.autocommit = True
            session.cursor().execute(command)


def environment_of(home: Path, config: Path) -> dict[str, str]:
    """The environment of the commands of a home."""
    return {
        "QAQ_HOME": str(home),
        "DAGSTER_HOME": str(home / "dagster"),
        "QAQ_CONFIG": str(config),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
