"""A storage on each kind of file system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.s3_server import BUCKET, S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server of objects, for all tests."""
    with S3Server() as one:
        yield one


@pytest.fixture
def s3_storage(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Storage on an S3 server."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return Storage(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "locks")


@pytest.fixture(params=["disk", "memory", "s3"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Storage on the local disk, on a non-local file system, and on an object store."""
    if request.param == "s3":
        yield request.getfixturevalue("s3_storage")
        return
    root = str(tmp_path / "storage") if request.param == "disk" else f"memory://{tmp_path.name}/storage"
    yield Storage(root, tmp_path / "locks")
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def files_under(folder: Path) -> list[str]:
    """Paths of all files in a folder and its subfolders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
