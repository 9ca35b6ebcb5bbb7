"""The settings that every selection has, whatever its strategy: conditions, quotas, and caps for each query
and each near-duplicate cluster.

Does not belong here: the strategies' own settings (`selections`), and the values of columns (`selection.grammar`).
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qaq_pipeline.config.base import NAME, Closed

ROW_COLUMNS = ("language", "source")
TOKEN_COLUMNS = ("num_q_tokens", "num_a_tokens", "num_a_tokens_untruncated")
"""Columns of the strong model's scores."""
RECORD = "record"
"""Prefix of a column that is a field of the delivered record."""

NO_VALUE = "none"
"""Group of the pairs that have no value."""

_Column = Annotated[str, Field(pattern=r"^[^.\s]+(\.[^'\\]+)?$")]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Value = bool | int | _Number | str


def _is_unset(value: object) -> bool:
    """True for the default of a field, which is left out of hashes and of the dataset card."""
    return value is None or value == ()


class Condition(Closed):
    """A condition on a column of a pair: exactly one of the fields beside `column`. A pair without a value meets only
    `is_present: false`.
    """

    column: _Column
    """`language` or `source` of the row; `record.FIELD`, a field of the delivered record; `num_q_tokens`,
    `num_a_tokens` or `num_a_tokens_untruncated` under the strong model; or `TABLE.COLUMN` of an imported table."""
    equals: _Value | None = Field(None, exclude_if=_is_unset)
    """The value. A number is compared as a number, also with text such as "7"."""
    one_of: tuple[_Value, ...] | None = Field(None, min_length=1, exclude_if=_is_unset)
    """The allowed values, compared as in `equals`."""
    at_least: _Number | None = Field(None, exclude_if=_is_unset)
    """The lowest allowed number. Text that is not a number does not meet it."""
    at_most: _Number | None = Field(None, exclude_if=_is_unset)
    """The highest allowed number. Text that is not a number does not meet it."""
    is_present: bool | None = Field(None, exclude_if=_is_unset)
    """true: the pair has a value. false: it has none."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        self.require_one_of("equals", "one_of", "at_least", "at_most", "is_present")
        return self


class Quotas(Closed):
    """The division of a selection's budget among groups of pairs. A selection by `rmi_band` has no budget: the pairs of
    the band are divided. With `ranking.pool: reference`, a selection has no quotas.
    """

    per: _Column
    """The column whose values are the groups, as in `where[].column`. Pairs without a value are the group `none`."""
    shares: Literal["equal", "proportional"] | dict[str, Annotated[float, Field(gt=0, le=1)]]
    """equal: each group gets the same; what a group cannot fill goes to the others. proportional: each group gets its
    share of the selection's pool. Stated shares, such as `{python: 0.5, go: 0.2}`, are maxima, and groups without one
    get nothing. Except with equal, what a group does not fill is not taken."""

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        if isinstance(self.shares, dict):
            total = sum(Fraction(str(share)) for share in self.shares.values())
            if not 0 < total <= 1:
                raise ValueError(f"shares: they sum to {float(total):g}; give at least one, and at most 1 in total")
        return self


class Composed(Closed):
    """The part of a selection that does not depend on its strategy."""

    name: str = Field(pattern=NAME)
    """Name of the selection, as in the decisions and the exports."""
    valid: bool = Field(False, exclude_if=lambda valid: not valid)
    """Take only valid pairs: no signal with the action drop (section `validity`) declares them invalid. Invalid pairs
    count in the selection's pool, so that a budget may not be reached."""
    where: tuple[Condition, ...] = Field((), exclude_if=_is_unset)
    """Conditions; the selection takes only pairs that meet all of them. With `ranking.pool: reference`, they hold for
    the batch's pairs, and the cut is that of the whole reference."""
    quotas: Quotas | None = Field(None, exclude_if=_is_unset)
    """Division of the budget among groups; null: none."""
    max_per_query: int | None = Field(None, ge=1, exclude_if=_is_unset)
    """Maximum number of pairs with one query, the best first; queries that differ only in white space or Unicode
    normalisation are one. null: no limit."""
    max_per_cluster: int | None = Field(None, ge=1, exclude_if=_is_unset)
    """Maximum number of a batch's pairs from one near-duplicate cluster (`screening.duplicates.cluster_threshold`), the
    best first, of those that `max_per_query` leaves. null: no limit."""

    @property
    def columns(self) -> list[str]:
        """The columns that the conditions and the quotas name, each once."""
        per = () if self.quotas is None else (self.quotas.per,)
        return list(dict.fromkeys([*(condition.column for condition in self.where), *per]))

    @property
    def without_conditions(self) -> Self:
        """The selection by scores alone, for pairs whose rows are not at hand."""
        return self.model_copy(update={"where": (), "quotas": None, "max_per_query": None, "max_per_cluster": None})


def tables_named(selections: Iterable[Composed]) -> dict[str, list[str]]:
    """The columns of each imported table that selections name, by table."""
    found: dict[str, list[str]] = {}
    for column in dict.fromkeys(column for selection in selections for column in selection.columns):
        table, dot, name = column.partition(".")
        if dot and table != RECORD:
            found.setdefault(table, []).append(name)
    return found
