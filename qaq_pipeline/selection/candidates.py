"""The candidates of every selection: scores and ranks of the distinct pairs under every model, in long form."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from qaq_pipeline.schema.long_form import by_pair, to_long
from qaq_pipeline.schema.vocabularies import NullReason
from qaq_pipeline.selection.verdicts import INVALID_BY


def candidates(disagreement: pl.DataFrame, scores: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """One row for each distinct pair and model, sorted by model and pair_id.

    The columns are those of RmiScores, the model's stratum, num_strata and rank, and what is known of the pair itself:
    pool_id, gap, rank_sum, answer_tokens (in tokens of the strong model, which budgets are counted in) and
    is_scored_by_all.

    Args:
        disagreement: DisagreementScores.
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
        pl.concat([ranks[role], frame.drop("pair_id"), of_pair], how="horizontal") for role, frame in ordered.items()
    )


def with_validity(candidates: pl.DataFrame, validity: pl.DataFrame | None) -> pl.DataFrame:
    """The candidates with the signal that declares each pair invalid; unchanged without Validity.

    Raises:
        ValueError: the validity of a pair is missing.
    """
    if validity is None:
        return candidates
    judged = validity.select("pair_id", pl.col("invalid_by").alias(INVALID_BY), is_judged=pl.lit(value=True))
    joined = candidates.join(judged, on="pair_id", how="left", validate="m:1", maintain_order="left")
    if joined["is_judged"].null_count():
        raise ValueError("scores and validity are not of the same pairs; make validity again")
    return joined.drop("is_judged")


def _ranks(pairs: pl.DataFrame, roles: list[str]) -> dict[str, pl.DataFrame]:
    """The ranks of every model, each of all pairs in their order."""
    long = to_long(pairs, "ranks", "pair_id", "pool_id", "gap", "rank_sum")
    by_model = {role: long.slice(place * pairs.height, pairs.height) for place, role in enumerate(roles)}
    is_complete = long.height == len(roles) * pairs.height
    if not is_complete or not all((ranks["model"] == role).all() for role, ranks in by_model.items()):
        raise ValueError(f"not every pair is ranked under the models {roles}; make disagreement_scores again")
    return by_model


def _is_scored() -> pl.Expr:
    """Whether the model has an RMI of the pair or, where RMI is not wanted, an IFD."""
    is_unwanted = pl.col("null_reason_rmi").eq_missing(NullReason.NOT_WANTED.value)
    return pl.col("rmi").is_not_null() | (is_unwanted & pl.col("ifd_ppl").is_not_null())
