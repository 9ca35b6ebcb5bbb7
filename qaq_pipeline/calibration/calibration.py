"""Calibration: a validation of the scores by planted defects, which measures how well they tell good pairs from bad.

It is not the calibration of probabilities: there are no reliability curves. Some pairs of a batch are made bad on
purpose and scored like the rest; the AUROC of each score, and what each selection keeps of them, follow from that.

Belongs here: the AUROCs and shares with their intervals, the cuts of RMI and the settings that they offer; frames in,
frames out. Does not belong here: what is planted (`defects`, `planting`), how it is scored, and the warnings
(`check_metrics`).

A planted pair is ranked as a new pair would be: against the batch's own pairs, or against the reference where ranks
are taken against one. It changes no rank and no verdict of the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import yaml

from qaq_pipeline.config.selections import DiffSelection, Selection, SumSelection
from qaq_pipeline.config.settings import CalibrationSettings, RankingSettings
from qaq_pipeline.schema.tables import BOTH_MODELS, CLEAN, Calibration, dtypes
from qaq_pipeline.schema.vocabularies import Defect, Statistic, UnknownReason
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.strategies import select

MEASURES = (
    "rmi",
    "rank",
    "ifd_ppl",
    "log_ppl_q",
    "log_ppl_q_given_a",
    "log_ppl_a_given_q",
    "num_a_tokens_untruncated",
)
"""Scores of one model that are judged; the answer's length is the baseline that costs nothing."""

MEASURES_OF_BOTH = ("gap", "rank_sum")

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 2000
ECHO_QUANTILE = 0.05
"""Share of the echoes below the high cut of RMI."""

_OF_IFD = ("ifd_ppl", "log_ppl_a_given_q")
_POOL = "calibration"
_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, its interval and the rows that it rests on; or the reason why it is unknown."""

    value: float | None
    lower: float | None = None
    upper: float | None = None
    num_clean: int = 0
    num_planted: int = 0
    num_kept: int | None = None
    null_reason: UnknownReason | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """The pairs of a batch and its planted pairs, both as `candidates`, and which of them each selection takes."""

    clean: pl.DataFrame
    planted: pl.DataFrame
    """With `defect` and `original_pair_id`."""
    kept: Mapping[str, tuple[pl.DataFrame, pl.DataFrame]]
    """The verdicts of each named selection on the clean and on the planted pairs, by the cuts of batch or reference."""


def judge(
    planted: pl.DataFrame,
    planted_scores: Mapping[str, pl.DataFrame],
    scores: Mapping[str, pl.DataFrame],
    disagreement: pl.DataFrame,
    ranking: RankingSettings,
    selections: Sequence[Selection],
    frozen: pl.DataFrame | None = None,
) -> Judged:
    """Ranks and verdicts of the planted pairs beside those of the batch.

    Args:
        planted: PlantedRows, at least one.
        planted_scores: PlantedScores by model.
        scores: RmiScores of the batch by model.
        disagreement: DisagreementScores of the batch.
        ranking: the strata and ranks of the batch.
        selections: those whose verdicts are wanted.
        frozen: RankReference, where ranks are taken against one; None: the batch itself is the pool.

    Raises:
        ValueError: the frames are not of the same pairs.
    """
    pool = rank_reference.freeze([scores], ranking)[0] if frozen is None else frozen
    of_pool = rank_reference.reference_candidates(pool, list(scores))
    clean = candidates(disagreement, scores)
    ranked = rank_reference.disagreement_scores(planted_scores, pool, ranking, _POOL)
    bad = candidates(ranked, planted_scores)
    of_row = planted.select("pair_id", "defect", "original_pair_id")
    kept = {
        one.name: (
            select(clean, one, None if frozen is None else of_pool),
            select(bad, one, of_pool).join(of_row, on="pair_id", validate="1:1"),
        )
        for one in selections
    }
    return Judged(clean, bad.join(of_row, on="pair_id", validate="m:1", maintain_order="left"), kept)


def calibrate(
    judged: Judged | None,
    roles: Iterable[str],
    quantities: Sequence[str],
    selections: Sequence[Selection],
    settings: CalibrationSettings,
) -> pl.DataFrame:
    """The Calibration of a batch.

    Args:
        judged: of `judge`; None: nothing was planted, and every number is null.
        roles: of the models.
        quantities: the names of the scores that are computed, of `scoring.quantities`.
        selections: those of `judged`.
        settings: the defects, the seed of the intervals, the rate of the low cut.
    """
    models = sorted(roles)
    rows = [
        *_auroc_rows(judged, models, settings, has_ifd="ifd" in quantities),
        *_kept_rows(judged, selections, settings.defects),
        *_cut_rows(judged, models, settings.false_discovery_rate),
    ]
    return pl.DataFrame(rows, schema=dtypes(Calibration))


def _row(statistic: Statistic, defect: str, model: str, measure: str, estimate: Estimate) -> dict[str, Any]:
    place = {"statistic": statistic.value, "defect": str(defect), "model": model, "measure": measure}
    return place | asdict(estimate)


def _unknown(reason: UnknownReason, num_clean: int = 0, num_planted: int = 0) -> Estimate:
    return Estimate(None, num_clean=num_clean, num_planted=num_planted, null_reason=reason)


# --- AUROC: does a score tell planted rows from their twins? ----------------------------------------------------------


def _auroc_rows(
    judged: Judged | None, models: Sequence[str], settings: CalibrationSettings, *, has_ifd: bool
) -> Iterator[dict[str, Any]]:
    columns = [*itertools.product(models, MEASURES), *itertools.product([BOTH_MODELS], MEASURES_OF_BOTH)]
    for defect in settings.defects:
        twins = None if judged is None else _twins(judged, defect)
        for model, measure in columns:
            if measure in _OF_IFD and not has_ifd:
                found = paired = _unknown(UnknownReason.NOT_WANTED)
            elif twins is None or twins.is_empty():
                found = paired = _unknown(UnknownReason.NOT_PLANTED)
            else:
                of_model = twins.filter(pl.col("model") == ("strong" if model == BOTH_MODELS else model))
                clean, planted = (
                    of_model[name].cast(pl.Float64).to_numpy() for name in (measure, f"{measure}:planted")
                )
                found = auroc(clean, planted, BOOTSTRAP_SAMPLES, settings.seed)
                paired = paired_share(clean, planted)
            yield _row(Statistic.AUROC, defect, model, measure, found)
            if measure == "rmi":
                yield _row(Statistic.PAIRED_SHARE, defect, model, measure, paired)


def _twins(judged: Judged, defect: Defect) -> pl.DataFrame:
    """The clean pairs that the defect was made of; beside each number the planted pair's, as `<column>:planted`."""
    return judged.clean.join(
        judged.planted.filter(pl.col("defect") == defect.value),
        left_on=["pair_id", "model"],
        right_on=["original_pair_id", "model"],
        suffix=":planted",
        validate="1:1",
        maintain_order="left",
    )


def auroc(clean: np.ndarray, planted: np.ndarray, samples: int, seed: int) -> Estimate:
    """P(a clean value > a planted one of another row), ties count half; NaN: not scored, left out.

    A row is never compared with its own twin: that is the paired share, and each resample would hold more of it than
    the rows do, since a row drawn twice meets its twin four times. The interval is the percentile bootstrap over rows,
    a row and its twin drawn together. Near complete separation resamples hardly differ, and at it not at all; from
    (alpha / 2)**(1 / n) on, the exact binomial bound of a share of n where every one succeeds, no interval ends nearer
    to the middle than there.

    Args:
        clean: values of the rows as delivered.
        planted: those of the rows made of them, in their order.
        samples: resamples.
        seed: of the resamples.
    """
    has_clean, has_planted = ~np.isnan(clean), ~np.isnan(planted)
    num_clean, num_planted = int(has_clean.sum()), int(has_planted.sum())
    is_pair = np.outer(has_clean, has_planted) & ~np.eye(clean.size, dtype=bool)
    if not is_pair.any():
        return _unknown(UnknownReason.NOT_SCORED, num_clean, num_planted)
    difference = clean[:, None] - planted[None, :]
    wins = np.where(is_pair, (difference > 0) + (difference == 0) / 2, 0.0)
    value = float(wins.sum() / is_pair.sum())
    n = clean.size
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples).astype(np.float64)
    num_pairs = ((weights @ is_pair) * weights).sum(axis=1)
    drawn = ((weights @ wins) * weights).sum(axis=1)[num_pairs > 0] / num_pairs[num_pairs > 0]
    lower, upper = (float(end) for end in np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    bound = ((1 - CONFIDENCE) / 2) ** (1 / min(num_clean, num_planted))
    if value >= bound:
        lower = min(lower, bound)
    elif value <= 1 - bound:
        upper = max(upper, 1 - bound)
    return Estimate(value, lower, upper, num_clean, num_planted)


def paired_share(clean: np.ndarray, planted: np.ndarray) -> Estimate:
    """The share of rows whose value is above that of their planted twin, among rows scored both times.

    The prior of Q cancels where Q is the same, so together with the AUROC the share shows which side is broken.
    """
    both = ~(np.isnan(clean) | np.isnan(planted))
    if not both.any():
        return _unknown(UnknownReason.NOT_SCORED, int((~np.isnan(clean)).sum()), int((~np.isnan(planted)).sum()))
    n = int(both.sum())
    return share(int((clean[both] > planted[both]).sum()), n, num_clean=n, num_planted=n)


def share(kept: int, of: int, *, num_clean: int = 0, num_planted: int = 0) -> Estimate:
    """`kept / of` with its Wilson interval; `of` is at least 1."""
    from scipy import stats

    interval = stats.binomtest(kept, of).proportion_ci(CONFIDENCE, "wilson")
    return Estimate(kept / of, float(interval.low), float(interval.high), num_clean, num_planted, kept)


# --- kept shares: how many planted rows do the selections keep? -------------------------------------------------------


def _kept_rows(
    judged: Judged | None, selections: Sequence[Selection], defects: Sequence[Defect]
) -> Iterator[dict[str, Any]]:
    for one in selections:
        model = BOTH_MODELS if isinstance(one, DiffSelection | SumSelection) else one.model
        for defect in (CLEAN, *defects):
            yield _row(Statistic.KEPT_SHARE, defect, model, one.name, _kept_share(judged, one.name, defect))


def _kept_share(judged: Judged | None, name: str, defect: str) -> Estimate:
    """The kept share of all distinct pairs of the batch, or of all planted pairs of a defect, scored or not."""
    if judged is None:
        return _unknown(UnknownReason.NOT_PLANTED)
    of_clean, of_planted = judged.kept[name]
    verdicts = of_clean if defect == CLEAN else of_planted.filter(pl.col("defect") == defect)
    n = verdicts.height
    if n == 0:
        return _unknown(UnknownReason.NOT_PLANTED)
    counts = {"num_clean": n} if defect == CLEAN else {"num_planted": n}
    return share(int(verdicts["is_selected"].sum()), n, **counts)


# --- cuts: where could RMI be cut? ------------------------------------------------------------------------------------


def _cut_rows(judged: Judged | None, models: Sequence[str], rate: float) -> Iterator[dict[str, Any]]:
    for role in models:
        clean, mismatches, echoes = (
            np.empty(0) if judged is None else rmi_of(judged, role, of).drop_nulls().to_numpy()
            for of in (CLEAN, Defect.OTHER_ANSWER, Defect.ECHO)
        )
        yield _row(Statistic.LOW_CUT, Defect.OTHER_ANSWER, role, "rmi", low_cut(clean, mismatches, rate))
        yield _row(Statistic.HIGH_CUT, Defect.ECHO, role, "rmi", high_cut(clean, echoes, ECHO_QUANTILE))


def rmi_of(judged: Judged, role: str, defect: str) -> pl.Series:
    """RMI under a model, of the clean pairs or of those planted with a defect."""
    rows = judged.clean if defect == CLEAN else judged.planted.filter(pl.col("defect") == str(defect))
    return rows.filter(pl.col("model") == role)["rmi"]


def low_cut(clean: np.ndarray, null: np.ndarray, rate: float) -> Estimate:
    """The RMI above which, of the batch's rows, a share of at most `rate` is expected to be mismatches.

    p_i = (1 + #{null >= x_i}) / (m + 1) of each row's RMI x_i, m the rows of the null: the RMI of queries with the
    answer to another query of their stratum. The rows that Benjamini and Hochberg's procedure at `rate` tells from the
    null lie above all others; the cut is the largest RMI of the others, so that `cut < RMI` keeps exactly the former.

    It assumes that a mismatch in the batch scores like one of the null. The p-values share the null, so they depend on
    one another positively, which the procedure allows (Bates et al. 2023, arXiv 2104.08279). It needs
    m >= 1 / rate - 1: p is never below 1 / (m + 1).
    """
    from scipy import stats

    if not clean.size or not null.size:
        return _unknown(UnknownReason.NOT_PLANTED, clean.size, null.size)
    at_least = null.size - np.searchsorted(np.sort(null), clean, side="left")
    adjusted = stats.false_discovery_control((1 + at_least) / (null.size + 1), method="bh")
    is_told = adjusted <= rate
    if is_told.all() or not is_told.any():
        reason = UnknownReason.ALL_TOLD_FROM_NULL if is_told.any() else UnknownReason.NONE_TOLD_FROM_NULL
        return _unknown(reason, clean.size, null.size)
    cut = float(clean[~is_told].max())
    return Estimate(cut, num_clean=clean.size, num_planted=null.size, num_kept=int(is_told.sum()))


def high_cut(clean: np.ndarray, echoes: np.ndarray, quantile: float) -> Estimate:
    """The RMI up to which a share of `quantile` of the echoes lies: `RMI <= cut` excludes the others.

    The quantile is interpolated linearly between the echoes. It assumes that an echo in the batch scores like one that
    repeats the whole query. The number of the batch's rows that it keeps shows its cost.
    """
    if not echoes.size:
        return _unknown(UnknownReason.NOT_PLANTED, clean.size)
    cut = float(np.quantile(echoes, quantile))
    kept = int((clean <= cut).sum())
    return Estimate(cut, num_clean=clean.size, num_planted=echoes.size, num_kept=kept)


def offered_range(calibration: pl.DataFrame) -> tuple[float | None, float | None]:
    """The cuts of the strong model's RMI as `rmi_strong` of a selection: (lo, hi], to 4 decimals; None: no end.

    They are rounded towards each other, so that the range keeps nothing that the cuts exclude.
    """
    cuts = calibration.filter(pl.col("model") == "strong", pl.col("measure") == "rmi")
    values = dict(cuts.select("statistic", "value").iter_rows())
    low, high = (values.get(cut.value) for cut in (Statistic.LOW_CUT, Statistic.HIGH_CUT))
    return (
        None if low is None else math.ceil(low * 10**_DECIMALS) / 10**_DECIMALS,
        None if high is None else math.floor(high * 10**_DECIMALS) / 10**_DECIMALS,
    )


def offered_yaml(calibration: pl.DataFrame, published: Selection) -> str | None:
    """A selection with the offered cuts, to be pasted into `selections`; None: no cut, or the cuts leave nothing.

    It is the published selection if that can have cuts, else one by the gap.
    """
    low, high = offered_range(calibration)
    if (low is None and high is None) or (low is not None and high is not None and low >= high):
        return None
    can_have = isinstance(published, DiffSelection | SumSelection)
    base = published if can_have else DiffSelection(name="diff_high_within_cuts", strategy="diff_high")
    values = base.model_dump(mode="json", exclude_none=True) | {"rmi_strong": [low, high]}
    return yaml.safe_dump([values], sort_keys=False, default_flow_style=None)
