"""Duplicates of rows, in the same batch and in older ones: exact after normalisation, or near by words. No Dagster.

Belongs here: the signatures of rows, which row represents which, and which of the other rows are similar. Does not
belong here: which rows may be representatives at all (`screen`), what follows from similar rows (`clusters`), or what a
word is (`shingles`).

Rows are equal if their texts are, up to Unicode form, line ends, and white space at the end of lines: indentation and
line ends mean something in code. Near duplicates have the same system text and similar sets of word 5-grams over query
and answer. MinHash bands find candidates (Broder 1997; 25 bands of 5 values: Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, 3.4). Their exact Jaccard similarity decides: a false candidate costs time, never a row. A pair of
similarity s is a candidate with probability 1 - (1 - s**5)**25: 0.9999 at 0.8, 0.99 at 0.7, 0.87 at 0.6, 0.55 at 0.5. A
band that 32 representatives share comes from a template's words and gives no candidates any more. If one template makes
up most of every row in a batch, a pair is found by the bands of its own words.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
import polars as pl
from numpy.typing import NDArray

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY, by_key, row_place
from qaq_pipeline.schema.vocabularies import DuplicateReason, Status
from qaq_pipeline.screening import flaws, shingles
from qaq_pipeline.screening.shingles import Hashes

NGRAM_WORDS = 5
NUM_BANDS, VALUES_PER_BAND = 25, 5
SIGNATURE_VERSION = "3"
"""Covers everything in a signature, including rensa's algorithm; signatures of two versions are not compared."""
TEXTS = ("system", "history", "query", "answer")
"""Columns of RawData that a signature depends on."""
COMPARED = [*ROW_KEY, "pair_id", "exact_hash", "query_hash", "bands"]
"""Columns of Signatures by which rows are compared."""
_SEED = 5
_ROWS_AT_ONCE = 10_000
_MAX_STANDING = 32
"""Maximum rows of one band that a row is compared with: only bands of a template's words have more."""
_BEGINNING = 22
"""Bits of a hash that rule out most unknown hashes."""
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""An odd factor that makes every bit of a number count for its first ones."""

Texts = Callable[[pl.DataFrame], Iterable[pl.DataFrame]]
"""Maps order and keys of rows to what is compared of each, in parts: order, text (as built by `shingles.pair_text`),
query, answer, language."""


def signatures(raw: pl.DataFrame) -> pl.DataFrame:
    """Compute the Signatures of accepted RawData rows, in key order."""
    accepted = raw.filter(pl.col("status") == Status.ACCEPTED.value).sort(ROW_KEY)
    chunks = [_signed(chunk) for chunk in accepted.iter_slices(_ROWS_AT_ONCE)]
    return pl.concat([pl.DataFrame(schema=tables.dtypes(tables.Signatures)), *chunks])


def _signed(accepted: pl.DataFrame) -> pl.DataFrame:
    parts = accepted.select(shingles.context_text().alias("context"), "query", "answer")
    normal, exact = (parts.select(map(text, parts.columns)) for text in (normal_text, exact_text))
    hashes, exact_hashes = (list(starmap(_hash_content, of.rows())) for of in (normal, exact))
    salts = np.array([shingles.hash_word(context) for context in normal["context"]], dtype=np.uint64)
    queries = [hashlib.blake2b(query.encode(), digest_size=16).hexdigest() for query in normal["query"]]
    bands = _bands(_ngrams(accepted.select(shingles.pair_text()).to_series()), salts)
    return accepted.select(
        *ROW_KEY,
        "pair_id",
        content_hash=pl.Series(hashes, dtype=pl.String),
        exact_hash=pl.Series(exact_hashes, dtype=pl.String),
        query_hash=pl.Series(queries, dtype=pl.String),
        bands=bands,
    )


def normal_text(column: str) -> pl.Expr:
    """The text of a column by which queries are equal: after NFC, with each run of white space as one space."""
    return pl.col(column).fill_null("").str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()


def exact_text(column: str) -> pl.Expr:
    """The text of a column by which rows are equal: after NFC, with a line feed as line end and no blank before it."""
    lines = pl.col(column).fill_null("").str.normalize("NFC").str.replace_all(r"\r\n?", "\n")
    return lines.str.replace_all(r"[^\S\n]+\n", "\n").str.strip_chars_end()


def _hash_content(context: str, query: str, answer: str) -> str:
    content = f"{len(context)} {len(query)} {context}{query}{answer}"
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _ngrams(texts: pl.Series) -> shingles.Ragged:
    return shingles.ngrams(shingles.hash_words(shingles.words(texts, shingles.WORD_OR_SYMBOL)), NGRAM_WORDS)


def _bands(grams: shingles.Ragged, salts: Hashes) -> pl.Series:
    """Compute the salted bands of each row, as a list; a row without words has none and no near duplicates."""
    from rensa import RMinHash  # type: ignore[import-untyped]

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        grams.values, grams.offsets.astype(np.uint64), NUM_BANDS * VALUES_PER_BAND, _SEED
    )
    digests = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(grams), NUM_BANDS, VALUES_PER_BAND)
    bands = np.stack([shingles.combine(digests[:, band], seed=band) for band in range(NUM_BANDS)], axis=1)
    bands ^= salts[:, None]
    of_rows = pl.DataFrame({"bands": bands, "has_words": np.diff(grams.offsets) > 0})
    lists = pl.col("bands").arr.to_list()
    return of_rows.select(pl.when("has_words").then(lists).otherwise(pl.lit([], pl.List(pl.UInt64)))).to_series()


class Related:
    """Finds the rows of other batches that may be similar to a batch's own rows.

    Args:
        own: Signatures of the batch.
    """

    def __init__(self, own: pl.DataFrame) -> None:
        self._bands = _Known(own["bands"].explode(empty_as_null=False).to_numpy())
        self._queries = _Known(_number(own["query_hash"]))

    def among(self, others: pl.DataFrame) -> pl.DataFrame:
        """The Signatures that share their query or a band with any own row; equal rows share their query."""
        bands = others.with_row_index("row").select("row", "bands").explode("bands", empty_as_null=False)
        by_band = bands["row"].to_numpy()[self._bands.places_in(bands["bands"].to_numpy())]
        by_query = self._queries.places_in(_number(others["query_hash"]))
        return others[np.union1d(by_band, by_query)]


def _number(hashes: pl.Series) -> Hashes:
    """The first 64 bits of hashes of hex digits."""
    return hashes.str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64).to_numpy()


class _Known:
    """Hashes that are looked up among a hundred million others, of which few are known."""

    def __init__(self, hashes: Hashes) -> None:
        self._sorted = np.unique(hashes)
        self._beginnings = np.zeros(1 << _BEGINNING, dtype=bool)
        self._beginnings[_beginnings(self._sorted)] = True

    def places_in(self, values: Hashes) -> NDArray[np.int64]:
        """The places of those values that are known."""
        places = np.flatnonzero(self._beginnings[_beginnings(values)])  # Small enough for the processor's cache.
        likely = values[places]
        found = np.minimum(np.searchsorted(self._sorted, likely), len(self._sorted) - 1)
        return places[self._sorted[found] == likely]


def _beginnings(hashes: Hashes) -> Hashes:
    return (hashes * _SPREAD) >> np.uint64(64 - _BEGINNING)


@dataclass(frozen=True)
class Found:
    """The duplicates in a batch, and the similar rows among those that are none."""

    duplicates: pl.DataFrame
    """Key, reason, duplicate_of, similarity, evidence."""
    distinct: pl.DataFrame
    """Key and pair_id of the other rows, older ones first, with `order`, their place in it, `is_own`, and
    `same_query`, which rows with one query share."""
    links: pl.DataFrame
    """order, earlier: own rows, each with an earlier row (own or older) that has the same query or is similar. Of rows
    with one query, only the first own row is linked to the older ones, and the others to it."""


def find(
    own: pl.DataFrame,
    older: Sequence[pl.DataFrame],
    texts: Texts,
    near_threshold: float | None,
    cluster_threshold: float = 1.0,
) -> Found:
    """Find the duplicates in a batch, and the links between its other rows and to older ones.

    A row is compared with those before it, oldest first: the rows of older batches, then its own batch's in key
    order. The first equal or near row represents it, unless its code is flawed (`flaws`) and the row's is not: then
    the row represents it, or both stay if it is of an older batch. A duplicate represents no other row, and is linked
    to none.

    Args:
        own: `COMPARED` of the batch's rows that may be selected.
        older: rows of older batches that may represent others, oldest first (`Related` ones suffice).
        texts: returns the texts of rows; called once, for the rows with a candidate.
        near_threshold: minimum Jaccard similarity of near duplicates; None: find exact ones only.
        cluster_threshold: minimum Jaccard similarity of linked rows, not above near_threshold.
    """
    signed = pl.concat([*(frame.select(COMPARED) for frame in older), by_key(own.select(COMPARED))])
    bands, num_older, order = signed["bands"], signed.height - own.height, pl.col("order")
    rows = (
        signed.drop("bands")
        .with_row_index("order")
        .with_columns(first=order.min().over("exact_hash"), same_query=order.min().over("query_hash"))
        .drop("exact_hash", "query_hash")
    )
    thresholds = math.inf if near_threshold is None else near_threshold, cluster_threshold
    stands_for, similar = _near(rows, bands, num_older, texts, thresholds)
    is_one = (order != pl.col("first")) | order.is_in(list(stands_for))
    ones = rows[num_older:].filter(is_one).select("order", "first")
    found = [_duplicate(number, first, stands_for) for number, first in ones.iter_rows()]
    frame = pl.DataFrame(found, schema=_DUPLICATES, orient="row")
    pairs, of = rows[frame["order"]], rows[frame["duplicate_of"]]
    duplicates = pairs.select(
        *ROW_KEY,
        frame["reason"],
        of.select(duplicate_of=row_place()).to_series(),
        frame["similarity"],
        evidence=pl.when(pairs["pair_id"] == of["pair_id"])
        .then(pl.lit("equal system text, query and answer"))
        .otherwise(frame["evidence"]),
    )
    distinct = (
        rows.drop("first")
        .join(frame, on="order", how="anti", maintain_order="left")
        .with_columns(is_own=order >= num_older)
    )
    by_words = pl.DataFrame(similar, schema=_LINKS, orient="row")
    return Found(duplicates, distinct, pl.concat([by_words, _same_query(distinct)]))


_LINKS = {"order": pl.UInt32, "earlier": pl.UInt32}


def _same_query(distinct: pl.DataFrame) -> pl.DataFrame:
    """Link each own row to the first own row with its query, and that one to the older rows with it."""
    own = distinct.filter("is_own").select("order", "same_query", first=pl.col("order").min().over("same_query"))
    firsts = own.filter(pl.col("order") == pl.col("first"))
    older = distinct.filter(~pl.col("is_own")).select("same_query", earlier="order")
    return pl.concat(
        [
            firsts.join(older, on="same_query").select("order", "earlier"),
            own.filter(pl.col("order") != pl.col("first")).select("order", earlier="first"),
        ]
    )


_DUPLICATES = {
    "order": pl.UInt32,
    "duplicate_of": pl.UInt32,
    "reason": pl.String,
    "similarity": pl.Float64,
    "evidence": pl.String,
}


def _duplicate(order: int, first: int, stands_for: dict[int, tuple[int, float]]) -> tuple[int, int, str, float, str]:
    if first in stands_for:
        of, similarity = stands_for[first]
        evidence = f"Jaccard similarity {similarity:.3f} of the {NGRAM_WORDS}-word sequences of query and answer"
        return order, of, DuplicateReason.NEAR_DUPLICATE.value, similarity, evidence
    return order, first, DuplicateReason.EXACT_DUPLICATE.value, 1.0, "equal but for the ends of lines or Unicode form"


def _near(
    rows: pl.DataFrame, bands: pl.Series, num_older: int, texts: Texts, thresholds: tuple[float, float]
) -> tuple[dict[int, tuple[int, float]], list[tuple[int, int]]]:
    """Return, for each own row near another one, that row's order and the similarity; and the links of the others.

    Args:
        rows: keys of rows, with their order and that of the first row of their content.
        bands: of these rows.
        num_older: the order of the first own row.
        texts: returns the texts of rows.
        thresholds: minimum similarity of near duplicates, and of linked rows.
    """
    shared = _SharedBands.of(bands, (rows["order"] == rows["first"]).to_numpy(), num_older)
    candidates = _Candidates(rows[shared.orders].select("order", *ROW_KEY), texts)
    search = _Search(shared, num_older, candidates, thresholds)
    for order in shared.orders.tolist():
        search.place(order)
    return search.found, [link for link in search.links if search.found.keys().isdisjoint(link)]


@dataclass(frozen=True)
class _SharedBands:
    """The bands that several rows share, at least one of them an own row. A band is named by a number."""

    orders: NDArray[np.uint32]
    """The rows with such a band, in order."""
    of_row: dict[int, array[int]]
    """The bands of each of these rows, by its order."""
    sizes: array[int]
    """Number of rows of each band."""

    @classmethod
    def of(cls, bands: pl.Series, is_compared: NDArray[np.bool_], num_older: int) -> _SharedBands:
        """Of the rows that are compared, one place in the lists of bands at a time: no band stands in two places."""
        orders, numbers, sizes = ([np.empty(0, dtype=np.uint32)] for _ in range(3))
        num_bands = 0
        for place in range(int(bands.list.len().to_numpy().max(initial=0))):
            values = bands.list.get(place, null_on_oob=True)
            rows = np.flatnonzero(is_compared & values.is_not_null().to_numpy()).astype(np.uint32)
            of_rows = values.gather(rows).to_numpy()
            by_band = np.argsort(of_rows, kind="stable")  # Within a band, in the order of the rows.
            rows, of_rows = rows[by_band], of_rows[by_band]
            ends = np.flatnonzero(np.append(of_rows[1:] != of_rows[:-1], True)) if len(rows) else by_band
            of_band = np.diff(ends, prepend=-1)
            is_wanted = (of_band > 1) & (rows[ends] >= num_older)
            orders.append(rows[np.repeat(is_wanted, of_band)])
            sizes.append(of_band[is_wanted].astype(np.uint32))
            names = np.arange(num_bands, num_bands + len(sizes[-1]), dtype=np.uint32)
            numbers.append(np.repeat(names, sizes[-1]))
            num_bands += len(names)
        of_bands, named = np.concatenate(orders), np.concatenate(numbers)
        by_row = np.argsort(of_bands, kind="stable")
        found, starts = np.unique(of_bands[by_row], return_index=True)
        parts = np.split(named[by_row], starts[1:]) if len(found) else []
        of_row = {order: array("I", part.tobytes()) for order, part in zip(found.tolist(), parts, strict=True)}
        return cls(found, of_row, array("I", np.concatenate(sizes).astype(np.uint32).tobytes()))


class _Search:
    """The rows that stand for others so far, in each band, and what was found of the others."""

    def __init__(
        self, bands: _SharedBands, num_older: int, candidates: _Candidates, thresholds: tuple[float, float]
    ) -> None:
        self._bands, self._num_older, self._candidates, self._thresholds = (
            bands.of_row,
            num_older,
            candidates,
            thresholds,
        )
        room = np.minimum(np.frombuffer(bands.sizes, dtype=np.uint32), _MAX_STANDING).astype(np.uint64)
        self._starts = array("Q", np.concatenate([[0], np.cumsum(room)]).astype(np.uint64).tobytes())
        self._standing = array("I", bytes(4 * self._starts[-1]))
        """The rows that stand, band after band, each with room for as many as it may have."""
        self._num_standing = array("B", bytes(len(room)))
        self._duplicates_of: dict[int, list[int]] = {}
        self._replaced: set[int] = set()
        """Each row is replaced once: which of three rows is the worst may have no answer."""
        self.found: dict[int, tuple[int, float]] = {}
        self.links: list[tuple[int, int]] = []

    def place(self, order: int) -> None:
        """Find what represents a row, or let it stand, in place of rows of its batch that are near but worse."""
        flawed: list[int] = []
        if order >= self._num_older:
            others = {
                other
                for band in self._bands[order]
                if self._num_standing[band] < _MAX_STANDING
                for other in self._standing_in(band)
            }
            others -= self.found.keys() | {order}
            near, flawed, similar = self._candidates.compare(order, sorted(others), self._thresholds)
            if near is not None:
                self.found[order] = near
                self._duplicates_of.setdefault(near[0], []).append(order)
                return
            self.links += [(max(order, other), min(order, other)) for other in (*flawed, *similar)]
        for band in self._bands[order]:
            if self._num_standing[band] < _MAX_STANDING and order not in self._standing_in(band):
                self._standing[self._starts[band] + self._num_standing[band]] = order
                self._num_standing[band] += 1
        for other in flawed:
            if other >= self._num_older and other not in self._replaced:
                self._replace(other, order)

    def _standing_in(self, band: int) -> array[int]:
        start = self._starts[band]
        return self._standing[start : start + self._num_standing[band]]

    def _replace(self, other: int, order: int) -> None:
        """Make a row the duplicate of a better one; what it stood for is placed again."""
        self._replaced.add(other)
        self.found[other] = order, self._candidates.similarity(other, order)
        self._duplicates_of.setdefault(order, []).append(other)
        freed = self._duplicates_of.pop(other, [])
        for duplicate in freed:
            del self.found[duplicate]
        for duplicate in freed:
            self.place(duplicate)


class _Candidates:
    """The rows that share a band with another row: how similar they are, and which may represent which.

    Args:
        rows: their order and keys.
        texts: returns their texts.
    """

    def __init__(self, rows: pl.DataFrame, texts: Texts) -> None:
        codes, grams, orders = [], [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint32)]
        lengths = [0]
        for found in texts(rows):
            ragged = _ngrams(found["text"])
            distinct = [np.unique(ragged.row(index)) for index in range(len(ragged))]
            grams += [np.concatenate(distinct)] if distinct else []
            lengths += map(len, distinct)
            orders.append(found["order"].to_numpy())
            codes.append(found.select(flaws.Texts._fields))
        self._place = np.zeros(int(rows["order"].to_numpy().max(initial=0)) + 1, dtype=np.uint32)
        of_rows = np.concatenate(orders)
        self._place[of_rows] = np.arange(len(of_rows), dtype=np.uint32)
        self._ngrams = shingles.Ragged(np.concatenate(grams), np.cumsum(lengths))
        self._codes = pl.concat(codes) if codes else pl.DataFrame()

    def similarity(self, one: int, other: int) -> float:
        """Jaccard similarity of two rows."""
        return shingles.jaccard(*(self._ngrams.row(self._place[order]) for order in (one, other)))

    def _code(self, order: int) -> flaws.Texts:
        return flaws.Texts(*self._codes.row(int(self._place[order])))

    def compare(
        self, own: int, others: Sequence[int], thresholds: tuple[float, float]
    ) -> tuple[tuple[int, float] | None, list[int], list[int]]:
        """Return the first row that may represent this one, with the similarity.

        Else return the rows that are near but have worse code, and those that are linked.
        """
        near_threshold, cluster_threshold = thresholds
        flawed, similar = [], []
        for earlier in others:
            similarity = self.similarity(earlier, own)
            if similarity >= near_threshold:
                if not flaws.is_worse(self._code(earlier), self._code(own)):
                    return (earlier, similarity), [], []
                flawed.append(earlier)
            elif similarity >= cluster_threshold:
                similar.append(earlier)
        return None, flawed, similar
