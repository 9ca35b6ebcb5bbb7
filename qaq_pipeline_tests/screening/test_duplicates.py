"""duplicates: exact and near duplicates and their representatives, in a batch and in older ones."""

from __future__ import annotations

import random
import re
from typing import Any
from unittest.mock import ANY

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from qaq_pipeline.ingest.records import pair_id
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.tables import Signatures, enforce
from qaq_pipeline.screening import duplicates, flaws, shingles
from qaq_pipeline.screening.screen import texts_of
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import raw_rows

ANSWER = """def merge_sorted(left, right):
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    return merged + left[i:] + right[j:]
"""
QUERY = "Write a Python function that merges two sorted lists into one sorted list, without calling sort."
WORDS = [f"{stem}{ending}" for stem in "abcdefghij" for ending in ("one", "two", "three", "four", "five")]


def row(query: str, answer: str, **changes: Any) -> dict[str, Any]:
    system = changes.get("system")
    return {"query": query, "answer": answer, "pair_id": pair_id(system, query, answer)} | changes


def found(own: pl.DataFrame, *older: pl.DataFrame, threshold: float | None = 0.7) -> dict[int, tuple[Any, ...]]:
    """Return, for each own duplicate by source_row, its representative, reason and similarity."""
    signed = [enforce(Signatures, duplicates.signatures(raw)) for raw in (*older, own)]
    related = [duplicates.Related(signed[-1]).among(signatures) for signatures in signed[:-1]]
    frame = duplicates.find(signed[-1], related, texts_of(map(StoredTable, [*older, own])), threshold).duplicates
    return {
        one["source_row"]: (one["duplicate_of"], one["reason"], round(one["similarity"], 3))
        for one in frame.iter_rows(named=True)
    }


def test_line_ends_and_unicode_form_make_no_other_row() -> None:
    raw = raw_rows(
        row(QUERY, ANSWER),
        row(QUERY + " ", ANSWER.replace("\n", " \r\n") + "\n\n"),
        row("caf\u00e9?", "un caf\u00e9"),
        row("cafe\u0301?", "un cafe\u0301"),
        row(QUERY.upper(), ANSWER),
    )
    assert found(raw, threshold=None) == {
        2: ("b1/a.jsonl:1.0", "exact_duplicate", 1.0),
        4: ("b1/a.jsonl:3.0", "exact_duplicate", 1.0),
    }
    assert found(raw)[5] == ("b1/a.jsonl:1.0", "near_duplicate", 1.0)


FLATTENED = " ".join(ANSWER.split())
INDENTED = ANSWER.replace("    return", "        return")
MAKEFILE = "```makefile\nall: one\n\tcc -o one one.c\n\nclean:\n\trm -f one\n```"


@pytest.mark.parametrize("other", [FLATTENED, INDENTED, ANSWER.replace("    ", "\t"), ANSWER.replace("    ", "  ")])
def test_white_space_that_means_something_makes_another_row(other: str) -> None:
    assert found(raw_rows(row(QUERY, ANSWER), row(QUERY, other)), threshold=None) == {}


@pytest.mark.parametrize(
    ("flawed", "right", "language"),
    [
        (FLATTENED, ANSWER, None),
        (ANSWER.replace("    merged", "merged"), ANSWER, "python"),
        (MAKEFILE.replace("\t", "    "), MAKEFILE, "make"),
        ("a:\n\tb: 1 and then much more of the same", "a:\n  b: 1 and then much more of the same", "yaml"),
    ],
)
def test_flawed_code_does_not_stand_for_right_code(flawed: str, right: str, language: str | None) -> None:
    def rows(*answers: str, batch: str = "b1") -> pl.DataFrame:
        return raw_rows(*(row(QUERY, answer, language=language) for answer in answers), batch=batch)

    near, nearly = (("near_duplicate", similarity) for similarity in (1.0, pytest.approx(1, abs=0.1)))
    assert found(rows(flawed, flawed + "\n#", right)) == {
        1: ("b1/a.jsonl:3.0", *near),
        2: ("b1/a.jsonl:3.0", *nearly),
    }
    assert found(rows(right, flawed)) == {2: ("b1/a.jsonl:1.0", *near)}
    of_older = ("b0/a.jsonl:1.0", *near)
    assert found(rows(flawed, flawed + " "), rows(right, batch="b0")) == {1: of_older, 2: of_older}
    # A row of an older batch stands as it was published, and so does the right one.
    assert found(rows(right), rows(flawed, batch="b0")) == {}


@pytest.mark.parametrize(
    ("query", "flawed", "right"),
    [
        ("Make a Makefile rule.", "clean:\n    rm -rf build\n", "clean:\n\trm -rf build\n"),
        ("Write the service as YAML.", "web:\n\tport: 80\n\thost: all", "web:\n  port: 80\n  host: all"),
    ],
)
def test_code_may_be_of_the_language_that_the_query_names(query: str, flawed: str, right: str) -> None:
    assert found(raw_rows(row(query, flawed), row(query, right))) == {1: ("b1/a.jsonl:2.0", "near_duplicate", 1.0)}
    assert found(raw_rows(row(query, right), row(query, flawed))) == {2: ("b1/a.jsonl:1.0", "near_duplicate", 1.0)}


def test_both_answers_are_parsed_as_the_same_language() -> None:
    right = "web:" + "".join(f"\n  {word}: {number}" for number, word in enumerate(WORDS[:30]))
    flawed, queries = (
        right.replace("\n  ", "\n\t"),
        ("Write json and yaml of the service.", "Write yaml of the service."),
    )
    for one, other in (queries, queries[::-1]):
        assert found(raw_rows(row(one, flawed), row(other, right))) == {1: ("b1/a.jsonl:2.0", "near_duplicate", ANY)}


def test_make_is_a_word_of_its_own() -> None:
    """A label and an indented line of a shell script are no rule of a Makefile."""
    raw = raw_rows(*(row("Make a script.", f"help:\n{blank}echo one two three") for blank in ("    ", "\t")))
    assert found(raw) == {2: ("b1/a.jsonl:1.0", "near_duplicate", 1.0)}


def test_code_that_parses_as_python_is_the_better_one_whatever_else_the_query_names() -> None:
    query = "Write Python that prints JSON and a Makefile."
    raw = raw_rows(row(query, ANSWER.replace("    merged", "merged")), row(query, ANSWER))
    assert found(raw) == {1: ("b1/a.jsonl:2.0", "near_duplicate", 1.0)}


PROSE = "".join(f"\n- Note {word} of the answer.\n" for word in WORDS[:12])
LANGUAGES = {
    "javascript": "// add all numbers\nfor (const x of xs)\n  total += x\nconsole.log(total)\nreport(total)\n",
    "bash": '# add all numbers\nfor x in "$@"\ndo\n  total=$((total + x))\ndone\necho $total\n',
}


def fenced(code: str, language: str) -> str:
    return f"{PROSE}\n```{language}\n{code}\n```\n{PROSE}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_fenced_block_that_lost_its_lines_is_flawed_in_any_language_and_in_long_prose(language: str) -> None:
    flat, right = " ".join(LANGUAGES[language].split()), LANGUAGES[language]
    raw = raw_rows(*(row(QUERY, fenced(code, language)) for code in (flat, right)))
    assert found(raw) == {1: ("b1/a.jsonl:2.0", "near_duplicate", 1.0)}
    first = fenced("x = 1", language)
    both = raw_rows(*(row(QUERY, first + fenced(code, language)) for code in (flat, right)))
    assert found(both) == {1: ("b1/a.jsonl:2.0", "near_duplicate", 1.0)}


@pytest.mark.parametrize("ask", ["{}", "In which line is the fault?\n{}", "```python\n{}\n```\n" + PROSE])
def test_a_query_that_lost_its_lines_does_not_stand_for_the_whole_one(ask: str) -> None:
    flat, whole = (row(ask.format(code), "In the third line.") for code in (FLATTENED, ANSWER))
    assert found(raw_rows(flat, whole)) == {1: ("b1/a.jsonl:2.0", "near_duplicate", 1.0)}
    assert found(raw_rows(whole, flat)) == {2: ("b1/a.jsonl:1.0", "near_duplicate", 1.0)}


def test_of_two_rows_that_lost_lines_in_different_places_none_is_worse() -> None:
    one, other = row(FLATTENED, ANSWER), row(ANSWER, FLATTENED)
    assert found(raw_rows(one, other)) == {2: ("b1/a.jsonl:1.0", "near_duplicate", 1.0)}


def test_the_search_ends_where_each_of_three_rows_is_worse_than_the_next() -> None:
    def block(number: int) -> str:
        words = [f"step{step}" for step in range(100)]
        size = len(words) // number
        return "```\n" + "\n".join(" ".join(words[at : at + size]) for at in range(0, len(words), size)) + "\n```\n"

    numbers = [(25, 10, 14), (10, 14, 25), (14, 25, 10)]
    rows = [row(QUERY, "".join(map(block, of_row)), language="text") for of_row in numbers]
    codes = [flaws.Texts(one["query"], one["answer"], "text") for one in rows]
    assert all(flaws.is_worse(codes[place], codes[place - 1]) for place in range(3))
    assert found(raw_rows(*rows)) == {2: ("b1/a.jsonl:1.0", "near_duplicate", 1.0)}


@pytest.mark.parametrize(
    ("one", "other", "is_worse"),
    [
        ("```yaml\nx: !!bool foo\n```", "```yaml\nx: !!bool true\n```", True),
        ("```python\nx = 1\n```\n```bash\npip install foo\n```", "```python\nx = 1\n```", False),
        ("```make\nall: a.o \\\n    b.o\n\tcc\n```", "```make\nall: a.o b.o\n\tcc\n```", False),
        ("let x = 1", "let x = 2", False),
    ],
)
def test_code_is_parsed_by_its_own_language(one: str, other: str, *, is_worse: bool) -> None:
    first, second = (flaws.Texts("", answer, None) for answer in (one, other))
    assert flaws.is_worse(first, second) is is_worse
    assert not flaws.is_worse(second, first)


def test_what_a_flawed_row_stood_for_is_compared_again() -> None:
    def lines(words: list[str], number: int) -> str:
        size = -(-len(words) // number)
        return "\n".join(" ".join(words[start : start + size]) for start in range(0, len(words), size))

    words = [f"step{number}" for number in range(400)]
    changed, otherwise = (
        [f"x{word}" if start <= place < start + 60 else word for place, word in enumerate(words)] for start in (0, 200)
    )
    flat, near_it, whole = lines(words, 10), lines(changed, 15), lines(otherwise, 40)
    raw = raw_rows(*(row("Q", answer, language="text") for answer in (flat, near_it, whole)))
    # Both are near the flat one (0.74), which represents the second only, and they are far from each other (0.57).
    assert found(raw.head(2)) == {2: ("b1/a.jsonl:1.0", "near_duplicate", pytest.approx(0.74, abs=0.03))}
    assert found(raw) == {1: ("b1/a.jsonl:3.0", "near_duplicate", pytest.approx(0.74, abs=0.03))}


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    text = "写一个函数把两个已经排好序的列表合并成一个有序列表并且不要调用内置的排序函数"
    other = text.replace("列表合并", "数组合并")
    first, second = ({both[start : start + 5] for start in range(len(both) - 4)} for both in (text * 2, text + other))
    similarity = round(len(first & second) / len(first | second), 3)
    assert found(raw_rows(row(text, text), row(text, other))) == {2: ("b1/a.jsonl:1.0", "near_duplicate", similarity)}


def test_a_comment_more_is_a_near_duplicate_and_the_similarity_is_exact() -> None:
    commented = ANSWER.replace("    return", "    # What is left of one of them\n    return")
    raw = raw_rows(row(QUERY, ANSWER), row(QUERY, commented))
    first, second = (_five_grams(query + "\n" + answer) for query, answer in ((QUERY, ANSWER), (QUERY, commented)))
    similarity = len(first & second) / len(first | second)
    assert 0.8 < similarity < 0.9
    assert found(raw) == {2: ("b1/a.jsonl:1.0", "near_duplicate", round(similarity, 3))}
    assert found(raw, threshold=0.9) == {}
    assert found(raw, threshold=None) == {}


def _five_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\s\w]", text.lower())
    return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("Is it true that 5 > 3?", "True"), ("Is it true that 5 >= 3?", "True")),
        (("Write hello world in C", "puts"), ("Write hello world in C++", "puts")),
        (("Fix: `if a < b`", "if a > b"), ("Fix: `if a > b`", "if a < b")),
        (("\u2764\ufe0f", "\u2600\ufe0f"), ("\u2708\ufe0f", "\u2702\ufe0f")),
        (("a\x1fb", "c"), ("a", "b\x1fc")),
    ],
)
def test_what_differs_in_symbols_only_is_another_row(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert found(raw_rows(row(*first), row(*second))) == {}


def test_rows_of_one_template_are_compared_with_few_others_and_its_duplicates_still_found() -> None:
    random_ = random.Random(0)
    template = " ".join(random_.choices(WORDS, k=120))
    own = [" ".join(f"{word}{random_.randrange(10**6)}" for word in random_.choices(WORDS, k=40)) for _ in range(300)]
    rows = [row(template, text) for text in own] + [
        row(template, own[number] + " more") for number in range(0, 300, 10)
    ]
    assert {int(of.split(":")[1][:-2]) for of, _, _ in found(raw_rows(*rows)).values()} == set(range(1, 301, 10))


def test_another_system_text_makes_another_row() -> None:
    raw = raw_rows(
        row(QUERY, ANSWER), row(QUERY, ANSWER, system="Be brief."), row(QUERY, ANSWER + "x", system="Be brief.")
    )
    assert found(raw) == {3: ("b1/a.jsonl:2.0", "near_duplicate", pytest.approx(1.0, abs=0.1))}


def test_other_earlier_turns_make_another_row() -> None:
    asked, other = ([{"role": "user", "content": text}] for text in ("In Python?", "In Rust?"))
    raw = raw_rows(*(row(QUERY, ANSWER, history=turns) for turns in (asked, other, None)), row(QUERY, ANSWER + "x"))
    assert set(found(raw)) == {4}
    assert found(raw_rows(row(QUERY, ANSWER, history=asked), row(QUERY, ANSWER + " ", history=asked))) == {
        2: ("b1/a.jsonl:1.0", "exact_duplicate", 1.0)
    }


def test_rows_of_symbols_are_rows_like_others() -> None:
    assert found(raw_rows(row("+", "-"), row("*", "/"), row("+ ", "-"))) == {
        3: ("b1/a.jsonl:1.0", "exact_duplicate", 1.0)
    }


def test_short_rows_are_compared_whole() -> None:
    raw = raw_rows(row("Sum two", "a+b"), row("sum two", "a + b"), row("Sum three", "a + b"))
    assert found(raw) == {2: ("b1/a.jsonl:1.0", "near_duplicate", 1.0)}


def test_the_oldest_row_stands_for_the_others_and_stands_itself() -> None:
    old = raw_rows(row("Other", "text entirely"), row(QUERY, ANSWER), batch="b0")
    commented = ANSWER.replace("    return", "    # What is left of one of them\n    return")
    own = raw_rows(
        row(QUERY, commented), row(QUERY, commented + " "), row(QUERY, ANSWER), row("Other", "text entirely ")
    )
    assert found(own, old) == {
        1: ("b0/a.jsonl:2.0", "near_duplicate", 0.86),
        # Equal to row 1, which represents no row, since it is a duplicate itself.
        2: ("b0/a.jsonl:2.0", "near_duplicate", 0.86),
        3: ("b0/a.jsonl:2.0", "exact_duplicate", 1.0),
        4: ("b0/a.jsonl:1.0", "exact_duplicate", 1.0),
    }


def test_of_two_older_batches_the_first_one_counts() -> None:
    first, second = (raw_rows(row(QUERY, ANSWER + "#" * number), batch=f"b{number}") for number in range(2))
    assert found(raw_rows(row(QUERY, ANSWER + "##"), batch="b2"), first, second)[1][0] == "b0/a.jsonl:1.0"


_TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)


@effort(max_examples=40)
@given(texts=st.lists(st.tuples(_TEXTS, st.integers(0, 3)), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_what_is_found_is_what_comparing_all_with_all_would_find(texts: list[tuple[str, int]], seed: int) -> None:
    rows = [_edited(text, edits, seed + place) for place, (text, edits) in enumerate(texts)]
    rows += [_edited(text, 1, seed) for text, _ in texts]
    raw = raw_rows(*(row(f"q {text}", text) for text in rows))
    grams = [
        _five_grams(f"q {text}\n{text}") or {tuple(re.findall(r"\w+|[^\s\w]", f"q {text} {text}"))} for text in rows
    ]
    standing: list[int] = []
    expected: dict[int, int] = {}
    for number, own in enumerate(grams):
        near = [other for other in standing if len(grams[other] & own) / len(grams[other] | own) >= 0.9]
        if near:
            expected[number + 1] = near[0] + 1
        else:
            standing.append(number)
    # At 0.9, one such pair in 10^9 shares no band.
    assert {number: int(of.split(":")[1][:-2]) for number, (of, _, _) in found(raw, threshold=0.9).items()} == expected


def _edited(text: str, edits: int, seed: int) -> str:
    random_ = random.Random(seed)
    words = text.split()
    for _ in range(edits):
        words[random_.randrange(len(words))] = random_.choice(WORDS)
    return " ".join(words)


def test_the_hashes_of_stored_signatures_never_change() -> None:
    (signed,) = duplicates.signatures(raw_rows(row(QUERY, ANSWER))).iter_rows(named=True)
    assert signed["content_hash"] == "4939d71f7d9220a3f8396500f71f2cb6"
    assert signed["bands"][:2] == [2193271871315645211, 11785509169141182236]


def test_jaccard_of_nothing_is_nothing() -> None:
    empty = shingles.ngrams(shingles.hash_words(pl.Series([[]], dtype=pl.List(pl.String))), 5).row(0)
    assert shingles.jaccard(empty, empty) == 0.0


def test_no_rows_have_no_signatures() -> None:
    assert enforce(Signatures, duplicates.signatures(raw_rows())).is_empty()
    assert found(raw_rows()) == {}
    assert tables.dtypes(Signatures)["bands"] == pl.List(pl.UInt64)
