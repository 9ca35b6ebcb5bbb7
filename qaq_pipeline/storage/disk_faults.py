"""Faults of a disk: one that is full, or that cannot be written.

Belongs here: recognising one, whichever layer noticed it, and the remedy. Does not belong here: catching it.

The layers are Python's files, SQLite under Dagster's event log, and libraries that write files of their own. Each has
its own error, and Dagster keeps only an error's text, so the text decides.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")
_UNWRITABLE = (
    os.strerror(errno.EROFS),
    "attempt to write a readonly database",
    "unable to open database file",
)
_BROKEN = ("disk I/O error", os.strerror(errno.EIO))
"""SQLite says this too where the disk filled up while it wrote its journal."""


def fault_of(error: BaseException, home: Path) -> str | None:
    """The fault of a disk that caused an error, and its remedy, in one line; None: no disk did.

    Args:
        error: an error, or one that another layer raised from it.
        home: QAQ_HOME, for the remedy.
    """
    found = (remedy(str(one), home) for one in reversed(list(_causes(error))))  # The innermost text is the shortest.
    return next((text for text in found if text is not None), None)


def remedy(text: str, home: Path) -> str | None:
    """The same of the text of an error."""
    for signs, sentence in (
        (_FULL, f"a disk is full ({_free(home)} left at {home}); free some space, or set QAQ_HOME to another disk"),
        (_UNWRITABLE, f"{home} cannot be written; make it writable, or set QAQ_HOME to a folder that is"),
        (_BROKEN, f"a disk is full or damaged ({_free(home)} left at {home}); free some space, or check the disk"),
    ):
        if any(sign in text for sign in signs):
            return f"{' '.join(text.split())}: {sentence}, then run again. What was finished is stored"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from or beside."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _free(folder: Path) -> str:
    """The free space of the disk of a folder, or of its nearest parent."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return f"{shutil.disk_usage(there).free / 1e6:,.1f} MB"
