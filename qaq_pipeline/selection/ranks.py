"""Strata of PPL(Q), the rank of RMI inside them, and the gap between the strong and the weak model's ranks.

Belongs here: everything that depends on a pool of pairs. Does not belong here: the scores themselves (`scores`), and
what is selected by them (`selection`).

Frames are sorted by pair_id before anything depends on order, so no result depends on the order of the input.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from qaq_pipeline.config.settings import RankingSettings


def count_strata(num_rows: int, ranking: RankingSettings) -> int:
    """Number of strata of a pool: max(1, min(num_strata, num_rows // min_rows_per_stratum)); 0 of an empty pool."""
    if num_rows == 0:
        return 0
    return max(1, min(ranking.num_strata, num_rows // ranking.min_rows_per_stratum))


def stratum(log_ppl_q: pl.Expr, num_rows: int, num_strata: int) -> pl.Expr:
    """floor(i * num_strata / num_rows) + 1 for the 0-based position i in (log_ppl_q, row); null stays null.

    The frame is sorted by pair_id, so equal PPLs are told apart by pair_id and no bin edge can fall on two bins.
    """
    position = log_ppl_q.rank("ordinal").cast(pl.Int64) - 1
    return position * num_strata // num_rows + 1


def rank_in_stratum(rmi: pl.Expr, stratum_column: str) -> pl.Expr:
    """(rows of the stratum below + (equal rows + 1) / 2) / rows of the stratum: pandas `rank(pct=True)`; null stays.

    The count is spread over the rows before the division: Polars divides by a scalar as a product with its
    reciprocal, and 49 * (1 / 49) < 1.
    """
    return rmi.rank("average").over(stratum_column) / rmi.count().over(stratum_column)


def pools(scores: Mapping[str, pl.DataFrame], ranking: RankingSettings) -> dict[str, pl.DataFrame]:
    """What is ranked of each role's RmiScores, roles in order: pair_id (sorted), log_ppl_q, rmi, null_reason.

    log_ppl_q is that which the strata are made of. Where the pair is not ranked, it and rmi are null.

    Raises:
        ValueError: `strong` or `weak` is missing, or the roles' frames do not hold the same pairs.
    """
    ordered = {role: scores[role].sort("pair_id") for role in sorted(scores)}
    check_same_pairs(ordered)
    binned_by = {role: ordered["strong"] if ranking.strata_from == "strong" else ordered[role] for role in ordered}
    return {role: _pool(frame, binned_by[role]) for role, frame in ordered.items()}


def _pool(frame: pl.DataFrame, binned_by: pl.DataFrame) -> pl.DataFrame:
    in_pool = frame["rmi"].is_not_null() & binned_by["rmi"].is_not_null()
    pooled = frame.select("pair_id", "rmi", log_ppl_q=binned_by["log_ppl_q"], null_reason="null_reason_rmi")
    return pooled.with_columns(pl.when(in_pool).then(name).alias(name) for name in ("log_ppl_q", "rmi"))


def rank_pool(pool: pl.DataFrame, ranking: RankingSettings) -> pl.DataFrame:
    """A pool of `pools` with stratum, num_strata and rank, taken in the pool itself."""
    num_rows = pool["rmi"].count()
    num_strata = count_strata(num_rows, ranking)
    return pool.with_columns(
        stratum=stratum(pl.col("log_ppl_q"), num_rows, num_strata), num_strata=pl.lit(num_strata, pl.Int64)
    ).with_columns(rank=rank_in_stratum(pl.col("rmi"), "stratum"))


def few_strata_warnings(pools: Mapping[str, pl.DataFrame], ranking: RankingSettings) -> list[str]:
    """A sentence for every role whose pool gets fewer strata than the settings ask for."""
    return [warning for role, pool in pools.items() for warning in _warn(role, pool, ranking)]


def _warn(role: str, pool: pl.DataFrame, ranking: RankingSettings) -> list[str]:
    num_rows, num_pairs = pool["rmi"].count(), pool.height
    num_strata = count_strata(num_rows, ranking)
    if num_pairs == 0 or num_strata == ranking.num_strata:
        return []
    if num_rows == 0:
        return [f"model {role!r}: none of {num_pairs} pairs can be ranked"]
    strata = "1 stratum" if num_strata == 1 else f"{num_strata} strata"
    return [
        f"model {role!r}: {num_rows} of {num_pairs} pairs can be ranked, so {strata} instead of "
        f"{ranking.num_strata}: a stratum holds at least {ranking.min_rows_per_stratum} pairs"
    ]


def check_same_pairs(scores: Mapping[str, pl.DataFrame]) -> None:
    """Raise ValueError where the models did not score the same pairs."""
    missing = [role for role in ("strong", "weak") if role not in scores]
    if missing:
        raise ValueError(f"scores of the roles {missing} are missing; given: {list(scores)}")
    strong = scores["strong"]["pair_id"]
    if not all(frame["pair_id"].equals(strong) for frame in scores.values()):
        counts = ", ".join(f"{role}: {frame.height} pairs" for role, frame in scores.items())
        raise ValueError(f"the models' scores are not of the same pairs ({counts}); score the batch again under each")
