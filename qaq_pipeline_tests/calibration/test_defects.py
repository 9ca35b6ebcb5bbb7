"""defects: what is done to a text, what it cannot be done to, and that a seed does the same again."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaq_pipeline.calibration import defects
from qaq_pipeline.calibration.defects import Others, Text, guess_language, language_of, make
from qaq_pipeline.schema.vocabularies import Defect

PYTHON = Text(
    "Write a Python function that counts the words of a sentence.",
    "def count_words(sentence):\n    words = sentence.split()\n    return len(words) + 0\n",
    "python",
)
JAVASCRIPT = Text("Write a JavaScript function that counts vowels.", "const count = s => s.length;", "javascript")
SQL = Text("Write SQL that counts the words of a sentence.", "SELECT COUNT(*) FROM users;", "sql")
PROSE = Text("Is 7 prime?", "Yes.")
OTHERS = Others(JAVASCRIPT.answer, [PYTHON, JAVASCRIPT, SQL, PROSE])


def made(defect: Defect, text: Text = PYTHON, others: Others = OTHERS, seed: str = "0") -> Text:
    found = make(defect, text, others, seed)
    assert found is not None
    return found


def test_every_defect_can_be_made_of_a_usual_pair_and_changes_one_side_only() -> None:
    for defect in Defect:
        found = made(defect)
        changed = [name for name in ("query", "answer") if getattr(found, name) != getattr(PYTHON, name)]
        assert changed == (["query"] if defect is Defect.INVENTED_TERMS else ["answer"]), defect


def test_the_other_answer_is_the_one_that_the_row_may_get() -> None:
    assert made(Defect.OTHER_ANSWER) == Text(PYTHON.query, JAVASCRIPT.answer)
    assert make(Defect.OTHER_ANSWER, PYTHON, Others(None, [SQL]), "0") is None


def test_an_echo_says_the_query_again_half_of_the_time_alone_and_is_not_made_where_it_did_already() -> None:
    found = Counter(made(Defect.ECHO, seed=str(seed)).answer.removesuffix(PYTHON.query) for seed in range(200))
    assert set(found) == {"", *defects.ECHO_INTRODUCTIONS}
    assert 80 <= found[""] <= 120
    assert {make(Defect.ECHO, Text("a", "a"), OTHERS, str(seed)) is None for seed in range(20)} == {True, False}


def test_an_answer_is_cut_at_any_place_but_the_first_and_the_last_tenth() -> None:
    text = Text("q", "0123456789" * 8)
    lengths = {len(made(Defect.CUT_ANSWER, text, seed=str(seed)).answer) for seed in range(1000)}
    assert lengths == set(range(8, 73))
    assert text.answer.startswith(made(Defect.CUT_ANSWER, text).answer)
    assert make(Defect.CUT_ANSWER, Text("q", "x" * 39), OTHERS, "0") is None


def test_a_cut_answer_ends_with_no_white_space_and_lacks_more_than_that() -> None:
    text = Text("q", f"  {'word ' * 12}\n\n")
    for seed in range(100):
        answer = made(Defect.CUT_ANSWER, text, seed=str(seed)).answer
        assert answer == answer.strip()
        assert len(answer) < len(text.answer.strip())


def test_an_answer_is_cut_at_the_end_of_any_line_but_the_last_and_blank_lines_do_not_count() -> None:
    text = Text("q", "\none\n\n  two \nthree\nfour\n\n")
    found = {made(Defect.CUT_AT_LINE, text, seed=str(seed)).answer for seed in range(40)}
    assert found == {"one", "one\n\n  two", "one\n\n  two \nthree"}
    assert make(Defect.CUT_AT_LINE, Text("q", "one\n\n\ntwo\n"), OTHERS, "0") is None


def test_refusals_and_filler_come_from_their_lists_and_not_always_the_same() -> None:
    for defect, known in ((Defect.REFUSAL, defects.REFUSALS), (Defect.FILLER, defects.FILLERS)):
        found = {made(defect, seed=str(seed)).answer for seed in range(40)}
        assert found == set(known)


def test_half_of_the_content_words_are_invented_equal_ones_alike() -> None:
    text = Text("Sort the Array, then print the array of numbers.", "x")
    content = {"sort", "array", "print", "numbers"}
    for seed in range(20):
        query = made(Defect.INVENTED_TERMS, text, seed=str(seed)).query
        left = content.intersection(re.findall(r"\w+", query.lower()))
        assert len(left) == 2
        assert query.count(" ") == text.query.count(" ")
        words = re.findall(r"\w+", query)
        assert words[2].lower() == words[6]
        assert words[2][0].isupper()


def test_without_a_content_word_no_term_is_invented() -> None:
    assert make(Defect.INVENTED_TERMS, Text("What does that do?", "x"), OTHERS, "0") is None
    assert make(Defect.INVENTED_TERMS, Text("日本語", "x"), OTHERS, "0") is None


def test_the_wrong_language_is_that_of_the_query_most_alike_and_not_made_where_none_is_known() -> None:
    assert made(Defect.WRONG_LANGUAGE).answer == SQL.answer  # It counts the same.
    assert make(Defect.WRONG_LANGUAGE, PROSE, OTHERS, "0") is None
    assert make(Defect.WRONG_LANGUAGE, PYTHON, Others(None, [PYTHON, PROSE]), "0") is None


def test_a_bug_is_one_token_of_the_code_and_prose_has_none() -> None:
    found = {made(Defect.ONE_TOKEN_BUG, seed=str(seed)).answer for seed in range(20)}
    assert found == {PYTHON.answer.replace(" + ", " - "), PYTHON.answer.replace("0", "1")}
    assert make(Defect.ONE_TOKEN_BUG, Text("Is 7 prime?", "7 is: 1 and 7 divide it."), OTHERS, "0") is None
    assert make(Defect.ONE_TOKEN_BUG, Text("q", "pass", "python"), OTHERS, "0") is None


@pytest.mark.parametrize(
    ("answer", "language"),
    [
        (PYTHON.answer, "python"),
        ("for item in list:\n  print(item)", "python"),
        (JAVASCRIPT.answer, "javascript"),
        ("function f() {\n  return 1;\n}", "javascript"),
        ("  SELECT name\n  FROM users;", "sql"),
        ("#include <iostream>\nint main() {}", "cpp"),
        ("public class A { public static void main(String[] a) {} }", "java"),
        ("<div>\n  <p>x</p>\n</div>", "html"),
        (".box {\n  color: red;\n}", "css"),
        ("<?php $x = 1;", "php"),
        ("#!/bin/bash\necho $x", "shell"),
        ("package main\nfunc main() {\n}", "go"),
        ("fn main() { let mut x = 1; }", "rust"),
        ("Yes: no number from 2 to 6 divides it.", None),
        ("Choose what fits your needs, and select a tool.", None),
    ],
)
def test_the_language_of_an_answer_is_guessed_by_its_tokens(answer: str, language: str | None) -> None:
    assert guess_language(answer) == language


@pytest.mark.parametrize(
    ("delivered", "language"),
    [("Python", "python"), ("TS", "ts"), ("kotlin", "kotlin"), ("en", "go"), ("", "go"), (None, "go")],
)
def test_a_delivered_language_counts_where_it_is_one_of_programs(delivered: str | None, language: str) -> None:
    assert language_of(delivered, "package main\nfunc main() {}") == language


def test_guessing_a_language_takes_no_longer_for_hostile_text() -> None:
    for text in (
        "\n" * 100_000,
        "a " * 50_000,
        "class " * 20_000,
        "{" * 100_000,
        "- a" * 40_000,
        "if " + "a" * 100_000,
    ):
        guess_language(text)


@given(st.sampled_from(Defect), st.text(max_size=80), st.text(max_size=80), st.text(max_size=3))
def test_any_text_gives_the_same_defect_again_or_none_and_never_itself(
    defect: Defect, query: str, answer: str, seed: str
) -> None:
    text = Text(query, answer, guess_language(answer))
    found = make(defect, text, OTHERS, seed)
    assert found == make(defect, text, OTHERS, seed)
    if found is not None:
        assert (found.query, found.answer) != (query, answer)
        assert found.query.strip()
        assert found.answer.strip()
