"""Drift: the distance of a batch's scores from those of a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from qaq_pipeline.selection.rank_reference import by_model

DRIFT_BINS = 10
QUANTITIES = ("log_ppl_q", "rmi")
"""The columns of scores whose drift is measured."""


@dataclass(frozen=True, slots=True)
class Drift:
    """The statistics of a batch against a reference, and the number of pairs behind them."""

    statistics: Mapping[str, float]
    """`psi_<quantity>_<model>`, the population stability index over the reference's deciles, and
    `ks_<quantity>_<model>`, the two-sample Kolmogorov-Smirnov statistic in [0, 1], of log_ppl_q and rmi; 0 if the
    distributions are equal."""
    evidence: float
    """The smallest n m / (n + m) of any model, for n pairs of the batch and m of the reference. Chance alone gives a
    PSI of about 9 / evidence."""


def drift(scores: Mapping[str, pl.DataFrame], reference: pl.DataFrame) -> Drift:
    """Compute the drift of log_ppl_q and rmi. Pairs without an RMI, and models without such pairs, are left out.

    Args:
        scores: `QUANTITIES` of RmiScores of the batch, by model.
        reference: `QUANTITIES` and the model of RankReference.

    Raises:
        ValueError: the reference lacks a model.
    """
    statistics: dict[str, float] = {}
    evidence = []
    for role, frozen in by_model(reference, list(scores)).items():
        own, others = frozen.drop_nulls("rmi"), scores[role].drop_nulls("rmi")
        evidence.append(own.height * others.height / (own.height + others.height))
        if others.is_empty():
            continue
        for quantity in QUANTITIES:
            r, b = (np.sort(frame[quantity].to_numpy()) for frame in (own, others))
            statistics[f"psi_{quantity}_{role}"] = _psi(r, b)
            statistics[f"ks_{quantity}_{role}"] = _ks(r, b)
    return Drift(statistics, min(evidence))


def _psi(of_reference: np.ndarray, of_batch: np.ndarray) -> float:
    """Compute the sum of (b - r) ln(b / r) over the reference's deciles; b and r are the shares of each in a bin.

    A share is (rows + 1/2) / (all rows + bins / 2), so an empty bin still has a logarithm. Equal edges count once. Both
    arguments are sorted.
    """
    places = np.arange(1, DRIFT_BINS) * of_reference.size // DRIFT_BINS
    edges = np.unique(of_reference[places])
    shares = []
    for values in (of_reference, of_batch):
        rows = np.bincount(np.searchsorted(edges, values, side="right"), minlength=edges.size + 1)
        shares.append((rows + 0.5) / (values.size + 0.5 * rows.size))
    r, b = shares
    return float(np.sum((b - r) * np.log(b / r)))


def _ks(of_reference: np.ndarray, of_batch: np.ndarray) -> float:
    """Compute the maximum over x of |share of the reference up to x - share of the batch up to x|."""
    from scipy import stats

    with np.errstate(divide="ignore"):  # The unused p-value of one pair against one divides by 0.
        return float(stats.ks_2samp(of_reference, of_batch, method="asymp").statistic)
