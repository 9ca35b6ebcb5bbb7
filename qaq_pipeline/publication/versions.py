"""The published dataset: which batches enter it, its files, its manifest, and where it lies. No Dagster.

Belongs here: what a version consists of. Does not belong here: the formats of the files, or when it is published.

    curated_dataset/<manifest hash>/manifest.json, README.md, dataset_info.json, scores.parquet,
                                    <selection>/<format's file or folder>
    curated_dataset/differences/<newer>_from_<older>.parquet   the rows that entered and left, and why
    curated_dataset/publications.json          every publication: the version's number, its hash, when, by which run
    curated_dataset/pair_index/<version>.parquet  from pair_ids to the rows of its scores.parquet
    curated_dataset/history.json               the versions whose files are kept, the one published last at the end
    curated_dataset/retired/<version>.json     manifests of versions whose files were not kept
    curated_dataset/latest.json                points to the newest version, and lists the batches left out

The hash is taken of the manifest: equal content is one version, however often it is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

from qaq_pipeline.freshness.eligibility import signatures_if_withdrawn
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import withdrawals
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage

FOLDER = "curated_dataset"
MANIFEST_FORMAT = 2
_LOG = (FOLDER, "publications.json")
_SHORTEST_HASH = 4


@dataclass(frozen=True, slots=True)
class Published:
    """A version by its number, as people call it; it keeps the number when it is published again."""

    number: int
    version: str
    published_at: str | None
    """None: before publications were logged."""
    run_id: str | None


def read_manifest(storage: Storage, version: str | None = None) -> dict[str, Any] | None:
    """Of a version, by default the newest; None where there is none, or its files are gone."""
    found = version or latest(storage)
    if found is None or not storage.files.exists(FOLDER, found, "manifest.json"):
        return None
    return storage.files.read_json(FOLDER, found, "manifest.json")


def _withdrawn_since(storage: Storage, version: str | None) -> withdrawals.Withdrawals:
    """What was withdrawn after a version was published; where that time is not recorded, all."""
    version = version or latest(storage)
    times = [one.published_at for one in publications(storage) if one.version == version]
    return withdrawals.read(storage, times[0] if times else None)


def published_withdrawn(storage: Storage, version: str | None = None) -> list[str]:
    """Batches of a version, by default the newest, of which something was withdrawn since they entered it.

    Of a batch that was delivered or screened anew since, the rows of then are not known any more: it counts as soon as
    any text was withdrawn after the version was published.
    """
    published, withdrawn = read_manifest(storage, version), withdrawals.read(storage)
    found = []
    for entry in [] if published is None else published["batches"]:
        batch = entry["batch"]
        concerned = withdrawn.of_batch(batch, signatures_if_withdrawn(storage, batch, withdrawn))
        screened = storage.tables.footer("screened_data", Partition(batch))
        entered = screened.data_version == entry["data_versions"]["screened_data"]
        if entered and screened.provenance.get("withdrawn", {}) == concerned:
            continue
        if concerned or (not entered and _withdrawn_since(storage, version).contents):
            found.append(batch)
    return found


def latest(storage: Storage) -> str | None:
    """The version published last; None: nothing was."""
    return (
        storage.files.read_json(FOLDER, "latest.json")["version"]
        if storage.files.exists(FOLDER, "latest.json")
        else None
    )


def kept_versions(storage: Storage) -> list[str]:
    """The versions whose files are kept, the one published last at the end."""
    return storage.files.read_json(FOLDER, "history.json") if storage.files.exists(FOLDER, "history.json") else []


def publications(storage: Storage) -> list[Published]:
    """Every version that was ever published, once, in the order of the numbers."""
    return sorted({entry.version: entry for entry in reversed(_logged(storage))}.values(), key=lambda one: one.number)


def run_record(run_id: str) -> tuple[str, ...]:
    """Where it lies by which run, when, and without which batches a version was published."""
    return FOLDER, "runs", f"{run_id}.json"


def left_out(storage: Storage, published: Published) -> dict[str, str] | None:
    """The registered batches that a version was published without, and why; None: that is not recorded."""
    if published.run_id is None or not storage.files.exists(*run_record(published.run_id)):
        return None
    return storage.files.read_json(*run_record(published.run_id))["excluded_batches"]


def find_version(storage: Storage, name: str) -> Published:
    """The version that a person means: by its number, the first digits of its hash, or `latest`.

    Raises:
        StorageError: there is none, or more than one.
    """
    known = publications(storage)
    if not known:
        raise StorageError("nothing was published yet; `qaq run FILE --batch NAME` makes a version")
    digits = latest(storage) if name == "latest" else name
    if digits is None:
        raise StorageError("the first publication was cut off before it ended; `qaq refresh` ends it")
    by_number = [one for one in known if digits == str(one.number)]
    found = by_number or [one for one in known if len(digits) >= _SHORTEST_HASH and one.version.startswith(digits)]
    if len(found) != 1:
        numbers = ", ".join(f"{one.number} ({one.version[:8]})" for one in known)
        raise StorageError(f"no one version {name!r} was published; published were: {numbers}")
    return found[0]


def pair_index(version: str) -> tuple[str, ...]:
    """Where the index of a version's scores.parquet lies: outside, for the version's files are its content."""
    return FOLDER, "pair_index", f"{version}.parquet"


def _logged(storage: Storage) -> list[Published]:
    """The log, oldest first; of a storage of before there was one, what its history knows."""
    if storage.files.exists(*_LOG):
        return [Published(**entry) for entry in storage.files.read_json(*_LOG)]
    return [Published(number, version, None, None) for number, version in enumerate(kept_versions(storage), start=1)]


def log_publication(storage: Storage, version: str, run_id: str | None) -> None:
    """Add a publication, unless it is the same version as the last one."""
    logged = _logged(storage)
    if logged and logged[-1].version == version and storage.files.exists(*_LOG):
        return
    numbers = {entry.version: entry.number for entry in logged}
    number = numbers.get(version, max(numbers.values(), default=0) + 1)
    entry = Published(number, version, datetime.now(UTC).isoformat(timespec="seconds"), run_id)
    storage.files.write_json([asdict(one) for one in [*logged, entry]], *_LOG)


def index_pairs(storage: Storage, version: str, manifest: Mapping[str, Any], decisions: pl.DataFrame) -> None:
    """Write the index from pair_ids to the rows of a version, once."""
    if not storage.files.exists(*pair_index(version)):
        storage.tables.write_pair_index(decisions, manifest["files"]["scores.parquet"], *pair_index(version))


def retire(storage: Storage, version: str, keep: int | None) -> tuple[str, ...]:
    """Remove the files of the oldest versions, but for the newest `keep`; their manifests stay."""
    ordered = [*(known for known in kept_versions(storage) if known != version), version]
    surplus = ordered[:-keep] if keep else []
    for retired in surplus:
        if storage.files.exists(FOLDER, retired, "manifest.json"):
            manifest = storage.files.read_json(FOLDER, retired, "manifest.json")
            storage.files.write_json(manifest, FOLDER, "retired", f"{retired}.json")
            for name in manifest["files"]:  # The manifest goes last: until then the next publication goes on here.
                if storage.files.exists(FOLDER, retired, *name.split("/")):
                    storage.files.remove(FOLDER, retired, *name.split("/"))
            storage.files.remove_folder(FOLDER, retired)
            if storage.files.exists(*pair_index(retired)):
                storage.files.remove(*pair_index(retired))
    storage.files.write_json(ordered[len(surplus) :], FOLDER, "history.json")
    return tuple(surplus)
