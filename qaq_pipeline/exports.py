"""Selected rows as the files that trainers load. No scores in them.

Belongs here: one function a format, rows in, bytes out. Does not belong here: which rows, or where files go.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import polars as pl

from qaq_pipeline import lookup


def messages_jsonl(rows: pl.DataFrame) -> bytes:
    """OpenAI messages, one conversation a line: the row's own system text, if any, then Q and A."""
    return b"".join(_json({"messages": _messages(row)}) + b"\n" for row in rows.iter_rows(named=True))


def alpaca_json(rows: pl.DataFrame) -> bytes:
    """Alpaca: a JSON array of instruction (Q whole), input (empty), output (A).

    Where any row has a system text, every row has the field `system`, so that all rows have the same fields.
    """
    has_system = any(rows["system"].drop_nulls())
    return b"[\n" + b",\n".join(_json(record) for record in _alpaca(rows, has_system=has_system)) + b"\n]\n"


def scores_parquet(decisions: pl.DataFrame) -> bytes:
    """Every input row's decision and scores, flat: joins on the row key or on pair_id."""
    return parquet(flat_scores(decisions))


def parquet(rows: pl.DataFrame) -> bytes:
    """The rows as they are."""
    buffer = io.BytesIO()
    rows.write_parquet(buffer, compression="zstd", row_group_size=lookup.rows_per_group(rows.height))
    return buffer.getvalue()


def flat_scores(decisions: pl.DataFrame) -> pl.DataFrame:
    """Decisions with a column for each score and model (`rmi_strong`) and each selection (`is_selected:diff_high`)."""
    rows = decisions.with_row_index("row")
    keep = rows.drop("scores", "verdicts")
    scores = _spread(rows, "scores", "model", lambda field, role: f"{field}_{role}")
    verdicts = _spread(
        rows,
        "verdicts",
        "selection",
        lambda field, name: f"{field}:{name}",
        fields=("is_selected", "reason", "score", "position"),
    )
    return keep.join(scores, on="row", how="left").join(verdicts, on="row", how="left").sort("row").drop("row")


def _spread(
    rows: pl.DataFrame, column: str, name: str, rename: Callable[[str, str], str], fields: tuple[str, ...] = ()
) -> pl.DataFrame:
    """A list of structs as columns: for each value of `name` in it, one column for each of its other fields."""
    long = rows.select("row", column).explode(column, empty_as_null=False).unnest(column)
    values = fields or tuple(field for field in long.columns if field not in ("row", name))
    spread = rows.select("row")
    for value in long[name].unique(maintain_order=True):
        part = long.filter(pl.col(name) == value).select("row", *(pl.col(f).alias(rename(f, value)) for f in values))
        spread = spread.join(part, on="row", how="left", validate="1:1")
    return spread


EXPORTERS: dict[str, tuple[str, Callable[[pl.DataFrame], bytes]]] = {
    "messages": ("messages.jsonl", messages_jsonl),
    "alpaca": ("alpaca.json", alpaca_json),
}
"""File name and function of every format of `export.formats`."""


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    return [*system, {"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["answer"]}]


def _alpaca(rows: pl.DataFrame, *, has_system: bool) -> Iterator[dict[str, str]]:
    for row in rows.iter_rows(named=True):
        record = {"instruction": row["query"], "input": "", "output": row["answer"]}
        yield record | ({"system": row["system"] or ""} if has_system else {})


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
