"""The landing zone: which deliveries are complete, and their copy into the storage. fsspec only, no Dagster.

Belongs here: what a delivery is, when it is complete, which names are refused, and the copy. Does not belong here:
polling and the runs that it starts (`automation`), and parsing of records (`records`).

A delivery is one file or one folder directly in the zone. Its batch has the same name, without the format extensions
of a file. Names that begin with `.` or `_` are ignored. Names of unfinished uploads (`.tmp`, `.part`) are ignored
until they are renamed. A poll reads names, sizes and times only, never the data.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem

from qaq_pipeline.config.settings import LandingSettings
from qaq_pipeline.ingest.sources import FORMATS
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.storage import Storage

_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload")
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated")
"""Metadata fields by which stores show that a file was replaced or rewritten."""
_MAX_FILES = 10_000
_MAX_NAME = 200
_MOST_PER_LOOK = 25
"""Maximum number of deliveries taken per poll."""


class LandingError(ValueError):
    """The zone cannot be listed, or a delivery cannot be copied. The text names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Landed:
    """A delivery in the landing zone."""

    entry: str
    """Its name in the zone."""
    batch: str
    files: dict[str, tuple[int, str]]
    """Size in bytes and the store's change metadata, by the file's name in the delivery."""
    is_marked: bool
    """True if its completion marker exists."""
    is_unfinished: bool
    """True if a file in it has the name of an unfinished upload."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and times (16 hex digits, kept in the cursor); it changes with the delivery."""
        return hash_json(self.files)[:16]


@dataclass(frozen=True)
class Look:
    """The contents of the zone."""

    deliveries: list[Landed]
    refused: dict[str, str]
    """Reasons, by name in the zone."""


@dataclass(frozen=True)
class Seen:
    """Results of earlier polls for what is still in the zone: fingerprints by name."""

    waiting: dict[str, str] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Reasons, not fingerprints."""

    @classmethod
    def parse(cls, cursor: str | None) -> Self:
        """Parse the text of `dump`; any other text counts as nothing seen."""
        try:
            values = json.loads(cursor or "{}")
            return cls(**{name: dict(values.get(name, {})) for name in ("waiting", "taken", "refused")})
        except (ValueError, TypeError, AttributeError):
            return cls()

    def dump(self) -> str:
        """Return the text for a sensor's cursor."""
        return json.dumps({"waiting": self.waiting, "taken": self.taken, "refused": self.refused}, sort_keys=True)


def look(url: str, settings: LandingSettings) -> Look:
    """List the contents of the zone, by name.

    Raises:
        LandingError: the zone cannot be listed.
    """
    unreadable: dict[str, str] = {}
    try:
        fs, root = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        if isinstance(fs, LocalFileSystem):
            unreadable = _unreadable(root)  # Raises for the zone itself, which fsspec would list as empty.
        infos = fs.find(root, detail=True)
    except Exception as error:
        raise LandingError(
            f"landing.url: {url!r} cannot be listed ({type(error).__name__}: {error}); check that it exists and is "
            "readable, the credentials, and that the package for its protocol is installed"
        ) from error
    entries: dict[str, dict[str, Mapping[str, Any]]] = {}
    prefix = root.rstrip("/") + "/"
    for path, info in sorted(infos.items()):
        if path.endswith("/"):  # Placeholder that an object store's console writes for a folder.
            continue
        entry, _, inside = path.removeprefix(prefix).partition("/")
        entries.setdefault(entry, {})[inside] = info
    found = _sort_out({entry: files for entry, files in entries.items() if entry not in unreadable}, settings.marker)
    return Look(found.deliveries, found.refused | {_storable(entry): why for entry, why in unreadable.items()})


def _unreadable(root: str) -> dict[str, str]:
    """Return the entries of a local zone with unreadable contents, and why: fsspec omits them silently."""
    next(Path(root).iterdir(), None)
    faults: dict[str, str] = {}

    def note(error: OSError) -> None:
        entry = Path(error.filename).relative_to(root).parts[0]
        faults[entry] = f"{error.filename!a} cannot be read ({error.strerror}); let this user read it"

    for _ in os.walk(root, onerror=note):
        pass
    return faults


def _sort_out(entries: dict[str, dict[str, Mapping[str, Any]]], marker: str) -> Look:
    deliveries, refused = [], {}
    for entry, files in entries.items():
        if entry.startswith((".", "_")) or entry.endswith((*_UNFINISHED, f".{marker}")):
            continue
        fault = _fault(entry, files)
        if fault is not None:
            refused[_storable(entry)] = fault
            continue
        landed = _landed(entry, files, marker, is_marked=f"{entry}.{marker}" in entries)
        if landed.files or landed.is_marked:
            deliveries.append(landed)
    claims = Counter(landed.batch for landed in deliveries)
    for landed in deliveries:
        if claims[landed.batch] > 1:
            others = [other.entry for other in deliveries if other.batch == landed.batch and other != landed]
            refused[landed.entry] = (
                f"{', '.join(map(repr, others))} would also be batch {landed.batch!r}; rename or remove all but one"
            )
    return Look([landed for landed in deliveries if landed.entry not in refused], refused)


def _storable(entry: str) -> str:
    """Return the name, escaped if it is not printable."""
    return entry if entry.isprintable() else ascii(entry)[1:-1]


def _landed(entry: str, files: Mapping[str, Mapping[str, Any]], marker: str, *, is_marked: bool) -> Landed:
    if "" in files:  # The entry itself is a file.
        return Landed(entry, _batch_of(entry, is_file=True), {entry: _stamp(files[""])}, is_marked, is_unfinished=False)
    shown = {name: info for name, info in files.items() if name != marker and not _is_hidden(name)}
    return Landed(
        entry=entry,
        batch=_batch_of(entry, is_file=False),
        files={name: _stamp(info) for name, info in shown.items()},
        is_marked=marker in files,
        is_unfinished=any(name.endswith(_UNFINISHED) for name in shown),
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _batch_of(entry: str, *, is_file: bool) -> str:
    """Drop the compression and format extensions: `week-47.jsonl.gz` is batch `week-47`."""
    if not is_file:
        return entry
    path = PurePosixPath(entry)
    for endings in (_COMPRESSIONS, FORMATS):
        if path.suffix.lower() in endings:
            path = path.with_suffix("")
    return path.name


def _fault(entry: str, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    try:
        check_batch_name(_batch_of(entry, is_file="" in files))
    except ValueError as error:
        return f"{error}; rename it"
    folders = {str(parent).removeprefix(".") for name in files if name for parent in PurePosixPath(name).parents}
    if both := sorted(folders & set(files)):
        return f"{(both[0] or entry)!a} is both a file and a folder, as object stores allow; rename one"
    if len(files) > _MAX_FILES:
        return f"it holds {len(files)} files, more than {_MAX_FILES}; deliver fewer, larger ones"
    for name, info in files.items():
        shown = ascii(name or entry)
        if len(name) > _MAX_NAME or not name.isprintable() or "\\" in name or ".." in name.split("/"):
            return (
                f"the name of its file {shown[:80]} cannot be used: at most 200 printable characters, no '\\' or '..'"
            )
        if info.get("islink") or info["type"] != "file":
            return f"{shown} is not a regular file; deliver a copy"
    return None


def _stamp(info: Mapping[str, Any]) -> tuple[int, str]:
    # All of them: an ETag depends on the content, so a restored file has its old ETag again.
    signs = [str(info[name]) for name in _STAMPS if info.get(name) is not None]
    return int(info["size"] or 0), " ".join(signs)


def complete(found: Look, seen: Seen, settings: LandingSettings) -> tuple[list[Landed], Seen]:
    """Return the deliveries to take now, and the updated record of what was seen.

    A delivery is complete if its marker exists, or (unless the marker is required) if it is unchanged since the last
    poll. A redelivery must be unchanged in any case: its marker may be left over. A delivery is not taken again until
    it changes. Deliveries over the limit of one poll wait for the next; redeliveries come last.
    """
    ready, waiting, taken = [], {}, {}
    for landed in sorted(found.deliveries, key=lambda one: (one.entry in seen.taken, one.entry)):
        entry, fingerprint = landed.entry, landed.fingerprint
        if seen.taken.get(entry) == fingerprint:
            taken[entry] = fingerprint
            continue
        is_stable = seen.waiting.get(entry) == fingerprint
        is_said = landed.is_marked and (is_stable or entry not in seen.taken)
        is_complete = not landed.is_unfinished and (is_said or (is_stable and not settings.require_marker))
        if is_complete and len(ready) < _MOST_PER_LOOK:
            ready.append(landed)
            taken[entry] = fingerprint
        else:
            waiting[entry] = fingerprint
            if entry in seen.taken:
                taken[entry] = seen.taken[entry]
    return ready, Seen(waiting, taken, dict(found.refused))


# --- the copy -------------------------------------------------------------------------------------------------------

_ANNOUNCED = "landed.json"
_SETTLED = "settled.json"
"""File that records the last landed delivery that is settled (copied, or replaced by `qaq run`), and how many were
settled so far."""


def announce(storage: Storage, url: str, landed: Landed) -> str | None:
    """Store the location of the batch's newest delivery, without reading its data.

    Returns:
        The run key: path, size, the hash of names, sizes and times, and the number of deliveries of the batch settled
        before. None if this one is settled, so that a lost cursor does not bring back an old delivery.
    """
    path = f"{url.rstrip('/')}/{landed.entry}"
    note = {"url": path, "is_file": landed.entry in landed.files, "files": landed.files}
    settled = _settled(storage, landed.batch)
    if settled["note"] == json.loads(json.dumps(note)):
        return None
    storage.files.write_json(note, *storage.deliveries.place(landed.batch, _ANNOUNCED))
    return f"{path}|{landed.num_bytes} bytes|{landed.fingerprint}|{settled['number']}"


def is_announced(storage: Storage, batch: str) -> bool:
    """Return whether the zone has a delivery of the batch that is not copied yet."""
    return storage.files.exists(*storage.deliveries.place(batch, _ANNOUNCED))


def settle(storage: Storage, batch: str) -> None:
    """Close the announced delivery: it was copied, or a manual delivery of the batch replaced it."""
    if is_announced(storage, batch):
        settled = {"note": _announced(storage, batch), "number": _settled(storage, batch)["number"] + 1}
        storage.files.write_json(settled, *storage.deliveries.place(batch, _SETTLED))
        storage.files.remove(*storage.deliveries.place(batch, _ANNOUNCED))


def _announced(storage: Storage, batch: str) -> dict[str, Any]:
    return storage.files.read_json(*storage.deliveries.place(batch, _ANNOUNCED))


def _settled(storage: Storage, batch: str) -> dict[str, Any]:
    place = storage.deliveries.place(batch, _SETTLED)
    return storage.files.read_json(*place) if storage.files.exists(*place) else {"note": None, "number": 0}


def receive(storage: Storage, batch: str) -> Delivery:
    """Return the batch's newest delivery; copy it into the storage if it was only announced.

    Raises:
        LandingError: it is gone from the zone, or is still being written.
        StorageError: the batch was never delivered.
    """
    if not is_announced(storage, batch):
        return storage.deliveries.current(batch)
    note = _announced(storage, batch)
    delivery = storage.deliveries.store(batch, _read_files(note))
    if _announced(storage, batch) == note:  # Else another delivery was announced meanwhile.
        settle(storage, batch)
    return delivery


def _read_files(note: Mapping[str, Any]) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(note["url"])
    fs.invalidate_cache()
    paths = {name: root if note["is_file"] else f"{root}/{name}" for name in sorted(note["files"])}
    try:
        contents = {name: fs.cat_file(path) for name, path in paths.items()}
        # Listed as `look` lists it: some stores report other times for a single file.
        folder = root.rpartition("/")[0] if note["is_file"] else root
        infos = fs.find(folder, detail=True, maxdepth=1 if note["is_file"] else None)
        now = {name: _stamp(infos[path]) for name, path in paths.items()}
    except (FileNotFoundError, KeyError) as error:
        raise LandingError(
            f"{note['url']}: no longer in the landing zone ({error}); deliver it again, or `qaq run` it"
        ) from error
    except OSError as error:
        raise LandingError(f"{note['url']}: cannot be read ({error}); let this user read it, and run again") from error
    for name, (size, sign) in note["files"].items():
        if now[name] != (size, sign) or len(contents[name]) != size:
            raise LandingError(
                f"{note['url']}: {name} changed after the delivery was judged complete; it is taken again when "
                "it stays unchanged. Write under another name and rename, or use the marker"
            )
    return contents


# --- the visible record ---------------------------------------------------------------------------------------------

_REFUSED = ("landing", "refused.json")


def record_refused(storage: Storage, refused: Mapping[str, str]) -> None:
    """Store what is refused, for `qaq status`; write only if it changed."""
    if dict(refused) != read_refused(storage):
        storage.files.write_json(dict(refused), *_REFUSED)


def read_refused(storage: Storage) -> dict[str, str]:
    """Read what the last poll refused: reasons, by name in the zone."""
    try:
        return storage.files.read_json(*_REFUSED)
    except StorageError:
        return {}
