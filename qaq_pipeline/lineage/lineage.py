"""The lineage of a published version: the tables, scores and delivered files from which it was made. No Dagster.

Belongs here: the walk from a version's manifest over tables and cached scores to the deliveries. Does not belong here:
the path of one row (`trace`), the comparison of files with their hashes (`verify`), the sources of columns
(`schema.column_lineage`), and how lineage is shown (`cli`).

Each step back relies on a hash that the step before recorded. A version is the hash of its manifest, which contains the
sha256 of its files and of the delivered files, and the data versions of the tables. The footer of each table contains
the data versions of its inputs, and the hash of its own file. A table that was replaced since is no fault: it is
reported as replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from qaq_pipeline.pipeline import PIPELINE, Pipeline, Purpose
from qaq_pipeline.publication import versions
from qaq_pipeline.schema.partition import Input, Partition
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.files import StorageError, hash_json, json_bytes
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import Footer

MANIFEST_REMEDY = (
    "restore it from a backup; or remove it, and the next `qaq refresh` publishes the current state, under the same "
    "hash if that is the same"
)


class LineageError(ValueError):
    """There is no such version or row, or its manifest cannot be trusted. The text names the path and the remedy."""


class State(StrEnum):
    """State of a table compared with the published version."""

    AS_PUBLISHED = "as published"
    SAME_CONTENT = "rebuilt since, with the same content"
    REPLACED = "replaced since"
    UNKNOWN = "unknown whether as published: the table made from it, which recorded its version, has been replaced"
    MISSING = "missing, or unreadable"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a version, or of a delivery."""

    name: str
    path: str
    sha256: str
    """Hash of the published or delivered content."""


@dataclass(frozen=True, slots=True)
class Table:
    """A partition of a stored table that a version was made from."""

    name: str
    partition: Partition
    path: str
    entered: str | None
    """Data version that the version was made from; None: unknown."""
    stored: str | None
    """Data version that is stored now."""
    state: State


@dataclass(frozen=True, slots=True)
class Shards:
    """The score cache of one model, from which its logprobs were taken."""

    model: str
    """Role of the model."""
    digest: str
    path: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeliveredFiles:
    """The copy of a delivered batch; `path` is None if it is gone."""

    path: str | None
    files: tuple[File, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of a version, with the tables, scores and files from which its part was made."""

    name: str
    rows_in: int
    rows_selected: int
    provenance_id: str
    """Id of the provenance of its decisions."""
    tables: tuple[Table, ...]
    """From the publication back to the delivery."""
    scores: tuple[Shards, ...]
    delivery: DeliveredFiles


@dataclass(frozen=True, slots=True)
class Lineage:
    """A version and everything from which it was made."""

    version: str
    manifest: str
    """Path of the manifest."""
    is_kept: bool
    """False: only the manifest is stored."""
    files: tuple[File, ...]
    batches: tuple[Batch, ...]
    is_whole: bool = True
    """True if `files` are all files of the version."""


# --- the walk -------------------------------------------------------------------------------------------------------


def walk(storage: Storage, version: str, pipeline: Pipeline = PIPELINE) -> Lineage:
    """The lineage of a version, from manifest and footers alone: no table and no delivered file is read.

    Raises:
        LineageError: its manifest is missing, or is not the one that was published.
    """
    is_kept = versions.is_kept(storage, version)
    parts = versions.manifest_place(storage, version)
    manifest = _read_manifest(storage, version, parts)
    files = tuple(
        File(name, storage.files.url(*versions.place(version, name)), sha256)
        for name, sha256 in manifest["files"].items()
    )
    batches = tuple(_batch(storage, entry, pipeline) for entry in manifest["batches"])
    return Lineage(version, storage.files.url(*parts), is_kept, files, batches)


def only(lineage: Lineage, name: str) -> Lineage:
    """The lineage of one file of a version.

    Raises:
        LineageError: it has no such file; the text says which it has.
    """
    files = tuple(file for file in lineage.files if file.name == name)
    if not files:
        known = ", ".join(file.name for file in lineage.files)
        raise LineageError(f"version {lineage.version} has no file {name!r}; it has {known}")
    return replace(lineage, files=files, is_whole=False)


def _read_manifest(storage: Storage, version: str, parts: tuple[str, ...]) -> dict[str, Any]:
    path = storage.files.url(*parts)
    try:
        data = storage.files.read_bytes(*parts)
        manifest = json.loads(data)
    except StorageError as error:
        raise LineageError(f"{path}: it is missing; {MANIFEST_REMEDY}") from error
    except ValueError as error:
        raise LineageError(
            f"{path}: it was changed since it was published: it is not JSON ({error}); {MANIFEST_REMEDY}"
        ) from error
    if hash_json(manifest) != version or json_bytes(manifest) != data:
        raise LineageError(
            f"{path}: it is not the manifest of version {version}, which is its hash: it was changed since it was "
            f"published and cannot be trusted; {MANIFEST_REMEDY}"
        )
    return manifest


def _batch(storage: Storage, entry: Mapping[str, Any], pipeline: Pipeline) -> Batch:
    tables, raw_data = _tables(storage, entry, pipeline)
    return Batch(
        name=entry["batch"],
        rows_in=entry["rows_in"],
        rows_selected=entry["rows_selected"],
        provenance_id=entry["provenance_id"],
        tables=tables,
        scores=tuple(_shards(storage, role, identity) for role, identity in sorted(entry["models"].items())),
        delivery=_delivery(storage, entry, raw_data),
    )


def _tables(storage: Storage, entry: Mapping[str, Any], pipeline: Pipeline) -> tuple[tuple[Table, ...], Footer | None]:
    """The tables of a batch, and the footer of raw_data unless it was replaced since the version was published.

    The manifest says most of the versions, the footers of unchanged tables the rest.
    """
    entered, raw_data, tables = dict(entry["data_versions"]), None, []
    for key, name, partition in _partitions(entry, pipeline, entered):
        footer = storage.tables.readable_footer(name, partition)
        state = _state(footer, entered.get(key))
        if footer is not None and state is State.AS_PUBLISHED:
            is_end = pipeline[name].purpose is Purpose.REFERENCE or partition.batch != entry["batch"]
            inputs = {} if is_end else _inputs(footer, partition, pipeline)
            if any(entered.setdefault(source, version) != version for source, version in inputs.items()):
                state = State.SAME_CONTENT
            raw_data = footer if name == "raw_data" else raw_data
        stored = None if footer is None else footer.data_version
        tables.append(Table(name, partition, storage.tables.url(name, partition), entered.get(key), stored, state))
    return tuple(tables), raw_data


def _partitions(
    entry: Mapping[str, Any], pipeline: Pipeline, entered: Mapping[str, str]
) -> Iterator[tuple[str, str, Partition]]:
    """Key (as in a provenance), table and partition of everything from which a batch's selection was made.

    From the publication back to the delivery: each table's inputs come after it. A table of another batch that it
    takes over, as a small batch does with validity_cuts, comes directly after its own; the walk ends there.

    Args:
        entry: of the batch in the manifest.
        pipeline: the tables.
        entered: data versions by key, to which those that a yielded table names are added before the next is asked for.
    """
    sources = pipeline.sources_of_published
    is_calibrated = any(asset.needs_calibration and asset.name in entry["data_versions"] for asset in sources)
    for asset in reversed(sources):
        name = asset.name
        if asset.purpose is Purpose.REFERENCE:
            if name in entered:
                yield name, name, Partition(str(rank_reference.name_in(entry["pool"])))
            continue
        if asset.needs_calibration and not is_calibrated:
            continue
        for partition in asset.partitions(entry["batch"], list(entry["models"])):
            yield str(Input(name, partition.model)), name, partition
        for source in sorted(map(Input.parse, entered), key=str):
            if source.table == name and source.batch is not None:
                yield str(source), name, Partition(source.batch, source.model)


def _inputs(footer: Footer, partition: Partition, pipeline: Pipeline) -> dict[str, str]:
    """Data versions of a table's inputs, by key: an input of the same model gets the model's name."""
    return {
        str(Input(name, partition.model)) if name in pipeline and pipeline[name].has_models else name: version
        for name, version in footer.provenance.get("inputs", {}).items()
    }


def _state(footer: Footer | None, entered: str | None) -> State:
    if footer is None:
        return State.MISSING
    if entered is None:
        return State.UNKNOWN
    return State.AS_PUBLISHED if footer.data_version == entered else State.REPLACED


def _shards(storage: Storage, role: str, identity: Mapping[str, Any]) -> Shards:
    digest = ScoreIdentity(**identity).digest()
    return Shards(role, digest, storage.files.url(*storage.scores.place(digest)), tuple(storage.scores.names(digest)))


def _delivery(storage: Storage, entry: Mapping[str, Any], raw_data: Footer | None) -> DeliveredFiles:
    """The copy that raw_data names; if raw_data was replaced, the copy with the files that the manifest names."""
    batch, files = entry["batch"], entry["files"]
    named = None if raw_data is None else raw_data.provenance.get("delivery")
    folder = named or _copy_of(storage, batch, files)
    path = None if folder is None else storage.files.url(*storage.deliveries.place(batch, folder))
    return DeliveredFiles(path, tuple(File(name, f"{path}/{name}", sha256) for name, sha256 in files.items()))


def _copy_of(storage: Storage, batch: str, files: Mapping[str, str]) -> str | None:
    whole = Delivery(batch, dict(files)).content_hash
    for folder in sorted(storage.deliveries.copies(batch), key=lambda name: name != whole):
        parts = storage.deliveries.place(batch, folder)
        if all(storage.files.exists(*parts, *name.split("/")) for name in files) and (
            folder == whole or all(storage.files.sha256(*parts, *name.split("/")) == files[name] for name in files)
        ):
            return folder
    return None
