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

_FAULTS = (
    (
        (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full"),
        "the disk of {where} is full ({free}); free some space, or use another disk (QAQ_HOME names the home)",
    ),
    (
        (os.strerror(errno.EROFS), "attempt to write a readonly database", "unable to open database file"),
        "{where} cannot be written; make it writable, or use another folder (QAQ_HOME names the home)",
    ),
    (
        # SQLite says this too where the disk filled up while it wrote its journal.
        ("disk I/O error", os.strerror(errno.EIO)),
        "the disk of {where} is full or damaged ({free}); free some space, or check the disk",
    ),
)
"""What the text of an error has, and what it means."""


def fault_of(error: BaseException, home: Path) -> str | None:
    """The fault of a disk that caused an error, and its remedy, in one line; None: no disk did.

    Args:
        error: an error, or one that another layer raised from it.
        home: QAQ_HOME, for the remedy.
    """
    for one in reversed(list(causes_of(error))):  # The innermost text is the shortest.
        file = getattr(one, "filename", None)
        if (found := remedy(str(one), Path(file) if isinstance(file, str) else home)) is not None:
            return found
    return None


def remedy(text: str, where: Path) -> str | None:
    """The same of the text of an error; `where` is the file that could not be written, or QAQ_HOME if none is known."""
    sentence = next((sentence for signs, sentence in _FAULTS if any(sign in text for sign in signs)), None)
    if sentence is None:
        return None
    said = sentence.format(where=where, free=_free(where))
    return f"{' '.join(text.split())}: {said}, then run again. What was finished is stored"


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from or beside."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _free(place: Path) -> str:
    """The free space of the disk of a place, or of its nearest parent."""
    try:
        there = next(one for one in (place, *place.parents) if one.exists())
        return f"{shutil.disk_usage(there).free / 1e6:,.1f} MB free"
    except (OSError, StopIteration):
        return "free space unknown"
