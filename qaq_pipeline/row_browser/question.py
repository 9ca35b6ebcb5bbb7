"""Which rows of a listing are wanted, and in which order.

Belongs here: the filters and the order of a request, and their meaning. Does not belong here: the rows (`listing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qaq_pipeline.row_browser.listing import SEPARATOR, Listing
from qaq_pipeline.schema.row_place import ROW_KEY

CHOICES = ("decision", "reason", "signals", "language", "batch")
"""Columns whose values a person chooses from."""

NONE = "none"
"""The choice of the rows that have no value."""


class QuestionError(ValueError):
    """A request cannot be answered. The text names the parameter and what it may be."""


class Question(BaseModel):
    """A request for rows. Rows must have one of the values of each choice; empty: any."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decision: frozenset[str] = frozenset()
    reason: frozenset[str] = frozenset()
    signals: frozenset[str] = frozenset()
    language: frozenset[str] = frozenset()
    batch: frozenset[str] = frozenset()
    text: str = ""
    """Text that the query, the answer or the record contains."""
    number: str = ""
    """Column that `low` and `high` limit; rows without a value are left out."""
    low: float | None = None
    high: float | None = None
    order: str = ""
    """Column to sort by; empty: by place."""
    direction: Literal["asc", "desc"] = "asc"
    start: int = Field(0, ge=0)
    length: int = Field(50, ge=1, le=500)


def parse(parameters: Iterable[tuple[str, str]]) -> Question:
    """The question of the parameters of a URL; a parameter without a value is not there.

    Raises:
        QuestionError: a parameter is unknown, or its value cannot be.
    """
    values: dict[str, list[str]] = {}
    for name, value in parameters:
        if value:
            values.setdefault(name, []).append(value)
    given: Mapping[str, object] = {n: found if n in CHOICES else found[-1] for n, found in values.items()}
    try:
        return Question.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            known = ", ".join(Question.model_fields)
            raise QuestionError(f"{first['loc'][0]}: no such parameter; known: {known}") from error
        raise QuestionError(f"{first['loc'][0]}={first['input']!r}: {first['msg']}") from error


def answer(listing: Listing, question: Question, with_text: pl.DataFrame | None) -> pl.DataFrame:
    """All rows of a listing that a question asks for, in its order.

    Args:
        listing: all rows.
        question: the filters and the order; rows without a value of the order come last.
        with_text: keys of the rows that contain `question.text`; None: it is empty.

    Raises:
        QuestionError: the question names a column that the listing does not have.
    """
    rows = listing.rows.lazy()
    for name in CHOICES:
        if chosen := getattr(question, name):
            rows = rows.filter(_is_chosen(name, chosen))
    if with_text is not None:
        rows = rows.join(with_text.lazy(), on=ROW_KEY, how="semi", maintain_order="left")
    if question.low is not None or question.high is not None:
        value = pl.col(_known(question.number, listing.numbers, "number"))
        low, high = (float("-inf") if question.low is None else question.low), question.high
        rows = rows.filter(value.is_between(low, float("inf") if high is None else high))
    if question.order:
        order = _known(question.order, listing.rows.columns, "order")
        is_descending = question.direction == "desc"
        rows = rows.sort(order, *ROW_KEY, descending=[is_descending] + [False] * len(ROW_KEY), nulls_last=True)
    return rows.collect()


def _is_chosen(name: str, chosen: frozenset[str]) -> pl.Expr:
    found = _values(name).list.eval(pl.element().is_in(sorted(chosen - {NONE}))).list.any()
    return found.fill_null(value=False) | (_has_none(name) if NONE in chosen else pl.lit(value=False))


def _values(name: str) -> pl.Expr:
    """The values of a choice in each row, as a list: a pair can raise several signals."""
    return pl.col(name).str.split(SEPARATOR) if name == "signals" else pl.concat_list(name)


def _has_none(name: str) -> pl.Expr:
    return pl.col(name).fill_null("") == ""


def _known(name: str, known: Iterable[str], parameter: str) -> str:
    columns = list(known)
    if name not in columns:
        raise QuestionError(f"{parameter}={name!r}: no such column; known: {', '.join(columns)}")
    return name


def choices(listing: Listing) -> dict[str, list[tuple[str, int]]]:
    """The values of each choice with their numbers of rows, the most frequent first; only columns with several."""
    found = {}
    for name in CHOICES:
        values = listing.rows.select(_values(name).alias(name)).explode(name)
        named = values.select(pl.when(_has_none(name)).then(pl.lit(NONE)).otherwise(name).alias(name))
        counts = named.group_by(name).len().sort("len", name, descending=[True, False])
        if counts.height > 1:
            found[name] = counts.rows()
    return found
