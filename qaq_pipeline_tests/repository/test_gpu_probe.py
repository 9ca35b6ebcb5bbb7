"""bench.gpu_probe runs where only torch and transformers are installed: each mode, on the CPU and tiny."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("accelerate", "dagster", "dataframely", "polars", "psutil", "pyarrow", "scipy")

WITHOUT_THEM = f"""
import runpy, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
sys.argv = sys.argv[1:]
runpy.run_module("bench.gpu_probe", run_name="__main__", alter_sys=True)
"""


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", WITHOUT_THEM, "gpu_probe", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_the_engine_is_imported_without_what_a_bare_machine_lacks() -> None:
    done = probe("--help")
    assert done.returncode == 0, done.stderr
    assert "prediction beside result" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["env", "correct", "kernel", "memory", "speed", "workers"])
def test_each_mode_is_rehearsed_on_a_cpu(mode: str, tmp_path: Path) -> None:
    if mode == "kernel" and find_spec("triton") is None:
        pytest.skip("triton is made for Linux on x86-64")
    done = probe(mode, "--device", "cpu", "--tiny", "--json", str(tmp_path / "lines.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert (tmp_path / "lines.json").stat().st_size > 0
