"""The trainings of the study, one file each, so that an interrupted study goes on where it stopped.

Belongs here: which trainings there are, and their files. Does not belong here: rows (`pools`), and tables (`__main__`).
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from bench.trial.pools import BUDGET, Pool
from qaq_pipeline.config.settings import EVERYTHING, UNTRAINED, Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.lm.training_steps import Work
from qaq_pipeline.trial.answer_losses import losses_table
from qaq_pipeline.trial.training_run import RunResult, TrialModel

FULL_EPOCH = "everything, one epoch"
"""An arm with another amount of training: all rows once."""
_ANY_POOL = "any pool"


@dataclass(frozen=True)
class Study:
    """A study in a folder."""

    folder: Path
    settings: Settings
    measured: Mapping[str, Sequence[Pair]]

    @cached_property
    def model(self) -> TrialModel:
        """The model that is trained."""
        return TrialModel(self.settings)

    def work(self, pool: Pool) -> dict[float, Work]:
        """One epoch of a share of the pool's rows, in answer tokens: of a random quarter, and of the whole pool."""
        examples = self.model.examples(pool.pairs(EVERYTHING, 0))
        tokens, steps = sum(one.num_trained for one in examples), len(examples) / self.settings.trial.rows_per_step
        return {share: Work("tokens", round(share * tokens), round(share * steps)) for share in (BUDGET, 1.0)}

    def run(self, pools: Sequence[Pool], arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Run the trainings that have no file yet: seed by seed, so that all arms have the same seeds at any time."""
        self.open()
        self.train(_ANY_POOL, UNTRAINED, 0, functools.partial(self.model.run, [], None, 0, self.measured), {})
        for pool in pools:
            work = self.work(pool)
            for seed in seeds:
                for arm in arms:
                    rows = EVERYTHING if arm == FULL_EPOCH else arm
                    pairs = pool.pairs(rows, seed)
                    amount = work[1.0 if arm == FULL_EPOCH else BUDGET]
                    train = functools.partial(self.model.run, pairs, amount, seed, self.measured)
                    self.train(pool.name, arm, seed, train, {"rows": len(pairs), "kinds": pool.kinds(rows, seed)})

    def train(self, pool: str, arm: str, seed: int, run: Callable[[], RunResult], facts: Mapping[str, Any]) -> None:
        """Run a training and write its file, unless there is one."""
        file = self.folder / f"{pool} {arm} {seed}.json"
        if file.exists():
            return
        result = run()
        value = {"pool": pool, "arm": arm, "seed": seed, **facts, "result": result.as_json()}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(value), encoding="utf-8")
        part.rename(file)
        print(f"{time.strftime('%H:%M:%S')} {file.stem}: {result.seconds:.0f} s", file=sys.stderr)  # noqa: T201

    def open(self) -> None:
        """Make the folder; refuse one of a study with another model, other settings or other measured pairs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        measured = {name: [pair.pair_id for pair in pairs] for name, pairs in self.measured.items()}
        facts = {"identity": self.model.identity, "measured": measured}
        file = self.folder / "study"
        if not file.exists():
            file.write_text(json.dumps(facts), encoding="utf-8")
        elif json.loads(file.read_text(encoding="utf-8")) != facts:
            raise SystemExit(f"{self.folder} holds trainings of another study ({file}); take another folder")

    def results(self, pool: str) -> list[dict[str, Any]]:
        """The finished trainings of a pool, and the untrained model."""
        read = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("*.json"))]
        return [one for one in read if one["pool"] in (pool, _ANY_POOL)]

    def losses(self, pool: str) -> pl.DataFrame:
        """The trainings of a pool as the table training_trial."""
        read = ((one["arm"], one["seed"], RunResult.of_json(one["result"])) for one in self.results(pool))
        return losses_table((arm, seed, result.losses) for arm, seed, result in read)
