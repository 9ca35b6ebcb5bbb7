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
from pathlib import Path
from typing import Any

import polars as pl

from bench.trial.pools import BUDGET, EVERYTHING, Pool
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.lm.training_steps import Work
from qaq_pipeline.trial.training_run import RunResult, TrialModel

UNTRAINED, FULL_EPOCH = "untrained", "everything, one epoch"
"""Arms with another amount of training: none, and all rows once."""
_ANY_POOL = "any pool"


@dataclass(frozen=True)
class Study:
    """A study in a folder."""

    folder: Path
    settings: Settings
    measured: Mapping[str, Sequence[Pair]]

    def work(self, model: TrialModel, pool: Pool, *, epoch: bool = False) -> Work:
        """One epoch of a random quarter of the pool, or of the whole pool, in answer tokens."""
        examples = model.examples(pool.pairs(EVERYTHING, 0))
        share = 1.0 if epoch else BUDGET
        amount = round(share * sum(one.num_trained for one in examples))
        return Work("tokens", amount, round(share * len(examples) / self.settings.trial.rows_per_step))

    def run(self, pools: Sequence[Pool], arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Run the trainings that have no file yet: seed by seed, so that all arms have the same seeds at any time."""
        model = TrialModel(self.settings)
        self.train(_ANY_POOL, UNTRAINED, 0, functools.partial(model.run, [], None, 0, self.measured), {})
        for pool in pools:
            work = {arm: self.work(model, pool, epoch=arm == FULL_EPOCH) for arm in arms}
            for seed in seeds:
                for arm in arms:
                    rows = EVERYTHING if arm == FULL_EPOCH else arm
                    pairs = pool.pairs(rows, seed)
                    train = functools.partial(model.run, pairs, work[arm], seed, self.measured)
                    self.train(pool.name, arm, seed, train, {"rows": len(pairs), "kinds": pool.kinds(rows, seed)})

    def train(self, pool: str, arm: str, seed: int, run: Callable[[], RunResult], facts: Mapping[str, Any]) -> None:
        """Run a training and write its file, unless there is one."""
        self._require_same()
        file = self.folder / f"{pool} {arm} {seed}.json"
        if file.exists():
            return
        result = run()
        value = {"pool": pool, "arm": arm, "seed": seed, **facts, "result": result.as_json()}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(value), encoding="utf-8")
        part.rename(file)
        print(f"{time.strftime('%H:%M:%S')} {file.stem}: {result.seconds:.0f} s", file=sys.stderr)  # noqa: T201

    def _require_same(self) -> None:
        """Refuse a folder of a study with another model, other settings or other measured pairs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        measured = {name: [pair.pair_id for pair in pairs] for name, pairs in self.measured.items()}
        facts = {"identity": TrialModel(self.settings).identity, "measured": measured}
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
        """measure, arm, seed, item, num_tokens, nll of the trainings of a pool, as the table training_trial."""
        rows = [
            (measure, one["arm"], one["seed"], loss["item"], loss["num_tokens"], loss["nll"])
            for one in self.results(pool)
            for measure, found in one["result"]["losses"].items()
            for loss in found
        ]
        return pl.DataFrame(rows, schema=["measure", "arm", "seed", "item", "num_tokens", "nll"], orient="row")
