"""The columns that conditions, quotas and caps need, as further columns of the candidates.

Belongs here: the value of each column for a pair. Does not belong here: reading files (`ingest.imported_tables`), and
what follows from a value (`composition`, `quotas`).

A pair that several rows hold has the values of the row that screening keeps. Values are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from qaq_pipeline.config.conditions import RECORD, TOKEN_COLUMNS, Composed, tables_named
from qaq_pipeline.ingest.imported_tables import KEY, ImportedTable
from qaq_pipeline.ingest.records import field_of
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening.duplicates import normal_text
from qaq_pipeline.selection.verdicts import CLUSTER, QUERY


def value_of(column: str) -> pl.Expr:
    """The values of a named column, as text."""
    return pl.col(_stored(column))


def number_of(column: str) -> pl.Expr:
    """The values of a named column, as numbers; null where the text is no number."""
    return value_of(column).cast(pl.Float64, strict=False).fill_nan(None)


def _stored(column: str) -> str:
    return f"column:{column}"


def with_pair_columns(
    candidates: pl.DataFrame,
    raw: pl.DataFrame,
    screened: pl.DataFrame,
    selections: Sequence[Composed],
    tables: Mapping[str, ImportedTable],
) -> pl.DataFrame:
    """The candidates with the columns that selections name; unchanged where they name none.

    Args:
        candidates: of the batch.
        raw: RawData of the batch.
        screened: ScreenedData of the same rows.
        selections: named selections.
        tables: the imported tables that they name, with those columns.
    """
    named = dict.fromkeys(column for selection in selections for column in selection.columns)
    is_capped = any(selection.max_per_query is not None for selection in selections)
    has_clusters = any(selection.max_per_cluster is not None for selection in selections)
    if not (named or is_capped or has_clusters):
        return candidates
    kept = _kept_rows(raw, screened).collect()
    values = kept.select(
        "pair_id",
        "row",
        *(_of_row(column).alias(_stored(column)) for column in named if _is_of_row(column)),
        *([pl.col("number").first().over(normal_text("query")).alias(QUERY)] if is_capped else []),
        *([pl.col("cluster").alias(CLUSTER)] if has_clusters else []),
    )
    for name, columns in tables_named(selections).items():
        values = _with_table(values, name, columns, tables[name])
    joined = candidates.join(values.drop("row"), on="pair_id", how="left", maintain_order="left", validate="m:1")
    strong = pl.col("model") == "strong"
    of_strong = (pl.col(name).filter(strong).first().over("pair_id") for name in TOKEN_COLUMNS if name in named)
    return joined.with_columns(one.cast(pl.String).name.map(_stored) for one in of_strong)


def count_unmatched(raw: pl.DataFrame, screened: pl.DataFrame, table: ImportedTable) -> int:
    """The number of an imported table's rows that belong to no pair of the batch."""
    known = _kept_rows(raw, screened).select(table.key).collect()
    return table.rows.join(known, left_on=KEY, right_on=table.key, how="anti").height


def _kept_rows(raw: pl.DataFrame, screened: pl.DataFrame) -> pl.LazyFrame:
    """One row of each pair; lazy, so that only the columns that are read are copied."""
    accepted = screened.lazy().filter(pl.col("status") == Status.ACCEPTED.value).select(*ROW_KEY, "cluster")
    kept = raw.lazy().join(accepted, on=ROW_KEY, maintain_order="left", validate="1:1")
    columns = ("pair_id", "query", "language", "source", "record", "cluster")
    return kept.select(*columns, row=row_place()).with_row_index("number")


def _is_of_row(column: str) -> bool:
    table, dot, _ = column.partition(".")
    return table == RECORD if dot else column not in TOKEN_COLUMNS


def _of_row(column: str) -> pl.Expr:
    _, dot, field = column.partition(".")
    return field_of(pl.col(RECORD), field) if dot else pl.col(column)


def _with_table(values: pl.DataFrame, name: str, columns: Sequence[str], table: ImportedTable) -> pl.DataFrame:
    wanted = table.rows.select(KEY, *(pl.col(column).alias(_stored(f"{name}.{column}")) for column in columns))
    return values.join(wanted, left_on=table.key, right_on=KEY, how="left", validate="m:1")
