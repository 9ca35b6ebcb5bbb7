"""What is found out about rows before any GPU time is spent. Polars only.

Belongs here: duplicates (exact ones so far), each named with the row that represents it.
Does not belong here: reading records, or scores.
"""

from __future__ import annotations

import polars as pl

from qaq_pipeline import schema
from qaq_pipeline.schema import DuplicateReason, Status


def screen(raw: pl.DataFrame) -> pl.DataFrame:
    """The ScreenedData of a batch's RawData: of equal accepted pairs, the first in key order represents the others.

    Equal means an equal `pair_id`: the same system text, query and answer, to the letter.
    """
    is_accepted = pl.col("status") == Status.ACCEPTED.value
    ordered = raw.sort(schema.ROW_KEY).with_row_index("position")
    first = pl.col("position").filter(is_accepted).min().over("pair_id")
    is_duplicate = is_accepted & (pl.col("position") != first)
    return ordered.select(
        *schema.ROW_KEY,
        "pair_id",
        status=pl.when(is_duplicate).then(pl.lit(Status.DUPLICATE.value)).otherwise("status"),
        reason=pl.when(is_duplicate).then(pl.lit(DuplicateReason.EXACT_DUPLICATE.value)).otherwise("reason"),
        duplicate_of=pl.when(is_duplicate).then(row_reference().gather(first)),
        similarity=pl.when(is_duplicate).then(pl.lit(1.0)),
        evidence=pl.when(is_duplicate).then(pl.lit("equal system text, query and answer")).otherwise("detail"),
    )


def row_reference() -> pl.Expr:
    """A row as batch/file:row.turn, the way errors, decisions and `qaq explain` name it."""
    return pl.format("{}/{}:{}.{}", "batch", "source_file", "source_row", "turn_index")
