"""`dg` reads dg.toml, and plain `dagster dev` still reads workspace.yaml beside it; both name one code location."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import yaml

from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline_tests.support.server import REPOSITORY, code_locations, running_ui

DG = str(Path(sys.executable).with_name("dg"))
DAGSTER = str(Path(sys.executable).with_name("dagster"))
WORKSPACE = REPOSITORY / "workspace.yaml"
LOCATION = "qaq_pipeline"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that reads this repository, installed or not."""
    dagster_home = tmp_path / "home" / "dagster"
    dagster_home.mkdir(parents=True)
    shutil.copy(REPOSITORY / "qaq_pipeline" / "dagster.yaml", dagster_home)  # It switches telemetry off, of `dg` too.
    own = {"QAQ_HOME": str(tmp_path / "home"), "DAGSTER_HOME": str(dagster_home)}
    return os.environ | own | {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)}


def dg(environment: dict[str, str], *arguments: str) -> str:
    run = subprocess.run([DG, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_dg_checks_the_definitions(environment: dict[str, str]) -> None:
    assert "All definitions loaded successfully." in dg(environment, "check", "defs")


@pytest.mark.slow
def test_dg_lists_the_assets_of_the_pipeline(environment: dict[str, str]) -> None:
    listed = {asset["asset_key"] for asset in json.loads(dg(environment, "list", "defs", "--json"))["assets"]}
    # The demo profile names no reference.
    assert {asset.name for asset in PIPELINE.of(*set(Purpose) - {Purpose.REFERENCE})} <= listed


def test_every_way_to_load_the_definitions_names_one_location() -> None:
    project = tomllib.loads((REPOSITORY / "dg.toml").read_text(encoding="utf-8"))["project"]
    module = {"module_name": project["code_location_target_module"], "location_name": project["code_location_name"]}
    assert module == {"module_name": "qaq_pipeline.definitions", "location_name": LOCATION}
    assert yaml.safe_load(WORKSPACE.read_text(encoding="utf-8")) == {"load_from": [{"python_module": module}]}
    assert (resources.files("qaq_pipeline") / "workspace.yaml").read_bytes() == WORKSPACE.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [(DAGSTER, "dev"), (DG, "dev")], ids=["dagster dev", "dg dev"])
def test_a_development_server_loads_the_location(
    environment: dict[str, str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    with running_ui(environment, tmp_path / "log", command) as url:
        assert code_locations(url) == {LOCATION: "RepositoryLocation"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dagster_dev_reads_workspace_yaml_beside_dg_toml(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("dg.toml", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    renamed = WORKSPACE.read_text(encoding="utf-8").replace(f"location_name: {LOCATION}", "location_name: of_workspace")
    (folder / "workspace.yaml").write_text(renamed, encoding="utf-8")
    with running_ui(environment, tmp_path / "log", (DAGSTER, "dev"), folder) as url:
        assert code_locations(url) == {"of_workspace": "RepositoryLocation"}
