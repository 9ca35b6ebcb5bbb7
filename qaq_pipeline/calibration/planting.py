"""The draw of the rows of a batch that are made bad on purpose: from its accepted pairs to PlantedRows.

Belongs here: the draw of the rows, how many get each defect, and the keys of the planted rows. Does not belong here:
the change of a text (`defects`), who gets whose answer (`mismatches`), and the validation of the scores
(`calibration`).

Rows are drawn by a keyed hash of pair_id, before anything is scored. Every defect takes the first of them in which it
is possible. So defects share their clean twins as far as they can, and differ in nothing but the defect.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from qaq_pipeline.calibration import defects
from qaq_pipeline.calibration.defects import Others, Text
from qaq_pipeline.calibration.mismatches import other_answers
from qaq_pipeline.config.settings import CalibrationSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.schema.draws import draws
from qaq_pipeline.schema.long_form import find_pairs
from qaq_pipeline.schema.tables import PlantedRows, RawData, dtypes
from qaq_pipeline.schema.vocabularies import Defect
from qaq_pipeline.storage.stored_table import with_own_bytes

ENOUGH = 20
"""Minimum number of planted rows for which a defect is judged: with 20, the interval of an AUROC of 0.9 is 0.2 wide."""

_MOST_DRAWN = 2000
"""Rows that are drawn: more than are planted, because some defects are impossible in most rows."""

_READ = ("pair_id", "system", "history", "query", "answer", "language")
_DRAWN = {name: dtypes(RawData)[name] for name in _READ} | {"draw": pl.Float64()}


def plant(parts: Iterable[pl.DataFrame], settings: CalibrationSettings) -> pl.DataFrame:
    """PlantedRows of a batch, sorted by pair_id.

    Args:
        parts: the accepted pairs, part by part, each once: pair_id, system, history, query, answer, language.
        settings: how many, which defects, the seed.
    """
    drawn, pair_ids = draw(parts, settings.seed)
    twins = [(row, _text(row)) for row in drawn.iter_rows(named=True)]
    texts = [text for _, text in twins]
    answers = other_answers(texts, settings.mismatches)
    planted: list[dict[str, Any]] = []
    taken: set[str] = set()
    for defect in settings.defects:
        made = (
            _make(defect, *twin, Others(answers.get(place), texts), settings.seed) for place, twin in enumerate(twins)
        )
        new = (
            row
            for row in made
            if row is not None
            and row["pair_id"] not in taken
            and find_pairs(pair_ids, pl.Series([row["pair_id"]])).is_empty()
        )
        wanted = settings.mismatches if defect is Defect.OTHER_ANSWER else settings.rows_per_defect
        for row in itertools.islice(new, wanted):
            taken.add(row["pair_id"])
            planted.append(row)
    return pl.DataFrame(planted, schema=dtypes(PlantedRows)).sort("pair_id")


def draw(parts: Iterable[pl.DataFrame], seed: int) -> tuple[pl.DataFrame, pl.Series]:
    """The rows that may get a defect, in the order of their draws, each query once; and all pair_ids, sorted.

    Of the rows so far, those first in their order are kept. A row that is not among them is never needed again.
    """
    drawn, pair_ids = pl.DataFrame(schema=_DRAWN), [pl.Series(dtype=pl.String)]
    for part in parts:
        pair_ids.append(part["pair_id"])
        rows = pl.concat([drawn, part.with_columns(draw=draws(part["pair_id"], seed)).select(list(_DRAWN))])
        distinct = rows.sort("draw", "pair_id").unique(["system", "query"], keep="first", maintain_order=True)
        drawn = with_own_bytes(distinct.head(_MOST_DRAWN))
    return drawn.drop("draw"), pl.concat(pair_ids).sort()


def _text(row: Mapping[str, Any]) -> Text:
    return Text(row["query"], row["answer"], defects.language_of(row["language"], row["answer"]))


def _make(defect: Defect, twin: Mapping[str, Any], text: Text, others: Others, seed: int) -> dict[str, Any] | None:
    made = defects.make(defect, text, others, f"{seed}:{twin['pair_id']}")
    if made is None:
        return None
    return {
        "pair_id": records.pair_id(twin["system"], made.query, made.answer, twin["history"]),
        "defect": defect.value,
        "original_pair_id": twin["pair_id"],
        "system": twin["system"],
        "history": twin["history"],
        "query": made.query,
        "answer": made.answer,
    }
