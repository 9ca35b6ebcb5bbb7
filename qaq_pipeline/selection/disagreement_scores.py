"""disagreement_scores: the gap and the sum of the strong and the weak model's ranks.

Does not belong here: strata and ranks of one model (`ranks`).
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from qaq_pipeline.config.settings import RankingSettings
from qaq_pipeline.schema.long_form import to_lists
from qaq_pipeline.schema.tables import MODEL_RANK, DisagreementScores, dtypes
from qaq_pipeline.selection.ranks import few_strata_warnings, pools, rank_pools

_GAP_DECIMALS = 14


def disagreement_scores(
    scores: Mapping[str, pl.DataFrame], ranking: RankingSettings, pool_id: str
) -> tuple[pl.DataFrame, list[str]]:
    """DisagreementScores of a batch in its own pool, sorted by pair_id, and warnings as sentences.

    Args:
        scores: RmiScores by model.
        ranking: how strata are made.
        pool_id: name of the pool.

    Raises:
        ValueError: `strong` or `weak` is missing, or the models' frames do not hold the same pairs.
    """
    in_pool = pools(scores, ranking)
    return disagreement(rank_pools(in_pool, ranking), pool_id), few_strata_warnings(in_pool, ranking)


def disagreement(ranked: pl.DataFrame, pool_id: str) -> pl.DataFrame:
    """DisagreementScores of ranks in long form, pairs in their order.

    gap      = rank_strong - rank_weak
    rank_sum = rank_strong + rank_weak

    Both are rounded to 14 decimals: ranks are j / m, and without it 0.4 - 0.3 and 0.3 - 0.2 would be two gaps.

    Args:
        ranked: pair_id, model, stratum, num_strata, rank and null_reason; the same pairs for every model.
        pool_id: name of the pool.
    """
    of_model = {role: ranked.lazy().filter(pl.col("model") == role) for role in ("strong", "weak")}
    strong, weak = (rows.select("rank", "null_reason").collect() for rows in of_model.values())
    frame = to_lists(ranked, MODEL_RANK, "ranks").with_columns(
        pool_id=pl.lit(pool_id),
        gap=(strong["rank"] - weak["rank"]).round(_GAP_DECIMALS),
        rank_sum=(strong["rank"] + weak["rank"]).round(_GAP_DECIMALS),
        null_reason=pl.coalesce(strong["null_reason"], weak["null_reason"]),
    )
    return frame.select(pl.col(name).cast(dtype) for name, dtype in dtypes(DisagreementScores).items())
