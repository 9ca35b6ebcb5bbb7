"""Bytes, JSON and Parquet files under one root, on a local disk or an object store.

Belongs here: atomic writes, listings, URLs. Does not belong here: what a file means (the other stores).

Every write is atomic: on a local disk a temporary name in the same folder, then a rename; on an object store one PUT.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import polars as pl
from fsspec.implementations.local import LocalFileSystem

Place = tuple[str, ...]
"""Parts of the path of a file or folder below the root."""


_UNFINISHED = ".tmp"
"""Ending of the name of what is not stored yet; the name begins with a dot."""
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
"""Errors of S3 for a write whose condition does not hold: the file is another, is being written, or is gone."""
_WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of disks without hard links."""
_READS_AT_ONCE = 16
_LEFTOVER_SECONDS = 24 * 3600
"""Age at which something unfinished was left by a process that was killed."""


class StorageError(ValueError):
    """A stored file is missing, torn or foreign. The text names the path and the remedy."""


def read_url(url: str) -> bytes:
    """The content of a user's file at a local path or fsspec URL.

    Raises:
        StorageError: it cannot be read. The text is the reason alone.
    """
    try:
        files, path = fsspec.url_to_fs(url)
        return files.cat_file(path)
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(str(error)) from error


def json_bytes(value: Any) -> bytes:
    """A JSON value as it is stored: the one way to write it, so that its bytes can be compared."""
    return json.dumps(value, indent=2, sort_keys=True).encode()


def hash_json(value: Any) -> str:
    """Hash of a JSON value (32 hex digits)."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def sha256_of(stream: BinaryIO) -> str:
    """Hash of what is left of a stream (64 hex digits), which is read in pieces."""
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


class LocalFile:
    """A file on this machine. A temporary one is removed when nobody holds it any more."""

    def __init__(self, path: Path, *, is_temporary: bool = False) -> None:
        self.path = path
        if is_temporary:
            weakref.finalize(self, path.unlink, missing_ok=True)


class Files:
    """Files under a root. A place is given by its parts, as `files.read_json("reports", "b1", "made_of.json")`.

    Args:
        root: local path or any fsspec URL.

    Raises:
        ValueError, ImportError: the URL is of an unknown kind, or its fsspec package is not installed.
    """

    def __init__(self, root: str) -> None:
        # A listing that is kept would not have what other machines have written since.
        self._fs, self._root = fsspec.core.url_to_fs(root, use_listings_cache=False)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._is_conditional = "s3" in self._fs.protocol

    def path(self, *parts: str) -> str:
        """Full path below the root."""
        return "/".join([self._root.rstrip("/"), *parts])

    def url(self, *parts: str) -> str:
        """The full path with its protocol, as other tools need it."""
        return self._fs.unstrip_protocol(self.path(*parts)).removeprefix("file://")

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write atomically: readers see the old content or the new, never a part of it."""
        if not self._is_local:
            self._fs.pipe_file(self.path(*parts), data)
            return
        with self.writing(*parts) as stream:
            stream.write(data)

    def create(self, data: bytes, *parts: str) -> bool:
        """Write a new file atomically; False, and nothing is written, if there is one."""
        if self._is_conditional:
            return self._replace(data, None, *parts)
        try:
            if self._is_local:
                self._link(data, *parts)
            else:
                self._fs.pipe_file(self.path(*parts), data, mode="create")
        except FileExistsError:
            return False
        return True

    def _link(self, data: bytes, *parts: str) -> None:
        """Write a new local file. Raises FileExistsError if there is one."""
        file, target = self.unfinished(*parts), Path(self.path(*parts))
        with file.path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(file.path, target)
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            # Such a disk has no way to create a whole file exclusively. Of two writers at this moment one is lost.
            if target.exists():
                raise FileExistsError(target) from error
            file.path.replace(target)

    @contextlib.contextmanager
    def writing(self, *parts: str) -> Iterator[BinaryIO]:
        """A seekable stream whose content becomes the file at the end, atomically; not after an error."""
        file = self.unfinished(*parts)
        with file.path.open("w+b") as stream:
            yield stream
        self.put(file, *parts)

    def unfinished(self, *parts: str) -> LocalFile:
        """A new file for what will be stored there; it is removed if it never is."""
        if self._is_local:
            folder = Path(self.path(*parts)).parent
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
        else:
            folder = Path(tempfile.gettempdir())
        return LocalFile(folder / f".{uuid.uuid4().hex}{_UNFINISHED}", is_temporary=True)

    @contextlib.contextmanager
    def unfinished_folder(self, *parts: str) -> Iterator[Path]:
        """A new folder for files that `put` stores below this one; what is left in it at the end is removed."""
        place = self.path(*parts) if self._is_local else None
        if place is not None:
            Path(place).mkdir(parents=True, exist_ok=True)
            _remove_leftovers(Path(place))
        with tempfile.TemporaryDirectory(dir=place, prefix=".", suffix=_UNFINISHED) as folder:
            yield Path(folder)

    def put(self, file: LocalFile, *parts: str) -> None:
        """Store a file that `unfinished` gave for this place. On a local disk it is moved there."""
        if not self._is_local:
            self._fs.put_file(str(file.path), self.path(*parts))
            return
        with file.path.open("rb") as stream:
            os.fsync(stream.fileno())  # Else the rename could reach the disk before the content.
        Path(self.path(*parts)).parent.mkdir(parents=True, exist_ok=True)
        file.path.replace(self.path(*parts))

    def local(self, *parts: str) -> LocalFile:
        """The file on this machine: itself, or a copy of it. Raises `StorageError` where there is no file."""
        with self._must_exist(*parts):
            if self._is_local:
                path = Path(self.path(*parts))
                path.stat()  # Raises where there is none.
                return LocalFile(path)
            copy = self.unfinished(*parts)
            self._fs.get_file(self.path(*parts), str(copy.path))
            return copy

    def read_bytes(self, *parts: str) -> bytes:
        """Raises `StorageError` where there is no file."""
        with self._must_exist(*parts):
            return self._fs.cat_file(self.path(*parts))

    def read_if_any(self, *parts: str) -> bytes | None:
        """The content of a file; None where there is no file."""
        try:
            return self._fs.cat_file(self.path(*parts))
        except FileNotFoundError:
            return None

    def read_many(self, places: Iterable[Place]) -> Iterator[bytes | None]:
        """The content of each file, None where there is no file; from an object store many at the same time."""
        if self._is_local:
            yield from (self.read_if_any(*place) for place in places)
            return
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            asked: deque[Future[bytes | None]] = deque()
            for place in places:
                asked.append(threads.submit(self.read_if_any, *place))
                if len(asked) == _READS_AT_ONCE:
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()

    @contextlib.contextmanager
    def _must_exist(self, *parts: str) -> Iterator[None]:
        """Raise `StorageError` where the file is not there."""
        try:
            yield
        except FileNotFoundError as error:
            raise StorageError(f"{self.url(*parts)}: not stored yet") from error

    def read_unchanged(self, sha256: str, remedy: str, *parts: str) -> bytes:
        """The bytes of a file. Raises `StorageError` with the remedy where they do not have this hash."""
        data = self.read_bytes(*parts)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"{self.url(*parts)}: changed since it was written; {remedy}")
        return data

    def open(self, *parts: str) -> BinaryIO:
        """A stream that reads the file. Raises FileNotFoundError where there is none."""
        return self._fs.open(self.path(*parts), "rb")

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON value atomically."""
        self.write_bytes(json_bytes(value), *parts)

    def read_json(self, *parts: str) -> Any:
        """Raises `StorageError` where there is no file, or a torn one."""
        data = self.read_bytes(*parts)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StorageError(f"{self.url(*parts)}: not JSON ({error}); restore the file, or remove it") from error

    def update_json(self, change: Callable[[Any], Any], *parts: str, at_first: Any) -> None:
        """Replace a JSON value by what a function makes of it. Writers take turns by a lock.

        On S3 the value is replaced only if it is still the one that was read, else the function is called again: a
        writer that lost its lock meanwhile overwrites nothing.

        Args:
            change: the new value from the old one; an equal one is not written.
            parts: of the place.
            at_first: the old value where nothing is stored yet.

        Raises:
            StorageError: the stored file is torn.
        """
        while True:
            tag = self._tag(*parts)
            old = self.read_json(*parts) if self.exists(*parts) else at_first
            new = change(old)
            if new == old or self._replace(json_bytes(new), tag, *parts):
                return

    def _tag(self, *parts: str) -> str | None:
        """Names the content of a file in a store with conditional writes; None: there is no file."""
        if not self._is_conditional:
            return None
        try:
            return str(self._fs.info(self.path(*parts))["ETag"])
        except FileNotFoundError:
            return None

    def _replace(self, data: bytes, tag: str | None, *parts: str) -> bool:
        """Write a file; False, and nothing is written, if it has another tag by now."""
        if not self._is_conditional:
            self.write_bytes(data, *parts)
            return True
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            self._fs.pipe_file(self.path(*parts), data, **condition)
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            if answer.get("Error", {}).get("Code") in _CONFLICTS:
                return False
            raise
        return True

    def read_frame(self, *parts: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Rows of a Parquet file that is no stored table.

        Raises:
            StorageError: it is missing, or torn.
        """
        data = self.read_bytes(*parts)
        try:
            return pl.read_parquet(io.BytesIO(data), columns=None if columns is None else list(columns), glob=False)
        except pl.exceptions.PolarsError as error:
            raise StorageError(f"{self.url(*parts)}: it cannot be read: {error}; restore it from a backup") from error

    def exists(self, *parts: str) -> bool:
        """Whether there is a file or a folder."""
        return self._fs.exists(self.path(*parts))

    def sha256(self, *parts: str) -> str:
        """Hash of a file (64 hex digits). Raises `StorageError` where there is no file."""
        with self._must_exist(*parts), self.open(*parts) as stream:
            return sha256_of(stream)

    def size(self, *parts: str) -> int:
        """Size of a file in bytes. Raises `StorageError` where there is no file."""
        with self._must_exist(*parts):
            return int(self._fs.size(self.path(*parts)))

    def names(self, *parts: str) -> list[str]:
        """Names in a folder, sorted; empty where there is no folder."""
        folder = self.path(*parts)
        if not self._fs.exists(folder):
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False))

    def files_below(self, *parts: str) -> list[str]:
        """Paths of all files in a folder and its subfolders, relative to it."""
        start = self.path(*parts)
        return sorted(path.removeprefix(start).lstrip("/") for path in self._fs.find(start))

    def remove(self, *parts: str) -> None:
        """Remove one file."""
        self._fs.rm_file(self.path(*parts))

    def remove_folder(self, *parts: str) -> None:
        """Remove a folder and everything in it."""
        self._fs.rm(self.path(*parts), recursive=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder."""
    oldest = time.time() - _LEFTOVER_SECONDS
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # Another process was faster.
            if entry.name.startswith(".") and entry.name.endswith(_UNFINISHED) and entry.stat().st_mtime < oldest:
                shutil.rmtree(entry) if entry.is_dir() else Path(entry).unlink()
