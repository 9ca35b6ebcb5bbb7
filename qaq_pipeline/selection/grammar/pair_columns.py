"""The columns that conditions, quotas and caps need, as further columns of the candidates.

Belongs here: the value of each column for a pair. Does not belong here: reading files (`ingest.imported_tables`), and
what follows from a value (`composition`, `quotas`).

A pair that several rows hold has the values of the row that screening keeps. Values are text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from qaq_pipeline.config.conditions import RECORD, TOKEN_COLUMNS, Composed, tables_named
from qaq_pipeline.ingest.imported_tables import KEY, ImportedTable
from qaq_pipeline.ingest.records import field_of
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.schema.tables import RawData, ScreenedData, dtypes
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening.duplicates import normal_text
from qaq_pipeline.selection.verdicts import CLUSTER, QUERY

_QUERY_HASHES = ("query_hash_0", "query_hash_1")
_NO_ROWS = pl.DataFrame(schema=dtypes(RawData) | {"cluster": dtypes(ScreenedData)["cluster"]})


def value_of(column: str) -> pl.Expr:
    """The values of a named column, as text."""
    return pl.col(_stored(column))


def number_of(column: str) -> pl.Expr:
    """The values of a named column, as numbers; null where the text is no number."""
    return value_of(column).cast(pl.Float64, strict=False).fill_nan(None)


def _stored(column: str) -> str:
    return f"column:{column}"


def columns_read(selections: Sequence[Composed]) -> list[str]:
    """The columns of RawData that `with_pair_columns` reads of the rows."""
    named = _named(selections)
    columns = [_row_column(column) for column in named if _is_of_row(column)]
    return list(dict.fromkeys([*columns, *(["query"] if _is_capped(selections) else [])]))


def needs_rows(selections: Sequence[Composed]) -> bool:
    """Whether selections name a column of a pair, or have a cap."""
    return bool(_named(selections)) or _is_capped(selections) or _has_clusters(selections)


def with_pair_columns(
    candidates: pl.DataFrame,
    rows: Iterable[pl.DataFrame],
    selections: Sequence[Composed],
    tables: Mapping[str, ImportedTable],
) -> pl.DataFrame:
    """The candidates with the columns that selections name; unchanged where they name none.

    Args:
        candidates: of the batch.
        rows: those of the distinct pairs, in parts: the row's key, pair_id, cluster, and `columns_read`.
        selections: named selections.
        tables: the imported tables that they name, with those columns.
    """
    if not needs_rows(selections):
        return candidates
    named, is_capped = _named(selections), _is_capped(selections)
    has_places = any(table.key != "pair_id" for table in tables.values())
    parts = itertools.chain([_NO_ROWS], rows)
    values = pl.concat(_values(part, selections, has_places=has_places) for part in parts)
    if is_capped:
        first = pl.col("number").first().over(*_QUERY_HASHES)
        values = values.with_row_index("number").with_columns(first.alias(QUERY)).drop("number", *_QUERY_HASHES)
    for name, columns in tables_named(selections).items():
        values = _with_table(values, name, columns, tables[name])
    joined = candidates.join(values.drop("row"), on="pair_id", how="left", maintain_order="left", validate="m:1")
    strong = pl.col("model") == "strong"
    of_strong = (pl.col(name).filter(strong).first().over("pair_id") for name in TOKEN_COLUMNS if name in named)
    return joined.with_columns(one.cast(pl.String).name.map(_stored) for one in of_strong)


def count_unmatched(raw: pl.DataFrame, screened: pl.DataFrame, table: ImportedTable) -> int:
    """The number of an imported table's rows that belong to no pair of the batch.

    Args:
        raw: the key and pair_id of each row.
        screened: the key and status of the same rows.
        table: the imported table.
    """
    kept = screened.lazy().filter(pl.col("status") == Status.ACCEPTED.value).select(ROW_KEY)
    known = raw.lazy().join(kept, on=ROW_KEY, how="semi").select("pair_id", row=row_place()).select(table.key).collect()
    return table.rows.join(known, left_on=KEY, right_on=table.key, how="anti").height


def _named(selections: Sequence[Composed]) -> list[str]:
    return list(dict.fromkeys(column for selection in selections for column in selection.columns))


def _is_capped(selections: Sequence[Composed]) -> bool:
    return any(selection.max_per_query is not None for selection in selections)


def _has_clusters(selections: Sequence[Composed]) -> bool:
    return any(selection.max_per_cluster is not None for selection in selections)


def _values(rows: pl.DataFrame, selections: Sequence[Composed], *, has_places: bool) -> pl.DataFrame:
    """pair_id, row, and of each row the columns that selections name, its cluster, and two hashes of its query.

    Two queries that differ do not have both hashes in common by chance: they have 128 bits.
    """
    query = normal_text("query")
    hashes = (query.hash(seed).alias(name) for seed, name in enumerate(_QUERY_HASHES))
    return rows.select(
        "pair_id",
        (row_place() if has_places else pl.lit(None, pl.String)).alias("row"),
        *(_of_row(column).alias(_stored(column)) for column in _named(selections) if _is_of_row(column)),
        *(hashes if _is_capped(selections) else ()),
        *([pl.col("cluster").alias(CLUSTER)] if _has_clusters(selections) else []),
    )


def _is_of_row(column: str) -> bool:
    table, dot, _ = column.partition(".")
    return table == RECORD if dot else column not in TOKEN_COLUMNS


def _row_column(column: str) -> str:
    """The column of RawData that has the values."""
    return RECORD if "." in column else column


def _of_row(column: str) -> pl.Expr:
    _, dot, field = column.partition(".")
    of_row = pl.col(_row_column(column))
    return field_of(of_row, field) if dot else of_row


def _with_table(values: pl.DataFrame, name: str, columns: Sequence[str], table: ImportedTable) -> pl.DataFrame:
    wanted = table.rows.select(KEY, *(pl.col(column).alias(_stored(f"{name}.{column}")) for column in columns))
    return values.join(wanted, left_on=table.key, right_on=KEY, how="left", validate="m:1")
