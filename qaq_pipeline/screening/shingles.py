"""Texts as sequences of hashed words, and sets of hashed word n-grams: what near duplicates and benchmark text share.

Belongs here: what a word is, how it and an n-gram are hashed, and Jaccard similarity. Does not belong here: what is
compared with what.

Hashes are 64 bits of blake2b of a word, and polynomials of them of an n-gram: the same on every machine and in every
version of every library, since signatures are stored.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

WORD = r"[\p{L}\p{N}_][\p{L}\p{M}\p{N}_]*"
"""A word: a run of letters, digits and underscores of any script, in lower case after NFKC."""
WORD_OR_SYMBOL = WORD + r"|[^\s\p{L}\p{N}_]\p{M}*"
"""A word, or a single symbol: `a > b` and `a < b` are not the same words."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_ABSENT = np.uint64(0)

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length, one after the other: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: Hashes
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def row(self, index: int) -> Hashes:
        """The values of one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def row_of_value(self) -> NDArray[np.int64]:
        """For every value, the row it belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def pair_text() -> pl.Expr:
    """The text of a pair that is compared, of a RawData: query and answer."""
    return pl.concat_str("query", "answer", separator="\n")


def words(texts: pl.Series, pattern: str = WORD) -> pl.Series:
    """The words of each text, in order."""
    frame = texts.alias("text").to_frame()
    return frame.select(pl.col("text").str.normalize("NFKC").str.to_lowercase().str.extract_all(pattern)).to_series()


def hash_words(found: pl.Series) -> Ragged:
    """The hashed words of each text, from its `words`."""
    lengths = found.list.len().to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = found.explode(empty_as_null=False).to_arrow().dictionary_encode()
    distinct = np.fromiter(map(hash_word, flat.dictionary.to_pylist()), dtype=np.uint64, count=len(flat.dictionary))
    return Ragged(distinct[flat.indices.to_numpy()], offsets)


@functools.lru_cache(maxsize=1_000_000)
def hash_word(word: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def ngrams(hashed: Ragged, size: int) -> Ragged:
    """The hashed n-grams of each row of hashed words, in order and with repetitions.

    A row of fewer than `size` words has one, of all of them; a row without words has none.
    """
    lengths = np.diff(hashed.offsets)
    counts = np.where(lengths == 0, 0, np.maximum(lengths - size + 1, 1))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    in_row = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    starts = np.repeat(hashed.offsets[:-1], counts) + in_row
    ends = np.repeat(hashed.offsets[1:], counts)
    grams = np.zeros(len(starts), dtype=np.uint64)
    for place in range(size):
        at = starts + place
        present = at < ends
        word = np.where(present, hashed.values[np.where(present, at, 0)], _ABSENT) if len(starts) else grams
        grams = (grams * _MULTIPLIER) + word
    return Ragged(_mixed(grams), offsets)


def _mixed(values: Hashes) -> Hashes:
    """Spread the bits, so that any part of them may stand for all."""
    values = (values ^ (values >> np.uint64(33))) * _MIX
    return values ^ (values >> np.uint64(29))


def combine(parts: NDArray[np.uint32] | Hashes, seed: int) -> Hashes:
    """One hash of each row of a matrix."""
    combined = np.full(len(parts), seed, dtype=np.uint64)
    for column in parts.T:
        combined = combined * _MULTIPLIER + column.astype(np.uint64)
    return _mixed(combined)


def jaccard(first: Hashes, second: Hashes) -> float:
    """|A & B| / |A | B| of two sets, each sorted and without repetitions; 0 where both are empty."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - common
    return common / union if union else 0.0
