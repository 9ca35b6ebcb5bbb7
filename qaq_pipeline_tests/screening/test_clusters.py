"""clusters: the near-duplicate clusters of a batch and of older ones, against a naive loop over all pairs."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.ingest.records import pair_id
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.schema.tables import DISTINCT, Contamination, ScreenedData, dtypes, enforce
from qaq_pipeline.screening import duplicates, forbidden
from qaq_pipeline.screening.screen import screen, texts_of
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import raw_rows, rejected

WORDS = [f"{stem}{ending}" for stem in "abcdefghij" for ending in ("one", "two", "three", "four", "five")]
NO_BENCHMARK = pl.DataFrame(schema=dtypes(Contamination))


def settings(cluster_threshold: float = 0.9, near_threshold: float | None = None) -> ScreeningSettings:
    limits = {"cluster_threshold": cluster_threshold, "near_threshold": near_threshold}
    return ScreeningSettings.model_validate({"duplicates": limits})


def row(query: str, answer: str, **changes: Any) -> dict[str, Any]:
    return {"query": query, "answer": answer, "pair_id": pair_id(changes.get("system"), query, answer)} | changes


def screened_in_order(raws: Sequence[pl.DataFrame], how: ScreeningSettings) -> list[pl.DataFrame]:
    """The ScreenedData of batches, each screened against those before it."""
    made: list[pl.DataFrame] = []
    standing: list[pl.DataFrame] = []
    for number, raw in enumerate(raws):
        signed = duplicates.signatures(raw)
        older = [duplicates.Related(signed).among(frame) for frame in standing]
        texts = texts_of(map(StoredTable, raws[: number + 1]))
        made.append(
            enforce(ScreenedData, screen(raw, StoredTable(signed), NO_BENCHMARK, forbidden.NOTHING, older, texts, how))
        )
        distinct = made[-1].filter(pl.col("status").is_in(DISTINCT)).select(*ROW_KEY, "status", "cluster")
        standing.append(signed.join(distinct, on=ROW_KEY, maintain_order="left"))
    return made


def clusters_of(*raws: pl.DataFrame, **limits: Any) -> dict[str, str]:
    """The cluster of each distinct row of all batches."""
    frame = pl.concat(screened_in_order(raws, settings(**limits)))
    return dict(frame.select(row_place(), "cluster").drop_nulls().iter_rows())


# --- the naive loop


def grams(one: dict[str, Any]) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\s\w]", f"{one['query']}\n{one['answer']}".lower())
    return {tuple(words[start : start + 5]) for start in range(len(words) - 4)} or {tuple(words)}


def are_linked(one: dict[str, Any], other: dict[str, Any], threshold: float) -> bool:
    if one["query"].split() == other["query"].split():
        return True
    mine, its = grams(one), grams(other)
    return len(mine & its) / len(mine | its) >= threshold


def as_compared(one: dict[str, Any]) -> tuple[str, str]:
    """The texts by which rows are equal: white space counts, but at the end of a line."""
    query, answer = ("\n".join(line.rstrip() for line in one[name].splitlines()) for name in ("query", "answer"))
    return query.rstrip(), answer.rstrip()


def naive(batches: Sequence[Sequence[dict[str, Any]]], threshold: float) -> dict[str, str]:
    found: dict[str, str] = {}
    older: list[tuple[str, dict[str, Any]]] = []
    for number, rows in enumerate(batches):
        own = [(f"b{number}/a.jsonl:{place}.0", one) for place, one in enumerate(rows, start=1)]
        texts = {as_compared(one) for _, one in older}
        distinct = []
        for place, one in own:
            if as_compared(one) not in texts:
                distinct.append((place, one))
                texts.add(as_compared(one))
        component = {place: place for place, _ in distinct}
        for first, (place, one) in enumerate(distinct):
            for other_place, other in distinct[:first]:
                if are_linked(one, other, threshold):
                    merged = {component[place], component[other_place]}
                    component = {at: min(merged, key=_row) if of in merged else of for at, of in component.items()}
        for place, _ in distinct:
            members = [one for at, one in distinct if component[at] == component[place]]
            oldest = [at for at, other in older if any(are_linked(one, other, threshold) for one in members)]
            found[place] = found[oldest[0]] if oldest else component[place]
        older += distinct
    return found


def _row(place: str) -> int:
    return int(place.partition(":")[2][:-2])


_TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)
_ROWS = st.lists(st.tuples(_TEXTS, st.integers(0, 3), st.sampled_from([None, "same", "so  so", "so so"])), max_size=8)


@effort(max_examples=60)
@given(batches=st.lists(_ROWS, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_clusters_are_those_of_comparing_all_with_all(
    batches: list[list[tuple[str, int, str | None]]], seed: int
) -> None:
    pool = [text for rows in batches for text, _, _ in rows] or ["none"]
    random_ = random.Random(seed)
    made = []
    for rows in batches:
        texts = [(query or f"q {text}", _edited(text, edits, random_)) for text, edits, query in rows]
        texts += [(f"q {random_.choice(pool)}", _edited(random_.choice(pool), 1, random_)) for _ in rows]
        made.append([row(query, answer) for query, answer in texts])
    raws = [raw_rows(*rows, batch=f"b{number}") for number, rows in enumerate(made)]
    # At 0.9, one such pair in 10^9 shares no band.
    assert clusters_of(*raws) == naive(made, 0.9)


def _edited(text: str, edits: int, random_: random.Random) -> str:
    words = text.split()
    for _ in range(edits):
        words[random_.randrange(len(words))] = random_.choice(WORDS)
    return " ".join(words)


# --- examples

LONG = [" ".join(WORDS[start : start + 40]) for start in (0, 10)]


def test_a_row_without_a_similar_one_is_a_cluster_of_its_own_and_other_rows_have_none() -> None:
    raw = raw_rows(row("a", "b"), row("c", "d"), row("a", "b"), rejected(), batch="b0")
    assert clusters_of(raw) == {f"b0/a.jsonl:{number}.0": f"b0/a.jsonl:{number}.0" for number in (1, 2)}


def test_rows_are_in_one_cluster_through_a_third() -> None:
    raw = raw_rows(row("first", LONG[0]), row("second", LONG[1]), row("first", LONG[1]), batch="b0")
    assert set(clusters_of(raw, cluster_threshold=0.7).values()) == {"b0/a.jsonl:1.0"}
    assert len(set(clusters_of(raw, cluster_threshold=1.0).values())) == 2


def test_equal_queries_are_one_cluster_whatever_the_system_text() -> None:
    raw = raw_rows(row("Sort  a list", "x"), row("Sort a list ", "y", system="Be brief."), batch="b0")
    assert set(clusters_of(raw).values()) == {"b0/a.jsonl:1.0"}


def test_a_row_joins_the_cluster_of_the_oldest_row_and_older_clusters_stay_two() -> None:
    first = raw_rows(row("one", "x"), row("two", LONG[0]), batch="b0")
    second = raw_rows(row("three", "y"), row("one", LONG[0]), row("three", "z"), batch="b1")
    assert clusters_of(first, second) == {
        "b0/a.jsonl:1.0": "b0/a.jsonl:1.0",
        "b0/a.jsonl:2.0": "b0/a.jsonl:2.0",
        "b1/a.jsonl:1.0": "b1/a.jsonl:1.0",
        "b1/a.jsonl:2.0": "b0/a.jsonl:1.0",
        "b1/a.jsonl:3.0": "b1/a.jsonl:1.0",
    }


def test_a_duplicate_links_nothing() -> None:
    near = LONG[0] + " more"
    raw = raw_rows(row("one", LONG[0]), row("two", near), row("two", "other"), batch="b0")
    found = clusters_of(raw, near_threshold=0.7, cluster_threshold=0.7)
    assert found == {"b0/a.jsonl:1.0": "b0/a.jsonl:1.0", "b0/a.jsonl:3.0": "b0/a.jsonl:3.0"}
