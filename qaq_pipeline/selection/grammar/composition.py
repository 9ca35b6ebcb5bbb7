"""Validity, conditions and caps as parts of a rule, and the numbers behind them for an explanation.

Belongs here: what `valid`, `where`, `max_per_query` and `max_per_cluster` exclude. Does not belong here: the division
of a budget (`quotas`), and the words (`explanations`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import polars as pl

from qaq_pipeline.config.conditions import NO_VALUE, Composed, Condition, Quotas
from qaq_pipeline.schema.vocabularies import INVALID_REASONS, SelectionReason
from qaq_pipeline.selection.grammar.pair_columns import number_of, value_of
from qaq_pipeline.selection.verdicts import CLUSTER, INVALID_BY, QUERY, Rule


def compose(rule: Rule, selection: Composed) -> Rule:
    """The rule of a strategy with the validity, the conditions, the caps and the groups of a selection."""
    invalid = INVALID_REASONS.items() if selection.valid else ()
    conditions = (
        *((pl.col(INVALID_BY) == signal.value, reason) for signal, reason in invalid),
        *((~meets(one), SelectionReason.WHERE_NOT_MET) for one in selection.where),
    )
    group = None if selection.quotas is None else group_of(selection.quotas)
    return dataclasses.replace(
        rule,
        barriers=(*conditions, *rule.barriers),
        group=group,
        max_per_query=selection.max_per_query,
        max_per_cluster=selection.max_per_cluster,
    )


def is_open_to(selection: Composed) -> pl.Expr:
    """Whether a pair is valid, where it must be, and meets every condition."""
    valid = pl.col(INVALID_BY).is_null() if selection.valid else pl.lit(value=True)
    return pl.all_horizontal(valid, *map(meets, selection.where))


def meets(condition: Condition) -> pl.Expr:
    """Whether a pair meets a condition; false where it has no value, but for `is_present: false`."""
    value, number = value_of(condition.column), number_of(condition.column)
    if condition.is_present is not None:
        return value.is_not_null() == condition.is_present
    if condition.at_least is not None:
        holds = number >= condition.at_least
    elif condition.at_most is not None:
        holds = number <= condition.at_most
    else:
        wanted = (condition.equals,) if condition.one_of is None else condition.one_of
        holds = pl.any_horizontal(_equals(value, number, one) for one in wanted)
    return holds.fill_null(value=False)


def _equals(value: pl.Expr, number: pl.Expr, wanted: bool | float | str | None) -> pl.Expr:
    if isinstance(wanted, bool):
        return value.str.to_lowercase() == str(wanted).lower()
    return value == wanted if isinstance(wanted, str) else number == wanted


def group_of(quotas: Quotas) -> pl.Expr:
    """The group of a pair."""
    return value_of(quotas.per).fill_null(NO_VALUE)


def with_grounds(verdict: pl.DataFrame, candidates: pl.DataFrame, selection: Composed) -> pl.DataFrame:
    """The verdict of a selection with the numbers of its grammar that an explanation names.

    `condition` is the place in `where` of the first condition that a pair does not meet, and `value` what it has there.
    `query_place` is its place among the pairs with its query, `cluster_place` that among the pairs of its cluster that
    the cap of queries leaves, and `group_place` that in its group, of which the selection takes `group_taken`.

    Args:
        verdict: pair_id and the fields of VERDICT.
        candidates: of `with_pair_columns`.
        selection: whose verdict it is.
    """
    if not (selection.columns or selection.max_per_query or selection.max_per_cluster):
        return verdict
    of_pair = candidates.filter(pl.col("model") == "strong").select("pair_id", rf"^(column:.*|{QUERY}|{CLUSTER})$")
    is_within_query = pl.col("reason") != SelectionReason.QUERY_FULL.value
    is_open = is_within_query & (pl.col("reason") != SelectionReason.CLUSTER_FULL.value)
    place = pl.col("position").rank("ordinal")
    grounds = []
    if selection.where:
        grounds += _first_not_met(selection.where)
    if selection.max_per_query is not None:
        grounds.append(place.over(QUERY).alias("query_place"))
    if selection.max_per_cluster is not None:
        of_cluster = pl.when(is_within_query).then("position").rank("ordinal")
        grounds.append(of_cluster.over(CLUSTER).alias("cluster_place"))
    if selection.quotas is not None:
        group = group_of(selection.quotas)
        grounds += [
            group.alias("group"),
            pl.when(is_open).then("position").rank("ordinal").over(group).alias("group_place"),
            pl.col("is_selected").sum().over(group).alias("group_taken"),
        ]
    return verdict.join(of_pair, on="pair_id", maintain_order="left", validate="1:1").select(*verdict.columns, *grounds)


def _first_not_met(conditions: Sequence[Condition]) -> list[pl.Expr]:
    numbered = [pl.when(~meets(one)).then(pl.lit(place)) for place, one in enumerate(conditions)]
    first = pl.coalesce(numbered)
    values = [pl.when(first == place).then(value_of(one.column)) for place, one in enumerate(conditions)]
    return [first.alias("condition"), pl.coalesce(values).alias("value")]
