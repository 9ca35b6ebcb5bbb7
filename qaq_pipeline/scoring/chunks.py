"""Chunks: pairs of similar length that one process scores at a time, and what it counts.

Belongs here: the size of chunks, and the cached scores that go with them. Does not belong here: the processes
(`lm.workers`), and what they do with a chunk (`chunk_scorer`).

A chunk holds texts and cached sums, no tokens: each process tokenises its own chunks, and stores its own shards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import polars as pl

from qaq_pipeline.lm.prompts import Pair, PairEncoder
from qaq_pipeline.lm.workers import ScorerFacts
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.scoring.pairs import LongestFirst, Pairs
from qaq_pipeline.scoring.planner import WINDOW_PAIRS, Plan, scores_at
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.score_cache import FOUND
from qaq_pipeline.storage.storage import Storage

CHUNKS_LEFT = 2
"""A process gets so small a part of the characters that are left that it will get so many chunks like it."""
CHARACTERS_OF_TEMPLATE = 100
"""Rough number of characters that the template adds to those of a pair."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What was scored."""

    num_cached_quantities: int = 0
    num_scored_quantities: int = 0
    num_scored_pairs: int = 0
    """Pairs with at least one quantity that was scored."""
    num_sequences: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_sums: int = 0
    """Quantities that were scored and have a value."""
    num_computed_tokens: int = 0
    """Tokens that went through the model, padding included. A shared prefix counts each time it goes through the model,
    not for every sequence that uses it."""
    num_attended: int = 0
    """Pairs of a token and one that it attends to, of the tokens that went through the model."""
    num_splits: int = 0
    """Forward passes that did not fit into memory and were divided into two."""


@dataclass(frozen=True, slots=True)
class Work(Counts):
    """What was scored of a plan, or of some."""

    @classmethod
    def of(cls, plan: Plan, computed_tokens: int = 0, attended: int = 0, splits: int = 0) -> Work:
        """The work of a plan that was run to its end."""
        return cls(
            plan.num_cached,
            plan.num_quantities,
            plan.num_pairs_to_score,
            plan.num_sequences,
            plan.num_tokens,
            plan.num_targets,
            plan.sums.num_scored,
            computed_tokens,
            attended,
            splits,
        )

    def __add__(self, other: Work) -> Work:
        """The work of both."""
        return Work(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class ChunkPair:
    """A pair of a chunk, with its cached scores."""

    pair: Pair
    known: tuple[tuple[str, float, int, str], ...] = ()
    """Quantity, sum of NLL, number of tokens and end tokens of each."""
    batch_share: float = 1.0
    """The part of a batch's tokens that it may be scored with: half after each loss, since memory may be short."""


class Chunks:
    """The pairs of a plan in chunks, the longest pairs first; the last chunks are small, so that no process waits long.

    Args:
        plan: whose pairs and cached scores are taken.
        identity: under which scores are cached.
        storage: of the cache.
        facts: of each process that has its model.
        num_processes: also those that wait for a device.
    """

    def __init__(
        self, plan: Plan, identity: ScoreIdentity, storage: Storage, facts: Sequence[ScorerFacts], num_processes: int
    ) -> None:
        self._plan, self._identity, self._storage = plan, identity, storage
        self._num_processes = num_processes
        # Texts go through the model two or three times, so that a character makes one token, roughly: the smallest
        # chunk is about one forward pass.
        self._fewest = max(fact.batch_tokens for fact in facts)
        self._left = int(plan.pairs.num_characters().sum(dtype=np.int64)) + CHARACTERS_OF_TEMPLATE * len(plan.pairs)
        self._pairs = self._with_known()
        self._next: ChunkPair | None = next(self._pairs, None)

    def take(self) -> list[ChunkPair]:
        """The next chunk; empty if none is left."""
        most = max(self._left // (CHUNKS_LEFT * self._num_processes), self._fewest)
        chunk: list[ChunkPair] = []
        characters = 0
        while self._next is not None and len(chunk) < WINDOW_PAIRS and (not chunk or characters < most):
            chunk.append(self._next)
            characters += len(self._next.pair.query) + len(self._next.pair.answer) + CHARACTERS_OF_TEMPLATE
            self._next = next(self._pairs, None)
        self._left -= characters
        return chunk

    def after_loss(self, chunk: Sequence[ChunkPair]) -> list[ChunkPair]:
        """The chunk of a lost process, with the scores that it has stored, for smaller batches."""
        pair_ids = pl.Series([one.pair.pair_id for one in chunk], dtype=pl.String)
        known = _by_place(self._storage.scores.read(self._identity, pair_ids), 0, len(chunk))
        return [
            replace(one, known=scores, batch_share=one.batch_share / 2)
            for one, scores in zip(chunk, known, strict=True)
        ]

    def _with_known(self) -> Iterator[ChunkPair]:
        start = 0
        for window in self._plan.pairs.windows(WINDOW_PAIRS):
            known = _by_place(self._plan.cached, start, start + len(window))
            yield from (ChunkPair(pair, scores) for pair, scores in zip(window, known, strict=True))
            start += len(window)


def plan_of(chunk: Sequence[ChunkPair], encoder: PairEncoder, wanted: Collection[Quantity]) -> Plan:
    """The plan of a chunk: the wanted quantities without its cached ones."""
    pairs = LongestFirst(Pairs.of([one.pair for one in chunk]))
    places = {pair_id: place for place, pair_id in enumerate(pairs.pair_ids())}
    rows = [
        (places[one.pair.pair_id], *scores, None)
        for one in sorted(chunk, key=lambda one: places[one.pair.pair_id])
        for scores in one.known
    ]
    return Plan(pairs, encoder, wanted, pl.DataFrame(rows, schema=FOUND, orient="row"))


def _by_place(cached: pl.DataFrame, start: int, stop: int) -> list[tuple[tuple[str, float, int, str], ...]]:
    """The cached scores of each of these places, from `ScoreCache.read`."""
    rows = scores_at(cached, start, stop).select("place", "quantity", "sum_nll", "num_tokens", "end_ids")
    found: list[list[tuple[str, float, int, str]]] = [[] for _ in range(stop - start)]
    for place, *scores in rows.iter_rows():
        found[place - start].append((scores[0], scores[1], scores[2], scores[3]))
    return [tuple(scores) for scores in found]
