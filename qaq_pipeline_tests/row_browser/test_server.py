"""server: `qaq rows` answers on this machine only, says where, and ends with its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from qaq_pipeline.row_browser import server
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.server import REPOSITORY

PATIENCE_S = 60


@contextlib.contextmanager
def started(home: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`qaq rows` and its address, which it prints first."""
    command = [sys.executable, "-m", "qaq_pipeline.cli", "rows", *options]
    environment = os.environ | {"QAQ_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()[1].strip(";")
        finally:
            process.kill()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return str(listening.getsockname()[1])


def test_the_printed_address_answers_and_an_interrupt_ends_it_without_a_word(tmp_path: Path) -> None:
    with started(tmp_path, "--port", free_port()) as (process, address):
        with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
            assert b"Nothing is published yet" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD, free_port()],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        env=os.environ | {"QAQ_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        text=True,
    )
    assert parent.stdout is not None
    child, address = int(parent.stdout.readline()), parent.stdout.readline().split()[1].strip(";")
    with urllib.request.urlopen(address, timeout=PATIENCE_S):
        parent.kill()
    parent.wait()
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
    parent.stdout.close()


CHILD = """
import os, subprocess, sys
command = [sys.executable, "-m", "qaq_pipeline.cli", "rows", "--port", sys.argv[1], "--parent", str(os.getpid())]
child = subprocess.Popen(command)
print(child.pid)
child.wait()
"""


def test_a_port_in_use_is_named_with_the_remedy(check_sentence: Check) -> None:
    with server.listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(server.PortInUseError) as error, server.listen(port):
            pass
    check_sentence(str(error.value).replace(str(port), "PORT"))


def test_only_this_machine_can_reach_it() -> None:
    with server.listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
