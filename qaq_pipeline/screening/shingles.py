"""Hashed words and word n-grams of texts, used to find near duplicates and benchmark text.

Belongs here: what a word is, how words and n-grams are hashed, and Jaccard similarity. Does not belong here: which
texts are compared.

The hash of a word is 64 bits of blake2b; the hash of an n-gram is a polynomial of its words' hashes. Both are the same
on every machine and with every library version, since signatures are stored.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts without spaces between words."""
WORD = rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}_]--[{_UNSPACED}]][[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]*"
"""A word, in lower case after NFKC: a run of letters, digits and underscores, or one character of a script that has no
spaces between words."""
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
        """Return the values of one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def row_of_value(self) -> NDArray[np.int64]:
        """For every value, the row it belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def pair_text() -> pl.Expr:
    """Build the text by which RawData pairs are compared: query and answer."""
    return pl.concat_str("query", "answer", separator="\n")


def history_text() -> pl.Expr:
    """Build the text of the earlier turns of RawData pairs, each after its role; null where there are none."""
    turn = pl.element().struct
    turns = pl.concat_str(turn.field("role"), turn.field("content"), separator=": ")
    return pl.col("history").list.eval(turns).list.join("\n")


def context_text() -> pl.Expr:
    """Build the text of what RawData pairs are in the context of: their system text and earlier turns."""
    return pl.concat_str("system", history_text(), separator="\n", ignore_nulls=True)


def published_text() -> pl.Expr:
    """Build the text of RawData pairs as training files have it: earlier turns, query, reasoning and answer."""
    return pl.concat_str(history_text(), "query", "reasoning", "answer", separator="\n", ignore_nulls=True)


def words(texts: pl.Series, pattern: str = WORD) -> pl.Series:
    """Extract the words of each text, in order."""
    frame = texts.alias("text").to_frame()
    return frame.select(pl.col("text").str.normalize("NFKC").str.to_lowercase().str.extract_all(pattern)).to_series()


def hash_words(found: pl.Series) -> Ragged:
    """Hash the words of each text, as `words` returns them."""
    lengths = found.list.len().to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = found.explode(empty_as_null=False).to_arrow().dictionary_encode()
    distinct = np.fromiter(map(hash_word, flat.dictionary.to_pylist()), dtype=np.uint64, count=len(flat.dictionary))
    return Ragged(distinct[flat.indices.to_numpy()], offsets)


@functools.lru_cache(maxsize=200_000)
def hash_word(word: str) -> int:
    """Hash a text to 64 bits."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def ngrams(hashed: Ragged, size: int) -> Ragged:
    """Hash the n-grams of each row of hashed words, in order and with repetitions.

    A row of fewer than `size` words has one n-gram, of all its words; a row without words has none.
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
    """Mix the bits, so that any part of them is a usable hash."""
    values = (values ^ (values >> np.uint64(33))) * _MIX
    return values ^ (values >> np.uint64(29))


def combine(parts: NDArray[np.uint32] | Hashes, seed: int) -> Hashes:
    """Combine each row of a matrix into one hash."""
    combined = np.full(len(parts), seed, dtype=np.uint64)
    for column in parts.T:
        combined = combined * _MULTIPLIER + column.astype(np.uint64)
    return _mixed(combined)


def jaccard(first: Hashes, second: Hashes) -> float:
    """Return |A & B| / |A | B| of two sorted sets without repetitions; 0 if both are empty."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - common
    return common / union if union else 0.0
