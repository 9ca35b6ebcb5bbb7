"""Sums the NLL of pairs under one model: reads the cached scores, scores the rest, and caches them in shards.

Belongs here: the rows of a batch that are scored, the sequence of steps of one scoring, its progress and its report.
Does not belong here: the texts of pairs (`pairs`), prompts, batches and models (`lm`), the choice of sequences
(`planner`), the rows of a shard (`shards`), the Logprobs table (`sums`), and ranks (`selection`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl

from qaq_pipeline.config.settings import RuntimeSettings, ScoringSettings
from qaq_pipeline.lm.batching import BatchQueue
from qaq_pipeline.lm.prompts import PairEncoder, TokenSequence
from qaq_pipeline.lm.workers import MAX_TRIES, Processes, ScorerFacts, SequenceScorer, score_batches
from qaq_pipeline.schema.vocabularies import NullReason
from qaq_pipeline.scoring.chunks import ChunkPair, Chunks, Counts, Work, plan_of
from qaq_pipeline.scoring.pairs import LongestFirst, Pairs
from qaq_pipeline.scoring.planner import Plan, wanted_quantities
from qaq_pipeline.scoring.shards import ShardWriter
from qaq_pipeline.scoring.sums import Sums
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.ordered_rows import OrderedRows, Rows
from qaq_pipeline.storage.score_cache import FOUND
from qaq_pipeline.storage.storage import Storage

logger = logging.getLogger(__name__)

START_SECONDS = {"cpu": 5.0, "cuda": 15.0}
"""Time to start a scoring process on a kind of device, without reading its weights."""
LOADED_PER_SECOND = 1e9
"""Bytes of weights that are read in a second, from a disk or a network."""
SCORED_PER_SECOND = {"cpu": 2.5e11, "cuda": 2e14}
"""Bytes of weights x tokens that are scored in a second, by one core or one GPU."""
STARTS_WORTH = 4
"""A process is worth its start if its share of the work takes so many times as long."""

IDS_AT_ONCE = 1 << 20
"""pair_ids in memory at once."""

MAX_MISFITS = 16
"""Sequences in a row that may fail to fit into memory before a scoring stops."""

TYPICAL_SHARE = 0.55
"""Share of the matmul peak that scoring reaches on a CPU. Norms and the head's log-sum-exp take the rest."""
TYPICAL_SHARES_OF_GPUS = {1.2e9: 0.35, 1.3e10: 0.65}
"""The same on a GPU, by the operations of a token: a small model waits for memory. From arithmetic for an H100, not yet
measured."""


@dataclass(frozen=True, slots=True)
class ScoringModel:
    """A model that can score pairs. It is loaded only if something has to be scored."""

    role: str
    encoder: PairEncoder
    identity: ScoreIdentity
    open_workers: Callable[[int, Storage], contextlib.AbstractContextManager[SequenceScorer | Processes]]
    """Loads the model in this process, or in at most the given number of scoring processes, which take chunks and store
    their scores. Within the context the devices are held."""
    num_weight_bytes: int = 0
    scored_with: Mapping[str, Any] = field(default_factory=dict)
    """The libraries and the device that score; None if unknown."""
    warnings: Sequence[str] = ()
    """What may make its scores differ from those of the delivered texts, as sentences."""
    is_identity_true: Callable[[], bool] = lambda: True
    """Returns whether the model's files still match its identity."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of one scoring. Totals are forecasts until every pair is tokenised."""

    model: str
    done_tokens: int
    total_tokens: int
    done_sequences: int
    total_sequences: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, without padding; a shared prefix counts once per sequence."""
        return self.done_tokens / self.seconds if self.seconds > 0 else math.nan

    @property
    def seconds_left(self) -> float:
        """Seconds left at the rate so far; NaN before the first batch."""
        rate = self.tokens_per_second
        return (self.total_tokens - self.done_tokens) / rate if rate > 0 else math.nan

    @property
    def sentence(self) -> str:
        """The finished sequences, the speed and the time left."""
        return (
            f"{self.done_sequences:,} of {self.total_sequences:,} sequences, {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.seconds_left:,.0f} s left"
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A forecast of a scoring's cost, from the tokens of the first window and the matmul peak."""

    num_sequences: int
    num_tokens: int
    flops: float
    """Floating-point operations; 0 if unknown."""
    seconds: float
    """Time at `typical_share` of the measured matmul peak; NaN if unknown."""

    @classmethod
    def of(cls, plan: Plan, facts: Sequence[ScorerFacts]) -> Estimate:
        """The estimate for the whole plan with these workers."""
        shares = facts[0].shares_prefixes
        computed = plan.expected_tokens - (plan.expected_shared_tokens if shares else 0)
        attended = plan.expected_attended - (plan.expected_shared_attended if shares else 0)
        flops = facts[0].flops(computed, plan.expected_targets, attended)
        peak = sum(fact.peak_flops_per_second for fact in facts)
        share = typical_share(facts[0].device, facts[0].flops_per_token)
        seconds = flops / (share * peak) if peak and facts[0].flops_per_token else math.nan
        return cls(plan.expected_sequences, plan.expected_tokens, flops, seconds)

    @property
    def sentence(self) -> str:
        """The work and its time."""
        return (
            f"{self.num_sequences:,} sequences, {self.num_tokens:,} tokens, {self.flops:.3g} FLOP; at a typical share "
            f"of the matmul peak {self.seconds:,.0f} s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringReport(Counts):
    """Counts and times of one scoring."""

    num_pairs: int
    seconds: float
    runner: str | None = None
    """The name of the runner (see `lm.runners`); None if nothing was scored."""
    pool: str | None = None
    """The kind of the pool, as `runtime.pool.kind`; in_process also where the work justified one process only; None if
    nothing was scored."""
    devices: Sequence[str] = ()
    """Of each worker; empty if nothing was scored."""
    num_lost_workers: int = 0
    """Scoring processes that ended, or did not answer, and were replaced or left out."""
    peak_share: float | None = None
    """Floating-point operations per second, as a share of the matmul peak measured when the model was loaded; None if
    nothing was scored or the peak is unknown."""
    scored_with: Sequence[Mapping[str, Any]] = ()
    """The distinct libraries and devices that made the table's scores, in this run or an earlier one."""
    estimate: Estimate | None = None
    """The forecast before the first batch; None if nothing was scored."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second, without padding; None if nothing was scored."""
        return self.num_tokens / self.seconds if self.num_tokens else None


def score_pairs(
    pairs: Pairs,
    model: ScoringModel,
    storage: Storage,
    scoring: ScoringSettings,
    runtime: RuntimeSettings,
    *,
    on_start: Callable[[Estimate], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_shard: Callable[[Progress], None] = lambda _: None,
) -> tuple[Rows, ScoringReport]:
    """The rows of Logprobs of the pairs, and a report of the scoring.

    Finished scores are added to the cache every `runtime.shard_seconds`. A kill therefore loses at most the open
    shard; an error or another signal loses nothing. Cached quantities are not scored again.

    Args:
        pairs: distinct pairs.
        model: the model that scores.
        storage: holds the cache.
        scoring: the wanted quantities.
        runtime: batch and shard size, processes.
        on_start: called once the model is loaded, before the first batch.
        on_progress: called after every batch.
        on_shard: called after every stored shard; where processes score, every `runtime.shard_seconds`.

    Raises:
        workers.WorkerDiedError: scoring processes were lost wherever they were started.
        MemoryError: `MAX_MISFITS` sequences in a row did not fit into memory.
        Exception: raised by the model while it was loaded or run.
    """
    plan = plan_scoring(pairs, model.encoder, model.identity, storage, scoring)
    run = Run(plan, model, storage, runtime, on_start, on_progress, on_shard)
    rows = run.score()
    if run.work.num_cached_quantities:
        storage.scores.count_hits(model.identity, run.work.num_cached_quantities)
    scorers = plan.cached_scorers()
    if run.work.num_sums:
        scorers |= {json.dumps(dict(one.scored_with or model.scored_with), sort_keys=True) for one in run.facts}
    return rows, run.report([json.loads(scorer) for scorer in sorted(scorers)])


def justified_processes(num_tokens: int, num_weight_bytes: int, device: str) -> int:
    """How many processes the work justifies, if each of them takes its time to start; at least one.

    Args:
        num_tokens: to score.
        num_weight_bytes: of the model.
        device: kind of it; others than those of `START_SECONDS` count as a CPU.
    """
    kind = device if device in START_SECONDS else "cpu"
    start = START_SECONDS[kind] + num_weight_bytes / LOADED_PER_SECOND
    work = num_tokens * num_weight_bytes / SCORED_PER_SECOND[kind]
    return max(round(work / (STARTS_WORTH * start)), 1)


def typical_share(device: str, flops_per_token: float) -> float:
    """Share of the matmul peak that scoring reaches on a device, whose name begins with its kind."""
    if not device.startswith("cuda"):
        return TYPICAL_SHARE
    sizes, shares = zip(*TYPICAL_SHARES_OF_GPUS.items(), strict=True)
    return float(np.interp(math.log(max(flops_per_token, 1.0)), np.log(sizes), shares))


def plan_scoring(
    pairs: Pairs, encoder: PairEncoder, identity: ScoreIdentity, storage: Storage, scoring: ScoringSettings
) -> Plan:
    """The plan of a scoring: the wanted quantities, minus those cached under the identity."""
    ordered = LongestFirst(pairs)
    return Plan(ordered, encoder, wanted_quantities(scoring), _cached(ordered, identity, storage))


def _cached(pairs: LongestFirst, identity: ScoreIdentity, storage: Storage) -> pl.DataFrame:
    """Every cached score of the pairs, as `ScoreCache.read`, for `IDS_AT_ONCE` pairs at a time."""
    found = [pl.DataFrame(schema=FOUND)]
    if storage.scores.names(identity.digest()):
        for start in range(0, len(pairs), IDS_AT_ONCE):
            scores = storage.scores.read(identity, pairs.pair_ids(start, start + IDS_AT_ONCE))
            found.append(scores.with_columns(pl.col("place") + pl.lit(start, pl.UInt32)))
    return pl.concat(found)


@dataclass
class Run:
    """Scores what one plan leaves to do, and counts it: batch by batch in this process, or in chunks in others."""

    plan: Plan
    model: ScoringModel
    storage: Storage
    runtime: RuntimeSettings
    on_start: Callable[[Estimate], None] = lambda _: None
    on_progress: Callable[[Progress], None] = lambda _: None
    on_shard: Callable[[Progress], None] = lambda _: None
    batch_share: float = 1.0
    """The part of a batch's tokens that one may have here: less where larger ones were lost."""
    work: Work = field(default_factory=Work)
    """What was done."""
    facts: Sequence[ScorerFacts] = ()
    """Of each worker; empty if nothing was scored."""
    pool: str | None = None
    estimate: Estimate | None = None
    done_tokens: int = 0
    done_sequences: int = 0
    computed_tokens: int = 0
    attended: int = 0
    splits: int = 0
    misfits: int = 0
    """Sequences in a row that did not fit into memory."""
    lost_workers: int = 0
    seconds: float = 0.0

    def score(self) -> Rows:
        """The rows of Logprobs. The model is loaded only if something has to be scored.

        Raises:
            Exception: as `score_pairs`.
        """
        windows = self.plan.windows()
        first = next(filter(None, windows), None)
        if first is not None:
            with self.model.open_workers(self._max_workers(), self.storage) as workers:
                started = time.monotonic()
                self.pool = self.runtime.pool.kind if isinstance(workers, Processes) else "in_process"
                if isinstance(workers, Processes):
                    windows.close()
                    del first
                    self.plan.sums = Sums(0)  # The processes make the rows.
                    return self._score_chunks(workers, started)
                self._score_batches(workers, itertools.chain([first], windows), started)
        self.work = Work.of(self.plan, self.computed_tokens, self.attended, self.splits)
        return self.plan.sums

    def _score_batches(self, scorer: SequenceScorer, windows: Iterable[list[TokenSequence]], started: float) -> None:
        facts = scorer.facts
        self._start([facts])
        budget = max(int((self.runtime.batch_tokens or facts.batch_tokens) * self.batch_share), 1)
        queue = BatchQueue(windows, budget, is_padded=facts.is_padded, shares_prefixes=facts.shares_prefixes)
        shards = ShardWriter(
            self.storage,
            self.model.identity,
            self.runtime.shard_seconds,
            scored_with=self.model.scored_with,
            is_identity_true=self.model.is_identity_true,
            on_closed=self.plan.sums.add_shard,
        )
        with contextlib.closing(shards):
            for batch, outcome in score_batches(scorer, queue):
                if isinstance(outcome, NullReason):
                    self.splits += 1
                    if not queue.split(batch):
                        shards.add_failure(batch[0], outcome)
                        self._count(queue, batch)
                        self._count_misfit()
                else:
                    queue.fitted()
                    self.misfits = 0
                    for sequence, logprobs in zip(batch, outcome, strict=True):
                        shards.add(sequence, logprobs)
                    self._count(queue, batch)
                self.seconds = time.monotonic() - started
                self.on_progress(self._progress())
                if shards.close_if_due():
                    self.on_shard(self._progress())
            shards.close()
            self.on_shard(self._progress())

    def _score_chunks(self, processes: Processes, started: float) -> Rows:
        """Score every pair again that is not cached: the windows of this process were only for the estimate."""
        self._start(processes.facts)
        queue = Chunks(self.plan, self.model.identity, self.storage, processes.facts, processes.number)
        rows = OrderedRows(self.storage.files, self.storage.scores.place(self.model.identity.digest()))
        at_work: dict[int, Progress] = {}
        shown = started

        def tell() -> None:
            nonlocal shown
            self.done_tokens = self.work.num_tokens + sum(one.done_tokens for one in at_work.values())
            self.done_sequences = self.work.num_sequences + sum(one.done_sequences for one in at_work.values())
            self.seconds = time.monotonic() - started
            self.on_progress(self._progress())
            if time.monotonic() - shown >= self.runtime.shard_seconds:
                shown = time.monotonic()
                self.on_shard(self._progress())

        def note(number: int, progress: Progress | None) -> None:
            at_work.pop(number, None)
            if progress is not None:
                at_work[number] = progress
                tell()

        lost_before = processes.num_lost
        for chunk, result in processes.run(queue, note):
            table, work = self._given_up(chunk) if isinstance(result, NullReason) else result
            rows.append(table)
            self.work += work
            tell()
        self.lost_workers = processes.num_lost - lost_before
        self.facts = processes.facts
        self.on_shard(self._progress())
        return rows

    def _given_up(self, chunk: Sequence[ChunkPair]) -> tuple[pl.DataFrame, Work]:
        """The table of a pair that ended every process: what is not cached is null."""
        logger.warning("pair %s is given up: %d or more processes ended over it", chunk[0].pair.pair_id, MAX_TRIES)
        plan = plan_of(chunk, self.model.encoder, self.plan.wanted)
        shards = ShardWriter(self.storage, self.model.identity, math.inf, scored_with={}, on_closed=plan.sums.add_shard)
        with contextlib.closing(shards):
            for sequence in itertools.chain.from_iterable(plan.windows()):
                shards.add_failure(sequence, NullReason.WORKER_LOST)
        return pl.concat(plan.sums.parts()), Work.of(plan)

    def _start(self, facts: Sequence[ScorerFacts]) -> None:
        self.facts = facts
        self.estimate = Estimate.of(self.plan, facts)
        self.on_start(self.estimate)

    def report(self, scored_with: Sequence[Mapping[str, Any]]) -> ScoringReport:
        """The report of this run, at its end."""
        return ScoringReport(
            **asdict(self.work),
            num_pairs=self.plan.num_pairs,
            seconds=self.seconds,
            runner=self.facts[0].runner if self.facts else None,
            pool=self.pool,
            devices=tuple(facts.device for facts in self.facts),
            num_lost_workers=self.lost_workers,
            peak_share=self._peak_share(),
            scored_with=scored_with,
            estimate=self.estimate,
        )

    def _count_misfit(self) -> None:
        """Stop after many misfits in a row: one sequence may be too long, but many mean that memory is short."""
        self.misfits += 1
        if self.misfits >= MAX_MISFITS:
            raise MemoryError(
                f"{self.misfits} sequences in a row did not fit into memory, even one at a time; finished scores are "
                "stored: free memory and run again, or lower scoring.max_tokens"
            )

    def _max_workers(self) -> int:
        """The number of processes in the settings; by default as many as the work justifies."""
        device = str(self.model.scored_with.get("device", "cpu"))
        if self.runtime.pool.kind == "in_process":
            return 1
        return self.runtime.pool.size or justified_processes(
            self.plan.expected_tokens, self.model.num_weight_bytes, device
        )

    def _count(self, queue: BatchQueue, batch: Sequence[TokenSequence]) -> None:
        self.done_sequences += len(batch)
        self.done_tokens += sum(len(sequence.token_ids) for sequence in batch)
        self.computed_tokens += queue.tokens(batch)
        self.attended += queue.attended(batch)

    def _progress(self) -> Progress:
        return Progress(
            self.model.role,
            self.done_tokens,
            max(self.plan.expected_tokens, self.done_tokens),
            self.done_sequences,
            max(self.plan.expected_sequences, self.done_sequences),
            self.seconds,
        )

    def _peak_share(self) -> float | None:
        if not self.facts or not self.seconds:
            return None
        peak = sum(fact.peak_flops_per_second for fact in self.facts)
        flops = self.facts[0].flops(self.work.num_computed_tokens, self.work.num_targets, self.work.num_attended)
        return flops / self.seconds / peak if peak and flops else None
