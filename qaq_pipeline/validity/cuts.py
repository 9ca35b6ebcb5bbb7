"""The cut of a signal: the value beyond which a pair is more likely to have the signal's defect than may be published.

Belongs here: the statistics, on arrays of numbers. Does not belong here: which signals there are, and the verdict about
a pair.

A signal is a number of a pair that is low where the pair has the defect (turn the sign of one that is high
there). It may depend on a covariate: RMI on log PPL(Q), log PPL(Q) on 1 / query tokens. Its residual is the number
relative to planted pairs with the same covariate. The pairs of the batch are a mixture: a share pi has the defect and
is distributed like planted pairs.

    missed(cut)         P(planted > cut): the share of the defective pairs that the cut does not find
    false_share(cut)    pi * missed(cut) / P(batch > cut): the share of defective pairs among those that are kept

pi is the smallest ratio P(batch <= t) / P(planted <= t) over some t: pairs without the defect can only raise it (the
mixture proportion of Blanchard, Lee and Scott, "Semi-Supervised Novelty Detection", JMLR 11, 2010, at fixed points).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

SHARE_QUANTILES = (0.3, 0.5, 0.7, 0.9)
"""The shares of the planted pairs at which the share of the defect is estimated. Fewer pairs would be mostly noise."""

CONFIDENCE = 0.99
"""Of the test whether the signal tells anything: that more of the batch is kept than of the planted pairs."""

_NO_RANGE = 1e-6
"""Range of the covariate within which no slope is fitted."""
_NO_SCALE = 1e-9
"""Smallest scale: planted values that are all equal differ from others by their sign alone."""


@dataclass(frozen=True, slots=True)
class Line:
    """A number as a linear function of a covariate."""

    intercept: float
    slope: float = 0.0

    def at(self, covariate: Numbers) -> Numbers:
        """Its value at each covariate."""
        return self.intercept + self.slope * covariate


@dataclass(frozen=True, slots=True)
class Spread:
    """Place and scale of planted values, as functions of a covariate: value = place + scale * residual."""

    place: Line
    scale: Line

    def residuals(self, values: Numbers, covariate: Numbers) -> Numbers:
        """The values, each relative to the planted ones at its covariate."""
        return (values - self.place.at(covariate)) / self.scale.at(covariate)

    def line(self, residual: float) -> Line:
        """The values with that residual."""
        return Line(
            self.place.intercept + residual * self.scale.intercept, self.place.slope + residual * self.scale.slope
        )


FLAT = Spread(Line(0.0), Line(1.0))
"""For a signal without a covariate: the residual is the value."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut and what it costs, as estimated on the batch."""

    residual: float
    """Pairs up to it, included, have the defect by this signal."""
    missed: float
    """Upper bound of P(planted > cut), in expectation: (n - k + 1) / (n + 1) for the k-th smallest of n planted."""
    share: float
    """Estimated share of the batch that has the defect."""
    share_upper: float
    """Its upper 95 % bound."""
    dropped: float
    """Share of the batch that the cut drops."""
    false_share: float
    """Estimated share of the defect among the pairs that are kept."""
    tells: bool
    """Whether clearly more of the batch would be kept than of the planted pairs, at the largest share missed."""


def spread_of(values: Numbers, covariate: Numbers) -> Spread:
    """Place and scale of planted values: least squares of the values, then of their absolute deviations.

    The scale does not fall with the covariate, and is at least a quarter of its mean. So it is positive for every pair,
    also beyond the planted ones: below zero, a residual would have the wrong sign.

    Args:
        values: of the planted rows.
        covariate: of each, at least 0.
    """
    if np.ptp(covariate) < _NO_RANGE:
        mean = float(values.mean())
        return Spread(Line(mean), Line(max(float(np.abs(values - mean).mean()), _NO_SCALE)))
    slope, intercept = np.polyfit(covariate, values, 1)
    place = Line(float(intercept), float(slope))
    deviations = np.abs(values - place.at(covariate))
    return Spread(place, _positive(deviations, covariate))


def _positive(deviations: Numbers, covariate: Numbers) -> Line:
    mean = max(float(deviations.mean()), _NO_SCALE)
    slope, _ = np.polyfit(covariate, deviations, 1)
    center = float(covariate.mean())
    slope = float(np.clip(slope, 0.0, 0.75 * mean / center))
    return Line(mean - slope * center, slope)


def share_of_defect(batch: Numbers, planted: Numbers) -> tuple[float, float]:
    """The estimated share of the batch that is distributed like the planted pairs, and its upper bound, from 0 to 1.

    The bound is that of the smallest ratio: the upper end of the 95 % Wilson interval of its P(batch <= t). At least
    one planted value is finite.
    """
    from scipy import stats

    finite = planted[np.isfinite(planted)]
    at = np.minimum(np.quantile(planted, SHARE_QUANTILES, method="inverted_cdf"), finite.max())
    ratios = [(batch <= t).mean() / (planted <= t).mean() for t in at]
    t = at[int(np.argmin(ratios))]
    below = stats.binomtest(int((batch <= t).sum()), batch.size).proportion_ci(method="wilson")
    return min(1.0, float(min(ratios))), min(1.0, float(below.high / (planted <= t).mean()))


def choose_cut(batch: Numbers, planted: Numbers, max_missed: float, max_false_share: float) -> Cut | None:
    """The cut that drops least of the batch, within both limits; None: there are too few planted pairs for one.

    Where no cut keeps the false share within its limit, the one with the smallest false share is chosen. `missed` is
    above its limit where too many planted pairs cannot have the defect.

    Args:
        batch: residuals of the pairs of the batch, at least one; infinite where a pair cannot have the defect.
        planted: residuals of the planted pairs; infinite ones are missed at every cut.
        max_missed: largest share of defective pairs that may be missed.
        max_false_share: largest share of defective pairs among those kept.
    """
    ordered, values = np.sort(planted), np.sort(batch)
    n = ordered.size
    allowed = math.floor(max_missed * (n + 1) + 1e-9)  # Ranks from the top that stay within `max_missed`.
    first = int(np.isinf(ordered).sum()) + 1
    if allowed < 1 or first > n:
        return None
    share, share_upper = share_of_defect(batch, planted)
    allowed = max(allowed, first)
    tells = _tells(values, ordered, allowed)
    cuts = [
        _cut(ordered[n - rank], _missed(ordered, ordered[n - rank]), (share, share_upper), values, tells=tells)
        for rank in range(allowed, first - 1, -1)
    ]
    within = (cut for cut in cuts if cut.false_share <= max_false_share)
    return next(within, min(cuts, key=lambda cut: cut.false_share))


def _missed(planted: Numbers, residual: float) -> float:
    """Upper bound of the share of the defect above the cut. Equal planted values lie all at or below it."""
    return (int((planted > residual).sum()) + 1) / (planted.size + 1)


def _cut(residual: float, missed: float, shares: tuple[float, float], batch: Numbers, *, tells: bool) -> Cut:
    share, share_upper = shares
    dropped = int(np.searchsorted(batch, residual, side="right"))
    kept = batch.size - dropped
    false_share = min(1.0, share * missed * batch.size / kept) if kept else 1.0
    return Cut(float(residual), missed, share, share_upper, dropped / batch.size, false_share, tells)


def _tells(batch: Numbers, planted: Numbers, rank: int) -> bool:
    """Whether more of the batch than of the planted pairs lies above the cut of this rank, by Fisher's exact test.

    The rank is fixed before the batch is looked at: the best of many cuts would always seem to tell something.
    """
    from scipy import stats

    residual = planted[planted.size - rank]
    kept, missed = (int((values > residual).sum()) for values in (batch, planted))
    table = [[kept, batch.size - kept], [missed + 1, planted.size - missed - 1]]
    return bool(stats.fisher_exact(table, alternative="greater").pvalue < 1 - CONFIDENCE)
