"""copying: the shares are those of a loop over words, and a row's words count for that row alone."""

from __future__ import annotations

from random import Random

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from qaq_pipeline.screening import shingles
from qaq_pipeline.validity import copying
from qaq_pipeline.validity.copying import WORDS

Rows = list[tuple[str, str]]

# Few words, so that sequences repeat; parts that are no words; a wide `s`, which NFKC makes a plain one.
PARTS = st.sampled_from(["a", "b", "c", "A", "sort", "\uff53ort", "x_1", "日本", "+", "->", "\n", ""])
TEXTS = st.lists(PARTS, max_size=12).map(" ".join)


def texts(rows: Rows) -> pl.DataFrame:
    columns = {"pair_id": [f"{number:032x}" for number in range(len(rows))]}
    columns |= {name: [row[place] for row in rows] for place, name in enumerate(("query", "answer"))}
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def shares(*rows: tuple[str, str]) -> list[tuple[float, float]]:
    """query_in_answer and answer_in_query of each row."""
    return copying.shares(texts(list(rows))).select("query_in_answer", "answer_in_query").rows()


def naive(query: str, answer: str) -> tuple[float, float]:
    """|Q & A| / |Q| and |Q & A| / |A| of the sets of word sequences; 0 for an empty set."""
    of_query, of_answer = (shingles.words(pl.Series([text]))[0].to_list() for text in (query, answer))
    size = WORDS if len(of_query) >= WORDS else 1
    own, other = sequences(of_query, size), sequences(of_answer, size)
    in_answer, in_query = (len(own & other) / len(one) if one else 0.0 for one in (own, other))
    return in_answer, in_query


def sequences(words: list[str], size: int) -> set[tuple[str, ...]]:
    """Every run of `size` words; of fewer words, all of them."""
    return {tuple(words[start : start + size]) for start in range(max(1, len(words) - size + 1))} if words else set()


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=8))
@effort(max_examples=200)
def test_the_shares_are_those_of_a_loop_over_words(rows: Rows) -> None:
    assert shares(*rows) == [naive(*row) for row in rows]


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), st.randoms(use_true_random=False))
@effort(max_examples=50)
def test_a_row_has_the_shares_that_it_has_alone_in_the_order_of_the_rows(rows: Rows, random: Random) -> None:
    random.shuffle(rows)
    found = copying.shares(texts(rows))
    assert found["pair_id"].to_list() == texts(rows)["pair_id"].to_list()
    assert found.drop("pair_id").rows() == [pair for row in rows for pair in shares(row)]


def test_words_of_another_row_never_count() -> None:
    query = "reverse a list of numbers in place"
    assert shares((query, "unrelated"), ("unrelated", query)) == [(0.0, 0.0), (0.0, 0.0)]
    assert shares((query, query), (query, "unrelated")) == [(1.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("query", "answer", "expected"),
    [
        pytest.param("sort a list now", "sort a list now", (1.0, 1.0), id="echo"),
        pytest.param("sort a list now", "Sure: SORT a-list\nnow!", (1.0, 0.5), id="echo after a word"),
        pytest.param("sort a list now", "now list a sort", (0.0, 0.0), id="same words in another order"),
        pytest.param("sort a list now", "sort a list", (0.0, 0.0), id="an answer shorter than a sequence"),
        pytest.param("sort lists", "lists are sorted by sort", (1.0, 0.4), id="a short query by single words"),
        pytest.param("go go go", "go", (1.0, 1.0), id="repeated words count once"),
        pytest.param("Hi", "Hello", (0.0, 0.0), id="a short query that is not repeated"),
        pytest.param("sort a list now", "+-*/", (0.0, 0.0), id="an answer of symbols"),
        pytest.param("a >= b ?", "a <= b !", (1.0, 1.0), id="symbols are no words"),
        pytest.param("???", "???", (0.0, 0.0), id="only symbols on both sides"),
        pytest.param("", "", (0.0, 0.0), id="no text"),
    ],
)
def test_the_shares_of_small_texts(query: str, answer: str, expected: tuple[float, float]) -> None:
    assert shares((query, answer)) == [expected]


def test_no_rows_give_no_shares_of_the_same_types() -> None:
    none, one = copying.shares(texts([])), copying.shares(texts([("a", "a")]))
    assert none.is_empty()
    assert none.schema == one.schema
