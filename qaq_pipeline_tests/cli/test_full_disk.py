"""A disk that fills up, or cannot be written, while a command runs: one line with the remedy, and nothing is lost.

The disk is a real one in memory, so these tests need the right to mount; where it is missing they are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qaq_pipeline_tests.cli.conftest import QAQ, Home, write_settings
from qaq_pipeline_tests.conftest import delivered_rows, write_jsonl

WITH_ROOM = "100m"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("size=100k", folder)
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("no right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(options: str, folder: Path) -> None:
    kind = ["-t", "tmpfs", "tmpfs"] if not options.startswith("remount") else []
    subprocess.run(["mount", "-o", options, *kind, str(folder)], check=True, capture_output=True)


def qaq(home: Home, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **home.environment, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(QAQ), *map(str, arguments)],
        check=False,
        env=environment,
        cwd=home.config.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "free_kb",
    [
        100,  # Dagster's databases do not fit.
        1500,  # The event log fills the disk during a step.
        2000,  # … or while it logs that.
    ],
)
def test_a_full_disk_is_one_line_with_its_remedy_and_the_next_run_goes_on(
    disk: Path, dagster_home: Path, tiny_models: dict[str, Path], tmp_path: Path, free_kb: int
) -> None:
    mount(f"remount,size={free_kb}k", disk)
    home = Home(disk / "home", write_settings(tmp_path / "settings.yaml", tiny_models))
    if free_kb > 1000:
        shutil.copytree(dagster_home, home.folder / "dagster")
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    full = qaq(home, "run", delivery, "--batch", "b1")
    assert full.returncode == 1
    assert "Traceback" not in full.stderr + full.stdout
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(rf"the disk of {home.folder}\S* is full( or damaged)? \([\d.]+ MB free\); free some space", last)
    assert last.endswith("then run again. What was finished is stored") or " (run " in last
    mount(f"remount,size={WITH_ROOM}", disk)
    again = qaq(home, "run", delivery, "--batch", "b1")
    assert (again.returncode, again.stderr) == (0, "")
    assert "within_budget 5" in again.stdout


def test_a_disk_that_cannot_be_written_is_one_line_with_its_remedy(
    disk: Path, dagster_home: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    mount(f"remount,size={WITH_ROOM}", disk)
    home = Home(disk / "home", write_settings(tmp_path / "settings.yaml", tiny_models))
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    shutil.copytree(dagster_home, home.folder / "dagster")
    mount("remount,ro", disk)
    run = qaq(home, "run", delivery, "--batch", "b1")
    assert run.returncode == 1
    (line,) = run.stderr.strip().splitlines()
    assert re.search(rf"{home.folder}\S* cannot be written; make it writable, or use another folder", line)
