"""Calibration: a validation of the scores by planted defects, which measures how well they tell good pairs from bad.

It is not the calibration of probabilities: there are no reliability curves. Some pairs of a batch are made bad on
purpose and scored like the rest; the AUROC of each score, and what each selection keeps of them, follow from that.

Belongs here: the AUROCs and shares with their intervals; frames in, frames out. Does not belong here: what is planted
(`defects`, `planting`), how it is scored, the cuts of the signals (`validity`), and the warnings (`check_metrics`).

A planted pair is ranked as a new pair would be: against the batch's own pairs, or against the reference where ranks
are taken against one. It changes no rank and no verdict of the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from qaq_pipeline.config.selections import DiffSelection, Selection, SumSelection
from qaq_pipeline.config.settings import CalibrationSettings, RankingSettings
from qaq_pipeline.schema.tables import BOTH_MODELS, CLEAN, Calibration, dtypes
from qaq_pipeline.schema.vocabularies import Defect, Statistic, UnknownReason
from qaq_pipeline.selection import rank_reference, ranks
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.strategies import select
from qaq_pipeline.validity.judgement import of_signal
from qaq_pipeline.validity.signals.catalogue import SIGNALS

MEASURES = (
    "rmi",
    "rank",
    "ifd_ppl",
    "log_ppl_q",
    "log_ppl_q_given_a",
    "log_ppl_a_given_q",
    "nll_end",
    "num_a_tokens_untruncated",
)
"""Scores of one model that are judged; the answer's length is the baseline that costs nothing."""

MEASURES_OF_BOTH = ("gap", "rank_sum")

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 2000
VALID = "valid"
"""The measure of the share that no signal declares invalid."""

_QUANTITY_OF = {"ifd_ppl": "ifd", "log_ppl_a_given_q": "ifd", "nll_end": "end"}
"""The entry of `scoring.quantities` that a measure needs; the others need rmi."""
_POOL = "calibration"

JUDGED = ("pair_id", "invalid_by", "signals")
"""The columns of Validity that are read."""


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
    """Whether each named selection takes the clean pairs, and its verdicts on the planted ones, by the cuts of batch or
    reference, without its conditions, quotas and caps: a copy with a defect has no test result and no judge's score."""
    validity: tuple[pl.DataFrame, pl.DataFrame]
    """`JUDGED` of the clean and of the planted pairs, by the same cuts; the latter with `defect`."""


def judge(
    planted: pl.DataFrame,
    planted_scores: Mapping[str, pl.DataFrame],
    scores: Mapping[str, pl.DataFrame],
    disagreement: pl.DataFrame,
    validity: tuple[pl.DataFrame, pl.DataFrame],
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
        validity: `JUDGED` of the batch's pairs, and of the planted ones by the same cuts.
        ranking: the strata and ranks of the batch.
        selections: those whose verdicts are wanted.
        frozen: RankReference, where ranks are taken against one; None: the batch itself is the pool.

    Raises:
        ValueError: the frames are not of the same pairs.
    """
    of_clean, of_planted = validity
    clean = with_validity(candidates(disagreement, scores), of_clean)
    if frozen is None:
        pool, of_pool = rank_reference.ranked_pool(ranks.pools(scores, ranking), ranking), clean
    else:
        pool, of_pool = frozen, rank_reference.reference_candidates(frozen, list(scores))
    ranked = rank_reference.disagreement_scores(planted_scores, pool, ranking, _POOL)
    bad = with_validity(candidates(ranked, planted_scores), of_planted)
    of_row = planted.select("pair_id", "defect", "original_pair_id")
    kept = {
        one.name: (
            select(clean, one, None if frozen is None else of_pool).select("is_selected"),
            select(bad, one, of_pool).join(of_row, on="pair_id", validate="1:1"),
        )
        for one in (selection.without_conditions for selection in selections)
    }
    return Judged(
        clean,
        bad.join(of_row, on="pair_id", validate="m:1", maintain_order="left"),
        kept,
        (of_clean, of_planted.join(of_row.drop("original_pair_id"), on="pair_id", validate="1:1")),
    )


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
        settings: the defects, and the seed of the intervals.
    """
    models = sorted(roles)
    rows = [
        *_auroc_rows(judged, models, settings, quantities),
        *_kept_rows(judged, selections, settings.defects),
        *_dropped_rows(judged, settings.defects),
    ]
    return pl.DataFrame(rows, schema=dtypes(Calibration))


def _row(statistic: Statistic, defect: str, model: str, measure: str, estimate: Estimate) -> dict[str, Any]:
    place = {"statistic": statistic.value, "defect": str(defect), "model": model, "measure": measure}
    return place | asdict(estimate)


def _unknown(reason: UnknownReason, num_clean: int = 0, num_planted: int = 0) -> Estimate:
    return Estimate(None, num_clean=num_clean, num_planted=num_planted, null_reason=reason)


# --- AUROC: does a score tell planted rows from their twins? ----------------------------------------------------------


def _auroc_rows(
    judged: Judged | None, models: Sequence[str], settings: CalibrationSettings, quantities: Sequence[str]
) -> Iterator[dict[str, Any]]:
    columns = [*itertools.product(models, MEASURES), *itertools.product([BOTH_MODELS], MEASURES_OF_BOTH)]
    for defect in settings.defects:
        twins = None if judged is None else _twins(judged, defect)
        for model, measure in columns:
            if _QUANTITY_OF.get(measure, "rmi") not in quantities:
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


# --- dropped shares: how many rows do the signals declare invalid? ----------------------------------------------------


def _dropped_rows(judged: Judged | None, defects: Sequence[Defect]) -> Iterator[dict[str, Any]]:
    told = None if judged is None else _told(*judged.validity)
    for measure in (*(one.signal.value for one in SIGNALS), VALID):
        for defect in (CLEAN, *defects):
            yield _row(Statistic.DROPPED_SHARE, defect, BOTH_MODELS, measure, _dropped_share(told, measure, defect))


def _told(clean: pl.DataFrame, planted: pl.DataFrame) -> pl.DataFrame:
    """`defect` of every pair, whether it is `valid`, and whether each signal is raised; null: the signal has no cut."""
    rows = pl.concat([clean.with_columns(defect=pl.lit(CLEAN)), planted])
    told = rows.select("defect", pl.col("invalid_by").is_null().alias(VALID))
    for one in SIGNALS:
        found = of_signal(rows, one.signal)
        has_cut = found["evidence"].null_count() < rows.height
        told = told.with_columns(pl.when(has_cut).then(found["is_raised"]).alias(one.signal.value))
    return told


def _dropped_share(told: pl.DataFrame | None, measure: str, defect: str) -> Estimate:
    """The share of the distinct pairs of the batch, or of the planted pairs of a defect, for which the measure holds.

    A signal counts whatever its action is, and whether or not another one comes first.
    """
    rows = pl.Series() if told is None else told.filter(pl.col("defect") == defect)[measure]
    n = len(rows)
    if n == 0:
        return _unknown(UnknownReason.NOT_PLANTED)
    counts = {"num_clean": n} if defect == CLEAN else {"num_planted": n}
    if rows.null_count():
        return _unknown(UnknownReason.NO_CUT, **counts)
    return share(int(rows.sum()), n, **counts)
