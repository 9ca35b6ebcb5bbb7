"""The candidates of every selection: scores and ranks of the distinct pairs under every model, in long form."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from qaq_pipeline.schema.long_form import by_pair, to_long
from qaq_pipeline.schema.vocabularies import NullReason, Signal
from qaq_pipeline.selection.verdicts import INVALID_BY

_REASONS = pl.Enum(NullReason)
_SIGNALS = pl.Enum(Signal)

RANKS_READ = ("pair_id", "pool_id", "gap", "rank_sum", "ranks")
"""The columns of DisagreementScores that candidates have."""


def compact(scores: pl.DataFrame) -> pl.DataFrame:
    """RmiScores, or some columns of it, with a byte for each null reason instead of a text."""
    return scores.with_columns(pl.col("^null_reason_.*$").cast(_REASONS))


def candidates(disagreement: pl.DataFrame, scores: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """One row for each distinct pair and model, sorted by model and pair_id.

    The columns are those of RmiScores, the model's stratum, num_strata and rank, and what is known of the pair itself:
    pool_id, gap, rank_sum, answer_tokens (in tokens of the strong model, which budgets are counted in) and
    is_scored_by_all. Words that many pairs share take a few bytes a row.

    Args:
        disagreement: DisagreementScores, or `RANKS_READ` of it.
        scores: RmiScores by model.

    Raises:
        ValueError: the ranks or scores of a model are not those of the pairs of `disagreement`.
    """
    pairs = by_pair(disagreement)
    ordered = {role: by_pair(scores[role]) for role in sorted(scores)}
    ranks = _ranks(pairs, list(ordered))
    for role, frame in ordered.items():
        if not frame["pair_id"].equals(pairs["pair_id"]):
            counts = f"{pairs.height} pairs are ranked, {role!r} scored {frame.height}"
            raise ValueError(f"ranks and scores are not of the same pairs ({counts}); make disagreement_scores again")
    is_scored = pl.DataFrame([frame.select(_is_scored().alias(role)).to_series() for role, frame in ordered.items()])
    of_pair = is_scored.select(is_scored_by_all=pl.all_horizontal(pl.all())).insert_column(
        0, ordered["strong"]["num_a_tokens_untruncated"].alias("answer_tokens")
    )
    return pl.concat(
        pl.concat([ranks[role], compact(frame).drop("pair_id"), of_pair], how="horizontal")
        for role, frame in ordered.items()
    )


def with_validity(candidates: pl.DataFrame, validity: pl.DataFrame | None) -> pl.DataFrame:
    """The candidates with the signal that declares each pair invalid; unchanged without Validity.

    Raises:
        ValueError: the validity of a pair is missing.
    """
    if validity is None:
        return candidates
    judged = validity.select(
        "pair_id", pl.col("invalid_by").cast(_SIGNALS).alias(INVALID_BY), is_judged=pl.lit(value=True)
    )
    pair_ids = candidates.select("pair_id")
    joined = pair_ids.join(judged, on="pair_id", how="left", validate="m:1", maintain_order="left")
    if joined["is_judged"].null_count():
        raise ValueError("scores and validity are not of the same pairs; make validity again")
    return candidates.with_columns(joined[INVALID_BY])


def _ranks(pairs: pl.DataFrame, roles: list[str]) -> dict[str, pl.DataFrame]:
    """The ranks of every model, each of all pairs in their order."""
    named = pairs.with_columns(pl.col("pool_id").cast(pl.Categorical))
    long = to_long(named, "ranks", "pair_id", "pool_id", "gap", "rank_sum")
    by_model = {role: long.slice(place * pairs.height, pairs.height) for place, role in enumerate(roles)}
    is_complete = long.height == len(roles) * pairs.height
    if not is_complete or not all((ranks["model"] == role).all() for role, ranks in by_model.items()):
        raise ValueError(f"not every pair is ranked under the models {roles}; make disagreement_scores again")
    names = pl.Enum(roles)
    return {role: ranks.with_columns(pl.lit(role, names).alias("model")) for role, ranks in by_model.items()}


def _is_scored() -> pl.Expr:
    """Whether the model has an RMI of the pair or, where RMI is not wanted, an IFD."""
    is_unwanted = pl.col("null_reason_rmi").eq_missing(NullReason.NOT_WANTED.value)
    return pl.col("rmi").is_not_null() | (is_unwanted & pl.col("ifd_ppl").is_not_null())
