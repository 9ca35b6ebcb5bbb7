"""The versions of the dataset in the storage, and the log of their publications. No Dagster.

Belongs here: every path below `curated_dataset/`, and which versions there are. Does not belong here: the content of a
version (`curated_dataset`, `difference`), and its audit page (`reports`).

    curated_dataset/publications.json                 every publication in order; the last entry is the newest version
    curated_dataset/<version>/<selection>/…           training files, in each exported format, and keys.parquet
    curated_dataset/<version>/scores/<batch>.parquet  scores and decisions of a batch; all have the same columns
    curated_dataset/<version>/README.md, dataset_info.json
    curated_dataset/<version>/manifest.json           written after all other files of the version
    curated_dataset/differences/<newer>_from_<older>.parquet   rows that entered and left, and why
    curated_dataset/pair_index/<version>.parquet      from pair_ids to the rows of its scores
    curated_dataset/reports/<version>.html            audit page
    curated_dataset/trials/<version>.html, .md        page of a training trial, and its verdicts
    curated_dataset/retired/<version>.json            manifest of a version whose files were removed

A version is the hash of its manifest: equal content is one version, however often it is published. The index and the
page of a version lie outside its folder because the folder is the content. A version is published as soon as it is in
the log: a publication that is interrupted before leaves the newest version as it was, and the next one continues it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import SCORES_FOLDER
from qaq_pipeline.publication import flat_scores
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.files import LocalFile, Place, StorageError, hash_json
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import FoundRows

MANIFEST_FORMAT = 3
"""Raise it whenever a batch that has not changed would be written with other bytes: they are taken from the version
before (`earlier_version`)."""
MANIFEST = "manifest.json"
CARD = "README.md"
TRIAL_HEADING = "## Training trial"
"""Heading of the section of a training trial in the card; it is the last section."""
_FOLDER = "curated_dataset"
_LOG = (_FOLDER, "publications.json")
_SHORTEST_HASH = 4


@dataclass(frozen=True, slots=True)
class Published:
    """A publication of a version. A version keeps the number of its first publication."""

    number: int
    version: str
    published_at: str
    run_id: str | None
    excluded_batches: dict[str, str]
    """Reason for each registered batch that is not in it."""

    @property
    def name(self) -> str:
        """Number, hash and day, for people."""
        return f"version {self.number} ({self.version[:8]}, {self.published_at[:10]})"


# --- places -----------------------------------------------------------------------------------------------------------


def place(version: str, *file: str) -> tuple[str, ...]:
    """Place of a version, or of one of its files by the name in the manifest."""
    return (_FOLDER, version, *(part for name in file for part in name.split("/")))


def scores_name(batch: str) -> str:
    """The file of a batch's scores in a version, by its name in the manifest."""
    return f"{SCORES_FOLDER}/{batch}.parquet"


def page_place(version: str) -> tuple[str, ...]:
    """Place of a version's audit page."""
    return (_FOLDER, "reports", f"{version}.html")


def trial_page_place(version: str) -> tuple[str, ...]:
    """Place of the page of a version's training trial."""
    return (_FOLDER, "trials", f"{version}.html")


def trial_note_place(version: str) -> tuple[str, ...]:
    """Place of the verdicts of a version's training trial, as Markdown for its card."""
    return (_FOLDER, "trials", f"{version}.md")


def difference_place(older: str, newer: str) -> tuple[str, ...]:
    """Place of the difference between two versions."""
    return (_FOLDER, "differences", f"{newer}_from_{older}.parquet")


def index_place(version: str) -> tuple[str, ...]:
    """Place of the index from pair_ids to the rows of a version's scores."""
    return (_FOLDER, "pair_index", f"{version}.parquet")


def manifest_place(storage: Storage, version: str) -> tuple[str, ...]:
    """Place of a version's manifest, which is kept when the files are removed."""
    return place(version, MANIFEST) if is_kept(storage, version) else (_FOLDER, "retired", f"{version}.json")


def folder_url(storage: Storage) -> str:
    """Where the versions lie."""
    return storage.files.url(_FOLDER)


# --- publications -----------------------------------------------------------------------------------------------------


def log(storage: Storage) -> list[Published]:
    """Every publication, oldest first."""
    return [Published(**entry) for entry in storage.files.read_json(*_LOG)] if storage.files.exists(*_LOG) else []


def latest(storage: Storage) -> Published | None:
    """The last publication; None: nothing was published."""
    return next(reversed(log(storage)), None)


def publications(storage: Storage) -> list[Published]:
    """The first publication of each version, by number, with the batches that its last publication excluded."""
    found: dict[str, Published] = {}
    for entry in log(storage):
        first = found.get(entry.version, entry)
        found[entry.version] = replace(first, excluded_batches=entry.excluded_batches)
    return list(found.values())


def find_version(storage: Storage, name: str) -> Published:
    """The version with this number or these first digits of its hash, or `latest`.

    Raises:
        StorageError: there is none, or more than one.
    """
    known = publications(storage)
    if not known:
        raise StorageError("nothing is published yet; `qaq run FILE --batch NAME` makes a version")
    newest = latest(storage)
    digits = newest.version if newest is not None and name == "latest" else name
    by_number = [one for one in known if digits == str(one.number)]
    found = by_number or [one for one in known if len(digits) >= _SHORTEST_HASH and one.version.startswith(digits)]
    if len(found) != 1:
        numbers = ", ".join(f"{one.number} ({one.version[:8]})" for one in known)
        raise StorageError(f"no version, or more than one, matches {name!r}; published versions: {numbers}")
    return found[0]


def lock(storage: Storage) -> AbstractContextManager[None]:
    """Lock for one publication at a time."""
    return storage.locks.hold(_FOLDER, waits=True)


def record(storage: Storage, version: str, excluded: Mapping[str, str], run_id: str | None) -> None:
    """Log a publication, which makes the version the newest one; nothing changes if it repeats the last one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")

    def logged_too(log: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        if log and (log[-1]["version"], log[-1]["excluded_batches"]) == (version, excluded):
            return log
        numbers = {entry["version"]: entry["number"] for entry in log}
        number = numbers.get(version, len(numbers) + 1)
        return [*log, asdict(Published(number, version, now, run_id, dict(excluded)))]

    storage.files.update_json(logged_too, *_LOG, at_first=[])


# --- files ------------------------------------------------------------------------------------------------------------


def unfinished(storage: Storage) -> AbstractContextManager[Path]:
    """A folder on this machine for the files of a version that will be stored."""
    return storage.files.unfinished_folder(_FOLDER)


def store(storage: Storage, manifest: Mapping[str, Any], folder: Path) -> tuple[str, bool]:
    """Store the files of a version and then its manifest; the version, and whether it was stored now.

    Args:
        storage: where.
        manifest: of the version.
        folder: of `unfinished`, with the files that the manifest names.
    """
    version = hash_json(manifest)
    if is_kept(storage, version):
        return version, False
    for name in manifest["files"]:
        storage.files.put(LocalFile(folder / name), *place(version, name))
    storage.files.write_json(manifest, *place(version, MANIFEST))
    return version, True


def index_pairs(storage: Storage, version: str, rows: Iterable[pl.DataFrame]) -> None:
    """Write the index from pair_ids to the rows of a version's scores, once.

    Args:
        storage: where.
        version: stored.
        rows: the keys and pair_ids of its rows, some thousand at a time.
    """
    if not storage.files.exists(*index_place(version)):
        storage.tables.write_pair_index(rows, version, *index_place(version))


def is_kept(storage: Storage, version: str) -> bool:
    """True if the files of a version are stored."""
    return storage.files.exists(*place(version, MANIFEST))


def kept_versions(storage: Storage) -> list[str]:
    """The versions whose files are stored, in the order of their last publications."""
    ordered = dict.fromkeys(entry.version for entry in reversed(log(storage)))
    return [version for version in reversed(ordered) if is_kept(storage, version)]


def read_manifest(storage: Storage, version: str) -> dict[str, Any]:
    """The manifest of a version whose files are kept. Raises `StorageError` where it is missing or torn."""
    return storage.files.read_json(*place(version, MANIFEST))


def read_scores(storage: Storage, version: str) -> pl.DataFrame:
    """The scores of a version, in the order of its batches. Raises `StorageError` where they are missing or torn."""
    places = _places_of_scores(storage, version)
    return pl.concat([storage.files.read_frame(*one) for one in places.values()]) if places else flat_scores.head([])


def columns_of_scores(storage: Storage, version: str) -> list[str]:
    """Names of the columns of the scores of a version. Raises `StorageError` as `read_scores`."""
    first = next(iter(_places_of_scores(storage, version).values()), None)
    return flat_scores.head([]).columns if first is None else storage.tables.columns_of_file(*first)


def decided_batches(storage: Storage, version: str) -> dict[str, str]:
    """The batches of a version whose files are kept, and the data version of the decisions of each."""
    entries = read_manifest(storage, version)["batches"]
    return {entry["batch"]: entry["data_versions"]["decisions"] for entry in entries}


def scan_scores(storage: Storage, version: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Columns of the scores of a version, some thousand rows at a time. Raises `StorageError` as `read_scores`."""
    for one in _places_of_scores(storage, version).values():
        yield from storage.tables.scan_file(columns, *one)


def scan_batch(storage: Storage, version: str, batch: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The same of one batch, which the version has."""
    return storage.tables.scan_file(columns, *place(version, scores_name(batch)))


def read_difference(
    storage: Storage, older: str, newer: str, columns: Sequence[str] | None = None
) -> pl.DataFrame | None:
    """The stored difference between two versions, or columns of it; None: there is none."""
    stored = difference_place(older, newer)
    return storage.files.read_frame(*stored, columns=columns) if storage.files.exists(*stored) else None


def find_rows(
    storage: Storage, version: str, where: row_lookup.Where, columns: Sequence[str] | None = None
) -> pl.DataFrame:
    """Rows of a version's scores, without reading the others."""
    named = [value for column, how, value in where if (column, how) == ("batch", "==")]
    places = _places_of_scores(storage, version, named or None).values()
    found = [storage.tables.find_in_file(where, *one, columns=columns) for one in places]
    return pl.concat(found) if found else flat_scores.head([]).select(pl.col(columns or "*"))


def find_pair(storage: Storage, version: str, start: str, most: int, batches: Sequence[str] = ()) -> FoundRows:
    """Rows of a version's scores by the first digits of their pair_id; of these batches, or of all if none is named."""
    places = _places_of_scores(storage, version, batches or None)
    return storage.tables.find_pair_in_files(start, most, places, index_place(version), version)


def _places_of_scores(storage: Storage, version: str, batches: Collection[str] | None = None) -> dict[str, Place]:
    """Places of the scores of these batches of a version, or of all, in the order of the manifest."""
    known = [entry["batch"] for entry in read_manifest(storage, version)["batches"]]
    return {batch: place(version, scores_name(batch)) for batch in known if batches is None or batch in batches}


def retire(storage: Storage, version: str) -> None:
    """Remove the files of a version and keep its manifest.

    The manifest in the folder is removed last: if this is interrupted, the next publication retires the version again.
    """
    manifest = read_manifest(storage, version)
    storage.files.write_json(manifest, *(_FOLDER, "retired", f"{version}.json"))
    for stored in (index_place(version), *(place(version, name) for name in manifest["files"])):
        if storage.files.exists(*stored):
            storage.files.remove(*stored)
    storage.files.remove_folder(*place(version))


def retire_oldest(storage: Storage, keep: int | None) -> tuple[str, ...]:
    """Retire all but the newest `keep` versions (None: none); the retired versions."""
    surplus = tuple(kept_versions(storage)[:-keep]) if keep else ()
    for version in surplus:
        retire(storage, version)
    return surplus
