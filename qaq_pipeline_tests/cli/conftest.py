"""Fixtures of the command line: homes, and a factory that runs a command in one."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qaq_pipeline.cli import app
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs.deployment import open_instance
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import NO_CALIBRATION, NO_REPORTS, delivered_rows, write_jsonl

QAQ = Path(sys.executable).with_name("qaq")


@dataclass(frozen=True)
class Shown:
    """What a command left on the terminal, spaces and line breaks made one."""

    code: int
    out: str
    err: str
    lines: str
    """`out` as it was printed."""

    def error(self, code: int = 1, lines: int = 1) -> str:
        """The error message; fails where there is none, or more than that."""
        assert self.code == code, self
        assert self.err.startswith("error: ")
        assert "Traceback" not in self.err + self.out
        assert len(self.err.strip().splitlines()) == lines, self.err
        return self.err


Qaq = Callable[..., Shown]


@dataclass(frozen=True)
class Home:
    """A QAQ_HOME, and the settings file that goes with it."""

    folder: Path
    config: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "QAQ_HOME": str(self.folder),
            "DAGSTER_HOME": str(self.folder / "dagster"),
            "QAQ_CONFIG": str(self.config),
        }


def write_settings(path: Path, models: dict[str, Path], **sections: Any) -> Path:
    values = {
        "models": {
            role: {"directory": str(folder), "device": "cpu", "dtype": "float32"} for role, folder in models.items()
        },
        "scoring": {"max_tokens": 512},
        "ranking": {"num_strata": 2, "min_rows_per_stratum": 2},
        **NO_CALIBRATION,
        "reports": NO_REPORTS,
    }
    path.write_text(yaml.safe_dump(values | sections), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_models(tiny_model_dir: Callable[..., Path]) -> dict[str, Path]:
    return {"strong": tiny_model_dir(seed=0), "weak": tiny_model_dir(seed=1)}


@pytest.fixture(scope="session")
def curated(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Home, subprocess.CompletedProcess[str]]:
    """A home in which the console script curated the twenty rows as batch b1, and what it printed."""
    folder = tmp_path_factory.mktemp("curated")
    home = Home(folder / "home", write_settings(folder / "settings.yaml", tiny_models))
    delivery = write_jsonl(folder / "rows.jsonl", delivered_rows())
    # DAGSTER_HOME is left to its default, and the settings are named on the command line.
    environment = {name: value for name, value in os.environ.items() if name not in ("DAGSTER_HOME", "QAQ_CONFIG")}
    environment |= {"QAQ_HOME": str(home.folder), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [str(QAQ), "run", str(delivery), "--batch", "b1", "--config", str(home.config)]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return home, run


@pytest.fixture
def home(curated: tuple[Home, subprocess.CompletedProcess[str]]) -> Home:
    return curated[0]


@pytest.fixture(scope="session")
def dagster_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dagster home whose databases are set up, to be copied: setting them up takes a second."""
    folder = tmp_path_factory.mktemp("template") / "dagster"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(folder))
        with open_instance() as instance:
            instance.get_dynamic_partitions("batch")
            instance.get_runs()
    return folder


@pytest.fixture
def empty_home(tiny_models: dict[str, Path], dagster_home: Path, tmp_path: Path) -> Home:
    """A home in which nothing was run yet."""
    shutil.copytree(dagster_home, tmp_path / "home" / "dagster")
    return Home(tmp_path / "home", write_settings(tmp_path / "settings.yaml", tiny_models))


@pytest.fixture
def qaq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Qaq]:
    """Factory: a `qaq` command in this process, in a home."""
    dagster_level = logging.getLogger("dagster").level
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(home: Home, *arguments: object) -> Shown:
        for name, value in home.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["qaq", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            app.app()
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return Shown(code, " ".join(shown.out.split()), shown.err, shown.out)

    yield run
    logging.getLogger("dagster").setLevel(dagster_level)


def open_storage_of(home: Home) -> Any:
    values = yaml.safe_load(home.config.read_text())
    return open_storage(Settings.model_validate(values, context={"home": home.folder}))
