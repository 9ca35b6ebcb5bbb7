"""cuts: the bounds hold on draws whose truth is known, and a signal that tells nothing says so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from qaq_pipeline.validity.cuts import FLAT, Line, choose_cut, share_of_defect, spread_of


def normal(seed: int, size: int, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, size)


def batch_with(share: float, seed: int, size: int = 1000, distance: float = 6.0) -> np.ndarray:
    """Pairs of which a share is distributed as the planted ones are, around 0, and the rest around `distance`."""
    num_defective = round(share * size)
    return np.concatenate([normal(seed, num_defective), normal(seed + 1, size - num_defective, distance)])


# --- place and scale -------------------------------------------------------------------------------------------------


def test_the_bound_of_the_share_is_above_it_and_shrinks_with_the_batch() -> None:
    planted = normal(9, 200)
    small, large = (share_of_defect(batch_with(0.2, seed=2)[::step], planted) for step in (10, 1))
    assert small[0] < small[1] <= 1
    assert large[0] < large[1] < small[1]


def test_place_and_scale_follow_covariate() -> None:
    covariate = np.random.default_rng(0).uniform(1, 5, 4000)
    values = 0.3 - 0.1 * covariate + (0.05 + 0.04 * covariate) * normal(1, 4000)
    spread = spread_of(values, covariate)
    assert (spread.place.intercept, spread.place.slope) == pytest.approx((0.3, -0.1), abs=0.03)
    mean_deviation = np.sqrt(2 / np.pi)  # Of a standard normal number.
    assert spread.scale.at(np.array([1.0, 5.0])) / mean_deviation == pytest.approx([0.09, 0.25], abs=0.03)
    low, high = (spread.residuals(values, covariate)[covariate < 2], spread.residuals(values, covariate)[covariate > 4])
    assert np.std(low) == pytest.approx(np.std(high), rel=0.15)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 9)), min_size=1, max_size=30))
@effort(max_examples=200)
def test_the_scale_is_positive_at_every_planted_pair(pairs: list[tuple[float, float]]) -> None:
    values, covariate = (np.array(column) for column in zip(*pairs, strict=True))
    spread = spread_of(values, covariate)
    assert (spread.scale.at(covariate) > 0).all()
    assert np.isfinite(spread.residuals(values, covariate)).all()


def test_a_line_of_equal_residuals_gives_the_residual_back() -> None:
    spread = spread_of(normal(0, 50), np.random.default_rng(1).uniform(1, 5, 50))
    covariate = np.array([1.0, 2.5, 4.0])
    assert spread.residuals(spread.line(0.7).at(covariate), covariate) == pytest.approx([0.7] * 3)
    assert FLAT.line(0.7) == Line(0.7, 0.0)


# --- the share of the defect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.8, 1.0])
def test_the_share_of_the_defect_is_found_where_the_signal_tells(share: float) -> None:
    assert share_of_defect(batch_with(share, seed=2), normal(9, 200))[0] == pytest.approx(share, abs=0.07)


def test_the_share_is_never_above_one_and_high_where_nothing_can_be_told() -> None:
    assert 0.8 < share_of_defect(normal(0, 500), normal(1, 500))[0] <= 1
    assert share_of_defect(normal(0, 500, -9), normal(1, 500))[0] == 1


# --- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_planted", "max_missed"), [(19, 0.05), (60, 0.15), (200, 0.1)])
def test_the_missed_share_is_bounded_in_expectation(num_planted: int, max_missed: float) -> None:
    new = normal(0, 20_000)
    missed = []
    for seed in range(300):
        cut = choose_cut(batch_with(0.0, seed), normal(1000 + seed, num_planted), max_missed, 1.0)
        assert cut is not None
        assert cut.missed <= max_missed
        missed.append((new > cut.residual).mean())
    assert np.mean(missed) <= max_missed + 0.01


def test_planted_pairs_that_cannot_have_the_defect_are_missed_above_the_limit() -> None:
    planted = np.concatenate([normal(1, 70), np.full(30, np.inf)])
    cut = choose_cut(batch_with(0.0, 2), planted, 0.05, 1.0)
    assert cut is not None
    assert cut.residual == planted[:70].max()
    assert cut.missed == pytest.approx(31 / 101)


@pytest.mark.parametrize(("num_planted", "max_missed"), [(18, 0.05), (5, 0.15), (0, 0.5)])
def test_too_few_planted_pairs_give_no_cut(num_planted: int, max_missed: float) -> None:
    assert choose_cut(normal(0, 100), normal(1, num_planted), max_missed, 0.02) is None


def test_more_defects_in_the_batch_give_a_stricter_cut() -> None:
    planted = normal(5, 200)
    cuts = [choose_cut(batch_with(share, 7, distance=2.5), planted, 0.2, 0.03) for share in (0.0, 0.25, 0.6)]
    residuals = [cut.residual for cut in cuts if cut is not None]
    assert residuals == sorted(residuals)
    assert residuals[0] < residuals[2]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_the_false_share_is_the_one_promised(share: float) -> None:
    found = []
    for seed in range(0, 80, 2):
        batch = batch_with(share, seed, distance=4)
        cut = choose_cut(batch, normal(5000 + seed, 200), 0.15, 0.02)
        assert cut is not None
        defective = np.arange(batch.size) < round(share * batch.size)
        found.append((defective & (batch > cut.residual)).sum() / (batch > cut.residual).sum())
    assert np.mean(found) <= 0.02 + 0.01


def test_where_no_cut_keeps_the_false_share_the_smallest_one_is_taken() -> None:
    cut = choose_cut(normal(0, 500), normal(1, 200), 0.15, 0.02)
    assert cut is not None
    assert cut.false_share > 0.02
    assert not cut.tells


def test_a_signal_tells_something_where_more_is_kept_than_of_the_planted_pairs() -> None:
    told = choose_cut(batch_with(0.5, 3), normal(8, 200), 0.1, 0.02)
    assert told is not None
    assert told.tells
    assert told.dropped == pytest.approx(0.5, abs=0.05)


@given(st.integers(0, 10_000), st.floats(0.05, 0.5), st.floats(0.001, 0.5))
@effort(max_examples=100)
def test_no_looser_cut_would_keep_both_limits(seed: int, max_missed: float, max_false_share: float) -> None:
    random = np.random.default_rng(seed)
    batch, planted = random.normal(1, 1, 80), random.normal(0, 1, 40)
    cut = choose_cut(batch, planted, max_missed, max_false_share)
    if cut is None:
        assert max_missed * 41 < 1
        return
    looser = [value for value in planted if value < cut.residual]
    share = share_of_defect(batch, planted)[0]
    for residual in looser:
        missed = ((planted >= residual).sum()) / 41
        kept = (batch > residual).mean()
        assert missed > max_missed or not kept or share * missed / kept > max_false_share
