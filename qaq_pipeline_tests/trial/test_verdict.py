"""verdict: paired differences, Student's interval over seeds, Holm's adjustment, and the sentences."""

from __future__ import annotations

import math
import random

import polars as pl
import pytest
from scipy import stats

from qaq_pipeline.schema.vocabularies import Verdict
from qaq_pipeline.trial.verdict import Comparison, arm_means, compare, holm, sentence
from qaq_pipeline_tests.support.sentences import Check


def losses(shift: float, seeds: int = 5, items: int = 30, noise: float = 0.01) -> pl.DataFrame:
    """Losses of the arm `one`, on average `shift` above those of `two`, of an untrained arm, and of another measure."""
    choice, rows = random.Random(0), []
    for item in range(items):
        level = choice.uniform(0.5, 3)
        rows.append(("held_out", "untrained", 0, str(item), 7, 7 * (level + 1)))
        for seed in range(seeds):
            of_seed = noise * math.sin(seed + 1)
            rows.append(("held_out", "one", seed, str(item), 7, 7 * (level + shift + of_seed)))
            rows.append(("held_out", "two", seed, str(item), 7, 7 * level))
            rows.append(("other", "one", seed, str(item), 1, 1000.0))
    return pl.DataFrame(rows, schema=["measure", "arm", "seed", "item", "num_tokens", "nll"], orient="row")


def test_the_interval_is_students_over_the_seeds_mean_differences():
    found = compare(losses(-0.05), "held_out", "one", "two")
    means = [-0.05 + 0.01 * math.sin(seed + 1) for seed in range(5)]
    naive = stats.ttest_1samp(means, 0)
    low, high = naive.confidence_interval(0.95)
    assert found.difference == pytest.approx(sum(means) / 5)
    assert (found.lower, found.upper) == pytest.approx((low, high))
    assert found.p_value == pytest.approx(naive.pvalue)
    assert (found.num_seeds, found.num_items) == (5, 30)


def test_an_item_that_one_arm_lacks_counts_in_neither():
    frame = losses(-0.05)
    lacking = frame.filter(~((pl.col("arm") == "two") & (pl.col("item") == "3")))
    assert compare(lacking, "held_out", "one", "two").num_items == 29
    assert compare(lacking, "held_out", "one", "two").difference == pytest.approx(
        compare(frame, "held_out", "one", "two").difference
    )


def test_a_seed_that_one_arm_lacks_counts_in_neither():
    lacking = losses(-0.05).filter(~((pl.col("arm") == "two") & (pl.col("seed") > 0)))
    found = compare(lacking, "held_out", "one", "two")
    assert (found.num_seeds, found.verdict) == (1, Verdict.TOO_FEW_SEEDS)


@pytest.mark.parametrize("order", [1, -1])
def test_an_arm_without_seeds_is_compared_with_every_seed(order: int):
    arms = ["two", "untrained"][::order]
    found = compare(losses(0), "held_out", *arms)
    assert found.num_seeds == 5
    assert found.difference == pytest.approx(-order)


def test_the_detectable_difference_is_found_in_four_of_five_trials():
    choice, sigma, found = random.Random(1), 0.1, 0
    detectable = (stats.t(9).ppf(0.975) + stats.t(9).ppf(0.8)) * sigma / math.sqrt(10)
    for _ in range(2000):
        found += stats.ttest_1samp([choice.gauss(detectable, sigma) for _ in range(10)], 0).pvalue < 0.05
    assert found / 2000 == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("shift", "seeds", "verdict"),
    [
        (-0.05, 5, Verdict.BETTER),
        (0.05, 5, Verdict.WORSE),
        (0.0001, 5, Verdict.NOT_TOLD_APART),
        (-0.05, 4, Verdict.TOO_FEW_SEEDS),
        (-0.05, 1, Verdict.TOO_FEW_SEEDS),
    ],
)
def test_the_verdict_and_its_sentence(shift: float, seeds: int, verdict: Verdict, check_sentence: Check):
    found = compare(losses(shift, seeds), "held_out", "one", "two")
    assert found.verdict is verdict
    check_sentence(sentence(found))


def test_arms_without_a_common_pair_are_not_compared():
    with pytest.raises(ValueError, match="no measured pair of other in common"):
        compare(losses(0), "other", "one", "two")


def test_holms_adjustment():
    def of(p_value: float | None) -> Comparison:
        return Comparison("m", "a", "b", 5, 1, 0.0, None, None, p_value, None)

    adjusted = [one.p_value for one in holm([of(0.01), of(None), of(0.04), of(0.03), of(0.005)])]
    assert adjusted == pytest.approx([0.03, None, 0.06, 0.06, 0.02])


def test_the_mean_of_an_arm_is_over_items_of_their_loss_per_token():
    rows = [("m", "a", 0, "1", 1, 1.0), ("m", "a", 0, "2", 10, 30.0)]
    frame = pl.DataFrame(rows, schema=["measure", "arm", "seed", "item", "num_tokens", "nll"], orient="row")
    assert arm_means(frame)["loss"].to_list() == [2.0]
