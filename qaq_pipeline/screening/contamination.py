"""Benchmark contamination of training data: shared word n-grams, and verbatim solutions. No Dagster.

Belongs here: which rows contain a task's prompt or solution, and the evidence. Does not belong here: the formats of
benchmark files (`benchmarks`), or what happens to such a row (`screen`).

A row contains a text of a task if its query, reasoning and answer contain at least `min_ngram_share` of the text's
distinct word n-grams, and at least three of them (all, if the text has fewer). This measures containment, so neither
the row's length nor a light edit hides a task. A prompt too short for n-grams is found if the row contains its words
consecutively. A
solution is also found verbatim, ignoring white space, if it is long enough to be distinctive and not a trivial body.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from qaq_pipeline.config.settings import ContaminationSettings
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import ContaminationReason
from qaq_pipeline.screening import shingles
from qaq_pipeline.screening.benchmarks import Benchmark

VERSION = "3"
_MIN_NGRAMS = 3
_MIN_PROMPT_WORDS = 5
_ROWS_AT_ONCE = 10_000
_EVIDENCE_CHARACTERS = 200

READS = ("history", "query", "reasoning", "answer")
"""Columns of RawData in which tasks are searched for."""


@dataclass(frozen=True)
class _Part:
    """A text of a task to search for."""

    task_id: str
    reason: ContaminationReason
    text: str


def find(accepted: Iterable[pl.DataFrame], benchmark: Benchmark, settings: ContaminationSettings) -> pl.DataFrame:
    """Find the Contamination of RawData rows by a benchmark: for each row, the task with the highest share.

    Args:
        accepted: rows with a query and an answer, in parts.
        benchmark: the tasks.
        settings: n-gram length, minimum share, trivial solutions.
    """
    parts = _parts(benchmark, settings)
    index = _Index.of(parts, settings)
    columns = tables.dtypes(tables.Contamination)
    chunks = [
        _find(chunk, parts, index, settings).with_columns(benchmark=pl.lit(benchmark.name)).select(list(columns))
        for part in accepted
        for chunk in part.iter_slices(_ROWS_AT_ONCE)
    ]
    return pl.concat([pl.DataFrame(schema=columns), *chunks])


def _parts(benchmark: Benchmark, settings: ContaminationSettings) -> list[_Part]:
    trivial = {_plain(text) for text in settings.trivial_solutions}
    prompts = [_Part(task.task_id, ContaminationReason.BENCHMARK_PROMPT, task.prompt) for task in benchmark.tasks]
    solutions = [
        _Part(task.task_id, ContaminationReason.BENCHMARK_SOLUTION, task.solution)
        for task in benchmark.tasks
        if task.solution is not None and _plain(task.solution) not in trivial
    ]
    return [*prompts, *solutions]


def _plain(text: str) -> str:
    """Replace every run of white space by one space."""
    return " ".join(text.split())


@dataclass(frozen=True)
class _Index:
    """Search terms, each with the numbers of the parts that contain it."""

    grams: pl.DataFrame
    """gram, part: the distinct n-grams of every part; shorter parts have none."""
    sizes: NDArray[np.int64]
    """Number of n-grams of each part."""
    short_prompts: dict[str, int]
    """Prompts too short for n-grams, but longer than a phrase, by their words."""
    long_solutions: dict[str, int]
    """Solutions long enough to search for verbatim, with every run of white space as one space."""

    @classmethod
    def of(cls, parts: list[_Part], settings: ContaminationSettings) -> _Index:
        words = shingles.words(pl.Series([part.text for part in parts], dtype=pl.String))
        hashed = shingles.hash_words(words)
        lengths, in_words = np.diff(hashed.offsets), _in_words(words)
        is_long = lengths >= settings.ngram_words
        grams = shingles.ngrams(hashed, settings.ngram_words)
        frame = pl.DataFrame({"gram": grams.values, "part": grams.row_of_value()}).unique()
        frame = frame.filter(pl.Series(is_long).gather(frame["part"]))
        short_prompts = {
            in_words[number]: number
            for number, part in enumerate(parts)
            if part.reason is ContaminationReason.BENCHMARK_PROMPT
            and _MIN_PROMPT_WORDS <= lengths[number] < settings.ngram_words
        }
        long_solutions = {
            _plain(part.text): number
            for number, part in enumerate(parts)
            if part.reason is ContaminationReason.BENCHMARK_SOLUTION and lengths[number] >= settings.min_solution_words
        }
        sizes = np.bincount(frame["part"].to_numpy(), minlength=len(parts))
        return cls(frame, sizes, short_prompts, long_solutions)


def _find(rows: pl.DataFrame, parts: list[_Part], index: _Index, settings: ContaminationSettings) -> pl.DataFrame:
    text = rows.select(shingles.published_text()).to_series()
    words = shingles.words(text)
    by_words = _verbatim(_in_words(words), index.short_prompts)
    by_solution = _verbatim(text.str.replace_all(r"\s+", " "), index.long_solutions)
    hits = pl.concat([_by_ngrams(words, index, settings), by_words, by_solution])
    best = hits.sort("row", "share", "part", descending=[False, True, False]).unique(
        "row", keep="first", maintain_order=True
    )
    named = [(parts[part].task_id, parts[part].reason.value) for part in best["part"]]
    tasks = pl.DataFrame(named, schema={"task": pl.String, "reason": pl.String}, orient="row")
    return pl.concat([rows[best["row"]].select(ROW_KEY), tasks, best.select("share", "matched_text")], how="horizontal")


_HIT = {"row": pl.Int64, "part": pl.Int64, "share": pl.Float64, "matched_text": pl.String}


def _by_ngrams(words: pl.Series, index: _Index, settings: ContaminationSettings) -> pl.DataFrame:
    """Find rows that contain at least `min_ngram_share` of the n-grams of a part."""
    grams = shingles.ngrams(shingles.hash_words(words), settings.ngram_words)
    of_rows = pl.DataFrame(
        {
            "gram": grams.values,
            "row": grams.row_of_value(),
            "place": np.arange(len(grams.values)) - np.repeat(grams.offsets[:-1], np.diff(grams.offsets)),
        }
    )
    held = of_rows.join(index.grams, on="gram")
    shares = held.group_by("row", "part").agg(pl.col("gram").n_unique().alias("num"), pl.col("place").sort())
    sizes = pl.Series(index.sizes).gather(shares["part"])
    hits = shares.with_columns(share=pl.col("num") / sizes).filter(
        (pl.col("share") >= settings.min_ngram_share) & ((pl.col("num") >= _MIN_NGRAMS) | (pl.col("num") == sizes))
    )
    matched = [
        _longest_run(words[row].to_list(), places, settings.ngram_words)
        for row, places in hits.select("row", "place").iter_rows()
    ]
    return hits.with_columns(matched_text=pl.Series(matched, dtype=pl.String)).select(
        pl.col(name).cast(dtype) for name, dtype in _HIT.items()
    )


def _longest_run(found: list[str], places: list[int], ngram_words: int) -> str:
    """Return the text of the longest run of consecutive task n-grams in the row, cut to a readable length."""
    starts = np.array(places)
    runs = np.split(starts, np.flatnonzero(np.diff(starts) != 1) + 1)
    longest = max(runs, key=len)
    return " ".join(found[longest[0] : longest[-1] + ngram_words])[:_EVIDENCE_CHARACTERS]


def _in_words(words: pl.Series) -> pl.Series:
    """Join the words of each text by single spaces, with one at each end."""
    return pl.select(" " + pl.lit(words).list.join(" ") + " ").to_series()


def _verbatim(texts: pl.Series, wanted: dict[str, int]) -> pl.DataFrame:
    """Find rows that contain a wanted text verbatim."""
    if not wanted:
        return pl.DataFrame(schema=_HIT)
    return (
        texts.alias("text")
        .to_frame()
        .with_row_index("row")
        .select("row", matched=pl.col("text").str.extract_many(list(wanted), overlapping=True))
        .explode("matched", empty_as_null=False)
        .unique(maintain_order=True)
        .select(
            pl.col("row").cast(pl.Int64),
            pl.col("matched").replace_strict(wanted, return_dtype=pl.Int64).alias("part"),
            pl.lit(1.0).alias("share"),
            pl.col("matched").str.strip_chars().str.slice(0, _EVIDENCE_CHARACTERS).alias("matched_text"),
        )
    )
