"""From pairs to their sums of NLL under one model: what is cached is read, the rest is scored and cached by shards.

Belongs here: the loop over batches, shards by time, progress, and the assembly of the Logprobs table.
Does not belong here: prompts, the model, or the ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import polars as pl

from qaq_pipeline import schema
from qaq_pipeline.batching import token_budget_batches
from qaq_pipeline.config import RuntimeSettings, ScoringSettings
from qaq_pipeline.identity import ScoreIdentity
from qaq_pipeline.prompts import QUANTITIES_OF, EncodedPair, Pair, PairEncoder, Target, TokenSequence
from qaq_pipeline.schema import NullReason, Quantity
from qaq_pipeline.storage import Storage

BATCH_TOKENS_CPU = 1024
BATCH_TOKENS_GPU = 16_384

_QUERY_SIDE = (Quantity.Q, Quantity.Q_GIVEN_A)


class SequenceScorer(Protocol):
    """The seam to a model."""

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[Sequence[Any]]:
        """For each sequence and each of its targets, ln p of the target's tokens (a 1-D tensor), in nats."""
        ...


@dataclass(frozen=True, slots=True)
class ScoringModel:
    """A model as scoring needs it; `load` is called only if something has to be scored."""

    role: str
    encoder: PairEncoder
    identity: ScoreIdentity
    load: Callable[[], SequenceScorer]
    batch_tokens: int = BATCH_TOKENS_CPU
    """Padded tokens of a batch where the settings name none: a CPU's caches want few, a GPU many."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the scoring of one partition is."""

    model: str
    done_tokens: int
    total_tokens: int
    done_sequences: int
    total_sequences: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted."""
        return self.done_tokens / self.seconds if self.seconds > 0 else math.nan

    @property
    def seconds_left(self) -> float:
        """At the rate so far; NaN before the first batch."""
        rate = self.tokens_per_second
        return (self.total_tokens - self.done_tokens) / rate if rate > 0 else math.nan


@dataclass(frozen=True, slots=True)
class ScoringReport:
    """What one scoring did, beside the table."""

    num_pairs: int
    num_cached_quantities: int
    num_scored_quantities: int
    num_sequences: int
    num_tokens: int
    num_padded_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens a second of scoring; None where nothing was scored."""
        return self.num_tokens / self.seconds if self.num_tokens else None


def wanted_quantities(scoring: ScoringSettings) -> frozenset[Quantity]:
    """The negative log-likelihoods that the wanted scores are made of."""
    return frozenset(quantity for score in scoring.quantities for quantity in QUANTITIES_OF[score])


def score_pairs(
    pairs: Sequence[Pair],
    model: ScoringModel,
    storage: Storage,
    scoring: ScoringSettings,
    runtime: RuntimeSettings,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_shard: Callable[[Progress], None] = lambda _: None,
) -> tuple[pl.DataFrame, ScoringReport]:
    """The Logprobs table of the pairs, and what it took.

    Finished scores are added to the cache every `runtime.shard_seconds`, so that a kill loses at most the open
    shard; what the cache holds is not scored again.

    Args:
        pairs: distinct pairs.
        model: whose log-probabilities are taken.
        storage: holds the cache.
        scoring: what is wanted.
        runtime: batch and shard size.
        on_progress: called after every batch.
        on_shard: called after every stored shard.
    """
    encoded = model.encoder.encode(pairs, wanted_quantities(scoring))
    pair_ids = pl.Series([pair.pair_id for pair in pairs], dtype=pl.String)
    cached = storage.read_scores(model.identity, pair_ids)
    sequences = _not_cached(encoded, cached)
    run = _Run(storage, model, scoring, runtime, on_progress, on_shard)
    if sequences:
        run.score(sequences)
    scores = pl.concat([cached, *run.shards])
    report = ScoringReport(
        num_pairs=len(pairs),
        num_cached_quantities=_num_targets(encoded) - _num_scored(sequences),
        num_scored_quantities=_num_scored(sequences),
        num_sequences=len(sequences),
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
        num_padded_tokens=run.num_padded_tokens,
        seconds=run.seconds,
    )
    return logprobs_table(encoded, scores, token_logprobs=scoring.token_logprobs), report


def logprobs_table(encoded: Sequence[EncodedPair], scores: pl.DataFrame, *, token_logprobs: bool) -> pl.DataFrame:
    """The Logprobs table, sorted by pair_id: counts and reasons of the encoding beside the cached scores."""
    by_key = {(row["pair_id"], row["quantity"], row["num_tokens"]): row for row in scores.iter_rows(named=True)}
    rows = [_table_row(pair, by_key, token_logprobs=token_logprobs) for pair in encoded]
    return pl.DataFrame(rows, schema=schema.dtypes(schema.Logprobs), orient="row").sort("pair_id")


def _table_row(
    pair: EncodedPair, by_key: dict[tuple[str, str, int], dict[str, Any]], *, token_logprobs: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "pair_id": pair.pair_id,
        "num_q_tokens": pair.num_q_tokens,
        "num_a_tokens": pair.num_a_tokens,
        "num_a_tokens_untruncated": pair.num_a_tokens_untruncated,
        "is_truncated": pair.is_truncated,
    }
    for quantity in Quantity:
        num_tokens = pair.num_q_tokens if quantity in _QUERY_SIDE else pair.num_a_tokens
        score = by_key.get((pair.pair_id, quantity.value, num_tokens), {})
        is_scored = quantity not in pair.null_reasons
        if is_scored and not score:
            raise AssertionError(f"pair {pair.pair_id}: {quantity.value} was neither scored nor refused")
        row[f"sum_nll_{quantity}"] = score["sum_nll"] if is_scored else None
        row[f"null_reason_{quantity}"] = score["null_reason"] if is_scored else pair.null_reasons[quantity].value
        row[f"token_logprobs_{quantity}"] = score["token_logprobs"] if is_scored and token_logprobs else None
    return row


def _not_cached(encoded: Iterable[EncodedPair], cached: pl.DataFrame) -> list[TokenSequence]:
    """The sequences, each without the targets that the cache has; those left without a target are dropped.

    A cached sum over another number of tokens is of another segmentation, and is scored anew.
    """
    known = set(zip(cached["pair_id"], cached["quantity"], cached["num_tokens"], strict=True))
    sequences = []
    for pair in encoded:
        for sequence in pair.sequences:
            targets = tuple(
                target
                for target in sequence.targets
                if (sequence.pair_id, target.quantity.value, target.stop - target.start) not in known
            )
            if targets:
                sequences.append(TokenSequence(sequence.pair_id, sequence.token_ids, targets))
    return sequences


class _Run:
    """One scoring: batches, longest first, into shards."""

    def __init__(
        self,
        storage: Storage,
        model: ScoringModel,
        scoring: ScoringSettings,
        runtime: RuntimeSettings,
        on_progress: Callable[[Progress], None],
        on_shard: Callable[[Progress], None],
    ) -> None:
        self._storage = storage
        self._model = model
        self._keep_tokens = scoring.token_logprobs
        self._runtime = runtime
        self._on_progress = on_progress
        self._on_shard = on_shard
        self._open_rows: list[dict[str, Any]] = []
        self.shards: list[pl.DataFrame] = []
        self.num_padded_tokens = 0
        self.seconds = 0.0

    def score(self, sequences: Sequence[TokenSequence]) -> None:
        """Score the sequences; every finished shard is in the cache before the next begins."""
        scorer = self._model.load()
        started = shard_started = time.monotonic()
        for progress in self._batches(sequences, scorer, started):
            self.seconds = progress.seconds
            self._on_progress(progress)
            is_last = progress.done_sequences == progress.total_sequences
            if is_last or time.monotonic() - shard_started >= self._runtime.shard_seconds:
                self._close_shard()
                self._on_shard(progress)
                shard_started = time.monotonic()

    def _batches(
        self, sequences: Sequence[TokenSequence], scorer: SequenceScorer, started: float
    ) -> Iterator[Progress]:
        lengths = [len(sequence.token_ids) for sequence in sequences]
        total_tokens, done_tokens, done_sequences = sum(lengths), 0, 0
        budget = self._runtime.batch_tokens or self._model.batch_tokens
        for indices in token_budget_batches(lengths, budget):
            batch = [sequences[index] for index in indices]
            for sequence, logprobs in zip(batch, scorer.score(batch), strict=True):
                self._open_rows += [
                    _cache_row(sequence.pair_id, target, values, keep_tokens=self._keep_tokens)
                    for target, values in zip(sequence.targets, logprobs, strict=True)
                ]
            done_sequences += len(batch)
            done_tokens += sum(lengths[index] for index in indices)
            self.num_padded_tokens += len(batch) * lengths[indices[0]]
            seconds = time.monotonic() - started
            yield Progress(self._model.role, done_tokens, total_tokens, done_sequences, len(sequences), seconds)

    def _close_shard(self) -> None:
        shard = pl.DataFrame(self._open_rows, schema=schema.dtypes(schema.CachedScores), orient="row")
        # A failure is not cached: its cause may be mended by the next run.
        self._storage.append_scores(self._model.identity, shard.filter(pl.col("null_reason").is_null()))
        self.shards.append(shard)
        self._open_rows = []


def _cache_row(pair_id: str, target: Target, logprobs: Any, *, keep_tokens: bool) -> dict[str, Any]:
    """A row of CachedScores; the sum is taken in fp64. What is not finite is null, with its reason."""
    sum_nll = -float(logprobs.double().sum())
    is_finite = math.isfinite(sum_nll)
    return {
        "pair_id": pair_id,
        "quantity": target.quantity.value,
        "sum_nll": max(sum_nll, 0.0) if is_finite else None,
        "num_tokens": target.stop - target.start,
        "null_reason": None if is_finite else NullReason.NON_FINITE.value,
        "token_logprobs": logprobs.tolist() if keep_tokens and is_finite else None,
    }


def _num_targets(encoded: Iterable[EncodedPair]) -> int:
    return sum(len(sequence.targets) for pair in encoded for sequence in pair.sequences)


def _num_scored(sequences: Iterable[TokenSequence]) -> int:
    return sum(len(sequence.targets) for sequence in sequences)
