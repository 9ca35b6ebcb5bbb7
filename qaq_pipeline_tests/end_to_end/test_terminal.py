"""`qaq run` in a real terminal: the progress moves throughout, and Ctrl-C ends it in a sentence."""

from __future__ import annotations

import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline_tests.conftest import write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONGEST_STILL_S = 5.0
"""Longest time in which nothing on the terminal moves."""


@pytest.fixture
def command(
    settings_for: Callable[..., Settings],
    settings_file: Callable[[Settings], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """A run that scores for some seconds, in small batches."""
    settings = settings_for(runtime={"batch_tokens": 300, "shard_seconds": 0})
    rows = [{"query": f"query {n} " + "word " * (n % 20), "response": f"answer {n} " * 8} for n in range(300)]
    monkeypatch.setenv("QAQ_CONFIG", str(settings_file(settings)))
    monkeypatch.setenv("TERM", "xterm-256color")
    delivery = write_jsonl(tmp_path / "rows.jsonl", rows)
    return [sys.executable, "-m", "qaq_pipeline.cli", "run", str(delivery), "--batch", "b1"]


def shown(process: subprocess.Popen[bytes], terminal: int) -> Iterator[tuple[float, str]]:
    """What is written to the terminal, and when, until the process ends."""
    while True:
        ready, _, _ = select.select([terminal], [], [], 0.05)
        if ready:
            try:
                yield time.monotonic(), os.read(terminal, 65_536).decode(errors="replace")
            except OSError:  # The other end is closed.
                return
        elif process.poll() is not None:
            return


def in_terminal(command: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    terminal, end = pty.openpty()
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    return process, terminal


def test_the_progress_moves_at_least_every_5_seconds(command: list[str]) -> None:
    process, terminal = in_terminal(command)
    written = [(time.monotonic(), ""), *shown(process, terminal)]
    assert process.wait() == 0, written[-1]
    times = [when for when, _ in written]
    longest = max(later - earlier for earlier, later in itertools.pairwise(times))
    shares = set(re.findall(r"([\d,]+ of [\d,]+ sequences)", "".join(text for _, text in written)))
    print(f"{len(written)} frames in {times[-1] - times[0]:.0f} s, the longest time without one {longest:.1f} s")
    assert longest < LONGEST_STILL_S
    assert len(shares) > 10


def test_ctrl_c_is_a_sentence_and_the_exit_code_of_a_shell(command: list[str]) -> None:
    process, terminal = in_terminal(command)
    text, is_sent = "", False
    for _, part in shown(process, terminal):
        text += part
        if not is_sent and "sequences" in text:
            os.killpg(process.pid, signal.SIGINT)
            is_sent = True
    assert process.wait() == 130
    assert "Traceback" not in text
    assert "what was finished is stored, run again to go on" in " ".join(text.split())
