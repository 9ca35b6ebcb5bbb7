"""The draw of the rows of a batch that are made bad on purpose: from pairs with their strata to PlantedRows.

Belongs here: how many rows each defect gets, the draw of the rows, and the keys of the planted rows. Does not belong
here: the change of a text (`defects`), and the validation of the scores (`calibration`).

Rows are drawn evenly from the strata of PPL(Q), by a keyed hash of pair_id. Every defect takes the first of them in
which it is possible. So defects share their clean twins as far as they can, and differ in nothing but the defect.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import polars as pl

from qaq_pipeline.calibration import defects
from qaq_pipeline.calibration.defects import Others, Text
from qaq_pipeline.config.settings import CalibrationSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import PlantedRows, dtypes
from qaq_pipeline.schema.vocabularies import Defect, Status
from qaq_pipeline.selection.random_order import draws

ENOUGH = 20
"""Minimum number of planted rows for which a defect is judged: with 20, the interval of an AUROC of 0.9 is 0.2 wide."""

_LEAST_LOOKED_AT = 2000
_LOOKED_AT_FOR_EACH = 20
"""Most rows that are drawn for each row of a defect: some defects are impossible in most rows."""


def scorable_pairs(raw: pl.DataFrame, screened: pl.DataFrame, disagreement: pl.DataFrame) -> pl.DataFrame:
    """The distinct pairs that both models rank, with their texts and the strong model's stratum."""
    accepted = screened.filter(pl.col("status") == Status.ACCEPTED.value).select(ROW_KEY)
    ranked = to_long(disagreement.drop_nulls("gap"), "ranks", "pair_id").filter(pl.col("model") == "strong")
    texts = raw.join(accepted, on=ROW_KEY, how="semi")
    return texts.join(ranked.select("pair_id", "stratum"), on="pair_id", validate="1:1").select(
        "pair_id", "system", "query", "answer", "language", "stratum"
    )


def quotas(num_pairs: int, settings: CalibrationSettings) -> dict[Defect, int]:
    """The number of planted rows of each defect in a batch with so many scorable pairs.

    In the order of the settings each gets `ENOUGH`, up to floor(max_planted_share * num_pairs) in all. The rest is
    dealt evenly up to `max_rows_per_defect` each; remainders go to the first.
    """
    cap, wanted, share = settings.max_rows_per_defect, settings.defects, settings.max_planted_share
    # The decimal as it is written: 0.29 * 100 is 29.
    left = len(wanted) * cap if share is None else math.floor(Fraction(str(share)) * num_pairs)
    dealt = dict.fromkeys(wanted, 0)
    for defect in wanted:
        dealt[defect] = min(ENOUGH, cap, left)
        left -= dealt[defect]
    for defect in wanted * cap:
        if left > 0 and dealt[defect] < cap:
            dealt[defect] += 1
            left -= 1
    return dealt


def plant(pairs: pl.DataFrame, settings: CalibrationSettings) -> pl.DataFrame:
    """PlantedRows of a batch, sorted by pair_id.

    Args:
        pairs: the scorable pairs: pair_id, system, query, answer, language, stratum (of the strong model).
        settings: how many, which defects, the seed.
    """
    drawn = draw(pairs, settings)
    twins = [(row, _text(row)) for row in drawn.iter_rows(named=True)]
    others = _others(drawn["stratum"], [text for _, text in twins])
    planted: list[dict[str, Any]] = []
    taken = set(pairs["pair_id"])
    for defect, quota in quotas(pairs.height, settings).items():
        made = (
            _make(defect, *twin, others_of_it, settings.seed) for twin, others_of_it in zip(twins, others, strict=True)
        )
        new = (row for row in made if row is not None and row["pair_id"] not in taken)
        for row in itertools.islice(new, quota):
            taken.add(row["pair_id"])
            planted.append(row)
    return pl.DataFrame(planted, schema=dtypes(PlantedRows)).sort("pair_id")


def draw(pairs: pl.DataFrame, settings: CalibrationSettings) -> pl.DataFrame:
    """The rows that may get a defect, in order: one of every stratum by turns, each query once."""
    most = max(_LEAST_LOOKED_AT, _LOOKED_AT_FOR_EACH * settings.max_rows_per_defect)
    drawn = pairs.sort("pair_id").with_columns(draw=draws(pairs["pair_id"].sort(), settings.seed))
    distinct = drawn.sort("draw").unique(["system", "query"], keep="first", maintain_order=True)
    by_turns = distinct.with_columns(turn=pl.col("draw").rank("ordinal").over("stratum")).sort("turn", "draw")
    return by_turns.head(most)


def _others(strata: pl.Series, texts: Sequence[Text]) -> list[Others]:
    """For each row the others of its stratum, from the next one on and round, and those of the batch.

    Where texts are distinct, taking the next one is a derangement of the stratum: no row keeps its answer, and each
    answer is given once.
    """
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, stratum in enumerate(strata):
        places[stratum].append(place)
    found = {}
    for rows in places.values():
        for turn, place in enumerate(rows):
            after = rows[turn + 1 :] + rows[:turn]
            found[place] = Others([texts[other] for other in after[: _LOOKED_AT_FOR_EACH - 1]], texts)
    return [found[place] for place in range(len(texts))]


def _text(row: Mapping[str, Any]) -> Text:
    return Text(row["query"], row["answer"], defects.language_of(row["language"], row["answer"]))


def _make(defect: Defect, twin: Mapping[str, Any], text: Text, others: Others, seed: int) -> dict[str, Any] | None:
    made = defects.make(defect, text, others, f"{seed}:{twin['pair_id']}")
    if made is None:
        return None
    return {
        "pair_id": records.pair_id(twin["system"], made.query, made.answer),
        "defect": defect.value,
        "original_pair_id": twin["pair_id"],
        "system": twin["system"],
        "query": made.query,
        "answer": made.answer,
    }
