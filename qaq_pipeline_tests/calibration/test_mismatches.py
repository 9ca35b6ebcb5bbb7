"""mismatches: which row gets whose answer, and that no answer is given twice without need."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from qaq_pipeline.calibration.defects import Text
from qaq_pipeline.calibration.mismatches import other_answers

WORDS = ("sort", "reverse", "count", "parse", "draw", "merge", "hash", "split")
QUERIES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


def rows(*pairs: tuple[str, str]) -> list[Text]:
    return [Text(query, answer) for query, answer in pairs]


def is_near(query: str, other: str) -> bool:
    words, others = (set(re.findall(r"\w+", text.lower())) for text in (query, other))
    return len(words & others) / len(words | others) >= 0.5


def test_where_every_query_differs_each_row_gets_the_answer_of_the_next_one() -> None:
    texts = rows(*((word, f"answer {word}") for word in WORDS))
    found = other_answers(texts, 100)
    assert found == {place: texts[(place + 1) % len(texts)].answer for place in range(len(texts))}
    assert other_answers(texts, 3) == {place: found[place] for place in range(3)}


def test_a_row_gets_no_answer_of_a_near_query_and_none_like_its_own() -> None:
    texts = rows(("Sort the list", "a = 1"), ("sort a list!", "b"), ("draw", "a=1\n"), ("hash", "c"))
    assert other_answers(texts, 1) == {0: "c"}
    assert other_answers(texts[:3], 3) == {2: "b"}


def test_an_answer_that_a_near_query_has_too_is_not_given() -> None:
    texts = rows(("sort the list", "a"), ("draw", "b"), ("sort the list again", "b"), ("hash", "c"))
    assert other_answers(texts, 1) == {0: "c"}


def test_an_answer_that_many_queries_have_counts_once_and_is_given_again_where_there_is_no_other() -> None:
    texts = rows(("sort", "yes"), ("draw", "no"), ("hash", "yes"), ("count", " y e s"), ("merge", "no"))
    assert other_answers(texts, 9) == {0: "no", 1: "yes", 2: "no", 3: "no", 4: "yes"}


def test_an_earlier_row_passes_its_answer_on_where_a_later_one_can_have_no_other() -> None:
    texts = rows(("sort lists", "0"), ("draw", "1"), ("count words", "2"), ("sort lists, count words", "3"))
    # The next free ones would be 1, 2, 0, and none for the last row, which can have 1 only.
    assert other_answers(texts, 4) == {0: "2", 1: "3", 2: "0", 3: "1"}


@given(st.lists(st.tuples(QUERIES, st.sampled_from("abcdef")), max_size=12, unique_by=lambda pair: pair[0]))
def test_answers_fit_and_as_many_are_distinct_as_can_be(pairs: list[tuple[str, str]]) -> None:
    texts = rows(*pairs)
    found = other_answers(texts, len(texts))
    answers = sorted({text.answer for text in texts})
    fits = np.array(
        [
            [
                answer != text.answer
                and not any(is_near(text.query, other.query) for other in texts if other.answer == answer)
                for answer in answers
            ]
            for text in texts
        ]
    ).reshape(len(texts), len(answers))
    assert set(found) == {place for place in range(len(texts)) if fits[place].any()}
    assert all(fits[place, answers.index(answer)] for place, answer in found.items())
    matched = maximum_bipartite_matching(csr_array(fits.astype(int)), perm_type="column") if fits.size else np.array([])
    assert len(set(found.values())) == (matched >= 0).sum()


@pytest.mark.parametrize("number", [200, 1000])
def test_a_batch_of_like_queries_or_of_few_answers_takes_seconds(number: int) -> None:
    like = rows(*((f"write the function number {n}", f"answer {n}") for n in range(2000)))
    few = rows(*((f"{word}{n} {n}", str(n % 5)) for n in range(250) for word in WORDS))
    started = time.monotonic()
    assert other_answers(like, number) == {}
    assert len(other_answers(few, number)) == number
    assert time.monotonic() - started < 60
