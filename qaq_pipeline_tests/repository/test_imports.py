"""Importing is free: no torch, no file, no environment variable."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PROBE = """
import os, sys
before = set(os.environ)
import {module}
heavy = sorted({{"torch", "transformers", "safetensors", "gguf", "scipy"}} & set(sys.modules))
assert not heavy, f"importing {module} imports {{heavy}}"
assert set(os.environ) == before, sorted(set(os.environ) ^ before)
"""


@pytest.mark.parametrize("module", ["qaq_pipeline", "qaq_pipeline.definitions", "qaq_pipeline.cli.app"])
def test_importing_loads_no_heavy_library_and_touches_no_file(module: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist")
    home = tmp_path / "home"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home)}
    environment |= {"QAQ_CONFIG": str(tmp_path / "missing.yaml"), "QAQ_HOME": str(tmp_path / "var")}
    environment.pop("DAGSTER_HOME", None)
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_importing_starts_no_thread_that_computes() -> None:
    """A process that was forked from one with such threads waits for them for ever."""
    probe = "import qaq_pipeline.definitions, qaq_pipeline.cli.app\nfrom pathlib import Path\n"
    probe += "print(*(path.read_text() for path in Path('/proc/self/task').glob('*/comm')))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert "python" in run.stdout
    assert "polars-0" not in run.stdout


def test_what_explains_a_row_loads_no_dagster_and_no_datasets_of_pyarrow() -> None:
    """They take longer to import than a row to be found."""
    probe = "import sys, qaq_pipeline.cli.app, qaq_pipeline.cli.row_view, qaq_pipeline.publication.versions\n"
    probe += "assert not {'torch', 'transformers', 'dagster', 'pyarrow.dataset'} & set(sys.modules), sys.modules.keys()"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
