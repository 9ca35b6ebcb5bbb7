"""The UI and its daemon as processes: `qaq ui`, its settings, started on a free port and ended; and the browser."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from qaq_pipeline_tests.conftest import NO_CALIBRATION

REPOSITORY = Path(__file__).parents[2]
QAQ = Path(sys.executable).with_name("qaq")
LOOPBACK = "127.0.0.1"
PATIENCE_S = 180.0
"""For anything that starts a process."""

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH; install it, e.g. Debian's package `chromium`"
)


def variables_of(home: Path, profile: Path) -> dict[str, str]:
    """The environment that names a home and its settings."""
    return {"QAQ_HOME": str(home), "QAQ_CONFIG": str(profile), "DAGSTER_HOME": str(home / "dagster")}


def write_profile(path: Path, models: dict[str, Path], **sections: Any) -> Path:
    """Settings of tiny models by role, for processes that read `QAQ_CONFIG`; sections by keyword."""
    values: dict[str, Any] = {
        "models": {
            role: {"directory": str(folder), "device": "cpu", "dtype": "float32"} for role, folder in models.items()
        },
        "scoring": {"max_tokens": 512},
        "ranking": {"num_strata": 2, "min_rows_per_stratum": 2},
        **({} if "calibration" in sections else NO_CALIBRATION),
    }
    path.write_text(yaml.safe_dump(values | sections), encoding="utf-8")
    return path


@contextlib.contextmanager
def curated_ui(variables: dict[str, str], batch: str, file: Path, log: Path) -> Iterator[str]:
    """`qaq run` of a batch, then `running_ui`; in the end nothing of it runs on, and nobody answers."""
    environment = os.environ | variables
    command = [str(QAQ), "run", str(file), "--batch", batch]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=600)
    with running_ui(environment, log) as url:
        yield url
    assert_nothing_runs(Path(variables["QAQ_HOME"]))
    with pytest.raises(ConnectionRefusedError), socket.create_connection((LOOPBACK, urlsplit(url).port or 0)):
        pass


@contextlib.contextmanager
def running_ui(
    environment: dict[str, str],
    log: Path,
    command: Sequence[str] = (str(QAQ), "ui"),
    folder: Path = REPOSITORY,
    port: int | None = None,
) -> Iterator[str]:
    """Start `qaq ui`, or another command, on a port; Ctrl-C's signal ends its whole process group."""
    port = port or free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://{LOOPBACK}:{port}"
    try:
        wait_for_answer(url, process, log)
        yield url
    finally:
        interrupt(process)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer((LOOPBACK, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
        server.shutdown()


def code_locations(url: str) -> dict[str, str]:
    """The names of the code locations that the UI shows, with the type of what each was loaded as."""
    query = "{workspaceOrError {... on Workspace {locationEntries {name locationOrLoadError {__typename}}}}}"
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(f"{url}/graphql", data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        entries = json.load(answer)["data"]["workspaceOrError"]["locationEntries"]
    return {entry["name"]: entry["locationOrLoadError"]["__typename"] for entry in entries}


def interrupt(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # It ended by itself.
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/server_info", timeout=10):
            return
        time.sleep(0.5)
    pytest.fail(f"qaq ui does not answer (exit {process.poll()}); its last words:\n{log.read_text()[-3000:]}")


def assert_nothing_runs(home: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (left := processes_of(home)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == {}


def processes_of(home: Path) -> dict[int, str]:
    """Command lines by id of the processes whose environment names the home, as far as /proc tells."""
    marker = f"QAQ_HOME={home}\0".encode()
    found = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # It ended meanwhile, or is another user's.
            if marker in environ.read_bytes():
                found[int(environ.parent.name)] = environ.with_name("cmdline").read_text().replace("\0", " ")
    return found
