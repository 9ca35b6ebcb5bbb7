"""The draw of the rows of a batch that are made bad on purpose: from its accepted pairs to PlantedRows.

Belongs here: the draw of the rows, how many get each defect, and the keys of the planted rows. Does not belong here:
the change of a text (`defects`), who gets whose answer (`mismatches`), and the validation of the scores
(`calibration`).

Rows are drawn by a keyed hash of pair_id, before anything is scored. Every defect takes the first of them in which it
is possible. So defects share their clean twins as far as they can, and differ in nothing but the defect.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import polars as pl

from qaq_pipeline.calibration import defects
from qaq_pipeline.calibration.defects import Others, Text
from qaq_pipeline.calibration.mismatches import other_answers
from qaq_pipeline.config.settings import CalibrationSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.schema.draws import draws
from qaq_pipeline.schema.tables import PlantedRows, dtypes
from qaq_pipeline.schema.vocabularies import Defect

ENOUGH = 20
"""Minimum number of planted rows for which a defect is judged: with 20, the interval of an AUROC of 0.9 is 0.2 wide."""

_MOST_DRAWN = 2000
"""Rows that are drawn: more than are planted, because some defects are impossible in most rows."""


def plant(pairs: pl.DataFrame, settings: CalibrationSettings) -> pl.DataFrame:
    """PlantedRows of a batch, sorted by pair_id.

    Args:
        pairs: the accepted pairs: pair_id, system, query, answer, language.
        settings: how many, which defects, the seed.
    """
    drawn = draw(pairs, settings.seed)
    twins = [(row, _text(row)) for row in drawn.iter_rows(named=True)]
    texts = [text for _, text in twins]
    answers = other_answers(texts, settings.mismatches)
    planted: list[dict[str, Any]] = []
    taken = set(pairs["pair_id"])
    for defect in settings.defects:
        made = (
            _make(defect, *twin, Others(answers.get(place), texts), settings.seed) for place, twin in enumerate(twins)
        )
        new = (row for row in made if row is not None and row["pair_id"] not in taken)
        wanted = settings.mismatches if defect is Defect.OTHER_ANSWER else settings.rows_per_defect
        for row in itertools.islice(new, wanted):
            taken.add(row["pair_id"])
            planted.append(row)
    return pl.DataFrame(planted, schema=dtypes(PlantedRows)).sort("pair_id")


def draw(pairs: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The rows that may get a defect, in the order of their draws, each query once."""
    drawn = pairs.with_columns(draw=draws(pairs["pair_id"], seed)).sort("draw", "pair_id")
    return drawn.unique(["system", "query"], keep="first", maintain_order=True).head(_MOST_DRAWN)


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
