"""The landing zone: which deliveries lie there complete, and their copy into the storage. fsspec only, no Dagster.

Belongs here: what one delivery is, when it is complete, which names are refused, and the copy. Does not belong here:
who looks, how often, and what is run then (`automation`), and the reading of records.

One delivery is one file or one folder directly in the zone; its batch is named as it is, less the endings of a file's
format. Names that begin with `.` or `_` are no deliveries, and a name that ends as unfinished uploads do (`.tmp`,
`.part`) is not one yet. A look reads names, sizes and times only, never a byte of the data.
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
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.storage import Storage

_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload")
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated")
"""What stores call the signs that a file is another, or was written anew."""
_MAX_FILES = 10_000
_MAX_NAME = 200
_MOST_PER_LOOK = 25
"""Deliveries that are taken at one look."""


class LandingError(ValueError):
    """The zone cannot be looked into, or a delivery cannot be copied. The text names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Landed:
    """A delivery as it lies in the zone."""

    entry: str
    """Its name in the zone."""
    batch: str
    files: dict[str, tuple[int, str]]
    """Size in bytes, and the store's sign of when it was written, by the file's name in the delivery."""
    is_marked: bool
    """Whether its marker says that it is complete."""
    is_unfinished: bool
    """Whether a name in it says that it is not."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and times (16 hex digits: the cursor holds it); another one is another delivery."""
        return hash_json(self.files)[:16]


@dataclass(frozen=True)
class Look:
    """What lies in the zone."""

    deliveries: list[Landed]
    refused: dict[str, str]
    """Why, by name in the zone."""


@dataclass(frozen=True)
class Seen:
    """What earlier looks found, for as long as it lies there: fingerprints by name in the zone."""

    waiting: dict[str, str] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Reasons, not fingerprints."""

    @classmethod
    def parse(cls, cursor: str | None) -> Self:
        """From `dump`; what is no such text counts as nothing seen."""
        try:
            values = json.loads(cursor or "{}")
            return cls(**{name: dict(values.get(name, {})) for name in ("waiting", "taken", "refused")})
        except (ValueError, TypeError, AttributeError):
            return cls()

    def dump(self) -> str:
        """As text, for a sensor's cursor."""
        return json.dumps({"waiting": self.waiting, "taken": self.taken, "refused": self.refused}, sort_keys=True)


def look(url: str, settings: LandingSettings) -> Look:
    """What lies in the zone now, by name.

    Raises:
        LandingError: it cannot be listed.
    """
    unreadable: dict[str, str] = {}
    try:
        fs, root = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        if isinstance(fs, LocalFileSystem):
            unreadable = _unreadable(root)  # Raises where the zone itself is: fsspec would find it empty.
        infos = fs.find(root, detail=True)
    except Exception as error:
        raise LandingError(
            f"landing.url: {url!r} cannot be looked into ({type(error).__name__}: {error}); check that it is there and "
            "may be read, the credentials, and that the package of its protocol is installed"
        ) from error
    entries: dict[str, dict[str, Mapping[str, Any]]] = {}
    prefix = root.rstrip("/") + "/"
    for path, info in sorted(infos.items()):
        if path.endswith("/"):  # What object stores' consoles write for a folder.
            continue
        entry, _, inside = path.removeprefix(prefix).partition("/")
        entries.setdefault(entry, {})[inside] = info
    found = _sort_out({entry: files for entry, files in entries.items() if entry not in unreadable}, settings.marker)
    return Look(found.deliveries, found.refused | {_storable(entry): why for entry, why in unreadable.items()})


def _unreadable(root: str) -> dict[str, str]:
    """Entries of a local zone of which something may not be read, and what: fsspec would leave it out in silence."""
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
                f"{', '.join(map(repr, others))} would be batch {landed.batch!r} as well; rename or remove all but one"
            )
    return Look([landed for landed in deliveries if landed.entry not in refused], refused)


def _storable(entry: str) -> str:
    """The name, with what cannot be shown or stored escaped."""
    return entry if entry.isprintable() else ascii(entry)[1:-1]


def _landed(entry: str, files: Mapping[str, Mapping[str, Any]], marker: str, *, is_marked: bool) -> Landed:
    if "" in files:  # The entry is a file itself.
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
    """The name less the endings of compression and format: `week-47.jsonl.gz` is batch `week-47`."""
    if not is_file:
        return entry
    path = PurePosixPath(entry)
    for endings in (_COMPRESSIONS, _FORMATS):
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
        return f"{(both[0] or entry)!a} is a file and a folder, as object stores allow; rename one"
    if len(files) > _MAX_FILES:
        return f"it holds {len(files)} files, more than {_MAX_FILES}; deliver fewer, larger ones"
    for name, info in files.items():
        shown = ascii(name or entry)
        if len(name) > _MAX_NAME or not name.isprintable() or "\\" in name or ".." in name.split("/"):
            return (
                f"the name of its file {shown[:80]} cannot be used: at most 200 printable characters, no '\\' or '..'"
            )
        if info.get("islink") or info["type"] != "file":
            return f"{shown} is no regular file; deliver a copy"
    return None


def _stamp(info: Mapping[str, Any]) -> tuple[int, str]:
    # All of them: an etag is of the content, and would be the old one again for a file that was put back.
    signs = [str(info[name]) for name in _STAMPS if info.get(name) is not None]
    return int(info["size"] or 0), " ".join(signs)


def complete(found: Look, seen: Seen, settings: LandingSettings) -> tuple[list[Landed], Seen]:
    """The deliveries to take now, and what is seen from now on.

    Complete is what its marker says to be, or (unless the marker is required) what is as it was at the last look. A
    correction of what was taken must be as it was in any case: its marker may be of before. What was taken is not taken
    again until it is another. Beyond the most that one look takes, deliveries wait for the next, corrections last.
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
"""The note of the delivery that was copied last, or was overtaken by one by hand; and how many there were."""


def announce(storage: Storage, url: str, landed: Landed) -> str | None:
    """Note in the storage where the batch's newest delivery lies; no byte of it is read.

    Returns:
        What a run for it is known by: path, size, the hash of names, sizes and times, and how many deliveries of the
        batch were settled before; None where this one is, so that a lost cursor brings no old delivery back.
    """
    path = f"{url.rstrip('/')}/{landed.entry}"
    note = {"url": path, "is_file": landed.entry in landed.files, "files": landed.files}
    settled = _settled(storage, landed.batch)
    if settled["note"] == json.loads(json.dumps(note)):
        return None
    storage.deliveries.write_note(note, landed.batch, _ANNOUNCED)
    return f"{path}|{landed.num_bytes} bytes|{landed.fingerprint}|{settled['number']}"


def is_announced(storage: Storage, batch: str) -> bool:
    """Whether a delivery of the batch lies in the zone that was not copied yet."""
    return storage.deliveries.has_note(batch, _ANNOUNCED)


def settle(storage: Storage, batch: str) -> None:
    """The announced delivery was copied, or the batch was delivered otherwise since: it is asked for no more."""
    if is_announced(storage, batch):
        note = storage.deliveries.read_note(batch, _ANNOUNCED)
        number = _settled(storage, batch)["number"] + 1
        storage.deliveries.write_note({"note": note, "number": number}, batch, _SETTLED)
        storage.deliveries.remove_note(batch, _ANNOUNCED)


def _settled(storage: Storage, batch: str) -> dict[str, Any]:
    if not storage.deliveries.has_note(batch, _SETTLED):
        return {"note": None, "number": 0}
    return storage.deliveries.read_note(batch, _SETTLED)


def receive(storage: Storage, batch: str) -> Delivery:
    """The batch's newest delivery, copied into the storage where it was only announced.

    Raises:
        LandingError: it is gone from the zone, or is being written.
        StorageError: the batch was never delivered.
    """
    if not is_announced(storage, batch):
        return storage.deliveries.current(batch)
    note = storage.deliveries.read_note(batch, _ANNOUNCED)
    delivery = storage.deliveries.store(batch, _read_files(note))
    if storage.deliveries.read_note(batch, _ANNOUNCED) == note:  # Else another delivery was announced meanwhile.
        settle(storage, batch)
    return delivery


def _read_files(note: Mapping[str, Any]) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(note["url"])
    fs.invalidate_cache()
    paths = {name: root if note["is_file"] else f"{root}/{name}" for name in sorted(note["files"])}
    try:
        contents = {name: fs.cat_file(path) for name, path in paths.items()}
        # Listed as the look listed it: some stores give other times for a single file.
        folder = root.rpartition("/")[0] if note["is_file"] else root
        infos = fs.find(folder, detail=True, maxdepth=1 if note["is_file"] else None)
        now = {name: _stamp(infos[path]) for name, path in paths.items()}
    except (FileNotFoundError, KeyError) as error:
        raise LandingError(
            f"{note['url']}: {error} is gone from the landing zone; deliver it again, or `qaq run` it"
        ) from error
    except OSError as error:
        raise LandingError(f"{note['url']}: cannot be read ({error}); let this user read it, and run again") from error
    for name, (size, sign) in note["files"].items():
        if now[name] != (size, sign) or len(contents[name]) != size:
            raise LandingError(
                f"{note['url']}: {name} was changed after the delivery was taken as complete; it is taken again when "
                "it stays the same. Write under another name and rename, or use the marker"
            )
    return contents


# --- the visible record ---------------------------------------------------------------------------------------------

_REFUSED = ("landing", "refused.json")


def record_refused(storage: Storage, refused: Mapping[str, str]) -> None:
    """Keep what lies in the zone and is refused, for `qaq status`; nothing is written where nothing changed."""
    if dict(refused) != read_refused(storage):
        storage.files.write_json(dict(refused), *_REFUSED)


def read_refused(storage: Storage) -> dict[str, str]:
    """What was refused at the last look, and why, by name in the zone."""
    try:
        return storage.files.read_json(*_REFUSED)
    except StorageError:
        return {}
