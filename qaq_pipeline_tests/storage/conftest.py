"""A storage on each kind of file system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from qaq_pipeline.storage.storage import Storage


@pytest.fixture(params=["disk", "memory"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Storage on the local disk, and on a non-local file system."""
    root = str(tmp_path / "storage") if request.param == "disk" else f"memory://{tmp_path.name}/storage"
    yield Storage(root, tmp_path / "locks")
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def files_under(folder: Path) -> list[str]:
    """Paths of all files in a folder and its subfolders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
