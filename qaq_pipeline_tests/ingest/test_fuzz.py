"""Fuzzed rows and files: every delivered row is in the ledger, with a reason where it is no pair; nothing else happens.

Records of every shape are changed in their structure, then their bytes; files of every format in their bytes. Seeds
are the numbers of the parts, so a part that fails can be run again alone.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qaq_pipeline.config.settings import RecordSettings, ScreeningSettings
from qaq_pipeline.ingest.records import read_delivery
from qaq_pipeline.schema.tables import RawData, ScreenedData, enforce
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening.screen import screen_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PARTS, ROWS_OF_A_PART, FILES_OF_A_PART = 100, 1_000, 20
LONGEST_SECONDS = 20
"""Of a part of 1,000 rows, or of a file, on a busy machine."""

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": "t", "tool_call_id": "1"},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}], "reasoning_content": "So."},
    {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image_url", "image_url": {"url": "u"}}]},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\ndef f():\n    return 1\n"},
]
CHAT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "observation", "value": "o"}]
RECORDS: list[dict[str, Any]] = [
    {"instruction": "Sort.", "input": "[3, 1]", "output": "sorted(x)", "history": [["q", "a"]], "license": "MIT"},
    {"query": "Größe \U0001f40d?", "context": "CREATE TABLE t", "answer": "x\u2028y", "source": "s", "language": "go"},
    {"messages": TURNS, "tools": [CALL], "source": "x"},
    {"messages": TURNS[:2] + TURNS[-1:], "weight": 1},
    {"conversations": CHAT * 2, "system": "s", "tools": "[]"},
    {"prompt": "p", "completion": "c", "label": False},
    {"prompt": TURNS[:2], "completion": TURNS[-1:]},
    {"prompt": TURNS[:2], "chosen": TURNS[-1:], "rejected": TURNS[2:3]},
    {"chosen": TURNS, "rejected": TURNS},
    {"problem": "p", "generation": "g", "thinking": "t", "license": [{"spdx_id": "MIT"}]},
]
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1e308,
        10**400,
        float("nan"),
        "",
        " \u200b",
        "\0",
        "\ud800",
        "a" * 70_000,
        [],
        {},
        [[]],
    ),
    *([None], {"": None}, {"role": "user"}, {"type": "text"}, "user", "assistant", "false", "<think>", "</think>a"),
    *("<tool_call>", {"text": 3}, [{"type": "tool_use"}], ["a", 1], {"role": [], "content": {}}, "```python\n", "\r\n"),
]
SNIPPETS = [
    b"\xff",
    b"\x00",
    b'"',
    b"\\",
    b"\\ud83d",
    b"{",
    b"}",
    b"]",
    b",",
    b"\r",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"1e999",
]


def changed(value: Any, drawn: random.Random, chance: float = 0.15) -> Any:
    """A value of JSON with some of its parts replaced, repeated, left out, moved or nested."""
    if drawn.random() < chance / 3:
        return drawn.choice(ODD)
    if isinstance(value, dict):
        names = list(value)
        items = {name: changed(one, drawn, chance) for name, one in value.items() if drawn.random() > chance / 4}
        if names and drawn.random() < chance:
            items[drawn.choice(names)] = value[drawn.choice(names)]
        if names and drawn.random() < chance / 2:
            items[f"{drawn.choice(names)}_2".upper()] = drawn.choice(ODD)
        return items
    if isinstance(value, list):
        items = [changed(one, drawn, chance) for one in value if drawn.random() > chance / 4]
        if drawn.random() < chance:
            drawn.shuffle(items)
        return items * (2 if drawn.random() < chance / 3 else 1)
    return {"nested": value} if drawn.random() < chance / 6 else value


def broken(data: bytes, drawn: random.Random, most: int = 3) -> bytes:
    """Bytes of which some are flipped, left out, doubled, or come between."""
    for _ in range(drawn.randint(1, most)):
        place, end = sorted(drawn.choices(range(len(data) + 1), k=2))
        end = min(end, place + 20)
        match drawn.randrange(4):
            case 0:
                data = data[:place] + bytes([drawn.randrange(256)]) + data[place + 1 :]
            case 1:
                data = data[:place] + data[end:]
            case 2:
                data = data[:end] + data[place:]
            case _:
                data = data[:place] + drawn.choice(SNIPPETS) + data[place:]
    return data


def line(drawn: random.Random) -> bytes:
    record = drawn.choice(RECORDS)
    record = changed(record, drawn) if drawn.random() < 0.8 else record
    data = json.dumps(record, ensure_ascii=drawn.random() < 0.5).encode("utf-8", "surrogatepass")
    return broken(data, drawn).replace(b"\n", b" ") if drawn.random() < 0.2 else data


SETTINGS = [
    RecordSettings(),
    RecordSettings(context="history", multi_turn="every"),
    RecordSettings(reasoning="score", multi_turn="every"),
    RecordSettings(shape="messages", context="history"),
    RecordSettings(shape="query_answer"),
]


@pytest.fixture
def soon() -> Iterator[None]:
    """An alarm that ends what hangs."""
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(2 * LONGEST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {2 * LONGEST_SECONDS} s")


def read(data: bytes, settings: RecordSettings, name: str = "a.jsonl") -> set[int]:
    """The rows of the ledger, of which each has a status, and a reason where it is rejected."""
    started = time.monotonic()
    raw = enforce(RawData, read_delivery({name: data}, "b", settings).frame)
    screening = ScreeningSettings(personal_data=("email", "ip_address"), licences=("mit",))
    screened = enforce(ScreenedData, screen_alone(raw, screening))
    assert time.monotonic() - started < LONGEST_SECONDS
    assert screened.height == raw.height
    assert raw.filter(status=Status.REJECTED.value)["detail"].null_count() == 0
    return set(raw["source_row"])


@pytest.mark.parametrize("seed", range(PARTS))
def test_every_fuzzed_row_is_in_the_ledger(seed: int, soon: None) -> None:
    drawn = random.Random(seed)
    lines = [line(drawn) for _ in range(ROWS_OF_A_PART)]
    assert lines[0].strip()
    data = b"\n".join([json.dumps(RECORDS[seed % len(RECORDS)]).encode(), *lines])
    wanted = {place for place, one in enumerate(data.split(b"\n"), start=1) if one.strip(b" \t\r")}
    assert read(data, SETTINGS[seed % len(SETTINGS)]) == wanted


def _csv(records: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["query", "answer", "source"])
    writer.writerows([[json.dumps(value) for value in [*record.values(), "", ""][:3]] for record in records])
    return text.getvalue().encode()


def _table(records: list[dict[str, Any]]) -> pa.Table:
    return pa.table(
        {
            "query": [json.dumps(record) for record in records],
            "answer": ["a" if place % 5 else None for place in range(len(records))],
            "messages": [[{"role": "user", "content": f"{place}"}] for place in range(len(records))],
        }
    )


def _parquet(records: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(_table(records), stream, row_group_size=7)
    return stream.getvalue()


def _arrow(records: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    table = _table(records)
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return stream.getvalue()


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": _jsonl,
    "array": lambda records: json.dumps(records, indent=1).encode(),
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
COMPRESSIONS: list[Callable[[bytes], bytes]] = [
    bytes,
    gzip.compress,
    bz2.compress,
    lzma.compress,
    zstandard.ZstdCompressor().compress,
]


@pytest.mark.parametrize("seed", range(PARTS))
def test_a_fuzzed_file_has_its_rows_in_the_ledger_or_is_named(seed: int, soon: None) -> None:
    drawn = random.Random(10_000 + seed)
    for _ in range(FILES_OF_A_PART):
        name, compress = drawn.choice(list(FORMATS)), drawn.choice(COMPRESSIONS)
        records = [json.loads(json.dumps(drawn.choice(RECORDS))) for _ in range(drawn.randint(1, 30))]
        whole = FORMATS[name](records)
        settings = drawn.choice(SETTINGS[:3])
        assert read(compress(whole), settings) == set(range(1, len(records) + 1))
        damaged = broken(compress(whole), drawn, 5) if drawn.random() < 0.5 else compress(broken(whole, drawn, 5))
        assert read(damaged, settings)
