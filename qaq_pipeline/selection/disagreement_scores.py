"""disagreement_scores: the gap and the sum of the two models' ranks.

Does not belong here: strata and ranks of one model (`ranks`).
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from qaq_pipeline.config.settings import RankingSettings
from qaq_pipeline.schema.tables import DisagreementScores, dtypes
from qaq_pipeline.selection.ranks import few_strata_warnings, pools, rank_pool

_GAP_DECIMALS = 14


def disagreement_scores(
    scores: Mapping[str, pl.DataFrame], ranking: RankingSettings, pool_id: str
) -> tuple[pl.DataFrame, list[str]]:
    """DisagreementScores of each role's RmiScores, sorted by pair_id, and warnings as sentences.

    Raises:
        ValueError: `strong` or `weak` is missing, or the roles' frames do not hold the same pairs.
    """
    in_pool = pools(scores, ranking)
    ranked = {role: rank_pool(pool, ranking) for role, pool in in_pool.items()}
    return disagreement(ranked, pool_id), few_strata_warnings(in_pool, ranking)


def disagreement(ranked: Mapping[str, pl.DataFrame], pool_id: str) -> pl.DataFrame:
    """DisagreementScores of each role's ranks: pair_id, stratum, num_strata, rank and null_reason, rows as in all.

    gap      = rank_strong - rank_weak
    rank_sum = rank_strong + rank_weak

    Both to 14 decimals: ranks are j / m, and without it 0.4 - 0.3 and 0.3 - 0.2 would be two gaps.
    """
    columns = ("stratum", "num_strata", "rank", "null_reason")
    long = [ranked[role].select(pl.col(columns).name.suffix(f":{role}")) for role in sorted(ranked)]
    wide = pl.concat([ranked["strong"].select("pair_id"), *long], how="horizontal")
    strong, weak = pl.col("rank:strong"), pl.col("rank:weak")
    numbers = {
        "pair_id": pl.col("pair_id"),
        "pool_id": pl.lit(pool_id),
        "stratum_strong": pl.col("stratum:strong"),
        "rank_strong": strong,
        "stratum_weak": pl.col("stratum:weak"),
        "rank_weak": weak,
        "num_strata": pl.col("num_strata:strong"),
        "gap": (strong - weak).round(_GAP_DECIMALS),
        "rank_sum": (strong + weak).round(_GAP_DECIMALS),
        "null_reason": pl.coalesce("null_reason:strong", "null_reason:weak"),
        # Sixty times faster than concat_list of structs.
        "ranks": pl.concat_arr([_rank_struct(role) for role in sorted(ranked)]).arr.to_list(),
    }
    types = dtypes(DisagreementScores)
    return wide.select(expression.cast(types[name]).alias(name) for name, expression in numbers.items())


def _rank_struct(role: str) -> pl.Expr:
    numbers = [pl.col(f"{column}:{role}").alias(column) for column in ("stratum", "num_strata", "rank")]
    return pl.struct(pl.lit(role).alias("model"), *numbers)
