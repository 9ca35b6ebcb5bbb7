"""Curation of a batch by the product's own functions: what is declared invalid, and what each selection takes.

Belongs here: the calls, from texts to verdicts. Does not belong here: the bad rows (`bad_rows`), and what is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from bench.validity.bad_rows import CLEAN, Batch
from qaq_pipeline.calibration import planting
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import records
from qaq_pipeline.schema.tables import RawData, dtypes
from qaq_pipeline.schema.vocabularies import Signal
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.validity import judgement
from qaq_pipeline.validity.judgement import MODELS, Sample, judged_pairs, judged_planted

Score = Callable[[str, pl.DataFrame], pl.DataFrame]
"""RmiScores of rows under a model."""


@dataclass(frozen=True)
class Curated:
    """A batch after curation."""

    rows: pl.DataFrame
    """pair_id, query, answer, kind, invalid_by, and `takes:<selection>` of each distinct pair."""
    cuts: pl.DataFrame
    """ValidityCuts."""
    validity: pl.DataFrame


def texts(batch: Batch, settings: Settings) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The distinct pairs of a batch, with `kind`, and its PlantedRows."""
    rows = [(records.pair_id(None, row.query, row.answer), row.query, row.answer, row.kind) for row in batch.rows]
    frame = pl.DataFrame(rows, schema=["pair_id", "query", "answer", "kind"], orient="row")
    pairs = frame.unique("pair_id", keep="first", maintain_order=True).sort("pair_id")
    none = {name: pl.lit(None, dtypes(RawData)[name]) for name in ("system", "history", "language")}
    return pairs, planting.plant([pairs.with_columns(**none)], settings.calibration)


def curate(batch: Batch, settings: Settings, score: Score, *, is_valid_first: bool = False) -> Curated:
    """Score, rank, judge and select, as the pipeline does.

    Args:
        batch: the rows.
        settings: everything that can be configured.
        score: scores rows under a model.
        is_valid_first: rank the valid pairs alone, not all.
    """
    pairs, planted = texts(batch, settings)
    scores = {role: score(role, pairs) for role in MODELS}
    sample = Sample(
        judged_pairs(scores, pairs),
        judged_planted({role: score(role, planted) for role in MODELS}, planted),
        (batch.name,),
    )
    cuts = judgement.choose_cuts(sample, settings.validity)
    validity = judgement.judge(sample.pairs, cuts, settings.validity)
    ranked = _ranked(scores, validity, settings, is_valid_first=is_valid_first)
    verdicts = select_all(with_validity(candidates(ranked, scores), validity), settings.selections)
    taken = verdicts.pivot("selection", index="pair_id", values="is_selected")
    takes = taken.rename({name: f"takes:{name}" for name in taken.columns if name != "pair_id"})
    rows = pairs.join(validity.select("pair_id", "invalid_by"), on="pair_id").join(takes, on="pair_id")
    return Curated(rows, cuts, validity)


def _ranked(
    scores: Mapping[str, pl.DataFrame], validity: pl.DataFrame, settings: Settings, *, is_valid_first: bool
) -> pl.DataFrame:
    if not is_valid_first:
        return disagreement_scores(scores, settings.ranking, "batch:bench")[0]
    invalid = validity.filter(pl.col("invalid_by").is_not_null())["pair_id"].implode()
    unranked = pl.when(~pl.col("pair_id").is_in(invalid)).then("rmi")
    reason = pl.when(pl.col("pair_id").is_in(invalid)).then(pl.lit("non_finite")).otherwise("null_reason_rmi")
    among_valid = {role: frame.with_columns(rmi=unranked, null_reason_rmi=reason) for role, frame in scores.items()}
    return disagreement_scores(among_valid, settings.ranking, "batch:bench")[0]


def counts(curated: Sequence[Curated], selections: Sequence[str]) -> pl.DataFrame:
    """For each kind: rows, how many are declared valid, and how many each selection takes, over all batches."""
    rows = pl.concat(one.rows for one in curated)
    return (
        rows.group_by("kind")
        .agg(
            pl.len().alias("rows"),
            pl.col("invalid_by").is_null().sum().alias("valid"),
            *((pl.col("invalid_by") == signal.value).sum().alias(signal.value) for signal in Signal),
            *(pl.col(f"takes:{name}").sum().alias(name) for name in selections),
        )
        .sort(pl.col("kind") != CLEAN, "kind")
    )
