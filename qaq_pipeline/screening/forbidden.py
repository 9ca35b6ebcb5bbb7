"""Rows that must not be published, by what they contain: secrets, personal data, and licences that are not allowed.

Belongs here: which rows, and the evidence, which never repeats what was found. Does not belong here: what a secret is
(`secrets`), what personal data is (`personal_data`), and rows that a person withdrew (`withdrawals`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import polars as pl

from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import RawData, dtypes
from qaq_pipeline.schema.vocabularies import Status, WithdrawalReason
from qaq_pipeline.screening import personal_data, secrets
from qaq_pipeline.screening.finding import Finding

_TEXTS = ("query", "answer", "system", "reasoning", "record")
"""Texts that are searched. The record also has what is not read, such as earlier turns."""


READS = (*_TEXTS, "status", "licence")
"""Columns of RawData that are searched."""

NOTHING = pl.DataFrame(
    schema={name: dtypes(RawData)[name] for name in ROW_KEY} | {"evidence": pl.String(), "reason": pl.String()}
)


def find(raw: pl.DataFrame, settings: ScreeningSettings) -> pl.DataFrame:
    """Key, evidence and reason of the rows that must not be published, nor shown.

    Rows that could not be read are searched for secrets, too: pages show their records.
    """
    found = [NOTHING]
    if settings.secrets == "drop":
        found.append(_containing(raw, secrets.may_have, secrets.find, WithdrawalReason.SECRET))
    if kinds := settings.personal_data:
        may_have, look = partial(personal_data.may_have, kinds=kinds), partial(personal_data.find, kinds=kinds)
        found.append(_containing(raw, may_have, look, WithdrawalReason.PERSONAL_DATA))
    if settings.licences is not None:
        found.append(_not_allowed(raw.filter(status=Status.ACCEPTED.value), settings.licences))
    return pl.concat(found)


def _containing(
    rows: pl.DataFrame,
    may_have: Callable[[pl.Expr], pl.Expr],
    look: Callable[[str], Iterable[Finding]],
    reason: WithdrawalReason,
) -> pl.DataFrame:
    """The rows of which a text contains something, with the kind and place of the first one."""
    suspects = rows.filter(pl.any_horizontal(may_have(pl.col(name)) for name in _TEXTS))
    evidence = [
        next((f"{one.kind} at character {one.place} of the {name}" for name, one in _all_in(texts, look)), None)
        for texts in suspects.select(_TEXTS).iter_rows(named=True)
    ]
    return (
        suspects.select(*ROW_KEY)
        .with_columns(evidence=pl.Series(evidence, dtype=pl.String), reason=pl.lit(reason.value))
        .drop_nulls("evidence")
    )


def _all_in(texts: Mapping[str, str | None], look: Callable[[str], Iterable[Finding]]) -> Iterator[tuple[str, Finding]]:
    return ((name, one) for name, text in texts.items() if text is not None for one in look(text))


def _not_allowed(accepted: pl.DataFrame, licences: tuple[str, ...]) -> pl.DataFrame:
    named = pl.col("licence").str.strip_chars()
    allowed = [licence.strip().lower() for licence in licences]
    each = named.str.to_lowercase().str.split(",").list.eval(pl.element().str.strip_chars().is_in(allowed)).list.all()
    is_allowed = named.str.to_lowercase().is_in(allowed) | each
    return accepted.filter(~is_allowed).select(
        *ROW_KEY,
        evidence=pl.format("it names the licence {}", named),
        reason=pl.lit(WithdrawalReason.LICENCE_NOT_ALLOWED.value),
    )
