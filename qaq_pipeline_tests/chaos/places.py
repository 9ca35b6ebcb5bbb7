"""Where the disturbed commands keep what they make, and how it is put back to what it was.

Belongs here: homes, disks, servers. Does not belong here: what is compared (`contents`).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline_tests.chaos import warm

ROOM = 200_000_000
"""Bytes of the disk of a home."""


class Place(Protocol):
    """A home with everything that its commands read and write."""

    environment: Mapping[str, str]
    """Of its commands."""

    def settings(self) -> Settings:
        """Its settings, read in its environment."""
        ...

    def keep(self, name: str) -> None:
        """Keep a copy of all that is stored now."""
        ...

    def put_back(self, name: str) -> None:
        """Make all that is stored what it was when the copy was kept."""
        ...


class Disk:
    """A home on a disk of its own, in memory; Dagster's instance is SQLite.

    Args:
        folder: where the disk is mounted, and copies are kept.
        config: file of settings.
    """

    def __init__(self, folder: Path, config: Path) -> None:
        self.disk = folder / "disk"
        self._home, self._copies = self.disk / "home", folder / "copies"
        self.environment = environment_of(self._home, config)

    def settings(self) -> Settings:
        """Its settings."""
        return load_settings(self.environment["QAQ_CONFIG"])

    def keep(self, name: str) -> None:
        """Copy the home."""
        shutil.copytree(self._home, self._copies / name)

    def put_back(self, name: str) -> None:
        """Replace the home by a copy."""
        warm.resize(self.disk, ROOM)
        shutil.rmtree(self._home)
        shutil.copytree(self._copies / name, self._home)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Mount the disk for the time of the context. Raises CalledProcessError without the right to."""
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(self.disk)], check=True)
        try:
            self._home.mkdir()
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)


def environment_of(home: Path, config: Path) -> dict[str, str]:
    """The environment of the commands of a home."""
    return {
        "QAQ_HOME": str(home),
        "DAGSTER_HOME": str(home / "dagster"),
        "QAQ_CONFIG": str(config),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
