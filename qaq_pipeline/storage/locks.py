"""Locks between processes that write the same storage.

Belongs here: holding a partition while it is written, on one machine or on several. Does not belong here: anything
about its content.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.schema.partition import check_batch_name


class PartitionBusyError(RuntimeError):
    """Another process is writing the same partition. The text names it and the remedy."""


class Locks(Protocol):
    """Locks by the name of a table or other thing that is written, and the parts of its partition.

    A lock is free again when its holder ends, however it ends.
    """

    are_of_one_machine: bool
    """Whether processes of other machines do not see them."""

    def hold(self, name: str, *partition: str, waits: bool = False) -> AbstractContextManager[None]:
        """Hold a lock, so that two processes never write the same at once; its holder may take it again.

        Args:
            name: of what is written.
            partition: parts of its partition.
            waits: without time-out, for a lock that another process holds as a matter of course.

        Raises:
            PartitionBusyError: another process holds it for longer than the time-out.
            ConnectionError: the server of the locks cannot be reached, or ended this lock.
            ValueError: a part cannot be the name of a file.
        """

    def is_held(self, name: str, *partition: str) -> bool:
        """Whether a process holds a lock now. Raises ConnectionError as `hold`."""

    def forget(self, name: str, *partition: str) -> None:
        """Remove what a lock left that nobody will ever hold again."""


class FileLocks:
    """Lock files in one folder, between the processes of one machine. The kernel frees a lock when its holder dies.

    Args:
        directory: local folder of the lock files.
        timeout_seconds: how long a writer waits for another.
    """

    are_of_one_machine = True

    def __init__(self, directory: Path, timeout_seconds: float = 10.0) -> None:
        self._directory = directory
        self._timeout = timeout_seconds

    @contextlib.contextmanager
    def hold(self, name: str, *partition: str, waits: bool = False) -> Iterator[None]:
        """As `Locks.hold`."""
        file = self._file(name, partition)
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(file, is_singleton=True).acquire(timeout=-1 if waits else self._timeout):
                yield
        except Timeout as error:
            raise PartitionBusyError(
                f"{label_of(name, partition)} is being written by another process (lock {file}); wait for it to end, "
                "then run again"
            ) from error

    def is_held(self, name: str, *partition: str) -> bool:
        """As `Locks.is_held`; also where this process holds it."""
        file = self._file(name, partition)
        try:
            with FileLock(file, timeout=0) if file.exists() else contextlib.nullcontext():
                return False
        except Timeout:
            return True

    def forget(self, name: str, *partition: str) -> None:
        """As `Locks.forget`."""
        self._file(name, partition).unlink(missing_ok=True)

    def _file(self, name: str, partition: tuple[str, ...]) -> Path:
        return self._directory / (label_of(name, partition).replace("/", "__") + ".lock")


def label_of(name: str, partition: tuple[str, ...]) -> str:
    """What a lock holds: `logprobs/2026-11-02/strong`. Raises ValueError for a part that cannot name a file."""
    for part in partition:
        check_batch_name(part)
    return "/".join((name, *partition))


def open_locks(settings: Settings, directory: Path) -> Locks:
    """The locks that the settings name.

    Args:
        settings: of the storage.
        directory: of the lock files, if there are any.

    Raises:
        SettingsError: the address of their server is not given, or its package is not installed.
    """
    locks, timeout = settings.storage.locks, settings.runtime.lock_timeout_seconds
    if locks.kind == "files":
        return FileLocks(directory, timeout)
    if find_spec("psycopg2") is None:
        raise SettingsError("storage.locks: kind postgres needs more packages; install qaq-pipeline[postgres]")
    from qaq_pipeline.storage.postgres_locks import locks_from_environment

    return locks_from_environment(locks.url_from, settings.storage_root, timeout)
