"""An S3 server on loopback: SeaweedFS, of a package from the registry.

Belongs here: starting, killing and starting it again. Does not belong here: what is stored in it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import fsspec

from qaq_pipeline_tests.support.child import end_with_parent

BUCKET = "bucket"
KEY, SECRET = "qaq", "sesame-s3-8f3c1d"
_START_SECONDS = 60


class S3Server:
    """One server with its own data."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="qaq-s3-"))
        may = [{"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}]
        self._users = self._folder / "users.json"
        self._users.write_text(json.dumps({"identities": may}), encoding="utf-8")
        names = ("master", "volume", "filer", "s3")
        self._ports = {
            f"{name}{kind}": port
            for (name, kind), port in zip(
                ((name, kind) for name in names for kind in (".port", ".port.grpc")), _free_ports(8), strict=True
            )
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['s3.port']}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        """For its clients."""

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = [f"-{name}={value}" for name, value in self._ports.items()]
        self._process = subprocess.Popen(
            [
                Path(sys.executable).parent / "weed",
                "server",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-s3",
                "-filer",
                f"-dir={self._folder}",
                f"-s3.config={self._users}",
                "-volume.max=50",
                "-master.volumeSizeLimitMB=64",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                *options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            preexec_fn=end_with_parent,  # noqa: PLW1509 It makes one system call.
        )
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                self._make_bucket()
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
            else:
                return

    def _make_bucket(self) -> None:
        files = fsspec.filesystem(
            "s3", key=KEY, secret=SECRET, endpoint_url=self.environment["AWS_ENDPOINT_URL"], skip_instance_cache=True
        )
        if not files.exists(BUCKET):
            files.mkdir(BUCKET)
        files.pipe_file(f"{BUCKET}/.ready", b"yes")

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and remove its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
