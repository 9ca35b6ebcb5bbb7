"""Commands of `qaq` in forked processes: what they import takes longer than what they do.

Belongs here: the process that forks them, and what a forked one does to itself at a given change of a file. Does not
belong here: which commands, and when they end (`campaign`).

The server (`python -m qaq_pipeline_tests.chaos.warm SOCKET`) imports everything and starts no thread. For each
connection it forks a process that forks the command, says its pid, waits for it and says how it ended.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self

import time_machine

from qaq_pipeline_tests.support.child import end_with_parent

_PATIENCE_S = 180.0
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
_MS_REMOUNT = 32
CRASHED = 99
"""Exit code of a command that ended with an error that nobody expected."""


@dataclass(frozen=True)
class Moment:
    """What a command does to itself before a change of a file: a new one, a write, a rename, a removal."""

    act: Literal["count", "kill", "fill", "step"]
    """count: say how many there were. kill: SIGKILL. fill: leave no free byte on the disk. step: set the clock by a
    part of a day to a month, forwards or backwards."""
    number: int
    """Of the change, from 1."""
    below: str
    """Folder whose files count; of `fill` it is on a disk of its own, in memory."""


class Running:
    """A command that was started."""

    def __init__(self, connection: socket.socket, output: Path) -> None:
        self._answers = connection.makefile("r", encoding="utf-8")
        self._connection = connection
        self._output = output
        self.pid = int(self._answers.readline())

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        code = int(self._answers.readline())
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # What it left running.
        return code

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")


class Warm:
    """The server, from the start to the end of the context.

    Args:
        folder: for its socket and what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "warm"
        self._started = 0

    def __enter__(self) -> Self:
        """Start it."""
        command = [sys.executable, "-m", __name__, str(self._socket)]
        self._server = subprocess.Popen(command, preexec_fn=end_with_parent)  # noqa: PLW1509 It makes one system call.
        until = time.monotonic() + _PATIENCE_S
        while not self._socket.exists():
            if self._server.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server of commands did not start")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._server.kill()
        self._server.wait()

    def start(self, command: Sequence[str], environment: Mapping[str, str], moment: Moment | None = None) -> Running:
        """Start a command in an environment that has these variables too."""
        self._started += 1
        output = self._folder / f"output-{self._started}"
        asked = {
            "command": list(command),
            "environment": dict(environment),
            "moment": None if moment is None else asdict(moment),
            "output": str(output),
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._socket))
        connection.sendall(json.dumps(asked).encode() + b"\n")
        return Running(connection, output)


# --- the server -------------------------------------------------------------------------------------------------------


def _serve(path: str) -> None:
    _import_everything()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".new")
        server.listen()
        Path(path + ".new").rename(path)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _handle(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _import_everything() -> None:
    """Everything that the commands import, as far as it starts no thread."""
    import psycopg2  # noqa: F401
    import s3fs  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import transformers  # noqa: F401

    from qaq_pipeline import definitions  # noqa: F401
    from qaq_pipeline.cli import app  # noqa: F401
    from qaq_pipeline.lm import causal_lm  # noqa: F401
    from qaq_pipeline.runs import refresh, registration, run_batch, withdrawal  # noqa: F401
    from qaq_pipeline.scoring import runtime  # noqa: F401


def _handle(connection: socket.socket) -> None:
    """Fork the command of a connection, and say how it ended."""
    asked = json.loads(connection.makefile("r", encoding="utf-8").readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        _run(asked)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(asked: dict[str, Any]) -> None:
    """Be the command."""
    os.setsid()
    output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(asked["environment"])
    code = CRASHED
    try:
        from qaq_pipeline.cli.app import app

        if asked["moment"] is not None:
            _watch(Moment(**asked["moment"]))
        app(asked["command"], prog_name="qaq")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 The parent judges by the code and the traceback.
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(moment: Moment) -> None:
    """Act at a change of a file."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _CHANGES and not (event == "open" and (arguments[2] or 0) & _WRITING):
            return
        if not str(arguments[0]).startswith(moment.below):
            return
        seen += 1
        if moment.act == "count":
            return
        if seen == moment.number and moment.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif seen == moment.number and moment.act == "fill":
            fill(Path(moment.below))
        elif seen == moment.number:
            _step_clock(random.Random(moment.number))

    sys.addaudithook(watch)
    if moment.act == "count":
        atexit.register(lambda: print(f"\nchanges: {seen}"))


def _step_clock(draw: random.Random) -> None:
    step = timedelta(days=draw.choice((-30, -1, 1, 30)) * draw.random())
    time_machine.travel(datetime.now(UTC) + step, tick=True).start()


def fill(disk: Path) -> None:
    """Leave no free byte on a disk in memory."""
    usage = os.statvfs(disk)
    resize(disk, (usage.f_blocks - usage.f_bfree) * usage.f_frsize)


def resize(disk: Path, num_bytes: int) -> None:
    """Give a disk in memory this size. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(disk).encode(), None, _MS_REMOUNT, f"size={num_bytes}".encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(disk))


if __name__ == "__main__":
    _serve(sys.argv[1])
