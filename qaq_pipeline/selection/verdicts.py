"""Verdicts of one selection: from an order of the candidates, and a limit on how many are taken, to VERDICT.

Belongs here: rules and limits as values, and what follows from them. Does not belong here: the rule of each strategy
(`strategies`) and random orders (`random_order`).

A candidate is a distinct pair. Frames are sorted by pair_id first, and pair_id decides between equal scores, so no
verdict depends on the order of the input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import polars as pl

from qaq_pipeline.config.selections import Budget
from qaq_pipeline.schema.tables import VERDICT
from qaq_pipeline.schema.vocabularies import SelectionReason

QUERY = "same_query"
"""Column of the candidates that is equal for pairs with the same query; needed where a rule has `max_per_query`."""

CLUSTER = "same_cluster"
"""Column of the candidates with the near-duplicate cluster; needed where a rule has `max_per_cluster`."""

INVALID_BY = "invalid_by"
"""Column of the candidates: the signal that declares a pair invalid; needed where a selection has `valid: true`."""

_REASONS = pl.Enum(SelectionReason)

COMPACT: Mapping[str, pl.DataType] = {
    "selection": pl.Categorical(),
    "reason": _REASONS,
    "position": pl.UInt32(),
    "pool_size": pl.UInt32(),
}
"""The fields of VERDICT that take fewer bytes until they are stored: there is a verdict for each pair and selection."""


@dataclass(frozen=True)
class Rule:
    """A strategy's pool, order and filters, as expressions over the candidates of one model."""

    in_pool: pl.Expr
    score: pl.Expr
    descending: bool = True
    barriers: tuple[tuple[pl.Expr, SelectionReason], ...] = ()
    """In priority order, why a pooled pair is excluded."""
    taken: SelectionReason = SelectionReason.WITHIN_BUDGET
    max_per_query: int | None = None
    """Pairs of one query that can be taken; None: all."""
    max_per_cluster: int | None = None
    """Pairs of one near-duplicate cluster that can be taken, of those within the cap of their query; None: all."""
    group: pl.Expr | None = None
    """Group of a pair, where the budget is divided among groups."""


@dataclass(frozen=True)
class Limit:
    """The number of rows, or of answer tokens, that are taken; both None: every pair that no filter excludes."""

    num_rows: int | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True)
class Cut:
    """The last pair taken of a reference: pairs after it in the selection's order are not taken."""

    score: float
    pair_id: str


def limit_of(budget: Budget, pool_size: int) -> Limit:
    """Rows: floor(f * n + 1/2) or the count; else answer tokens. f is the decimal as written: 0.29 * 50 is 14.5."""
    if budget.fraction is not None:
        return Limit(num_rows=math.floor(Fraction(str(budget.fraction)) * pool_size + Fraction(1, 2)))
    return Limit(num_rows=budget.count, answer_tokens=budget.answer_tokens)


def last_taken(verdicts: pl.DataFrame) -> Cut | Limit:
    """The cut that verdicts on a reference's pairs make for other batches.

    Where they took every pair that they could, the budget excluded none, and excludes no worse pair of a batch either.
    """
    taken = verdicts.filter("is_selected").sort("position")
    if taken.is_empty():
        return Limit(num_rows=0)
    if taken.height == verdicts["position"].count():
        return Limit()
    return Cut(taken["score"][-1], taken["pair_id"][-1])


def judge(rows: pl.LazyFrame, rule: Rule) -> pl.DataFrame:
    """pair_id, answer_tokens, barrier, score, pool_size, position, place, and `group` where there are groups.

    The position, from 1, is among the pairs without a barrier, by score and then by place in the frame; else null.
    Pairs beyond the cap of their query, then of their cluster, get a barrier, too: `place` is the position among the
    others.

    Args:
        rows: candidates of one model, sorted by pair_id.
        rule: of the selection.
    """
    in_pool = flag(rule.in_pool)
    barriers = ((~in_pool, SelectionReason.NOT_IN_POOL), *rule.barriers)
    ascending = -pl.col("score") if rule.descending else pl.col("score")
    why_not = (pl.when(flag(holds)).then(pl.lit(why.value, _REASONS)) for holds, why in barriers)
    group = [] if rule.group is None else [rule.group.alias("group")]
    judged = (
        rows.select(
            "pair_id",
            "answer_tokens",
            pl.coalesce(why_not).alias("barrier"),
            pl.when(in_pool).then(rule.score).cast(pl.Float64).alias("score"),
            in_pool.sum().cast(pl.Int64).alias("pool_size"),
            *(column for column, most, _ in _caps(rule) if most is not None),
            *group,
        )
        .with_columns(position=pl.when(pl.col("barrier").is_null()).then(ascending).rank("ordinal").cast(pl.Int64))
        .with_columns(place="position")
    )
    for column, most, full in _caps(rule):
        judged = judged if most is None else _capped(judged, column, most, full)
    return judged.collect()


def _caps(rule: Rule) -> tuple[tuple[str, int | None, SelectionReason], ...]:
    """In this order: the column whose values are capped, the cap, and the reason of pairs beyond it."""
    return (
        (QUERY, rule.max_per_query, SelectionReason.QUERY_FULL),
        (CLUSTER, rule.max_per_cluster, SelectionReason.CLUSTER_FULL),
    )


def _capped(judged: pl.LazyFrame, column: str, most: int, reason: SelectionReason) -> pl.LazyFrame:
    is_over = pl.col("place").rank("ordinal").over(column) > most
    full = pl.when(is_over).then(pl.lit(reason.value, _REASONS))
    return judged.with_columns(barrier=pl.coalesce("barrier", full)).with_columns(
        place=pl.when(pl.col("barrier").is_null()).then("position").rank("ordinal").cast(pl.Int64)
    )


def flag(condition: pl.Expr) -> pl.Expr:
    """The condition, which does not hold where a number is missing."""
    return condition.fill_null(False)


def pool_size(judged: pl.DataFrame) -> int:
    """The number of pairs in the selection's pool."""
    return 0 if judged.is_empty() else int(judged["pool_size"][0])


def verdicts(judged: pl.DataFrame, name: str, rule: Rule, limit: Limit | Cut | Mapping[str, Limit]) -> pl.DataFrame:
    """The verdict on every judged pair, in their order: pair_id and the fields of VERDICT, some of them `COMPACT`.

    Args:
        judged: of `judge`.
        name: of the selection.
        rule: of the selection.
        limit: where taking ends; where there are groups, in each of them.
    """
    is_grouped = isinstance(limit, Mapping)
    taken = _of_groups(judged, limit) if isinstance(limit, Mapping) else _of_all(judged, rule, limit)
    full = SelectionReason.QUOTA_FULL if is_grouped else SelectionReason.BELOW_CUT
    why_taken = pl.when("is_selected").then(pl.lit(rule.taken.value, _REASONS))
    return taken.with_columns(
        selection=pl.lit(name), reason=pl.coalesce("barrier", why_taken, pl.lit(full.value, _REASONS))
    ).select("pair_id", *(pl.col(name).cast(COMPACT.get(name, column.dtype)) for name, column in VERDICT.inner.items()))


def _of_all(judged: pl.DataFrame, rule: Rule, limit: Limit | Cut) -> pl.DataFrame:
    """The judged pairs with `is_selected` and `cut`, where one order decides."""
    if isinstance(limit, Cut):
        num_taken = judged.select(flag(_up_to(limit, rule.descending)).sum()).item()
        cut = pl.lit(limit.score)
    else:
        num_taken = _num_taken(judged, limit)
        last = pl.col("score").filter(pl.col("place") == num_taken).first()
        cut = pl.when(pl.col("place").count() > num_taken).then(last)
    return judged.with_columns(is_selected=flag(pl.col("place") <= num_taken), cut=cut)


def _of_groups(judged: pl.DataFrame, limits: Mapping[str, Limit]) -> pl.DataFrame:
    """As `_of_all`, where each group has an order and a limit of its own; groups without a limit get nothing."""
    of_tokens = any(limit.answer_tokens is not None for limit in limits.values())
    sizes = {group: limit.answer_tokens if of_tokens else limit.num_rows for group, limit in limits.items()}
    place = pl.col("place")
    tokens = pl.when(place.is_not_null()).then("answer_tokens").cum_sum().over("group", order_by="place")
    used = tokens if of_tokens else place.rank("ordinal").over("group")
    quota = pl.col("group").replace_strict(sizes, default=-1, return_dtype=pl.Int64)
    last = pl.when("is_selected").then(place).max().over("group")
    is_cut = place.count().over("group") > pl.col("is_selected").sum().over("group")
    score = pl.col("score").filter(place == pl.col("last")).first().over("group")
    return (
        judged.with_columns(is_selected=flag(used <= quota))
        .with_columns(last=last)
        .with_columns(cut=pl.when(is_cut).then(score))
    )


def _up_to(cut: Cut, descending: bool) -> pl.Expr:
    """Whether a pair with a place does not come after the cut. Such pairs are the first ones in the order."""
    score = pl.col("score")
    before = score > cut.score if descending else score < cut.score
    equal = (score == cut.score) & (pl.col("pair_id") <= cut.pair_id)
    return pl.col("place").is_not_null() & (before | equal)


def _num_taken(judged: pl.DataFrame, limit: Limit) -> int:
    """The length of the longest prefix of the order that is within the limit."""
    num_placed = int(judged["place"].count())
    if limit.answer_tokens is None:
        return num_placed if limit.num_rows is None else min(limit.num_rows, num_placed)
    in_order = judged.filter(pl.col("place").is_not_null()).sort("place")["answer_tokens"]
    return int((in_order.cum_sum() <= limit.answer_tokens).sum())
