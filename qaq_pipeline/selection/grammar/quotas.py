"""Quotas: the division of a budget among groups of pairs.

Belongs here: how many rows or answer tokens each group gets. Does not belong here: which pairs of a group are taken
(`verdicts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import polars as pl

from qaq_pipeline.config.conditions import Quotas
from qaq_pipeline.schema.vocabularies import SelectionReason
from qaq_pipeline.selection.random_order import quotas as largest_remainders
from qaq_pipeline.selection.verdicts import Limit


def divide(limit: Limit, quotas: Quotas, judged: pl.DataFrame) -> dict[str, Limit]:
    """The limit of each group.

    equal: the budget spread evenly; what a group cannot fill goes to the others, odd rows to the first by name.
    proportional: floor(k * n_g / n), and one more for the largest remainders, n_g of the pool's n in the group.
    stated shares: floor(s_g * k).

    Args:
        limit: of the whole selection; without any, the pairs that no filter excludes are divided.
        quotas: the shares.
        judged: of `verdicts.judge`, with groups.
    """
    of_tokens = limit.answer_tokens is not None
    open_sizes = _sizes(judged.filter(pl.col("place").is_not_null()), of_tokens=of_tokens)
    total = limit.answer_tokens if of_tokens else limit.num_rows
    total = sum(open_sizes.values()) if total is None else total
    if quotas.shares == "equal":
        shared = spread(open_sizes, total)
    elif quotas.shares == "proportional":
        is_pooled = pl.col("barrier").ne_missing(SelectionReason.NOT_IN_POOL.value)
        shared = largest_remainders(_sizes(judged.filter(is_pooled), of_tokens=of_tokens), total)
    else:
        shared = {group: math.floor(Fraction(str(share)) * total) for group, share in quotas.shares.items()}
    return {group: Limit(answer_tokens=size) if of_tokens else Limit(size) for group, size in shared.items()}


def _sizes(judged: pl.DataFrame, *, of_tokens: bool) -> dict[str, int]:
    size = pl.col("answer_tokens").sum() if of_tokens else pl.len()
    sizes = judged.group_by("group").agg(size.cast(pl.Int64).alias("size"))
    return dict(sizes.filter(pl.col("size") > 0).iter_rows())


def spread(capacities: Mapping[str, int], total: int) -> dict[str, int]:
    """min(capacity, level), where the level is such that all add up to the total, or to all capacities."""
    given, left = {}, total
    by_capacity = sorted(capacities, key=lambda group: (capacities[group], group))
    for number, group in enumerate(by_capacity):
        level, odd = divmod(left, len(by_capacity) - number)
        if capacities[group] > level:
            rest = sorted(by_capacity[number:])
            return given | {other: level + (place < odd) for place, other in enumerate(rest)}
        given[group] = capacities[group]
        left -= capacities[group]
    return given
