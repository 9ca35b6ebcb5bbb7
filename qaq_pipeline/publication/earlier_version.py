"""The newest version, from which the next one takes what has not changed. No Dagster.

Belongs here: which batches have not changed, and their bytes. Does not belong here: how the bytes are written
(`exports`, `flat_scores`).

A batch whose entry in the manifest is the same, under the same settings, has the same bytes in every file. A new batch
is a small part of a large dataset, and to write all others again would take minutes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl

from qaq_pipeline.publication import exports, versions
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.files import LocalFile, StorageError, hash_json, sha256_of
from qaq_pipeline.storage.storage import Storage

_BYTES_AT_ONCE = 1 << 22
_READERS = 2

logger = logging.getLogger(__name__)


class EarlierVersion:
    """Unchanged batches of a version.

    Args:
        manifest: of the version.
        unchanged: names of the batches that enter the next version as they are in this one.
        files: the files of the version, by their names in the manifest; each is as it was published.
    """

    def __init__(self, manifest: Mapping[str, Any], unchanged: Collection[str], files: Mapping[str, LocalFile]) -> None:
        self._manifest, self._unchanged, self._files = manifest, unchanged, files

    @classmethod
    def newest(
        cls, storage: Storage, recipe: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
    ) -> EarlierVersion:
        """The newest version; nothing of it is unchanged if it was made by other settings, or a file of it is damaged.

        Args:
            storage: where it is.
            recipe: the part of the next version's manifest that the settings determine.
            entries: of the batches in the next version's manifest.
        """
        newest = versions.latest(storage)
        if newest is None or not versions.is_kept(storage, newest.version):
            return NO_VERSION
        manifest = versions.read_manifest(storage, newest.version)
        if hash_json(manifest) != newest.version:
            logger.warning("version %s: its manifest was changed; every file is written again", newest.version)
            return NO_VERSION
        unchanged = {entry["batch"] for entry in entries if entry in manifest["batches"]}
        if not unchanged or {**manifest, **recipe} != manifest:
            return NO_VERSION
        try:
            with ThreadPoolExecutor(_READERS) as readers:
                files = readers.map(lambda file: _unchanged_file(storage, newest.version, *file), _taken(manifest))
                return cls(manifest, unchanged, dict(files))
        except StorageError as error:
            logger.warning("%s; every file is written again", error)
            return NO_VERSION

    def copy_scores(self, batch: str, columns: Sequence[str], to: Path) -> bool:
        """Copy the file of a batch's scores; False: it has changed, or has other columns."""
        if batch not in self._unchanged:
            return False
        file = self._files[versions.scores_name(batch)].path
        with file.open("rb") as stream:
            if row_lookup.columns(stream) != list(columns):
                return False
        shutil.copyfile(file, to)
        return True

    def unchanged_in(self, selection: str, formats: Sequence[str]) -> frozenset[str]:
        """The batches whose records of a selection can be taken, in all these formats."""
        names = {f"{selection}/{exports.WRITTEN[name].path}" for name in formats}
        return frozenset(self._unchanged if names <= self._manifest.get("spans", {}).keys() else ())

    def records(self, selection: str, name: str, batch: str) -> Iterator[bytes] | None:
        """The bytes of the records of an unchanged batch in a format; None: it has no records."""
        file = f"{selection}/{exports.WRITTEN[name].path}"
        span = self._manifest["spans"][file].get(batch)
        return None if span is None else _bytes(self._files[file].path, *span)

    def keys(self, selection: str, batch: str) -> pl.DataFrame:
        """The keys of the records of an unchanged batch."""
        rows = pl.scan_parquet(self._files[f"{selection}/{exports.KEYS}"].path, glob=False)
        return exports.keys(rows.filter(batch=batch).collect())


NO_VERSION = EarlierVersion({}, (), {})
"""Nothing is taken."""


def _taken(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and sha256 of the files that have what is taken."""
    keys = {f"{file.partition('/')[0]}/{exports.KEYS}" for file in manifest["spans"]}
    wanted = {*manifest["spans"], *keys, *(versions.scores_name(entry["batch"]) for entry in manifest["batches"])}
    return [(name, sha256) for name, sha256 in manifest["files"].items() if name in wanted]


def _unchanged_file(storage: Storage, version: str, name: str, sha256: str) -> tuple[str, LocalFile]:
    place = versions.place(version, name)
    local = storage.files.local(*place)
    with local.path.open("rb") as stream:
        if sha256_of(stream) != sha256:
            raise StorageError(f"{storage.files.url(*place)}: it was changed since it was published")
    return name, local


def _bytes(file: Path, start: int, stop: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        while (left := stop - stream.tell()) and (data := stream.read(min(left, _BYTES_AT_ONCE))):
            yield data
