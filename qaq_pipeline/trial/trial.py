"""A training trial of a published version: its plan, its trainings, and their results as a table.

Belongs here: which trainings there are, how much each is trained, and the stored results that a repeated trial uses.
Does not belong here: rows (`arms`), one training (`training_run`), and the verdict (`verdict`).

training_runs/<id>.json    the result of one training; its id is the hash of everything that determines it
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from qaq_pipeline.config.settings import EVERYTHING, HELD_OUT, UNTRAINED, Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.screening.benchmarks import load_benchmark
from qaq_pipeline.storage.files import hash_json
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.trial.answer_losses import losses_table
from qaq_pipeline.trial.arms import CONTROLS, TrialError, read_arms
from qaq_pipeline.trial.training_run import RunResult, TrialModel

if TYPE_CHECKING:
    from qaq_pipeline.lm import training
    from qaq_pipeline.lm.training_steps import Work

TYPICAL_SHARE = 0.12
"""Share of the matmul peak that a trial reaches on a CPU, measured on the demo."""

_SAMPLED = 1000
"""Rows whose tokens are counted for an estimate."""

_FOLDER = "training_runs"


@dataclass(frozen=True)
class Training:
    """One training of a trial: an arm and a seed."""

    arm: str
    seed: int
    pairs: list[Pair]
    result_id: str
    """Hash of everything that determines its result."""


@dataclass(frozen=True)
class TrialPlan:
    """The trainings of a trial, in the order in which they run: all arms of a seed, then those of the next."""

    version: str
    published: str
    work: Work
    measured: dict[str, list[Pair]]
    trainings: list[Training]
    identity: dict[str, Any]
    made_of: dict[str, dict[str, StoredTable]]
    """Tables of each batch, by name."""

    @property
    def facts(self) -> dict[str, Any]:
        """The part of the provenance that the inputs do not show: the selection, the model, the amount of training."""
        return {
            "selection": self.published,
            "model": self.identity,
            "amount": {"unit": self.work.unit, "amount": self.work.amount, "steps": self.work.num_steps},
            "measured": {name: len(pairs) for name, pairs in self.measured.items()},
        }


@dataclass(frozen=True)
class TrialCost:
    """The estimated cost of a trial."""

    num_trainings: int
    num_missing: int
    """Trainings whose results are not stored."""
    num_tokens: int
    """Tokens to train on, prompts included."""
    num_measured: int
    """Tokens to measure."""
    flops: float
    seconds: float
    """Time at `TYPICAL_SHARE` of the measured matmul peak; NaN if unknown."""

    @property
    def sentence(self) -> str:
        """The work and its time."""
        known = not math.isnan(self.seconds)
        time = f"about {self.seconds / 60:,.0f} min on this machine" if known else "its time on this machine is unknown"
        return (
            f"{self.num_missing:,} of {self.num_trainings:,} trainings to run: {self.num_tokens:,} tokens to train on "
            f"and {self.num_measured:,} to measure, {self.flops:.3g} FLOP, {time}"
        )


@dataclass(frozen=True)
class TrialProgress:
    """A trial after an optimizer step of one of its trainings."""

    step: int
    num_steps: int
    sentence: str


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    plan: TrialPlan
    results: list[RunResult]
    """In the order of the plan's trainings."""
    num_stored: int
    """Results that an earlier trial had stored."""

    @functools.cached_property
    def frame(self) -> pl.DataFrame:
        """TrainingTrial."""
        both = zip(self.plan.trainings, self.results, strict=True)
        table = losses_table((one.arm, one.seed, result.losses) for one, result in both)
        return table.sort("measure", "arm", "seed", "item")

    @functools.cached_property
    def runs(self) -> list[dict[str, Any]]:
        """Arm, seed, rows, tokens, steps, seconds and curve of each training, for people."""
        return [
            {"arm": one.arm, "seed": one.seed, **{k: v for k, v in result.as_json().items() if k != "losses"}}
            for one, result in zip(self.plan.trainings, self.results, strict=True)
        ]


@dataclass
class TrialRuntime:
    """Runs trials under the settings. torch and transformers load on first use.

    Args:
        settings: everything that can be configured.
        on_progress: called during every training.
    """

    settings: Settings
    on_progress: Callable[[TrialProgress], None] = field(default=lambda _: None)

    @functools.cached_property
    def _model(self) -> TrialModel:
        return TrialModel(self.settings)

    def plan(self, storage: Storage, version: str) -> TrialPlan:
        """The plan for a version.

        Raises:
            TrialError: the version cannot be tried, a measure has no answer to measure, or an arm has no row.
            StorageError: a table of it is missing or damaged.
            benchmarks.BenchmarkError: a benchmark file cannot be read.
        """
        trial, arms = self.settings.trial, read_arms(storage, self.settings, version)
        measured = {HELD_OUT: arms.held_out(trial.max_held_out), **self._benchmarks()}
        self._check_measured(measured, version)
        fixed = {arm: arms.pairs(arm) for arm in self._arms(arms.published.name)}
        controls = [arms.controls(seed) for seed in range(trial.seeds)]
        work = self._work(controls[0][CONTROLS[0]], version)
        of_measured = hash_json({name: [asdict(pair) for pair in pairs] for name, pairs in measured.items()})
        trainings = []
        for arm, seed in self._order(arms.published.name):
            pairs = controls[seed][arm] if arm in CONTROLS else fixed[arm]
            if not pairs and arm != UNTRAINED:
                raise TrialError(f"version {version}: {arm} takes no row, so there is nothing to train on")
            amount = None if arm == UNTRAINED else [work.unit, work.amount, work.num_steps, seed]
            facts = [self._model.identity, of_measured, amount, [pair.pair_id for pair in pairs]]
            trainings.append(Training(arm, seed, pairs, hash_json(facts)))
        published, identity = arms.published.name, self._model.identity
        return TrialPlan(version, published, work, measured, trainings, identity, arms.made_of)

    def _check_measured(self, measured: Mapping[str, list[Pair]], version: str) -> None:
        for name, pairs in measured.items():
            ids = [pair.pair_id for pair in pairs]
            if len(set(ids)) < len(ids):
                raise TrialError(f"trial.benchmarks: {name} has several tasks of one id; correct the file")
            if self._model.examples(pairs):
                continue
            if name == HELD_OUT:
                raise TrialError(
                    f"version {version} has no held-out pair to measure on: set held_out.share (0.1, for example) and "
                    "curate another batch, or the same ones in another QAQ_HOME: rows that were accepted stay accepted"
                )
            raise TrialError(
                f"trial.benchmarks: {name} has no canonical solution that fits into scoring.max_tokens; take a file in "
                "the format of HumanEval or MBPP"
            )

    def _arms(self, published: str) -> list[str]:
        """The arms that are the same for every seed."""
        others = [name for name in self.settings.trial.selections if name != published]
        return [UNTRAINED, published, *others, EVERYTHING]

    def _order(self, published: str) -> Iterator[tuple[str, int]]:
        """Arms and seeds; the untrained model is measured once."""
        untrained, first, *others = self._arms(published)
        yield untrained, 0
        for seed in range(self.settings.trial.seeds):
            for arm in (first, *CONTROLS, *others):
                yield arm, seed

    def _benchmarks(self) -> dict[str, list[Pair]]:
        return {
            one.name: [
                Pair(task.task_id, None, task.prompt, task.solution)
                for task in load_benchmark(one).tasks
                if task.solution
            ]
            for one in self.settings.trial.benchmarks
        }

    def _work(self, control: list[Pair], version: str) -> Work:
        """The amount of training: by default one pass over the first draw of the random control."""
        from qaq_pipeline.lm.training_steps import Work

        trial, examples = self.settings.trial, self._model.examples(control)
        if not examples:
            raise TrialError(f"version {version} has no row to train on: its selection takes none")
        one_pass = sum(one.num_trained for one in examples) if trial.equal == "tokens" else len(examples)
        amount = trial.amount or one_pass
        return Work(trial.equal, amount, max(1, round(amount / one_pass * len(examples) / trial.rows_per_step)))

    def run(self, plan: TrialPlan, storage: Storage, log: Callable[[str], None] = lambda _: None) -> Trial:
        """Run the trainings whose results are not stored. Each is stored as soon as it is finished."""
        stored = [_read(storage, one.result_id) for one in plan.trainings]
        missing = sum(result is None for result in stored)
        results, seconds = [], 0.0
        for number, (one, found) in enumerate(zip(plan.trainings, stored, strict=True), start=1):
            result = found
            if result is None:
                name = f"training {number} of {len(plan.trainings)} ({one.arm}, seed {one.seed})"
                left = f", about {seconds * missing:,.0f} s left" if seconds else ""
                log(f"{name}: {len(one.pairs):,} rows{left}")
                result = self._run(plan, one, f"{name}{left}")
                storage.files.write_json(result.as_json(), _FOLDER, f"{one.result_id}.json")
                seconds, missing = result.seconds, missing - 1
            results.append(result)
        return Trial(plan, results, sum(result is not None for result in stored))

    def estimate(self, plan: TrialPlan, storage: Storage) -> TrialCost:
        """The cost of the trainings whose results are not stored. It loads no weights."""
        examples, work = self._model.examples(plan.trainings[-1].pairs[:_SAMPLED]), plan.work
        total, trained = sum(len(one.token_ids) for one in examples), sum(one.num_trained for one in examples)
        per_unit = total / (trained if work.unit == "tokens" else len(examples))
        measured = [one for pairs in plan.measured.values() for one in self._model.examples(pairs)]
        missing = [one for one in plan.trainings if not storage.files.exists(_FOLDER, f"{one.result_id}.json")]
        num_tokens = round(per_unit * work.amount) * sum(one.arm != UNTRAINED for one in missing)
        num_measured = sum(len(one.token_ids) for one in measured) * len(missing)
        speed = self._model.speed()
        per_token = speed.flops_per_token + speed.flops_per_target
        flops = (3 * num_tokens + num_measured) * per_token  # A backward pass costs two forward passes.
        peak = speed.peak_flops_per_second
        seconds = flops / (TYPICAL_SHARE * peak) if peak else math.nan
        return TrialCost(len(plan.trainings), len(missing), num_tokens, num_measured, flops, seconds)

    def _run(self, plan: TrialPlan, one: Training, name: str) -> RunResult:
        def report(step: training.Progress) -> None:
            loss = "" if step.loss is None else f", loss {step.loss:.3f}"
            self.on_progress(TrialProgress(step.step, step.num_steps, f"{name}: step {step.step}{loss}"))

        work = None if one.arm == UNTRAINED else plan.work
        return self._model.run(one.pairs, work, one.seed, plan.measured, report)


def _read(storage: Storage, result_id: str) -> RunResult | None:
    """The stored result of a training; None: there is none."""
    place = (_FOLDER, f"{result_id}.json")
    return RunResult.of_json(storage.files.read_json(*place)) if storage.files.exists(*place) else None
