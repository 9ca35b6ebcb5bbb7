"""Strata of similar PPL(Q) and the rank of RMI inside each stratum, for every model.

Belongs here: everything that depends on a pool of pairs, one model at a time. Does not belong here: the scores
themselves (`scoring`), the gap between two models' ranks (`disagreement_scores`), and what a selection takes
(`strategies`).

Frames are sorted by pair_id before anything depends on order, so no result depends on the order of the input.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from qaq_pipeline.config.settings import RankingSettings
from qaq_pipeline.schema.long_form import by_pair

SCORES_READ = ("pair_id", "log_ppl_q", "rmi", "null_reason_rmi")
"""The columns of RmiScores that ranks are made from."""


def count_strata(num_rows: int, ranking: RankingSettings) -> int:
    """Number of strata in a pool: max(1, min(num_strata, num_rows // min_rows_per_stratum)); 0 in an empty pool."""
    if num_rows == 0:
        return 0
    return max(1, min(ranking.num_strata, num_rows // ranking.min_rows_per_stratum))


def stratum(log_ppl_q: pl.Expr, num_rows: int, num_strata: int) -> pl.Expr:
    """floor(i * num_strata / num_rows) + 1 for the 0-based position i in (log_ppl_q, row); null stays null.

    The frame is sorted by pair_id, so pair_id decides between equal PPLs, and no bin edge can fall into two bins.
    """
    position = log_ppl_q.rank("ordinal").cast(pl.Int64) - 1
    return position * num_strata // num_rows + 1


def rank_in_stratum(rmi: pl.Expr, stratum_column: str) -> pl.Expr:
    """(smaller RMIs of the stratum + (equal ones + 1) / 2) / RMIs of the stratum: pandas `rank(pct=True)`.

    Null stays null. The count is repeated for every row before the division: Polars divides by a scalar as a product
    with its reciprocal, and 49 * (1 / 49) < 1.
    """
    return rmi.rank("average").over(stratum_column) / rmi.count().over(stratum_column)


def pools(scores: Mapping[str, pl.DataFrame], ranking: RankingSettings) -> dict[str, pl.DataFrame]:
    """The pairs to be ranked under each model, models in order: pair_id (sorted), log_ppl_q, rmi, null_reason.

    log_ppl_q is the one that makes the strata. It and rmi are null where the pair cannot be ranked.

    Args:
        scores: RmiScores by model.
        ranking: which model's PPL(Q) makes the strata.

    Raises:
        ValueError: `strong` or `weak` is missing, or the models' frames do not hold the same pairs.
    """
    ordered = {role: by_pair(scores[role]) for role in sorted(scores)}
    _check_same_pairs(ordered)
    binned_by = {role: ordered["strong"] if ranking.strata_from == "strong" else ordered[role] for role in ordered}
    return {role: _pool(frame, binned_by[role]) for role, frame in ordered.items()}


def _pool(frame: pl.DataFrame, binned_by: pl.DataFrame) -> pl.DataFrame:
    in_pool = frame["rmi"].is_not_null() & binned_by["rmi"].is_not_null()
    pooled = frame.select("pair_id", "rmi", log_ppl_q=binned_by["log_ppl_q"], null_reason="null_reason_rmi")
    return pooled.with_columns(pl.when(in_pool).then(name).alias(name) for name in ("log_ppl_q", "rmi"))


def rank_pools(pools: Mapping[str, pl.DataFrame], ranking: RankingSettings) -> pl.DataFrame:
    """The pools in long form, with model, stratum, num_strata and rank: each pair among the pairs of its own pool."""
    return pl.concat([_rank(pool, ranking).with_columns(model=pl.lit(role)) for role, pool in pools.items()])


def _rank(pool: pl.DataFrame, ranking: RankingSettings) -> pl.DataFrame:
    num_rows = pool["rmi"].count()
    num_strata = count_strata(num_rows, ranking)
    return pool.with_columns(
        stratum=stratum(pl.col("log_ppl_q"), num_rows, num_strata), num_strata=pl.lit(num_strata, pl.Int64)
    ).with_columns(rank=rank_in_stratum(pl.col("rmi"), "stratum"))


def few_strata_warnings(pools: Mapping[str, pl.DataFrame], ranking: RankingSettings) -> list[str]:
    """A sentence for every model whose pool gets fewer strata than the settings ask for."""
    warnings = []
    for role, pool in pools.items():
        num_rows, num_pairs = pool["rmi"].count(), pool.height
        num_strata = count_strata(num_rows, ranking)
        strata = "1 stratum" if num_strata == 1 else f"{num_strata} strata"
        if num_pairs > 0 and num_rows == 0:
            warnings.append(f"model {role!r}: none of {num_pairs} pairs can be ranked")
        elif num_pairs > 0 and num_strata < ranking.num_strata:
            warnings.append(
                f"model {role!r}: {num_rows} of {num_pairs} pairs can be ranked, so {strata} instead of "
                f"{ranking.num_strata}: a stratum holds at least {ranking.min_rows_per_stratum} pairs"
            )
    return warnings


def _check_same_pairs(scores: Mapping[str, pl.DataFrame]) -> None:
    """Raise ValueError where the models did not score the same pairs."""
    missing = [role for role in ("strong", "weak") if role not in scores]
    if missing:
        raise ValueError(f"scores of the models {missing} are missing; given: {list(scores)}")
    strong = scores["strong"]["pair_id"]
    if not all(frame["pair_id"].equals(strong) for frame in scores.values()):
        counts = ", ".join(f"{role}: {frame.height} pairs" for role, frame in scores.items())
        raise ValueError(f"the models did not score the same pairs ({counts}); score the batch again under each model")
