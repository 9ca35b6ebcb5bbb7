"""Locks between processes of one machine.

Belongs here: holding a partition while it is written. Does not belong here: anything about its content.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qaq_pipeline.schema.partition import check_batch_name


class PartitionBusyError(RuntimeError):
    """Another process is writing the same partition. The text names it and the remedy."""


class Locks:
    """Lock files in one folder. The kernel frees a lock when its holder dies.

    Args:
        directory: local folder of the lock files.
        timeout_seconds: how long a writer waits for another.
    """

    def __init__(self, directory: Path, timeout_seconds: float = 10.0) -> None:
        self._directory = directory
        self._timeout = timeout_seconds

    @contextlib.contextmanager
    def hold(self, name: str, *partition: str, waits: bool = False) -> Iterator[None]:
        """Hold a partition, so that two processes never write it at once; its holder may take it again.

        Args:
            name: of the table or other thing that is written.
            partition: parts of its partition.
            waits: without time-out, for a lock that another process holds as a matter of course.

        Raises:
            PartitionBusyError: another process holds it for longer than the time-out.
            ValueError: a part cannot be the name of a file.
        """
        for part in partition:
            check_batch_name(part)
        self._directory.mkdir(parents=True, exist_ok=True)
        label = "/".join((name, *partition))
        file = self._directory / ("__".join((name, *partition)) + ".lock")
        try:
            with FileLock(file, is_singleton=True).acquire(timeout=-1 if waits else self._timeout):
                yield
        except Timeout as error:
            raise PartitionBusyError(
                f"{label} is being written by another process (lock {file}); wait for it to end, then run again"
            ) from error
