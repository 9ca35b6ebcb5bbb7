"""The command explain: what it says of a row, and the ways to name one."""

from __future__ import annotations

import json
import re

import pytest

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline_tests.cli.conftest import Home, Qaq, open_storage_of
from qaq_pipeline_tests.conftest import REJECTED_ROW, REPEATED_ROW
from qaq_pipeline_tests.support.frames import pair_name, store_batch
from qaq_pipeline_tests.support.naive import ENDS
from qaq_pipeline_tests.support.sentences import Check

BRACKETS = "a[bold]b.jsonl"


def selected_row(home: Home) -> int:
    decisions = open_storage_of(home).tables.read("decisions", Partition("b1")).frame
    return int(decisions.filter(decision="selected")["source_row"][0])


def test_explain_says_why_a_row_was_selected_with_its_numbers(home: Home, qaq: Qaq) -> None:
    row = selected_row(home)
    shown = qaq(home, "explain", "b1", row)
    assert shown.code == 0
    assert shown.out.startswith(f"b1/rows.jsonl:{row}.0: selected (within_budget) ")
    assert re.search(r' by "diff_high", .* 25% .* 0\.\d{3}, number \d of 18 pairs; .* 0\.\d', shown.out)
    for word in ("query:", "answer:", "strong", "weak", "rmi", "control_stratified_random", "of 18", "provenance"):
        assert word in shown.out
    assert re.search(r"nll_end +│? *\d+\.\d{4} +│? *\d+\.\d{4}", shown.out)
    assert "strong: chatml-0 (files:" in shown.out
    assert re.search(r"version 1 \(\w{8}, \d{4}-\d\d-\d\d\): published, for the same reason", shown.out)
    assert re.search(r"scored with tokenizers \S+, torch \S+, transformers \S+, on cpu", shown.out)
    assert re.search(r"input: rows\.jsonl, row \d+, sha256 [0-9a-f]{64}", shown.out)
    assert "decided by run " in shown.out


def test_the_texts_of_a_row_are_shown_whole_if_asked(empty_home: Home, qaq: Qaq) -> None:
    long = f"Reverse {'a very ' * 60}long list.\n\n\tThen stop."
    storage = open_storage_of(empty_home)
    store_batch(storage, parse_settings(empty_home.config.read_text(), home=empty_home.folder), queries=(long, "b"))
    shown = qaq(empty_home, "explain", "b1", 1)
    assert "long list." not in shown.out
    whole = qaq(empty_home, "explain", "b1", 1, "--full")
    assert f"  query, {len(long)} characters:\n    {long.splitlines()[0]}\n    \n" in whole.lines
    assert "Then stop." in whole.lines


def test_explain_says_why_a_row_was_rejected(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "explain", "b1", REJECTED_ROW)
    assert shown.out.startswith(
        f"b1/rows.jsonl:{REJECTED_ROW}.0: rejected (empty_query) Rejected when it was read, and never scored: shape "
    )
    assert "no pair, provenance" in shown.out


def test_explain_says_of_what_a_row_is_a_duplicate(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "explain", "b1", REPEATED_ROW)
    assert shown.out.startswith(
        f"b1/rows.jsonl:{REPEATED_ROW}.0: duplicate (exact_duplicate) Duplicate of b1/rows.jsonl:1.0, "
    )
    assert ": equal system text, query and answer. That row is " in shown.out
    assert "query: Reverse a string in Python." in shown.out


def test_a_row_can_be_named_in_several_ways(home: Home, qaq: Qaq) -> None:
    decisions = open_storage_of(home).tables.read("decisions", Partition("b1")).frame
    pair_id = decisions.filter(source_row=3)["pair_id"][0]
    first = qaq(home, "explain", "b1", 3)
    for name in ("rows.jsonl:3", "rows.jsonl:3.0", "b1/rows.jsonl:3.0", pair_id, pair_id[:8]):
        assert qaq(home, "explain", "b1", name) == first


def test_a_row_is_named_by_its_pair_or_its_place_alone_and_by_a_version(
    home: Home, qaq: Qaq, check_sentence: Check
) -> None:
    decisions = open_storage_of(home).tables.read("decisions", Partition("b1")).frame
    pair_id = decisions.filter(source_row=3)["pair_id"][0]
    first = qaq(home, "explain", "b1", 3)
    for name in (pair_id, pair_id[:8], "b1/rows.jsonl:3", "b1/rows.jsonl:3.0"):
        assert qaq(home, "explain", name) == first
    of_version = qaq(home, "explain", "b1", 3, "--version", "1")
    assert of_version.out.startswith("b1/rows.jsonl:3.0: ")
    assert " in version 1 (" in of_version.out
    assert decisions.filter(source_row=3)["explanation"][0] in of_version.out
    error = qaq(home, "explain", "b1", 3, "--version=7").error()
    check_sentence(error)
    check_sentence(qaq(home, "explain", "b1", 99, "--version", "1").error())
    assert "no row 'abcdef123'" in qaq(home, "explain", "abcdef123").error()


def test_a_row_is_found_by_its_text(home: Home, qaq: Qaq, check_sentence: Check) -> None:
    shown = qaq(home, "explain", "--text", "Sum the squares", "--batch", "b1")
    assert shown.out == qaq(home, "explain", "b1", 2).out
    several = qaq(home, "explain", "--text", "def").out
    assert "b1/rows.jsonl:1.0: Reverse a string in Python." in several
    assert re.search(r"\d rows contain that text; explain one: `qaq explain b1/rows\.jsonl:1\.0`", several)
    missing = qaq(home, "explain", "--text", "nowhere").err
    check_sentence(missing)


def test_explain_gives_all_of_it_as_json_and_the_templates_if_asked(home: Home, qaq: Qaq) -> None:
    (dossier,) = json.loads(qaq(home, "explain", "b1", REPEATED_ROW, "--json").out)
    assert dossier["row"]["duplicate_of"] == "b1/rows.jsonl:1.0"
    assert dossier["representative"]["source_row"] == 1
    assert dossier["fates"][0]["published"]["number"] == 1
    assert set(dossier["provenance"]["made_of"]["scored_by"]) == {"strong", "weak"}
    shown = qaq(home, "explain", "b1", 1, "--provenance").out
    assert "TASK: Given an answer" in shown
    assert f"end tokens: {list(ENDS)}" in shown


def test_markup_in_names_and_texts_is_shown_as_it_is(empty_home: Home, qaq: Qaq) -> None:
    settings = parse_settings(empty_home.config.read_text())
    store_batch(open_storage_of(empty_home), settings, queries=("[red]q[/red]", "[/]"), source_file=BRACKETS)
    shown = qaq(empty_home, "explain", "b1", 1)
    assert shown.code == 0
    assert shown.out.startswith(f"b1/{BRACKETS}:1.0: ")
    assert "query: [red]q[/red]" in shown.out
    assert "query: [/]" in qaq(empty_home, "explain", "b1", pair_name(2)).out


@pytest.mark.parametrize(
    "row", ["99", "rows.jsonl:99", "other.jsonl:1", "rows.jsonl:1.7", "abcdef", "x", "²", "9" * 30, "a:²"]
)
def test_a_row_that_is_not_there_is_named_with_those_that_are(
    home: Home, qaq: Qaq, row: str, check_sentence: Check
) -> None:
    error = qaq(home, "explain", "b1", row).error()
    check_sentence(error)
