"""Groups finished scores into shards and stores one every few seconds, so that a killed run loses at most the open one.

Belongs here: the rows of a shard, and when it is closed. Does not belong here: where shards are kept (storage), and
scoring itself (lm).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import NullReason
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage


class ShardWriter:
    """Collects scores and adds them to the cache, shard by shard. Close it at the end, whatever ends the run.

    Args:
        storage: holds the cache.
        identity: the key that the scores are cached under.
        seconds: how often a shard is closed.
        scored_with: the libraries and the device that score.
        is_identity_true: returns whether the model's files still match the identity; called before a shard is cached.
            Scores that another model may have made enter this run's table, but not the cache.
        on_closed: called with each shard, as `CachedScores`, including failures.
    """

    def __init__(
        self,
        storage: Storage,
        identity: ScoreIdentity,
        seconds: float,
        *,
        scored_with: Mapping[str, Any],
        is_identity_true: Callable[[], bool] = lambda: True,
        on_closed: Callable[[pl.DataFrame], None] = lambda _: None,
    ) -> None:
        self._scored_with = scored_with
        self._is_identity_true = is_identity_true
        self._storage = storage
        self._identity = identity
        self._seconds = seconds
        self._on_closed = on_closed
        self._open_rows: list[dict[str, Any]] = []
        self._opened = time.monotonic()

    def add(self, sequence: TokenSequence, logprobs: Sequence[np.ndarray]) -> None:
        """Add a sequence's scores: for each of its targets, ln p of the target's tokens."""
        self._open_rows += [
            _scored(sequence.pair_id, target, values) for target, values in zip(sequence.targets, logprobs, strict=True)
        ]

    def add_failure(self, sequence: TokenSequence, reason: NullReason) -> None:
        """Add a sequence that could not be scored, as nulls with a reason."""
        self._open_rows += [_failed(sequence.pair_id, target, reason) for target in sequence.targets]

    def close_if_due(self) -> bool:
        """Store the open shard if it has been open long enough. Returns whether it was stored."""
        is_due = bool(self._open_rows) and time.monotonic() - self._opened >= self._seconds
        if is_due:
            self.close()
        return is_due

    def close(self) -> None:
        """Store the open shard. Failures are not cached: the next run may succeed."""
        self._opened = time.monotonic()
        if not self._open_rows:
            return
        shard = pl.DataFrame(self._open_rows, schema=tables.dtypes(tables.CachedScores), orient="row")
        scores = shard.filter(pl.col("null_reason").is_null())
        if not scores.is_empty() and self._is_identity_true():
            self._storage.scores.append(self._identity, scores, self._scored_with)
        self._on_closed(shard)
        self._open_rows = []


def _scored(pair_id: str, target: Target, logprobs: np.ndarray) -> dict[str, Any]:
    """A row of CachedScores, summed in fp64. A sum that is not finite becomes null with a reason."""
    row = _failed(pair_id, target, NullReason.NON_FINITE)
    sum_nll = -float(logprobs.sum(dtype=np.float64))
    if math.isfinite(sum_nll):
        row |= {"sum_nll": max(sum_nll, 0.0), "null_reason": None}
    return row


def _failed(pair_id: str, target: Target, reason: NullReason) -> dict[str, Any]:
    return {
        "pair_id": pair_id,
        "quantity": target.quantity.value,
        "sum_nll": None,
        "num_tokens": target.stop - target.start,
        "end_ids": target.end_ids,
        "null_reason": reason.value,
    }
