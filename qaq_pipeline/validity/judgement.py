"""Cuts and validity of a batch: from scores of its pairs and of its planted rows to ValidityCuts and Validity.

Belongs here: the evidence of every signal, where its cut lies, and which pairs it declares invalid; frames in, frames
out. Does not belong here: the statistics of a cut (`cuts`), what a signal reads (`signals`), and stored tables
(`planted_sample`, `stored_cuts`).

The evidence of a signal is the mean over both models of (value - place) / scale, where place and scale are those of the
planted rows at the same covariate. The mean of both tells every kind of defect as well as the better model, or better.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from qaq_pipeline.config.settings import ValiditySettings
from qaq_pipeline.schema.long_form import by_pair, slices_of_pairs
from qaq_pipeline.schema.tables import Validity, ValidityCuts, dtypes
from qaq_pipeline.schema.vocabularies import NoCutReason, Signal
from qaq_pipeline.validity import copying
from qaq_pipeline.validity.cuts import Line, Numbers, Spread, choose_cut, spread_of
from qaq_pipeline.validity.signals.catalogue import SCORES_READ, SIGNALS
from qaq_pipeline.validity.signals.signal import Definition
from qaq_pipeline.validity.unclosed import is_unclosed

MODELS = ("strong", "weak")
"""The models whose evidence is averaged."""

ENOUGH = 20
"""Minimum number of planted rows from which a cut is chosen."""

PAIRS_AT_ONCE = 16_384
"""Pairs that are judged at once."""


def judged_pairs(scores: Mapping[str, pl.DataFrame], texts: pl.DataFrame) -> pl.DataFrame:
    """The pairs as the signals read them, as `beside_scores`.

    Args:
        scores: RmiScores by model.
        texts: pair_id, query and answer of these pairs.
    """
    return beside_scores(scores, shown_by(texts))


def shown_by(texts: pl.DataFrame) -> pl.DataFrame:
    """pair_id, query_in_answer, answer_in_query and is_unclosed of each pair: numbers that its texts alone show.

    Args:
        texts: pair_id, query and answer.
    """
    return copying.shares(texts).with_columns(is_unclosed=is_unclosed(texts["answer"]))


def beside_scores(scores: Mapping[str, pl.DataFrame], shown: pl.DataFrame) -> pl.DataFrame:
    """The scores that signals read in long form, with what the texts show, sorted by model and pair_id.

    Args:
        scores: RmiScores by model; the columns that no signal reads may be missing.
        shown: of `shown_by`, of the same pairs in any order.
    """
    sorted_by_pair = by_pair(shown)
    of_models = (
        by_pair(scores[role])
        .select("pair_id", *SCORES_READ)
        .join(sorted_by_pair, on="pair_id", validate="1:1", maintain_order="left")
        .with_columns(model=pl.lit(role))
        for role in MODELS
    )
    return pl.concat(of_models)


def judged_planted(scores: Mapping[str, pl.DataFrame], planted: pl.DataFrame) -> pl.DataFrame:
    """The planted rows as `judged_pairs`, with `defect`.

    Args:
        scores: PlantedScores by model.
        planted: PlantedRows.
    """
    defects = planted.select("pair_id", "defect")
    return judged_pairs(scores, planted).join(defects, on="pair_id", validate="m:1", maintain_order="left")


@dataclass(frozen=True, slots=True)
class Sample:
    """The pairs and planted rows from which cuts are chosen."""

    pairs: pl.DataFrame
    """Of `judged_pairs`: the pairs as delivered."""
    planted: pl.DataFrame
    """Of `judged_planted`."""
    batches: tuple[str, ...]

    @classmethod
    def joined(cls, samples: Sequence[Sample]) -> Sample:
        """All of them; a pair of several has its scores of the first."""
        pairs, planted = (
            pl.concat(frames).unique(["model", "pair_id"], keep="first", maintain_order=True).sort("model", "pair_id")
            for frames in ([one.pairs for one in samples], [one.planted for one in samples])
        )
        return cls(pairs, planted, tuple(batch for one in samples for batch in one.batches))


def choose_cuts(sample: Sample, settings: ValiditySettings) -> pl.DataFrame:
    """ValidityCuts: a row for each signal, in their order."""
    rows = [_row(one, sample, settings) for one in SIGNALS]
    return pl.DataFrame(rows, schema=dtypes(ValidityCuts))


def _row(one: Definition, sample: Sample, settings: ValiditySettings) -> dict[str, Any]:
    planted = sample.planted.filter(pl.col("defect").is_in([defect.value for defect in one.defects]))
    planted = _judgeable(planted, one)
    pairs = _judgeable(sample.pairs, one)
    row: dict[str, Any] = {  # The numbers of a cut are null where they are missing.
        "signal": one.signal.value,
        "null_reason": None,
        "num_planted": planted.height // len(MODELS),
        "num_pairs": pairs.height // len(MODELS),
        "spreads": [],
        "chosen_from": list(sample.batches),
    }
    if reason := _no_cut(one, row, settings):
        return row | {"null_reason": reason.value}
    spreads = {role: spread_of(*_values(one, planted, role)) for role in MODELS}
    of_planted, of_pairs = (_as_possible(one, rows, _evidence(one, rows, spreads)) for rows in (planted, pairs))
    cut = choose_cut(of_pairs, of_planted, one.max_missed, settings.max_false_share)
    if cut is None:
        return row | {"null_reason": NoCutReason.TOO_FEW_PLANTED.value}
    if not cut.tells:
        return row | {"null_reason": NoCutReason.CANNOT_TELL.value}
    return row | {
        "cut": cut.residual,
        "missed": cut.missed,
        "defect_share": cut.share,
        "defect_share_upper": cut.share_upper,
        "dropped": cut.dropped,
        "false_share": cut.false_share,
        "spreads": [_stored(role, spread) for role, spread in spreads.items()],
    }


def _no_cut(one: Definition, row: Mapping[str, Any], settings: ValiditySettings) -> NoCutReason | None:
    if not settings.is_on(one.signal):
        return NoCutReason.TURNED_OFF
    if row["num_planted"] == 0:
        return NoCutReason.NOT_PLANTED
    if row["num_pairs"] == 0:
        return NoCutReason.NOT_SCORED
    return NoCutReason.TOO_FEW_PLANTED if row["num_planted"] < ENOUGH else None


def _judgeable(rows: pl.DataFrame, one: Definition) -> pl.DataFrame:
    """The pairs that have the value and the covariate under both models, with the columns that the signal reads."""
    has = rows.select(one.value.is_not_null() & one.covariate.is_not_null()).to_series()
    size = rows.height // len(MODELS)
    of_models = (has.slice(place * size, size) for place in range(len(MODELS)))
    has_both = functools.reduce(operator.and_, of_models)
    return rows.select("model", *one.columns).filter(pl.concat([has_both] * len(MODELS)))


def _values(one: Definition, rows: pl.DataFrame, role: str) -> tuple[Numbers, Numbers]:
    """Value and covariate of each pair under a model; NaN: null."""
    found = (
        rows.lazy()
        .filter(pl.col("model") == role)
        .select(value=one.value.cast(pl.Float64), covariate=one.covariate.cast(pl.Float64))
        .collect()
    )
    return found["value"].to_numpy(), found["covariate"].to_numpy()


def _evidence(one: Definition, rows: pl.DataFrame, spreads: Mapping[str, Spread]) -> Numbers:
    """The evidence of each pair, in the order of the pairs; NaN: a model has no value."""
    of_models = [spread.residuals(*_values(one, rows, role)) for role, spread in spreads.items()]
    return np.mean(of_models, axis=0)


def _as_possible(one: Definition, rows: pl.DataFrame, evidence: Numbers) -> Numbers:
    """The evidence, without end where the pair cannot have the defect."""
    return np.where(_is_possible(one, rows), evidence, np.inf)


def _is_possible(one: Definition, rows: pl.DataFrame) -> NDArray[np.bool_]:
    possible = pl.lit(value=True, dtype=pl.Boolean) & one.is_possible
    return rows.lazy().filter(pl.col("model") == MODELS[0]).select(possible=possible).collect()["possible"].to_numpy()


def _stored(role: str, spread: Spread) -> dict[str, Any]:
    place, scale = spread.place, spread.scale
    return {
        "model": role,
        "place": place.intercept,
        "place_slope": place.slope,
        "scale": scale.intercept,
        "scale_slope": scale.slope,
    }


def spreads_of(stored: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """The spreads of a row of ValidityCuts, by model."""
    return {
        one["model"]: Spread(Line(one["place"], one["place_slope"]), Line(one["scale"], one["scale_slope"]))
        for one in stored
    }


def judge_in_parts(pairs: pl.DataFrame, cuts: pl.DataFrame, settings: ValiditySettings) -> Iterator[pl.DataFrame]:
    """The rows of `judge`, some thousand at a time: a row of Validity is many times as large as the numbers of a pair.

    Args:
        pairs: of `judged_pairs`.
        cuts: ValidityCuts.
        settings: what each signal does.
    """
    for part in slices_of_pairs(pairs, len(MODELS), PAIRS_AT_ONCE):
        yield judge(part, cuts, settings)


def judge(pairs: pl.DataFrame, cuts: pl.DataFrame, settings: ValiditySettings) -> pl.DataFrame:
    """Validity of every pair, sorted by pair_id.

    Args:
        pairs: of `judged_pairs`.
        cuts: ValidityCuts.
        settings: what each signal does.
    """
    first = pairs.filter(pl.col("model") == MODELS[0])
    cut_of = {row["signal"]: row for row in cuts.iter_rows(named=True)}
    found = {one.signal: _judged(one, pairs, first.height, cut_of[one.signal.value]) for one in SIGNALS}
    raised = {
        signal: pl.when(pl.col(signal.value).struct.field("is_raised")).then(pl.lit(signal.value))
        for signal in found
        if settings.declares(signal)
    }
    invalid_by = pl.coalesce(pl.lit(None, pl.String), *raised.values())
    signals = pl.DataFrame({signal.value: one for signal, one in found.items()})
    judged = pl.concat([first.select("pair_id", "query_in_answer", "answer_in_query"), signals], how="horizontal")
    return judged.select(
        "pair_id",
        invalid_by.alias("invalid_by"),
        "query_in_answer",
        "answer_in_query",
        signals=pl.concat_list(pl.col(signal.value) for signal in found),
    ).select(pl.col(name).cast(dtype) for name, dtype in dtypes(Validity).items())


def _judged(one: Definition, pairs: pl.DataFrame, num_pairs: int, cut: Mapping[str, Any]) -> pl.Series:
    """The evidence of a signal for every pair, as SIGNAL_EVIDENCE."""
    evidence, is_raised = np.full(num_pairs, np.nan), np.zeros(num_pairs, dtype=bool)
    if cut["cut"] is not None:
        evidence = _evidence(one, pairs, spreads_of(cut["spreads"]))
        is_raised = _as_possible(one, pairs, evidence) <= cut["cut"]
    frame = pl.DataFrame({"evidence": evidence, "is_raised": is_raised}, schema_overrides={"evidence": pl.Float64})
    named = frame.select(
        pl.lit(one.signal.value).alias("signal"), pl.col("evidence").fill_nan(None), pl.col("is_raised")
    )
    return named.to_struct(one.signal.value)


def of_signal(validity: pl.DataFrame, signal: Signal) -> pl.DataFrame:
    """pair_id, evidence and is_raised of one signal for every pair of Validity, in their order."""
    place = [one.signal for one in SIGNALS].index(signal)
    found = pl.col("signals").list.get(place, null_on_oob=True)
    return validity.select("pair_id", *(found.struct.field(name) for name in ("evidence", "is_raised")))


def count_invalid(validity: pl.DataFrame) -> dict[Signal | None, int]:
    """Pairs by the signal that declares them invalid; None: valid."""
    counts = dict(validity["invalid_by"].value_counts().iter_rows())
    return {None: counts.get(None, 0)} | {one.signal: counts.get(one.signal.value, 0) for one in SIGNALS}
