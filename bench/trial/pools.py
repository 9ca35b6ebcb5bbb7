"""The pools of the study: real pairs with a share of bad rows, what each arm trains on, and the held-out pairs.

Belongs here: rows. Does not belong here: the trainings (`studies`), and the tables (`__main__`).

Held-out pairs are drawn first, by near-duplicate cluster, as the product draws them. They are as delivered: nothing is
planted in them, and no signal chooses them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from bench.validity import bad_rows
from bench.validity.__main__ import QUARTER, SELECTIONS, scored, trial_settings
from bench.validity.bad_rows import CLEAN, Batch, Row
from bench.validity.curated import Curated, curate
from qaq_pipeline.config.selections import LengthSelection, RandomSelection, Selection, SumSelection
from qaq_pipeline.config.settings import (
    EVERYTHING,
    HeldOutSettings,
    RecordSettings,
    ScreeningSettings,
    Settings,
    TrialSettings,
)
from qaq_pipeline.ingest import records
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening.held_out import HoldOut
from qaq_pipeline.screening.screen import screen_alone

HELD_OUT = HeldOutSettings(share=0.15)
HELD_OUT_PAIRS = 200
"""Held-out pairs that are measured, one of each cluster: measuring more costs as much as the training."""
BUDGET = 0.25
"""Share of the pool that an arm takes."""
KINDS = (*bad_rows.KINDS, "one-token bug")
"""The kinds of bad rows, in equal parts. A one-token bug is a control: no signal tells it."""
ORACLE, RANDOM, STRATIFIED, VALID_RANDOM = "random_clean", "random", "stratified_random", "valid_random"
_FIXED: tuple[Selection, ...] = (
    *(selection for selection in SELECTIONS if selection.name != RANDOM),
    SumSelection(name="sum_high", strategy="sum_high", budget=QUARTER),
    LengthSelection(name="length", strategy="length", budget=QUARTER),
)
_RANDOM_ARMS: tuple[tuple[str, Literal["random", "stratified_random"], bool], ...] = (
    (RANDOM, "random", False),
    (STRATIFIED, "stratified_random", False),
    (VALID_RANDOM, "random", True),
)
ARMS = (EVERYTHING, "qaq", "diff_high", VALID_RANDOM, RANDOM, ORACLE)
"""The arms of the study that are required; the others are in `_FIXED`."""


@dataclass(frozen=True)
class Pool:
    """A pool after curation."""

    name: str
    curated: Curated

    def pairs(self, arm: str, seed: int) -> list[Pair]:
        """The rows of an arm; random arms are drawn anew for each seed.

        Raises:
            ValueError: there is no such arm.
        """
        rows = self.curated.rows
        if arm == EVERYTHING:
            found = rows
        elif arm == ORACLE:
            clean = rows.filter(kind=CLEAN).sort("pair_id")
            drawn = random.Random(seed).sample(range(clean.height), min(clean.height, round(BUDGET * rows.height)))  # noqa: S311
            found = clean[sorted(drawn)]
        else:
            column = f"takes:{arm}" if f"takes:{arm}" in rows.columns else f"takes:{arm}_{seed}"
            if column not in rows.columns:
                raise ValueError(f"there is no arm {arm!r} with seed {seed}")
            found = rows.filter(column)
        texts = found.select("pair_id", "query", "answer").iter_rows()
        return [Pair(pair_id, None, query, answer) for pair_id, query, answer in texts]

    def kinds(self, arm: str, seed: int) -> dict[str, int]:
        """How many rows of each kind an arm has."""
        taken = pl.Series([pair.pair_id for pair in self.pairs(arm, seed)])
        counts = self.curated.rows.filter(pl.col("pair_id").is_in(taken.implode())).group_by("kind").len().sort("kind")
        return dict(counts.iter_rows())


def read_sides(path: Path) -> tuple[list[tuple[str, str]], list[Pair]]:
    """The pairs of an Alpaca file to train on, in a fixed random order, and the held-out pairs."""
    raw = records.read_file(path.read_bytes(), path.name, "study", RecordSettings()).frame
    settings, hold_out = ScreeningSettings(), HoldOut(HELD_OUT)
    screened = screen_alone(raw, settings, hold_out)
    texts = screened.join(raw.select("pair_id", "query", "answer").unique("pair_id"), on="pair_id", validate="m:1")
    accepted, held_out = (
        texts.filter(status=status.value).sort("pair_id") for status in (Status.ACCEPTED, Status.HELD_OUT)
    )
    pool = accepted.select("query", "answer").rows()
    random.Random(0).shuffle(pool)  # noqa: S311
    measured = held_out.unique("cluster", keep="first", maintain_order=True).head(HELD_OUT_PAIRS)
    columns = measured.select("pair_id", "query", "answer")
    return pool, [Pair(pair_id, None, query, answer) for pair_id, query, answer in columns.iter_rows()]


def pool_settings(seeds: list[int]) -> Settings:
    """The demo's models, the product's defaults, the selections of the study, and random ones for each seed."""
    settings = trial_settings(has_ifd=True)
    # Draws of their own: with one seed, random arms would take mostly the same rows.
    random_ones = [
        RandomSelection(name=f"{name}_{seed}", strategy=strategy, seed=3 * seed + place, valid=is_valid, budget=QUARTER)
        for seed in seeds
        for place, (name, strategy, is_valid) in enumerate(_RANDOM_ARMS)
    ]
    trial = TrialSettings(model="strong", curve_points=1)
    return settings.model_copy(update={"selections": (*_FIXED, *random_ones), "trial": trial})


def make_pools(pairs: list[tuple[str, str]], shares: list[float], settings: Settings) -> list[Pool]:
    """The pools with these shares of bad rows, scored and curated by the product. The bad rows of a small share are
    among those of a larger one.
    """
    bad = bad_rows.spoil(pairs, KINDS, round(max(shares) * len(pairs)), random.Random(7))  # noqa: S311
    batches = []
    for share in shares:
        first = dict(list(bad.items())[: round(share * len(pairs))])
        rows = tuple(first.get(place, Row(*pair)) for place, pair in enumerate(pairs))
        batches.append(Batch(0, f"{share:.0%}", rows))
    score = scored(settings, batches)
    return [Pool(batch.name, curate(batch, settings, score)) for batch in batches]
