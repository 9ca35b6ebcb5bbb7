"""The README's commands, as a newcomer types them: each runs as printed, one after the other.

Slow: it fetches the models, runs the demo, a batch of its own and a training trial.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from qaq_pipeline_tests.support.server import REPOSITORY

LINKED = (".venv", "Makefile", "constraints.txt", "examples", "pyproject.toml", "qaq_pipeline", "workspace.yaml")
UNTIL_CTRL_C = ("make ui", "qaq rows")
"""Commands that go on until Ctrl-C. They have to show their page first."""


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


class Shell:
    """A shell that runs a line after the other, and keeps what a line exports, in a folder like a fresh clone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        self.folder.mkdir()
        for name in LINKED:
            (self.folder / name).symlink_to(REPOSITORY / name)
        kept = {"PATH", "LANG", "TMPDIR"} | {name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_"))}
        self.state = folder / "state.sh"
        self.state.write_text("", encoding="utf-8")
        self.environment = {name: os.environ[name] for name in kept & os.environ.keys()} | {"HOME": str(folder)}

    def start(self, line: str) -> subprocess.Popen[str]:
        script = f". {self.state}\n{line}\nqaq_exit=$?\nexport -p > {self.state}\nexit $qaq_exit"
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, line: str) -> str:
        with self.start(line) as process:
            try:
                shown, _ = process.communicate()
            except BaseException:  # Such as the test's timeout: the command would go on.
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert process.returncode == 0, f"{line}\n{shown}"
        return shown

    def run_until_ctrl_c(self, line: str) -> str:
        """Run a line until the page at the address that it prints can be read, then press Ctrl-C."""
        with self.start(line) as process:
            assert process.stdout is not None
            shown = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+\S*", shown)):
                read = process.stdout.readline()
                assert read, f"{line} ended\n{shown}"
                shown += read
            page = _read(found[0].rstrip(";,"))
            os.killpg(process.pid, signal.SIGINT)
            rest, _ = process.communicate(timeout=120)
        assert "Traceback" not in shown + rest
        return page


def _read(address: str) -> str:
    """The page at an address, which may need some seconds to come up."""
    command = ["curl", "--silent", "--fail", "--retry", "60", "--retry-delay", "1", "--retry-connrefused", address]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_command_runs_as_printed_one_after_the_other(tmp_path: Path) -> None:
    shell, shown = Shell(tmp_path), {}
    lines = [line.strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
    for line in lines:
        run = shell.run_until_ctrl_c if line.startswith(UNTIL_CTRL_C) else shell.run
        shown[line.split("#")[0].strip()] = run(line)
        print(f"$ {line}", shown[line.split("#")[0].strip()], sep="\n")
    assert len(shown) == len(lines) >= 15
    assert "selected" in shown["make demo"]
    assert "Dataset: " in shown["qaq run pairs.jsonl --batch week-47"]
    (notebook,) = blocks("python")
    (tmp_path / "notebook.py").write_text(notebook, encoding="utf-8")
    shell.run(f"python {tmp_path / 'notebook.py'}")
