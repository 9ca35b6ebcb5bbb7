"""A planted truth for the trial itself: what differs is told apart, and what does not differ is not.

    mismatched   60 % of the rows have the answer to another query; against clean rows
    null 0 … 19  two arms of independent random draws of the same rows, five seeds each

Belongs here: the rows of these arms, and their trainings. Does not belong here: the study (`studies`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from bench.trial.studies import Study
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.lm.training_steps import Work
from qaq_pipeline.schema.vocabularies import Verdict
from qaq_pipeline.trial import verdict

SEEDS, TRIES = 5, 20
MEASURED = 50
"""Held-out pairs that are measured: the trainings are short, and there are many."""
MISMATCHED = 0.6
CLEAN_ARM, MISMATCHED_ARM = "clean", "mismatched"


@dataclass(frozen=True)
class Truth:
    """The trainings of the planted truth, of `rows` rows each."""

    study: Study
    pairs: Sequence[tuple[str, str]]
    rows: int
    seeds: Sequence[int]

    def run(self) -> None:
        """Run the trainings that have no file yet."""
        self.study.open()
        for seed in self.seeds:
            clean = self._draw(f"clean {seed}")
            self._train("truth", CLEAN_ARM, seed, clean)
            self._train("truth", MISMATCHED_ARM, seed, _mismatched(clean, seed))
        for number in range(TRIES):
            for seed in self.seeds:
                for arm in ("a", "b"):
                    self._train(f"null {number}", arm, seed, self._draw(f"{number} {arm} {seed}"))

    def _draw(self, name: str) -> list[Pair]:
        chosen = random.Random(name).sample(range(len(self.pairs)), self.rows)  # noqa: S311
        return [Pair(str(place), None, *self.pairs[place]) for place in sorted(chosen)]

    def _train(self, pool: str, arm: str, seed: int, pairs: list[Pair]) -> None:
        work = Work("rows", len(pairs), max(1, len(pairs) // self.study.settings.trial.rows_per_step))
        train = functools.partial(self.study.model.run, pairs, work, seed, self.study.measured)
        self.study.train(pool, arm, seed, train, {"rows": len(pairs)})


def _mismatched(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs, of which a share get each other's answers in a cycle, so that none keeps its own."""
    chosen = random.Random(seed).sample(range(len(pairs)), round(MISMATCHED * len(pairs)))  # noqa: S311
    answers = {place: pairs[other].answer for place, other in zip(chosen, chosen[1:] + chosen[:1], strict=True)}
    return [Pair(one.pair_id, None, one.query, answers.get(place, one.answer)) for place, one in enumerate(pairs)]


def sentences(study: Study) -> list[str]:
    """What the finished trainings tell."""
    found, frame = [], study.losses("truth")
    if MISMATCHED_ARM in frame["arm"]:
        measures = frame["measure"].unique(maintain_order=True)
        found += [verdict.sentence(verdict.compare(frame, one, MISMATCHED_ARM, CLEAN_ARM)) for one in measures]
    complete = [frame for number in range(TRIES) if _has_all_seeds(frame := study.losses(f"null {number}"))]
    for measure in complete[0]["measure"].unique(maintain_order=True) if complete else ():
        told = [verdict.compare(frame, measure, "a", "b").verdict for frame in complete]
        number = sum(one in (Verdict.BETTER, Verdict.WORSE) for one in told)
        found.append(f"On {measure}, {number} of {len(told)} pairs of random draws are told apart.")
    return found


def _has_all_seeds(losses: pl.DataFrame) -> bool:
    """Whether both arms of a try have all seeds."""
    return all(losses.filter(arm=arm)["seed"].n_unique() == SEEDS for arm in ("a", "b"))
