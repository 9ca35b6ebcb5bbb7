"""How much of the query occurs in the answer, and of the answer in the query: direct evidence of copying.

Belongs here: the two shares, from texts alone. Does not belong here: what follows from them (`signals.echo`).
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from qaq_pipeline.screening import shingles
from qaq_pipeline.screening.shingles import Hashes, Ragged

WORDS = 4
"""Length of the compared word sequences. Single words are compared where a query has fewer words."""


def shares(texts: pl.DataFrame) -> pl.DataFrame:
    """pair_id, query_in_answer and answer_in_query, each from 0 to 1, in the order of the rows.

    Each is the share of the distinct sequences of `WORDS` words of one text that occur in the other; 0 where a text has
    no words.

    Args:
        texts: pair_id, query and answer.
    """
    queries, answers = (shingles.hash_words(shingles.words(texts[name])) for name in ("query", "answer"))
    is_short = np.diff(queries.offsets) < WORDS
    found = [
        np.where(is_short, by_word, by_sequence)
        for by_word, by_sequence in zip(_both(queries, answers, 1), _both(queries, answers, WORDS), strict=True)
    ]
    return texts.select(
        "pair_id", query_in_answer=pl.Series(found[0], dtype=pl.Float64), answer_in_query=pl.Series(found[1])
    )


def _both(queries: Ragged, answers: Ragged, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    of_queries, of_answers = (_distinct(shingles.ngrams(hashed, size)) for hashed in (queries, answers))
    num_rows = len(queries)
    return _share(of_queries, of_answers, num_rows), _share(of_answers, of_queries, num_rows)


def _distinct(grams: Ragged) -> tuple[Hashes, NDArray[np.int64]]:
    """The distinct sequences of every row, hashed together with their row, and the row of each."""
    rows = grams.row_of_value()
    keys, first = np.unique(shingles.combine(np.stack([grams.values, rows.astype(np.uint64)], axis=1), 0), True)
    return keys, rows[first]


def _share(
    own: tuple[Hashes, NDArray[np.int64]], other: tuple[Hashes, NDArray[np.int64]], num_rows: int
) -> NDArray[np.float64]:
    keys, rows = own
    total = np.bincount(rows, minlength=num_rows)
    common = np.bincount(rows[np.isin(keys, other[0], assume_unique=True)], minlength=num_rows)
    return np.divide(common, total, out=np.zeros(num_rows), where=total > 0)
