"""Locks between processes of several machines: the advisory locks of a Postgres database.

Belongs here: taking them, and their loss. Does not belong here: which locks the settings name (`locks`).

A lock belongs to a session of the database: it is free when its holder's connection ends. A thread has one session for
all locks that it holds. A proxy that shares connections between clients (such as PgBouncer by transaction) cannot be
used.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg2
from psycopg2 import extensions

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.storage.locks import PartitionBusyError, label_of

_POLL_SECONDS = 0.2
_GONE_AFTER = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""A peer that answers nothing for a minute is gone: a machine without power would hold its locks for hours."""
_HOLDER = """
    SELECT activity.application_name
    FROM pg_locks AS held LEFT JOIN pg_stat_activity AS activity USING (pid)
    WHERE held.locktype = 'advisory' AND held.granted AND held.objsubid = 1
        AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND held.classid::bigint = %s AND held.objid::bigint = %s
"""


class LockServerError(ConnectionError):
    """The server of the locks cannot be reached, or ended a lock. The text has the remedy."""


class PostgresLocks:
    """Advisory locks of a database.

    Args:
        url: of the database.
        scope: what is locked, such as the root of the storage: the locks of others in the same database are others.
        timeout_seconds: how long a writer waits for another, and for the server.
        url_from: environment variable with the URL: where these locks go to another process, it reads the URL there, so
            that no password travels.
    """

    are_of_one_machine = False

    def __init__(self, url: str, scope: str, timeout_seconds: float = 10.0, url_from: str = "QAQ_POSTGRES_URL") -> None:
        self._url = url
        self._url_from = url_from
        self._scope = scope
        self._timeout = timeout_seconds
        self._here = _OfThread()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the URL."""
        return locks_from_environment, (self._url_from, self._scope, self._timeout)

    @contextlib.contextmanager
    def hold(self, name: str, *partition: str, waits: bool = False) -> Iterator[None]:
        """As `Locks.hold`. Where the server ended the lock meanwhile, that is an error at the end."""
        label, key = label_of(name, partition), self._key(name, partition)
        with self._session() as session:
            self._take(session, label, key, waits=waits)
            try:
                yield
            except BaseException:
                with contextlib.suppress(psycopg2.Error):  # The first error counts.
                    _ask(session, "SELECT pg_advisory_unlock(%s)", key)
                raise
            self._give_back(session, label, key)

    def is_held(self, name: str, *partition: str) -> bool:
        """As `Locks.is_held`."""
        with contextlib.closing(self._connect()) as session:
            return self._holder(session, self._key(name, partition)) is not None

    def forget(self, name: str, *partition: str) -> None:
        """Nothing: a lock leaves nothing."""

    def _key(self, name: str, partition: tuple[str, ...]) -> int:
        """The number of a lock, of 64 bits."""
        text = f"{self._scope}\0{label_of(name, partition)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)

    @contextlib.contextmanager
    def _session(self) -> Iterator[extensions.connection]:
        """The session of this thread, which ends when nothing uses it any more."""
        here = self._here
        if here.session is None:
            here.session = self._connect()
        here.num_users += 1
        try:
            yield here.session
        finally:
            here.num_users -= 1
            if not here.num_users:
                here.session.close()
                here.session = None

    def _connect(self) -> extensions.connection:
        """A session. A server that restarts is waited for."""
        until = time.monotonic() + self._timeout
        name = f"{platform.node()[:40]}, process {os.getpid()}"  # At most 63 characters.
        while True:
            try:
                session = psycopg2.connect(
                    self._url, application_name=name, connect_timeout=max(math.ceil(self._timeout), 2), **_GONE_AFTER
                )
                session.autocommit = True
                for option, value in _GONE_AFTER.items():
                    _ask(session, "SELECT set_config(%s, %s, false)", f"tcp_{option}", str(value))
            except psycopg2.OperationalError as error:
                if time.monotonic() >= until:
                    raise LockServerError(
                        f"the database of the locks cannot be reached ({_cause(error)}); run again when it can be"
                    ) from error
                time.sleep(_POLL_SECONDS)
            else:
                return session

    def _take(self, session: extensions.connection, label: str, key: int, *, waits: bool) -> None:
        until = time.monotonic() + self._timeout
        try:
            while not _ask(session, "SELECT pg_try_advisory_lock(%s)", key):
                if not waits and time.monotonic() >= until:
                    holder = self._holder(session, key) or "which has just ended"
                    raise PartitionBusyError(
                        f"{label} is being written by another process ({holder}); wait for it to end, then run again"
                    )
                time.sleep(_POLL_SECONDS)
        except psycopg2.Error as error:
            raise LockServerError(
                f"{label} cannot be locked: the database of the locks does not answer ({_cause(error)}); run again"
            ) from error

    def _give_back(self, session: extensions.connection, label: str, key: int) -> None:
        cause = "it was restarted"
        try:
            if _ask(session, "SELECT pg_advisory_unlock(%s)", key):
                return
        except psycopg2.Error as error:
            cause = _cause(error)
        raise LockServerError(
            f"the database of the locks ended the lock of {label} ({cause}): another process may have written it too; "
            "run again, what is finished is kept"
        )

    def _holder(self, session: extensions.connection, key: int) -> str | None:
        """Machine and process that hold a lock; None: nobody does."""
        name = _ask(session, _HOLDER, (key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF)
        return None if name is None else str(name)


def locks_from_environment(url_from: str, scope: str, timeout_seconds: float) -> PostgresLocks:
    """The locks of the database whose URL is in an environment variable.

    Raises:
        SettingsError: the variable has no URL of a database.
    """
    # Dagster's storage takes the same URL, with the name of the driver in it.
    url = re.sub(r"^(\w+)\+\w+://", r"\1://", os.environ.get(url_from, ""))
    try:
        is_address = bool(extensions.parse_dsn(url))
    except psycopg2.ProgrammingError:  # Its text may repeat a password.
        is_address = False
    if not is_address:
        raise SettingsError(
            f"storage.locks: the environment variable {url_from} has no URL of a database, such as "
            "postgresql://qaq@db.example/qaq"
        )
    return PostgresLocks(url, scope, timeout_seconds, url_from)


class _OfThread(threading.local):
    """The session of a thread, and how many locks use it."""

    session: extensions.connection | None = None
    num_users = 0


def _ask(session: extensions.connection, question: str, *values: int | str) -> bool | str | None:
    """The first value of the first row of an answer; None: no row."""
    with session.cursor() as cursor:
        cursor.execute(question, values)
        row = cursor.fetchone()
    return None if row is None else row[0]


def _cause(error: psycopg2.Error) -> str:
    """What the server or its library said, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
