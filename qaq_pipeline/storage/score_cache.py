"""Cached scores, by the identity that makes a score what it is.

score_cache/<identity>/identity.json            its fields
score_cache/<identity>/<sha256>.parquet         a shard: written once, never changed
score_cache/<identity>/hits.json                how many scores runs have taken from it
score_cache/<identity>/set_aside/               files that are no shards
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from qaq_pipeline.schema.tables import CachedScores, dtypes, enforce
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.files import Files, StorageError
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.locks import Locks, PartitionBusyError

logger = logging.getLogger(__name__)

_FOLDER = "score_cache"
_IDENTITY, _HITS, _SET_ASIDE = "identity.json", "hits.json", "set_aside"
_ROWS_AT_ONCE = 1 << 17
FOUND = pl.Schema(
    {
        "place": pl.UInt32,
        "quantity": pl.Enum([quantity.value for quantity in Quantity]),
        "sum_nll": pl.Float64,
        "num_tokens": pl.UInt32,
        "end_ids": pl.Categorical(),
        "scored_with": pl.Categorical(),
    }
)
"""Columns of the scores that are read: some 25 bytes a row."""
_NO_SCORES = pl.DataFrame(schema=dtypes(CachedScores) | {"scored_with": pl.String()})


@dataclass(frozen=True, slots=True)
class CachedModel:
    """The content of the score cache under one identity."""

    digest: str
    identity: dict[str, Any]
    """Fields of the `ScoreIdentity`."""
    num_shards: int
    num_set_aside: int
    num_scores: int
    num_bytes: int
    num_hits: int
    """Scores that runs have taken from it."""


class ScoreCache:
    """The cached scores of all models."""

    def __init__(self, files: Files, locks: Locks) -> None:
        self._files = files
        self._locks = locks

    def read(self, identity: ScoreIdentity, pair_ids: pl.Series) -> pl.DataFrame:
        """Every cached score of distinct pairs, once for each number of tokens and end tokens, sorted by place.

        A row has the place of its pair in `pair_ids`, and `scored_with`: JSON, the libraries and the device that
        scored it. Where two writers cached a score, the lower sum counts, whatever the shards are named. A file that
        is no shard, torn or changed is set aside with a warning and never read: its pairs are scored again.
        """
        key = ("place", "quantity", "num_tokens", "end_ids")
        places = pl.DataFrame({"pair_id": pair_ids}, schema={"pair_id": pl.String}).with_row_index("place")
        found = [
            shards.join(places, on="pair_id").cast(FOUND).select(list(FOUND))
            for shards in self._some_shards(identity.digest())
        ]
        scores = pl.concat([pl.DataFrame(schema=FOUND), *found]).sort(*key, "sum_nll", "scored_with")
        return scores.filter(pl.any_horizontal(pl.col(name).ne_missing(pl.col(name).shift()) for name in key))

    def append(self, identity: ScoreIdentity, scores: pl.DataFrame, scored_with: Mapping[str, Any]) -> None:
        """Add a shard of scores, under the hash of its bytes: an equal one is the same file.

        Shards are never changed, so writers cannot disturb each other.

        Args:
            identity: what makes the scores what they are.
            scores: as `CachedScores`.
            scored_with: the libraries and the device that scored them.
        """
        folder = self.place(identity.digest())
        if not self._files.exists(*folder, _IDENTITY):
            self._files.write_json(asdict(identity), *folder, _IDENTITY)
        frame = enforce(CachedScores, scores)
        footer = {"data_version": parquet_file.hash_rows(frame), "scored_with": scored_with}
        data = parquet_file.encode(frame, footer)
        self._files.write_bytes(data, *folder, f"{hashlib.sha256(data).hexdigest()}.parquet")

    def count_hits(self, identity: ScoreIdentity, number: int) -> None:
        """Add to the count of scores that runs have taken from the cache."""
        digest = identity.digest()
        # A statistic: no scoring fails for it.
        with contextlib.suppress(PartitionBusyError), self._locks.hold(_FOLDER, digest):
            self._files.update_json(lambda hits: hits + number, *self.place(digest, _HITS), at_first=0)

    def models(self) -> list[CachedModel]:
        """The content of the cache, by model."""
        digests = [name for name in self._files.names(_FOLDER) if self._files.exists(_FOLDER, name, _IDENTITY)]
        return sorted(map(self._model, digests), key=lambda cached: (cached.identity["model"], cached.digest))

    def prune(self, digest: str) -> None:
        """Remove everything under an identity."""
        removed = (_FOLDER, f".{uuid.uuid4().hex}.pruned")
        with self._locks.hold(_FOLDER, digest):
            # On a local disk moved in one step: a shard that is being written goes with it, or starts a new folder.
            self._files.move((_FOLDER, digest), removed)
        self._files.remove_folder(*removed)

    def shards(self, digest: str) -> list[str]:
        """File names of the shards under an identity."""
        return [name for name in self._files.names(_FOLDER, digest) if name.endswith(".parquet")]

    def fault(self, digest: str, name: str) -> str | None:
        """The fault of a shard that was changed since it was written, as a sentence; None: no fault.

        Raises:
            StorageError: there is no such shard.
        """
        is_same = name == f"{self._files.sha256(*self.place(digest, name))}.parquet"
        return None if is_same else "it was changed since it was written"

    def place(self, digest: str, *inside: str) -> tuple[str, ...]:
        """Parts of the path of an identity's folder, or of something in it."""
        return (_FOLDER, digest, *inside)

    def _model(self, digest: str) -> CachedModel:
        contents = [self._files.read_bytes(_FOLDER, digest, name) for name in self.shards(digest)]
        return CachedModel(
            digest=digest,
            identity=self._files.read_json(_FOLDER, digest, _IDENTITY),
            num_shards=len(contents),
            num_set_aside=len(self._files.names(_FOLDER, digest, _SET_ASIDE)),
            num_scores=sum(map(_num_rows, contents)),
            num_bytes=sum(map(len, contents)),
            num_hits=self._num_hits(digest),
        )

    def _num_hits(self, digest: str) -> int:
        hits = self.place(digest, _HITS)
        return self._files.read_json(*hits) if self._files.exists(*hits) else 0

    def _some_shards(self, digest: str) -> Iterator[pl.DataFrame]:
        """The scores under an identity, many shards at a time: each search for pairs reads all pair_ids."""
        shards: list[pl.DataFrame] = []
        for name in self.shards(digest):
            shards.append(self._shard_or_aside(digest, name))
            if sum(shard.height for shard in shards) >= _ROWS_AT_ONCE:
                yield pl.concat(shards)
                shards.clear()
        if shards:
            yield pl.concat(shards)

    def _shard_or_aside(self, digest: str, name: str) -> pl.DataFrame:
        """The shard; no scores where the file is none and is set aside, or is gone since it was listed."""
        parts = self.place(digest, name)
        try:
            data = self._files.read_bytes(*parts)
        except StorageError:  # Another reader set it aside, or it was pruned.
            return _NO_SCORES
        try:
            return _read_shard(data)
        except parquet_file.UNREADABLE as error:
            path = self._files.path(*parts)
            logger.warning("%s: no shard of scores (%s); set aside, its pairs are scored again", path, error)
        with contextlib.suppress(FileNotFoundError):  # Another reader was faster.
            self._files.move(parts, self.place(digest, _SET_ASIDE, name))
        return _NO_SCORES


def _read_shard(data: bytes) -> pl.DataFrame:
    """The scores of a shard, labelled. Raises one of `UNREADABLE` where it is none."""
    stream = io.BytesIO(data)
    footer, _ = parquet_file.read_footer(stream)
    if parquet_file.content_hash(stream) != footer["data_version"]:
        raise ValueError("it was changed since it was written")
    columns = dtypes(CachedScores)
    # Its rows were checked when it was written, and there may be thousands of shards.
    frame = parquet_file.decode(data).select(list(columns))  # A shard may have more columns.
    if dict(frame.schema) != columns:
        raise ValueError("its columns have other types")
    return frame.with_columns(scored_with=pl.lit(json.dumps(footer["scored_with"], sort_keys=True)))


def _num_rows(data: bytes) -> int:
    """Rows of a shard; 0 where it is none."""
    try:
        return _read_shard(data).height
    except parquet_file.UNREADABLE:
        return 0
