"""The comparison of two arms of a trial, and its verdict in words.

Belongs here: the statistics and the sentence. Does not belong here: the trainings (`training_run`), and the arms.

A seed is one training of each arm. The difference of a seed is the mean over the measured pairs of the difference of
their losses per answer token, so that pairs of different difficulty cancel out. The interval is Student's, over the
differences of the seeds: it holds for these pairs, and other draws and orders of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from qaq_pipeline.config.settings import UNTRAINED
from qaq_pipeline.schema.vocabularies import Verdict

MIN_SEEDS = 5
"""Fewest seeds for a verdict."""
LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference between two arms by one measure: loss of `arm` minus loss of `other`, in nats per token."""

    measure: str
    arm: str
    other: str
    num_seeds: int
    num_items: int
    difference: float
    lower: float | None
    """Lower end of the 95 % interval; None: one seed has no interval."""
    upper: float | None
    p_value: float | None
    """Of Student's test over the seeds; after `holm`, adjusted for the number of comparisons. None: one seed."""
    detectable: float | None
    """Smallest difference that a trial with this spread finds with a probability of 80 %."""
    is_adjusted: bool = False
    """Whether the p-value is adjusted. The interval never is."""

    @property
    def verdict(self) -> Verdict:
        """Better if `arm` has the lower loss."""
        if self.num_seeds < MIN_SEEDS or self.p_value is None:
            return Verdict.TOO_FEW_SEEDS
        if self.p_value >= 1 - LEVEL:
            return Verdict.NOT_TOLD_APART
        return Verdict.BETTER if self.difference < 0 else Verdict.WORSE


def arm_means(losses: pl.DataFrame) -> pl.DataFrame:
    """measure, arm, seed, loss: the mean over the items of their loss per token, for each training.

    Args:
        losses: TrainingTrial: measure, arm, seed, item, num_tokens, nll.
    """
    loss = (pl.col("nll") / pl.col("num_tokens")).mean()
    return losses.group_by("measure", "arm", "seed").agg(loss=loss, num_items=pl.len()).sort("measure", "arm", "seed")


def compare(losses: pl.DataFrame, measure: str, arm: str, other: str) -> Comparison:
    """The comparison of two arms on the items and seeds of both; the untrained model is compared with every seed.

    Raises:
        ValueError: they have no item or no seed in common.
    """
    of_measure = losses.filter(pl.col("measure") == measure).with_columns(loss=pl.col("nll") / pl.col("num_tokens"))
    one, two = (of_measure.filter(pl.col("arm") == name).select("seed", "item", "loss") for name in (arm, other))
    keys = ["item"] if UNTRAINED in {arm, other} else ["seed", "item"]
    both = one.join(two, on=keys, suffix="_other")
    if both.is_empty():
        raise ValueError(f"{arm} and {other} have no measured pair of {measure} in common")
    seed = "seed_other" if arm == UNTRAINED else "seed"
    means = both.group_by(seed).agg((pl.col("loss") - pl.col("loss_other")).mean().alias("difference")).sort(seed)
    return _of_differences(measure, arm, other, both["item"].n_unique(), means["difference"].to_numpy())


def _of_differences(measure: str, arm: str, other: str, num_items: int, differences: np.ndarray) -> Comparison:
    from scipy import stats

    number, mean = len(differences), float(np.mean(differences))
    if number < 2:
        return Comparison(measure, arm, other, number, num_items, mean, None, None, None, None)
    error = float(np.std(differences, ddof=1)) / math.sqrt(number)
    student = stats.t(number - 1)
    quantile = float(student.ppf((1 + LEVEL) / 2))
    p_value = float(2 * student.sf(abs(mean) / error)) if error else float(mean == 0)
    detectable = (quantile + float(student.ppf(POWER))) * error
    lower, upper = mean - quantile * error, mean + quantile * error
    return Comparison(measure, arm, other, number, num_items, mean, lower, upper, p_value, detectable)


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values adjusted for their number (Holm 1979); those without one stay."""
    tested = [(one.p_value, place) for place, one in enumerate(comparisons) if one.p_value is not None]
    found, highest = list(comparisons), 0.0
    for rank, (p_value, place) in enumerate(sorted(tested)):
        highest = max(highest, min(1.0, (len(tested) - rank) * p_value))
        found[place] = replace(comparisons[place], p_value=highest, is_adjusted=True)
    return found


def sentence(one: Comparison) -> str:
    """The verdict for a person."""
    side = "lower" if one.difference < 0 else "higher"
    said = (
        f"On {one.measure}, the loss after training on {one.arm} is {abs(one.difference):.4f} nats/token {side} than "
        f"after training on {one.other}"
    )
    if one.lower is None:
        return f"{said}. One seed gives no interval: a verdict needs {MIN_SEEDS} seeds."
    told = {
        Verdict.TOO_FEW_SEEDS: f"too few seeds for a verdict, which needs {MIN_SEEDS}",
        Verdict.NOT_TOLD_APART: "the two cannot be told apart",
        Verdict.BETTER: f"{one.arm} trains better",
        Verdict.WORSE: f"{one.arm} trains worse",
    }[one.verdict]
    p_value = f", p after Holm {one.p_value:.2g}" if one.is_adjusted else ""
    return (
        f"{said} (difference {one.difference:+.4f}, 95 % interval {one.lower:+.4f} to {one.upper:+.4f}{p_value}; "
        f"{one.num_seeds} seeds, {one.num_items} pairs): {told}. With this spread, a trial finds a difference of "
        f"{one.detectable:.4f} with a probability of 80 %."
    )
