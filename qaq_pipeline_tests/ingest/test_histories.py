"""histories: what comes before a query is its context where `records.context` says so, and nothing of it is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest import records

HISTORY = RecordSettings(context="history")

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"in": "Bern"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
BEFORE = [
    {"role": "assistant", "content": "How can I help?"},  # Before the first question: no part of an exchange.
    {"role": "user", "content": "Weather in Bern?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "assistant", "content": "Anything else?", "weight": 0},
]
PAIR = [{"role": "user", "content": "Print it."}, {"role": "assistant", "content": "print('sunny')"}]
SAID = [
    ("user", "Weather in Bern?"),
    ("assistant", 'I look.\n<tool_call>\n{"name": "weather", "arguments": "{\\"in\\": \\"Bern\\"}"}\n</tool_call>'),
    ("tool", "sunny"),
    ("assistant", "Sunny.\n\nAnything else?"),
]
OFFERED = ("tools", json.dumps(TOOLS))


def read(record: dict[str, Any], settings: RecordSettings = HISTORY) -> dict[str, Any]:
    (row,) = records.read_file(json.dumps(record).encode(), "a.jsonl", "b", settings).frame.to_dicts()
    return row


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in row["history"] or ()]


def test_the_turns_before_a_query_and_the_tools_of_its_record_are_its_context() -> None:
    row = read({"tools": TOOLS, "messages": [{"role": "system", "content": "Be brief."}, *BEFORE, *PAIR]})
    assert (row["status"], row["system"], row["query"]) == ("accepted", "Be brief.", "Print it.")
    assert said(row) == [OFFERED, *SAID]


def test_without_the_setting_there_is_no_context_and_the_pair_is_another_one() -> None:
    record = {"messages": [*BEFORE, *PAIR]}
    alone = read(record, RecordSettings())
    assert alone["history"] is None
    assert (
        alone["pair_id"]
        == read({"messages": PAIR})["pair_id"]
        == read({"query": "Print it.", "answer": "print('sunny')"})["pair_id"]
    )
    assert alone["pair_id"] != read(record)["pair_id"] != read({"messages": [*BEFORE[:-1], *PAIR]})["pair_id"]


def test_every_turn_has_what_was_said_before_it() -> None:
    every = RecordSettings(context="history", multi_turn="every")
    data = json.dumps({"messages": [*PAIR, *BEFORE[1:], *PAIR]}).encode()
    first, tools, last = records.read_file(data, "a.jsonl", "b", every).frame.to_dicts()
    assert (first["history"], tools["reason"]) == (None, "uses_tools")
    assert said(last) == [("user", "Print it."), ("assistant", "print('sunny')"), *SAID]


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        (
            {"from": "function_call", "value": '{"name": "f"}'},
            ("assistant", '<tool_call>\n{"name": "f"}\n</tool_call>'),
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f"}},
            ("assistant", '<tool_call>\n{"name": "f"}\n</tool_call>'),
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]},
            ("assistant", '[{"type": "tool_use", "name": "f"}]'),
        ),
        ({"role": "tool", "content": {"degrees": 20}}, ("tool", '{"degrees": 20}')),
        ({"role": "assistant", "content": [{"type": "text", "text": "hello"}]}, ("assistant", "hello")),
    ],
)
def test_a_turn_says_its_calls_and_results_in_whatever_form_they_came(
    turn: dict[str, Any], shown: tuple[str, str]
) -> None:
    ask = {"role": "user", "content": "q"}
    reply = {"role": "assistant", "content": "done"}
    between = [reply] if shown[0] == "tool" else []
    row = read({"messages": [ask, *between, turn, ask, *PAIR[1:]]})
    assert shown in said(row)
    assert row["status"] == "accepted"


def test_an_earlier_turn_that_is_no_text_costs_the_pair_that_needs_it() -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
    record = {"messages": [picture, {"role": "assistant", "content": "A cat."}, *PAIR]}
    assert read(record)["reason"] == "other_than_text"
    assert read(record, RecordSettings())["status"] == "accepted"
    surrogate = {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "?"}, *PAIR]}
    assert read(surrogate)["reason"] == "invalid_utf8"


def test_a_record_that_is_no_conversation_has_its_history_in_a_field() -> None:
    record = {"instruction": "Go on.", "output": "ok", "history": [["q1", "a1"], ["q2", "a2"]], "tools": "[{}]"}
    row = read(record)
    assert said(read(record | {"tools": "[]"})) == said(row)[1:]
    assert said(row) == [("tools", "[{}]"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    reading = records.read_file(json.dumps(record).encode(), "a.jsonl", "b", HISTORY)
    assert not reading.unread
    unread = records.read_file(json.dumps(record).encode(), "a.jsonl", "b", RecordSettings()).unread
    assert unread == {"history": 1, "tools": 1}


@pytest.mark.parametrize("history", [["q", "a"], [["q"]], [["q", None]], "text", {"q": "a"}])
def test_a_history_of_another_form_is_named(history: object) -> None:
    row = read({"instruction": "Go on.", "output": "ok", "history": history})
    assert row["reason"] == "wrong_type"
    assert "`history[0]` is" in row["detail"]
