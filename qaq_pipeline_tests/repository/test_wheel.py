"""A wheel built from the tree works outside of the repository: `qaq doctor`, `qaq --help`, `qaq ui`.

The wheel is installed alone into an environment that sees this one's other packages: nothing is fetched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from qaq_pipeline_tests.support.server import REPOSITORY, code_locations, running_ui, variables_of, write_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def qaq(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The console script that the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    environment = venv.EnvBuilder(symlinks=True)
    environment.create(folder / "venv")
    python = Path(environment.ensure_directories(folder / "venv").env_exe)
    install = ["--python", str(python), "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=300)
    # A path in a .pth file: the .pth files of that folder, so an editable installation of this tree, are not read.
    site_packages = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    (Path(site_packages) / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return str(python.with_name("qaq"))


@pytest.fixture
def environment(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, str]:
    """A home of two tiny models, without the path of this repository."""
    models = {role: tiny_model_dir(seed=seed) for seed, role in enumerate(("strong", "weak"))}
    own = variables_of(tmp_path / "home", write_profile(tmp_path / "settings.yaml", models))
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own | {"COLUMNS": "200"}


def test_the_code_is_the_wheel_s(qaq: str, environment: dict[str, str], tmp_path: Path) -> None:
    python = str(Path(qaq).with_name("python"))
    probe = [python, "-c", "import qaq_pipeline; print(qaq_pipeline.__file__)"]
    run = subprocess.run(probe, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()).is_relative_to(Path(qaq).parents[1])


@pytest.mark.parametrize("argument", ["doctor", "--help"])
def test_a_command_works_in_an_empty_folder(
    qaq: str, environment: dict[str, str], tmp_path: Path, argument: str
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    run = subprocess.run([qaq, argument], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_ui_works_in_an_empty_folder(qaq: str, environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with running_ui(environment, tmp_path / "log", (qaq, "ui"), folder) as url:
        assert code_locations(url) == {"qaq_pipeline": "RepositoryLocation"}
