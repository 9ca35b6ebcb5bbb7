"""The Makefile: an unfit Python is refused before anything is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qaq_pipeline_tests.support.server import REPOSITORY

OTHER_PYTHON = """#!/bin/sh
exec python3 -c "import sys; sys.version_info = ({version}, 0)
$2"
"""


@pytest.mark.parametrize("version", ["3, 10", "3, 14"])
def test_a_python_that_is_not_supported_is_named_and_nothing_is_made(tmp_path: Path, version: str) -> None:
    python = tmp_path / "python"
    python.write_text(OTHER_PYTHON.format(version=version))
    python.chmod(0o755)
    command = ["make", "install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert made.returncode != 0
    assert f"Python 3.11, 3.12 or 3.13 is needed; {python} is {version.replace(', ', '.')}." in made.stderr
    assert list(tmp_path.iterdir()) == [python]
