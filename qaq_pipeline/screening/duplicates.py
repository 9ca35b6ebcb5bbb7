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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import numpy as np
import polars as pl

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.schema.vocabularies import DuplicateReason, Status
from qaq_pipeline.screening import flaws, shingles
from qaq_pipeline.screening.shingles import Hashes

NGRAM_WORDS = 5
NUM_BANDS, VALUES_PER_BAND = 25, 5
SIGNATURE_VERSION = "3"
"""Covers everything in a signature, including rensa's algorithm; signatures of two versions are not compared."""
_SEED = 5
_ROWS_AT_ONCE = 10_000
_MAX_STANDING = 32
"""Maximum rows of one band that a row is compared with: only bands of a template's words have more."""

Texts = Callable[[pl.DataFrame], pl.DataFrame]
"""Maps keys of rows to what is compared of each: text (as built by `shingles.pair_text`), answer, language."""


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
        bands=pl.Series(bands, dtype=pl.List(pl.UInt64)),
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


def _bands(grams: shingles.Ragged, salts: Hashes) -> list[list[int]]:
    """Compute the salted bands of each row; a row without words has none and no near duplicates."""
    from rensa import RMinHash  # type: ignore[import-untyped]

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        grams.values, grams.offsets.astype(np.uint64), NUM_BANDS * VALUES_PER_BAND, _SEED
    )
    digests = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(grams), NUM_BANDS, VALUES_PER_BAND)
    bands = np.stack([shingles.combine(digests[:, band], seed=band) for band in range(NUM_BANDS)], axis=1)
    bands ^= salts[:, None]
    has_words = np.diff(grams.offsets) > 0
    return [row if known else [] for row, known in zip(bands.tolist(), has_words, strict=True)]


def related(older: pl.DataFrame, own: pl.DataFrame) -> pl.DataFrame:
    """Return the older Signatures that share their query or a band with any own row; equal rows share their query."""
    bands = own.select(pl.col("bands").explode(empty_as_null=False).unique())
    by_band = (
        older.with_row_index("row")
        .select("row", "bands")
        .explode("bands", empty_as_null=False)
        .join(bands, on="bands", how="semi")["row"]
        .unique()
    )
    by_query = older.select((pl.col("query_hash").is_in(own["query_hash"].implode())).arg_true()).to_series()
    return older[pl.concat([by_band, by_query]).unique().sort()]


@dataclass(frozen=True)
class Found:
    """The duplicates in a batch, and the similar rows among those that are none."""

    duplicates: pl.DataFrame
    """Key, reason, duplicate_of, similarity, evidence."""
    distinct: pl.DataFrame
    """Signatures of the other rows, older ones first, with `order`, their place in it, and `is_own`."""
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
        own: Signatures of the batch's rows that may be selected.
        older: rows of older batches that may represent others, oldest first (`related` ones suffice).
        texts: returns the texts of rows; called only for rows with a candidate.
        near_threshold: minimum Jaccard similarity of near duplicates; None: find exact ones only.
        cluster_threshold: minimum Jaccard similarity of linked rows, not above near_threshold.
    """
    rows = pl.concat([*(frame.select(own.columns) for frame in older), own.sort(ROW_KEY)]).with_row_index("order")
    num_older = rows.height - own.height
    rows = rows.with_columns(first=pl.col("order").min().over("exact_hash"))
    firsts = rows.filter(pl.col("order") == pl.col("first"))
    thresholds = math.inf if near_threshold is None else near_threshold, cluster_threshold
    stands_for, similar = _near(firsts, num_older, texts, thresholds)
    found = [_duplicate(row, stands_for) for row in rows[num_older:].iter_rows(named=True) if _is_one(row, stands_for)]
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
    is_own = pl.col("order") >= num_older
    distinct = rows.drop("first").join(frame, on="order", how="anti", maintain_order="left").with_columns(is_own=is_own)
    by_words = pl.DataFrame(similar, schema=_LINKS, orient="row")
    return Found(duplicates, distinct, pl.concat([by_words, _same_query(distinct)]))


_LINKS = {"order": pl.UInt32, "earlier": pl.UInt32}


def _same_query(distinct: pl.DataFrame) -> pl.DataFrame:
    """Link each own row to the first own row with its query, and that one to the older rows with it."""
    own = distinct.filter("is_own").select("order", "query_hash", first=pl.col("order").min().over("query_hash"))
    firsts = own.filter(pl.col("order") == pl.col("first"))
    older = distinct.filter(~pl.col("is_own")).select("query_hash", earlier="order")
    return pl.concat(
        [
            firsts.join(older, on="query_hash").select("order", "earlier"),
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


def _is_one(row: dict[str, Any], stands_for: dict[int, tuple[int, float]]) -> bool:
    return row["order"] != row["first"] or row["order"] in stands_for


def _duplicate(row: dict[str, Any], stands_for: dict[int, tuple[int, float]]) -> tuple[int, int, str, float, str]:
    first = row["first"]
    if first in stands_for:
        of, similarity = stands_for[first]
        evidence = f"Jaccard similarity {similarity:.3f} of the {NGRAM_WORDS}-word sequences of query and answer"
        return row["order"], of, DuplicateReason.NEAR_DUPLICATE.value, similarity, evidence
    return (
        row["order"],
        first,
        DuplicateReason.EXACT_DUPLICATE.value,
        1.0,
        "equal but for the ends of lines or Unicode form",
    )


def _near(
    rows: pl.DataFrame, num_older: int, texts: Texts, thresholds: tuple[float, float]
) -> tuple[dict[int, tuple[int, float]], list[tuple[int, int]]]:
    """Return, for each own row near another one, that row's order and the similarity; and the links of the others.

    Args:
        rows: Signatures, the first of each content, with their order.
        num_older: the order of the first own row.
        texts: returns the texts of rows.
        thresholds: minimum similarity of near duplicates, and of linked rows.
    """
    in_common = _shared_bands(rows, num_older)
    candidates = _Candidates(rows.join(in_common.select("order"), on="order", how="semi"), texts)
    search = _Search(dict(in_common.iter_rows()), num_older, candidates, thresholds)
    for order in in_common["order"]:
        search.place(order)
    return search.found, [link for link in search.links if search.found.keys().isdisjoint(link)]


class _Search:
    """The rows that stand for others so far, in each band, and what was found of the others."""

    def __init__(
        self, bands: dict[int, list[int]], num_older: int, candidates: _Candidates, thresholds: tuple[float, float]
    ) -> None:
        self._bands, self._num_older, self._candidates, self._thresholds = bands, num_older, candidates, thresholds
        self._standing: dict[int, list[int]] = {}
        self._duplicates_of: dict[int, list[int]] = {}
        self.found: dict[int, tuple[int, float]] = {}
        self.links: list[tuple[int, int]] = []

    def place(self, order: int) -> None:
        """Find what represents a row, or let it stand, in place of rows of its batch that are near but worse."""
        flawed: list[int] = []
        if order >= self._num_older:
            shared = (self._standing.get(band, ()) for band in self._bands[order])
            others = {other for of_band in shared if len(of_band) < _MAX_STANDING for other in of_band}
            others -= self.found.keys() | {order}
            near, flawed, similar = self._candidates.compare(order, sorted(others), self._thresholds)
            if near is not None:
                self.found[order] = near
                self._duplicates_of.setdefault(near[0], []).append(order)
                return
            self.links += [(max(order, other), min(order, other)) for other in (*flawed, *similar)]
        for band in self._bands[order]:
            rows_of = self._standing.setdefault(band, [])
            if len(rows_of) < _MAX_STANDING and order not in rows_of:
                rows_of.append(order)
        for other in flawed:
            if other >= self._num_older:
                self._replace(other, order)

    def _replace(self, other: int, order: int) -> None:
        """Make a row the duplicate of a better one; what it stood for is placed again."""
        self.found[other] = order, self._candidates.similarity(other, order)
        self._duplicates_of.setdefault(order, []).append(other)
        freed = self._duplicates_of.pop(other, [])
        for duplicate in freed:
            del self.found[duplicate]
        for duplicate in freed:
            self.place(duplicate)


class _Candidates:
    """The rows that share a band with another row: how similar they are, and which may represent which."""

    def __init__(self, rows: pl.DataFrame, texts: Texts) -> None:
        self._ngrams: dict[int, Hashes] = {}
        self._answers: dict[int, tuple[str, str | None]] = {}
        for chunk in rows.iter_slices(_ROWS_AT_ONCE):
            found = texts(chunk.select(ROW_KEY))
            grams = _ngrams(found["text"])
            self._ngrams |= {order: np.unique(grams.row(index)) for index, order in enumerate(chunk["order"])}
            self._answers |= dict(zip(chunk["order"], found.select("answer", "language").iter_rows(), strict=True))

    def similarity(self, one: int, other: int) -> float:
        """Jaccard similarity of two rows."""
        return shingles.jaccard(self._ngrams[one], self._ngrams[other])

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
                if not flaws.is_worse(self._answers[earlier], self._answers[own]):
                    return (earlier, similarity), [], []
                flawed.append(earlier)
            elif similarity >= cluster_threshold:
                similar.append(earlier)
        return None, flawed, similar


def _shared_bands(rows: pl.DataFrame, num_older: int) -> pl.DataFrame:
    """Return each row's order and the bands that several rows share, at least one of them an own row."""
    of_rows = rows.sort("order").select("order", "bands").explode("bands", empty_as_null=False)
    bands, orders = of_rows["bands"].to_numpy(), of_rows["order"].to_numpy()
    by_band = np.argsort(bands, kind="stable")  # Within a band, the order of the rows: the last row is the newest.
    ends = np.flatnonzero(np.append(bands[by_band][1:] != bands[by_band][:-1], True)) if len(bands) else by_band
    sizes = np.diff(ends, prepend=-1)
    is_wanted = (sizes > 1) & (orders[by_band[ends]] >= num_older)
    shared = of_rows[np.sort(by_band[np.repeat(is_wanted, sizes)])]
    return shared.group_by("order", maintain_order=True).agg("bands")
