"""The rows of a batch, or of a version, as its page counts them: numbers and short words, some 150 bytes a row.

Belongs here: reading these columns of all rows, and everything that is shown of the few rows that are examples. Does
not belong here: counting (`summaries`), and choosing examples.

    pair_id                        null: the row is no pair
    decision, reason               categories
    batch, or source and language  categories
    gap
    <score>_<model>                the scores of `_SCORES`, for each model
    is_selected:<selection>        null: the selection does not judge the row

Rows are in the order of their keys, and have the names of `flat_scores`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import polars as pl

from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.reports import summaries
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.storage.stored_table import parts_of_both

_SCORES = ("num_q_tokens", "num_a_tokens", "log_ppl_q", "rmi", "rank", "stratum")
_WORDS = ("decision", "reason", "batch", "source", "language")


def of_batch(tables: BatchTables) -> pl.DataFrame:
    """The rows of a batch, with `source` and `language` of RawData."""
    decided = ("pair_id", "decision", "reason", "gap", "scores", "verdicts")
    origin = ("source", "language")
    parts = parts_of_both(tables["decisions"], decided, tables["raw_data"], origin, ROW_KEY)
    return _joined((_flat(part) for part in parts), origin)


def of_version(scores: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """The rows of a version, with `batch`; from parts of its scores with at least the columns of `read_of`."""
    return _joined(scores, ("batch",))


def read_of(columns: Sequence[str]) -> list[str]:
    """Those of the columns of scores that a page counts."""
    of_models = {f"{score}_{role}" for role in summaries.roles(columns) for score in _SCORES}
    known = {"pair_id", "gap", *_WORDS, *of_models}
    return [name for name in columns if name in known or name.startswith(summaries.SELECTED)]


def of_examples(tables: BatchTables, rows: Collection[int]) -> dict[int, dict[str, Any]]:
    """All that is shown of some rows of a batch, by their places in `of_batch`, from 0.

    Returns:
        the `place` of each, its decision, reason, explanation, scores, query, answer, record, and its status in
        ScreenedData.
    """
    decided, texts = ("decision", "reason", "explanation", "scores"), ("query", "answer", "record")
    parts = parts_of_both(tables["decisions"], decided, tables["raw_data"], texts, ROW_KEY)
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for part, screened in zip(parts, tables["screened_data"].parts("status"), strict=True):
        wanted = sorted(row for row in rows if start <= row < start + part.height)
        places = [row - start for row in wanted]
        shown = part[places].with_columns(screened["status"][places], place=row_place())
        found |= dict(zip(wanted, shown.iter_rows(named=True), strict=True))
        start += part.height
    return found


def _flat(part: pl.DataFrame) -> pl.DataFrame:
    scored = to_columns(part.drop(ROW_KEY), "scores", fields=_SCORES)
    return to_columns(scored, "verdicts", ":", ["is_selected"])


def _joined(parts: Iterable[pl.DataFrame], words: Sequence[str]) -> pl.DataFrame:
    """The parts as one frame, with words as categories. A part may lack the columns of models and selections."""
    named = ["decision", "reason", *words]
    head = pl.DataFrame(schema={"pair_id": pl.String, "gap": pl.Float64} | dict.fromkeys(named, pl.Categorical))
    narrow = (part.select(read_of(part.columns)).with_columns(pl.col(named).cast(pl.Categorical)) for part in parts)
    return pl.concat([head, *narrow], how="diagonal")
