"""Cached scores, by the identity that makes a score what it is.

score_cache/<identity>/identity.json            its fields
score_cache/<identity>/hits.json                how many scores runs have taken from it
score_cache/<identity>/…                        the scores (`score_log`)
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from qaq_pipeline.schema.tables import CachedScores, enforce
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.files import Files
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.locks import Locks, PartitionBusyError
from qaq_pipeline.storage.score_log import ScoreLog, distinct

_FOLDER = "score_cache"
_IDENTITY, _HITS = "identity.json", "hits.json"
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


@dataclass(frozen=True, slots=True)
class CachedModel:
    """The content of the score cache under one identity."""

    digest: str
    identity: dict[str, Any]
    """Fields of the `ScoreIdentity`."""
    num_files: int
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
        self._logs: dict[str, ScoreLog] = {}

    def read(self, identity: ScoreIdentity, pair_ids: pl.Series) -> pl.DataFrame:
        """Every cached score of distinct pairs, once for each number of tokens and end tokens, sorted by place.

        A row has the place of its pair in `pair_ids`, and `scored_with`: JSON, the libraries and the device that
        scored it. Where two writers cached a score, the lower sum counts. A file that is torn or changed is set aside
        with a warning and never read: its pairs are scored again.
        """
        places = pl.DataFrame({"pair_id": pair_ids}, schema={"pair_id": pl.String}).with_row_index("place")
        found = [
            scores.join(places, on="pair_id").cast(FOUND).select(list(FOUND))
            for scores in _many_at_once(self._log(identity.digest()).read(places["pair_id"]))
        ]
        key = ("place", "quantity", "num_tokens", "end_ids")
        return distinct(pl.concat([pl.DataFrame(schema=FOUND), *found]), key)

    def append(self, identity: ScoreIdentity, scores: pl.DataFrame, scored_with: Mapping[str, Any]) -> None:
        """Add a shard of scores. Any number of processes may do so at a time.

        Args:
            identity: what makes the scores what they are.
            scores: as `CachedScores`.
            scored_with: the libraries and the device that scored them.
        """
        frame = enforce(CachedScores, scores)
        folder = self.place(identity.digest())
        if not self._files.exists(*folder, _IDENTITY):
            self._files.write_json(asdict(identity), *folder, _IDENTITY)
        self._log(identity.digest()).append(frame, scored_with)

    def pack(self, identity: ScoreIdentity) -> None:
        """Pack all shards of an identity. Whoever appends does so by itself."""
        self._log(identity.digest()).pack()

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
        """Remove all scores under an identity. A process that scores meanwhile adds to what is left.

        Raises:
            PartitionBusyError: another process packs them; run it again.
        """
        self._log(digest).clear()
        for name in (_IDENTITY, _HITS):
            with contextlib.suppress(FileNotFoundError):
                self._files.remove(*self.place(digest, name))

    def names(self, digest: str) -> list[str]:
        """Paths of the files with scores under an identity, relative to its folder."""
        return self._log(digest).names()

    def holding(self, digest: str, pair_id: str) -> list[str]:
        """Those of them that have a score of the pair."""
        return self._log(digest).holding(pair_id)

    def fault(self, digest: str, name: str) -> str | None:
        """The fault of such a file that was changed since it was written, as a sentence; None: no fault.

        Raises:
            StorageError: there is no such file.
        """
        return parquet_file.file_fault(io.BytesIO(self._files.read_bytes(*self.place(digest, *name.split("/")))))

    def place(self, digest: str, *inside: str) -> tuple[str, ...]:
        """Parts of the path of an identity's folder, or of something in it."""
        return (_FOLDER, digest, *inside)

    def _model(self, digest: str) -> CachedModel:
        log = self._log(digest)
        num_scores, num_bytes = log.counts()
        return CachedModel(
            digest=digest,
            identity=self._files.read_json(_FOLDER, digest, _IDENTITY),
            num_files=len(log.names()),
            num_set_aside=log.num_set_aside(),
            num_scores=num_scores,
            num_bytes=num_bytes,
            num_hits=self._num_hits(digest),
        )

    def _num_hits(self, digest: str) -> int:
        hits = self.place(digest, _HITS)
        return self._files.read_json(*hits) if self._files.exists(*hits) else 0

    def _log(self, digest: str) -> ScoreLog:
        return self._logs.setdefault(digest, ScoreLog(self._files, self._locks, self.place(digest)))


def _many_at_once(parts: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The rows, many at a time: each search for pairs takes all pair_ids."""
    waiting: list[pl.DataFrame] = []
    num_waiting = 0
    for part in parts:
        waiting.append(part)
        num_waiting += part.height
        if num_waiting >= _ROWS_AT_ONCE:
            yield pl.concat(waiting)
            waiting, num_waiting = [], 0
    if waiting:
        yield pl.concat(waiting)
