"""The landing zone: which deliveries lie there complete, and their copy into the storage. fsspec only, no Dagster.

Belongs here: what one delivery is, when it is complete, which names are refused, and the copy. Does not belong here:
who looks, how often, and what is run then (`automation`), and the reading of records.

One delivery is one file or one folder directly in the zone; its batch is named as it is, less the endings of a file's
format. Names that begin with `.` or `_` are no deliveries, and a name that ends as unfinished uploads do (`.tmp`,
`.part`) is not one yet. A look reads names, sizes and times only, never a byte of the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem

from qaq_pipeline.config import LandingSettings, check_batch_name
from qaq_pipeline.storage import Delivery, Storage, StorageError, hash_json

_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload")
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")
"""What stores call the sign that a file was written anew, the surest first."""
_MAX_FILES = 10_000
_MAX_NAME = 200


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
        """Hash of names, sizes and times (32 hex digits): another one is another delivery."""
        return hash_json(self.files)

    def run_key(self, url: str) -> str:
        """What a run for this delivery is known by: path, size, and the hash of names, sizes and times."""
        return f"{url.rstrip('/')}/{self.entry}|{self.num_bytes} bytes|{self.fingerprint}"


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
    try:
        fs, root = fsspec.core.url_to_fs(url)
        if isinstance(fs, LocalFileSystem):
            fs.makedirs(root, exist_ok=True)
        fs.invalidate_cache()
        infos = fs.find(root, detail=True) if fs.exists(root) else {}
    except Exception as error:
        raise LandingError(
            f"landing.url: {url!r} cannot be looked into ({type(error).__name__}: {error}); check the URL, the "
            "credentials, and that the package of its protocol is installed"
        ) from error
    entries: dict[str, dict[str, Mapping[str, Any]]] = {}
    prefix = root.rstrip("/") + "/"
    for path, info in sorted(infos.items()):
        if path.endswith("/"):  # What object stores' consoles write for a folder.
            continue
        entry, _, inside = path.removeprefix(prefix).partition("/")
        entries.setdefault(entry, {})[inside] = info
    return _sort_out(entries, settings.marker)


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
    shown = {name: info for name, info in files.items() if not _is_hidden(name)}
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
    if "" in files and len(files) > 1:
        return "it is a file and a folder, as object stores allow; rename one"
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
    sign = next((info[name] for name in _STAMPS if info.get(name) is not None), "")
    return int(info["size"] or 0), str(sign)


def complete(found: Look, seen: Seen, settings: LandingSettings) -> tuple[list[Landed], Seen]:
    """The deliveries to take now, and what is seen from now on.

    Complete is what its marker says to be, or (unless the marker is required) what is as it was at the last look. What
    was taken is not taken again until it is another. Beyond the most that one look takes, deliveries wait for the next.
    """
    ready, waiting, taken = [], {}, {}
    for landed in found.deliveries:
        entry, fingerprint = landed.entry, landed.fingerprint
        if seen.taken.get(entry) == fingerprint:
            taken[entry] = fingerprint
            continue
        is_stable = not settings.require_marker and seen.waiting.get(entry) == fingerprint
        is_complete = landed.is_marked or (is_stable and not landed.is_unfinished)
        if is_complete and len(ready) < settings.max_deliveries_per_tick:
            ready.append(landed)
            taken[entry] = fingerprint
        else:
            waiting[entry] = fingerprint
            if entry in seen.taken:
                taken[entry] = seen.taken[entry]
    return ready, Seen(waiting, taken, dict(found.refused))


# --- the copy -------------------------------------------------------------------------------------------------------

_ANNOUNCED = "landed.json"


def announce(storage: Storage, url: str, landed: Landed) -> None:
    """Note in the storage where the batch's newest delivery lies; no byte of it is read."""
    note = {"url": f"{url.rstrip('/')}/{landed.entry}", "is_file": landed.entry in landed.files, "files": landed.files}
    storage.write_json(note, "deliveries", check_batch_name(landed.batch), _ANNOUNCED)


def is_announced(storage: Storage, batch: str) -> bool:
    """Whether a delivery of the batch lies in the zone that was not copied yet."""
    return storage.exists("deliveries", check_batch_name(batch), _ANNOUNCED)


def forget(storage: Storage, batch: str) -> None:
    """Forget the note: the batch was delivered otherwise since."""
    if is_announced(storage, batch):
        storage.remove("deliveries", batch, _ANNOUNCED)


def receive(storage: Storage, batch: str) -> Delivery:
    """The batch's newest delivery, copied into the storage where it was only announced.

    Raises:
        LandingError: it is gone from the zone, or is being written.
        StorageError: the batch was never delivered.
    """
    if not is_announced(storage, batch):
        return storage.current_delivery(batch)
    note = storage.read_json("deliveries", batch, _ANNOUNCED)
    delivery = storage.store_delivery(batch, _read_files(note))
    if storage.read_json("deliveries", batch, _ANNOUNCED) == note:  # Else another delivery was announced meanwhile.
        forget(storage, batch)
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
        storage.write_json(dict(refused), *_REFUSED)


def read_refused(storage: Storage) -> dict[str, str]:
    """What was refused at the last look, and why, by name in the zone."""
    try:
        return storage.read_json(*_REFUSED)
    except StorageError:
        return {}
