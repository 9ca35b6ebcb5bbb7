"""records: every format, shape and reject reason, on deliveries of a few rows."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest.records import (
    check_delivery,
    check_file,
    delivery_parts,
    not_read,
    pair_id,
    read_delivery,
    read_file,
    unreadable_file,
)
from qaq_pipeline.schema.tables import RawData, enforce
from qaq_pipeline.schema.vocabularies import RejectReason, Status
from qaq_pipeline.storage.row_files import NoRowsError, UnreadableFileError
from qaq_pipeline_tests.support.sentences import Check

FIELDS = RecordSettings().fields
ALPACA = {"instruction": "Sort.", "input": "", "output": "sorted(x)"}
ORIGIN = {"source": "unit", "language": "py"}
PAIRS = [{"query": f"Q{number} \u2028\U0001f40d", "answer": f" A{number}\n", **ORIGIN} for number in range(3)]
DIALOGUE = [("system", "S"), ("user", "Q0"), ("assistant", "A0"), ("user", "Q1"), ("user", "Q2"), ("assistant", "A2")]


def read(content: bytes, **settings: Any) -> pl.DataFrame:
    frame = read_file(content, "file.jsonl", "b1", RecordSettings(**settings)).frame
    return enforce(RawData, frame)


def jsonl(*records: Any) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def json_array(*records: Any) -> bytes:
    return json.dumps(records, indent=4).encode()


def parquet(*records: dict[str, Any]) -> bytes:
    return parquet_of(pl.DataFrame(records))


def parquet_of(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def arrow(*records: dict[str, Any], writer: Callable[..., Any]) -> bytes:
    buffer, rows = io.BytesIO(), pa.Table.from_pylist(list(records))
    with writer(buffer, rows.schema) as stream:
        stream.write_table(rows)
    return buffer.getvalue()


def write_arrow(rows: pa.Table, to: io.BytesIO) -> None:
    with pa.ipc.new_stream(to, rows.schema) as stream:
        stream.write_table(rows)


def written_csv(*records: dict[str, Any], lineterminator: str = "\n", **how: Any) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator=lineterminator, **how)
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().encode()


def turns(*said: tuple[Any, Any], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [{keys[0]: role, keys[1]: text} for role, text in said]


def only(frame: pl.DataFrame) -> dict[str, Any]:
    assert frame.height == 1
    return frame.row(0, named=True)


FORMATS = {
    "json": json_array(*PAIRS),
    "jsonl": jsonl(*PAIRS),
    "jsonl_crlf": jsonl(*PAIRS).replace(b"\n", b"\r\n"),
    "jsonl_bom": b"\xef\xbb\xbf" + jsonl(*PAIRS),
    "json_bom": b"\xef\xbb\xbf\n" + json.dumps(PAIRS, ensure_ascii=False).encode(),
    "jsonl.gz": gzip.compress(jsonl(*PAIRS)),
    "jsonl.gz_members": gzip.compress(jsonl(*PAIRS[:1])) + gzip.compress(jsonl(*PAIRS[1:])),
    "jsonl.zst": zstandard.compress(jsonl(*PAIRS)),
    "jsonl.zst_frames": b"\x50\x2a\x4d\x18\x02\x00\x00\x00--"
    + zstandard.compress(jsonl(*PAIRS[:1]))
    + zstandard.compress(jsonl(*PAIRS[1:])),
    "jsonl.bz2": bz2.compress(jsonl(*PAIRS)),
    "jsonl.xz": lzma.compress(jsonl(*PAIRS)),
    "jsonl.lzma": lzma.compress(jsonl(*PAIRS), lzma.FORMAT_ALONE),
    "jsonl.zst_long": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    ).compress(jsonl(*PAIRS)),
    "parquet": parquet(*PAIRS),
    "arrow_file": arrow(*PAIRS, writer=pa.ipc.new_file),
    "arrow_stream": arrow(*PAIRS, writer=pa.ipc.new_stream),
    "csv": written_csv(*PAIRS),
    "csv_crlf": written_csv(*PAIRS, lineterminator="\r\n"),
    "tsv": written_csv(*PAIRS, delimiter="\t"),
    "csv_excel": b"sep=;\r\n" + written_csv(*PAIRS, delimiter=";"),
    "parquet.gz": gzip.compress(parquet(*PAIRS)),
}


# Formats


@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_rows_exactly_as_delivered(content: bytes) -> None:
    frame = read(content)
    assert frame.select("source_row", "query", "answer", "source", "language", "status").rows() == [
        (number, pair["query"], pair["answer"], "unit", "py", "accepted") for number, pair in enumerate(PAIRS, 1)
    ]
    assert [json.loads(record) for record in frame["record"]] == PAIRS


def test_the_row_is_the_line_that_an_editor_shows() -> None:
    frame = read(b"\n" + jsonl(PAIRS[0]) + b"\r\n  \n" + jsonl(PAIRS[1]) + b"{torn")
    assert frame["source_row"].to_list() == [2, 5, 6]
    assert frame["record"].to_list()[2] == "{torn"


def test_the_record_is_verbatim() -> None:
    line = '{"query" : "q",  "answer":"\\u0061", "n": 1.0}'
    assert only(read(line.encode()))["record"] == line
    assert only(read(f"[ {line} ]".encode()))["record"] == line


NO_PARQUET_ROWS = parquet_of(pl.DataFrame(schema={"query": pl.String, "answer": pl.String}))


def test_an_array_of_nothing_and_a_parquet_file_of_nothing_are_empty_frames() -> None:
    assert read(b" [ ] ").height == 0
    assert read(NO_PARQUET_ROWS).height == 0


def test_parquet_cells_that_are_no_text_reach_the_record() -> None:
    row = {"query": "q", "answer": "a", "at": datetime(2026, 1, 2, tzinfo=UTC), "n": 3, "list": [1]}
    record = only(read(parquet(row)))["record"]
    assert json.loads(record) | {"at": ""} == row | {"at": ""}
    assert "2026-01-02" in record


def text(*cells: bytes) -> pa.Array:
    """Texts that need not be UTF-8."""
    buffers = pa.array(cells, pa.binary()).buffers()
    return pa.StringArray.from_buffers(len(cells), buffers[1], buffers[2], buffers[0])


ENDS = pa.array([0, 1, 2, 3], pa.int32())
HOLDERS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "text": lambda cells: cells,
    "view": lambda cells: cells.cast(pa.string_view()),
    "dictionary": lambda cells: pa.DictionaryArray.from_arrays(ENDS[:3], cells),
    "struct": lambda cells: pa.StructArray.from_arrays([cells], ["x"]),
    "map": lambda cells: pa.MapArray.from_arrays(ENDS, pa.array(["k"] * 3), cells),
    "list": lambda cells: pa.ListArray.from_arrays(ENDS, cells),
    "large_list": lambda cells: pa.LargeListArray.from_arrays(ENDS.cast(pa.int64()), cells),
    "fixed_size_list": lambda cells: pa.FixedSizeListArray.from_arrays(cells, 1),
    "deep": lambda cells: pa.ListArray.from_arrays(ENDS, pa.StructArray.from_arrays([HOLDERS["map"](cells)], ["x"])),
}
"""Columns of three rows, with one value in each."""


def read_table(write: Callable[..., None] = write_arrow, **columns: pa.Array) -> pl.DataFrame:
    buffer = io.BytesIO()
    write(pa.table({"query": ["q"] * 3, "answer": ["a"] * 3} | columns), buffer)
    return read(buffer.getvalue())


@pytest.mark.parametrize("write", [pq.write_table, write_arrow], ids=["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["text", "view", "dictionary"])
def test_an_answer_that_is_not_utf8_costs_its_row_only(kind: str, write: Callable[..., None]) -> None:
    frame = read_table(write, answer=HOLDERS[kind](text(b"a", b"\xff", b"c")))
    assert frame["reason"].to_list() == [None, "invalid_utf8", None]
    assert "`answer` contains the byte \\xff" in frame["detail"][1]


@pytest.mark.parametrize("held", HOLDERS.values(), ids=HOLDERS)
def test_a_cell_that_is_not_utf8_costs_nothing_where_nobody_reads_it(held: Callable[[pa.Array], pa.Array]) -> None:
    frame = read_table(side=held(text(b"\xfe", b"p", b"p")))
    assert frame["status"].to_list() == ["accepted"] * 3
    assert "\\xfe" in frame["record"][0]
    assert '"p"' in frame["record"][1]


TIMES = {
    "date": (pa.array([1, 3_663_000, None], pa.int32()).cast(pa.date32()), "11998-12-15"),
    "date_of_a_part_of_a_day": (pa.array([1, 2**50, None]).cast(pa.date64()), str(2**50)),
    "duration": (pa.array([1, 2**62, None]).cast(pa.duration("s")), str(2**62)),
    "nanoseconds": (pa.array([1, 1_700_000_000_000_000_123, None]).cast(pa.timestamp("ns")), "000000123"),
    "years": (pa.array([1, 9_400_000_000_000, None]).cast(pa.timestamp("s")), "out of range"),
    "zone": (pa.array([1, 2, None]).cast(pa.timestamp("s", "Mars/Base")), "1970-01-01 00:00:02Z"),
    "time_of_no_day": (pa.array([1, 2**40, None]).cast(pa.time64("us")), str(2**40)),
    "time": (pa.array([1, 86_399_999_999_999, None]).cast(pa.time64("ns")), "23:59:59.999999999"),
}


@pytest.mark.parametrize("kind", sorted(HOLDERS.keys() - {"view"}))
@pytest.mark.parametrize(("times", "shown"), TIMES.values(), ids=TIMES)
def test_a_date_or_time_that_python_cannot_hold_costs_nothing(kind: str, times: pa.Array, shown: str) -> None:
    frame = read_table(side=HOLDERS[kind](times))
    assert frame["status"].to_list() == ["accepted"] * 3
    assert shown in frame["record"][1]


def test_dates_beside_texts_that_are_not_utf8_cost_nothing() -> None:
    side = pa.StructArray.from_arrays([text(b"\xfe", b"p", b"p"), TIMES["date"][0]], ["text", "date"])
    assert json.loads(read_table(side=side)["record"][1])["side"] == {"text": "p", "date": "11998-12-15"}


def test_a_byte_that_is_not_utf8_inside_a_conversation_costs_its_row_only() -> None:
    said = turns(("user", "q"), ("assistant", "a?"))
    table = pa.table({"messages": [said, turns(("user", "q"), ("assistant", "b"))]})
    buffer = io.BytesIO()
    write_arrow(table, buffer)
    frame = read(buffer.getvalue().replace(b"a?", b"a\xff"))
    assert frame["reason"].to_list() == ["invalid_utf8", None]


def test_csv_is_read_as_its_writer_meant_it() -> None:
    rows = [{"query": 'a "b", c\nd', "answer": "x" * 200_000}, {"query": "", "answer": "e"}]
    frame = read(written_csv(*rows))
    assert frame.select("source_row", "query", "answer", "reason").rows() == [
        (1, 'a "b", c\nd', "x" * 200_000, None),
        (2, None, "e", "missing_query"),
    ]
    assert json.loads(frame["record"][0]) == rows[0]


NO_ROWS = {
    "prose": b"# Title\n\nSome words, and more.\n",
    "names": b"Doe, Jane\nRoe, Rick\n",
    "yaml": b"- query: q\n  answer: a\n",
    "xml": b"<?xml version='1.0'?>\n<rows><row>q</row></rows>\n",
    "code": b"int main()\n{\n    return 0;\n}\n",
    "python_objects": b"{'query': 'q', 'answer': 'a'}\n",
    "values": b'3\nnull\n"text"\n',
    "long_line": b"x" * 200_000,
    "long_cell": b'"' + b"x" * 200_000 + b'"',
    "binary": b"RIFF" + b"\x01\x02\x03\xfe\n" * 50_000,
}


@pytest.mark.parametrize("content", NO_ROWS.values(), ids=NO_ROWS)
def test_a_file_in_no_format_of_rows_is_refused(content: bytes) -> None:
    with pytest.raises(NoRowsError, match=r"^file\.jsonl: .*CSV"):
        read(content)


def test_the_refusal_shows_how_the_file_begins(check_sentence: Check) -> None:
    with pytest.raises(NoRowsError) as caught:
        read(NO_ROWS["prose"])
    check_sentence(str(caught.value))


@pytest.mark.parametrize("line", [jsonl(PAIRS[0]), b'{"query": "q\xff"', b' { "query": tor'])
def test_one_of_the_first_lines_that_begins_as_an_object_makes_a_file_jsonl(line: bytes) -> None:
    assert read(b"bad\n" * 19 + line)["reason"].to_list()[:19] == [RejectReason.BAD_JSON] * 19
    with pytest.raises(NoRowsError):
        read(b"bad\n" * 20 + line)


def test_csv_with_line_ends_of_old_and_an_empty_cell_beside_another_name() -> None:
    frame = read(b"query,question, answer\rq,,a\r,r,b\r")
    assert frame.select("query", "answer").rows() == [("q", "a"), ("r", "b")]


def test_a_row_of_csv_with_other_cells_than_the_header_is_rejected(check_sentence: Check) -> None:
    frame = read(b"\nquery,answer\nq,a,b\nq,a\n\nq\n")
    assert frame.select("source_row", "reason").rows() == [
        (1, RejectReason.BAD_CSV),
        (2, None),
        (3, RejectReason.BAD_CSV),
    ]
    assert frame["record"][0] == '["q", "a", "b"]'
    check_sentence(frame["detail"][0])


UNREADABLE = {
    "csv_open_quote": (b'query,answer\nq1,a1\nq2,"oops\nq3,a3\n', r"is CSV that cannot be read: before line 5"),
    "csv_two_names": (b"query,answer,answer\nq,a,b\n", "two columns have one name"),
    "csv_unknown": (b"Question,Fixed code\nq,a\n", r"looks like CSV.*\(Question, Fixed code\).*records\.fields"),
    "csv_unknown_of_any_language": ("问题,修正的代码\nq,a\n".encode(), r"looks like CSV.*问题"),
    "excel": (b"PK\x03\x04...xl/workbook.xml", "is an Excel workbook. Save .* CSV"),
    "lz4": (b"\x04\x22\x4d\x18\x60\x40\x82" + jsonl(*PAIRS), "compressed with LZ4. Decompress"),
    "orc": (b"ORC\x08\x03\n" + jsonl(*PAIRS), "is an ORC file"),
    "avro": (b"Obj\x01\x04\x14avro.codec\n" + jsonl(*PAIRS), "is an Avro file"),
    "pickle": (pickle.dumps(PAIRS), "is a pickle"),
    "zip": (b"PK\x03\x04...", r"is a zip archive\. Unpack"),
    "tar": (b"rows.jsonl".ljust(257, b"\0") + b"ustar\0", r"is a tar archive\. Unpack"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    "bz2_cut": (bz2.compress(b"[]")[:-3], "cut off or damaged"),
    "xz_cut": (lzma.compress(b"[]")[:-3], "cut off or damaged"),
    "arrow_cut": (b"ARROW1\0\0", "no complete Arrow file"),
    "empty": (b"", r"is empty\. "),
    "blank": (b"\xef\xbb\xbf \n\n", "is empty"),
    "empty_gzip": (gzip.compress(b""), "is empty"),
    "utf16": ("[]".encode("utf-16"), "UTF-16.*Convert it to UTF-8"),
    "utf16_without_mark": (jsonl(*PAIRS).decode().encode("utf-16-le"), "UTF-16.*Convert it to UTF-8"),
    "zstd_dictionary": (
        zstandard.ZstdCompressor(
            dict_data=zstandard.train_dictionary(4096, [jsonl({"n": n}) for n in range(999)])
        ).compress(jsonl(*PAIRS)),
        r"compressed with a zstandard dictionary \(id \d+\).*Decompress it with `zstd -d -D",
    ),
    "gzip_cut": (FORMATS["jsonl.gz"][:-9], "cut off or damaged"),
    "gzip_bad": (b"\x1f\x8bnothing of the kind", "cut off or damaged"),
    "zstd_cut": (FORMATS["jsonl.zst"][:-1], "cut off or damaged"),
    "zstd_bad": (b"\x28\xb5\x2f\xfd" + b"\xff" * 20, "cut off or damaged"),
    "twice": (gzip.compress(FORMATS["jsonl.zst"]), "compressed twice"),
    "parquet_cut": (FORMATS["parquet"][:-5], "Parquet"),
    "array_cut": (b'[{"a": 1},\n {"b": ', "line 2, column 8: "),
    "array_no_end": (b'[{"a": 1}', "line 1, column 10: .*',' or ']'"),
    "array_no_comma": (b'[{"a": 1}\n{"a": 2}]', "line 2, column 1: "),
    "array_and_more": (b"[]\n[]", "line 2, column 1: .*more follows"),
    "array_too_deep": (b"[" * 100_000, "nested too deep"),
    "object_over_lines": (json.dumps(ALPACA, indent=2).encode(), "line 1, .*several lines.*one object per line"),
    "objects_over_lines": ((json.dumps(ALPACA, indent=2) + "\n").encode() * 2, "one object per line"),
    "wrapped_list": (jsonl({"version": 1, "data": [ALPACA]}), "'data' holds the list.*Deliver that list"),
    "wrapped_list_over_lines": (json.dumps({"data": [ALPACA]}, indent=1).encode(), "'data' holds the list"),
}


@pytest.mark.parametrize(("content", "fault"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_file_is_named_with_its_fault(content: bytes, fault: str) -> None:
    with pytest.raises(UnreadableFileError, match=rf"(?s)^file\.jsonl: .*{fault}") as caught:
        read(content)
    with pytest.raises(UnreadableFileError, match=f"^{re.escape(str(caught.value))}$"):
        check_file(content, "file.jsonl", RecordSettings())


def fault_of(function: Callable[[bytes], object], content: bytes) -> str | None:
    try:
        function(content)
    except UnreadableFileError as error:
        return str(error)
    return None


def read_if_readable(content: bytes) -> None:
    fault = fault_of(lambda data: read(data, multi_turn="every"), content)
    assert fault_of(lambda data: check_file(data, "file.jsonl", RecordSettings()), content) == fault


MAGICS = (b"BZh9", b"\xfd7zXZ\x00", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"query,answer\n")


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"PAR1", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"[", b"{", *MAGICS]),
)
def test_any_bytes_are_rows_or_an_unreadable_file(content: bytes, magic: bytes) -> None:
    read_if_readable(magic + content)


@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_a_damaged_file_is_rows_or_an_unreadable_file(name: str, data: st.DataObject) -> None:
    content = bytearray(FORMATS[name])
    position = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.sampled_from([position, position + 1, len(content)]))
    content[position:end] = data.draw(st.binary(max_size=3))
    read_if_readable(bytes(content))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "prompt", "completion", "role", "content", "output", "instruction"]), inner
        )
    ),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES, min_size=2, max_size=4))
def test_rows_in_are_rows_out(values: list[Any]) -> None:
    lines = "\n".join(json.dumps(value) for value in [{}, *values]).encode()
    assert read(lines)["source_row"].to_list() == list(range(1, len(values) + 2))


# Shapes


def test_alpaca_query_is_instruction_newline_input() -> None:
    records = [ALPACA, ALPACA | {"input": "[2, 1]", "system": "S"}, ALPACA | {"input": None}, ALPACA | {"input": " "}]
    frame = read(jsonl(*records, ALPACA | {"instruction": "", "input": "Only."}))
    assert frame["query"].to_list() == ["Sort.", "Sort.\n[2, 1]", "Sort.", "Sort.", "Only."]
    assert frame["system"].to_list() == [None, "S", None, None, None]
    assert set(frame["answer"]) == {"sorted(x)"}


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_conversations_in_either_spelling(field: str, keys: tuple[str, str]) -> None:
    row = only(read(jsonl({field: turns(*DIALOGUE, keys=keys)})))
    assert (row["system"], row["query"], row["answer"], row["turn_index"]) == ("S", "Q1\n\nQ2", "A2", 1)


@pytest.mark.parametrize("answering", ["gpt", "assistant", "model", "bing", "chatgpt", "bard", "Assistant"])
@pytest.mark.parametrize("asking", ["human", "user"])
def test_roles(asking: str, answering: str) -> None:
    row = only(read(jsonl({"conversations": turns((asking, "q"), (answering, "a")), "system": "S"})))
    assert (row["status"], row["system"], row["query"], row["answer"]) == ("accepted", "S", "q", "a")


def test_developer_and_system_turns_are_the_system_text() -> None:
    said = turns(("developer", "D"), ("user", "q"), ("system", "S"), ("assistant", "a"), ("system", None))
    row = only(read(jsonl({"messages": said})))
    assert (row["system"], row["query"], row["answer"]) == ("D\nS", "q", "a")


def test_the_system_text_of_a_record_and_of_its_turns_are_one_text() -> None:
    record = {"system": "CREATE TABLE t", "messages": turns(("system", "S"), ("user", "q"), ("assistant", "a"))}
    assert only(read(jsonl(record)))["system"] == "CREATE TABLE t\nS"
    for same in ("S", "", None):
        assert only(read(jsonl(record | {"system": same})))["system"] == "S"
    assert only(read(jsonl(record | {"system": 7})))["reason"] == "wrong_type"


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "u"}}, "other_than_text"),
        ({"type": "text", "text": None}, "wrong_type"),
        ({"type": "tool_use", "name": "f"}, "other_than_text"),
    ],
)
@pytest.mark.parametrize("multi_turn", ["last", "every"])
def test_a_part_of_the_system_text_that_is_no_text_costs_the_row(part: object, reason: str, multi_turn: str) -> None:
    said = turns(("system", [{"type": "text", "text": "S"}, part]), ("user", "q"), ("assistant", "a"))
    row = only(read(jsonl({"messages": said}), multi_turn=multi_turn))
    assert (row["reason"], "`messages[0].content[1]`" in row["detail"]) == (reason, True)


def test_prompt_completion_as_text_and_as_turns() -> None:
    prompt = turns(("system", "S"), ("user", "Q0"), ("assistant", "A0"), ("user", "Q1"))
    completion = turns(("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))
    content = jsonl({"prompt": "q", "completion": "a"}, {"prompt": prompt, "completion": completion})
    rows = read(content).select("source_row", "turn_index", "system", "query", "answer").rows()
    assert rows == [(1, 0, None, "q", "a"), (2, 1, "S", "Q1", "A1")]
    assert read(content, multi_turn="every")["query"].to_list() == ["q", "Q0", "Q1"]


@pytest.mark.parametrize("answer_field", FIELDS.answer)
@pytest.mark.parametrize("query_field", FIELDS.query)
def test_query_answer_aliases(query_field: str, answer_field: str) -> None:
    record = {query_field: "q", answer_field: "a", "system": "S"}
    row = only(read(jsonl(record), shape="query_answer"))
    assert (row["system"], row["query"], row["answer"]) == ("S", "q", "a")
    assert only(read(jsonl(record)))["pair_id"] == row["pair_id"]


def test_the_first_alias_that_is_present_is_taken() -> None:
    record = {name: name for name in (FIELDS.query + FIELDS.answer)[::-1]}
    row = only(read(jsonl(record | {"query": None}), shape="query_answer"))
    assert (row["query"], row["answer"]) == ("question\ninput", "response")


def test_an_input_is_never_lost_to_an_alias() -> None:
    row = only(read(jsonl({"instruction": "Sort.", "input": "[2, 1]", "response": "a"})))
    assert row["query"] == "Sort.\n[2, 1]"


def test_multi_turn_policies() -> None:
    content = jsonl({"messages": turns(*DIALOGUE)})
    assert read(content)["query"].to_list() == ["Q1\n\nQ2"]
    every = read(content, multi_turn="every").select("source_row", "turn_index", "system", "query", "answer")
    assert every.rows() == [(1, 0, "S", "Q0", "A0"), (1, 1, "S", "Q1\n\nQ2", "A2")]


def test_an_empty_turn_rejects_that_turn_only() -> None:
    said = turns(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", " "))
    frame = read(jsonl({"messages": said}), multi_turn="every")
    assert frame["reason"].to_list() == [None, "empty_answer"]


def test_the_shape_is_that_of_most_rows_and_the_rest_is_rejected(check_sentence: Check) -> None:
    pairs = [{"messages": turns(("user", "q"), ("assistant", "a"))}] * 2
    frame = read(jsonl(ALPACA, *pairs, "no object"))
    assert frame["reason"].to_list() == ["missing_query", None, None, "not_an_object"]
    check_sentence(frame["detail"][0])


@pytest.mark.parametrize("other", [{"messages": None}, {"prompt": "whole template"}, {"query": "", "source": 3}])
def test_ties_go_to_the_more_special_shape(other: dict[str, Any]) -> None:
    assert only(read(jsonl(other | ALPACA)))["query"] == "Sort."


def test_the_shape_can_be_set() -> None:
    record = {"messages": turns(("user", "m"), ("assistant", "a")), "prompt": "p", "completion": "c"}
    assert only(read(jsonl(record)))["query"] == "m"
    assert only(read(jsonl(record), shape="prompt_completion"))["query"] == "p"


# Fields


SQL = {"question": "Which cranes?", "context": "CREATE TABLE crane (name TEXT)", "answer": "SELECT name FROM crane"}


def test_the_context_of_a_query_belongs_to_it() -> None:
    frame = read(jsonl(SQL, SQL | {"context": "CREATE TABLE crane (name TEXT, built INTEGER)"}, SQL | {"context": ""}))
    assert frame["query"].to_list() == [
        "Which cranes?\nCREATE TABLE crane (name TEXT)",
        "Which cranes?\nCREATE TABLE crane (name TEXT, built INTEGER)",
        "Which cranes?",
    ]
    assert frame["pair_id"].n_unique() == 3


def test_input_and_output_are_a_query_and_an_answer() -> None:
    row = only(read(jsonl({"id": "0", "input": "q", "output": "a"})))
    assert (row["query"], row["answer"]) == ("q", "a")


def test_a_person_names_the_fields() -> None:
    record = {"ask": "q", "schema": "t", "fix": "a", "instruction": "no", "output": "no", "who": "S", "origin": "x"}
    named = {"query": ["ask"], "context": ["schema"], "answer": ["fix"], "system": ["who"], "source": ["origin"]}
    row = only(read(jsonl(record), fields=named))
    assert (row["system"], row["query"], row["answer"], row["source"]) == ("S", "q\nt", "a", "x")


def test_of_two_fields_that_could_be_read_the_other_one_is_named() -> None:
    both = {"instruction": "do", "question": "q", "answer": "a", "solution": "s"}
    assert unread(both) == ({"instruction": 1, "solution": 1}, 1)


def test_context_that_is_no_text_is_named_and_costs_no_row_unless_a_person_asked_for_it() -> None:
    record = {"question": "q", "answer": "a", "context": ["x"]}
    assert unread(record) == ({"context": 1}, 1)
    assert only(read(jsonl(record), fields={"context": ["context"]}))["reason"] == "wrong_type"
    assert (
        only(read(jsonl({"prompt": "p", "completion": "c", "context": "t"}), fields={"context": ["context"]}))["query"]
        == "p\nt"
    )


def test_a_licence_is_read_in_every_form() -> None:
    forms = ["MIT", ["MIT", "Apache-2.0"], {"key": "mit", "name": "MIT License"}, None, 3]
    frame = read(jsonl(*({"query": "q", "answer": "a", "license": form} for form in forms)))
    assert frame["licence"].to_list() == ["MIT", "MIT, Apache-2.0", "mit", None, None]


def test_fields_that_are_neither_read_nor_known_are_counted() -> None:
    talk = turns(("user", "q"), ("assistant", "a"))
    talk[1] |= {"weight": 1, "logprobs": [1], "refusal": None, "notes": {}}
    assert unread({"id": 1, **SQL, "tests": "assert", "note": ""}, SQL | {"tests": ["x"]}) == ({"tests": 2}, 2)
    assert unread({"messages": talk, "tests": "assert"}, {"messages": talk}) == (
        {"tests": 1, "messages[].logprobs": 2},
        2,
    )
    assert unread({"query": "q", "answer": "a"}) == ({}, 1)


@pytest.mark.parametrize("value", [False, 0, 0.0, "no"])
def test_an_unknown_field_of_a_turn_is_named_where_its_value_says_no(value: object) -> None:
    talk = turns(("user", "q"), ("assistant", "a"))
    talk[1]["training"] = value
    assert unread({"messages": talk}) == ({"messages[].training": 1}, 1)


def test_tools_are_named_where_they_are_not_context() -> None:
    talk = {"messages": turns(("user", "q"), ("assistant", "a"))}
    for nothing in ([], "[]", None, ""):
        assert unread(talk | {"tools": nothing}) == ({}, 1)
    assert unread(talk | {"tools": [{"name": "f"}]}) == ({"tools": 1}, 1)
    with_tools = jsonl(talk | {"tools": [{"name": "f"}]})
    facts = read_file(with_tools, "file.jsonl", "b1", RecordSettings()).facts
    assert not_read(facts) == [
        "fields not read: tools (1 of 1 records); name them in records.fields if they belong to the pair; "
        "see records.context"
    ]
    assert not read_file(with_tools, "file.jsonl", "b1", RecordSettings(context="history")).unread


def test_earlier_turns_that_are_not_read_are_counted() -> None:
    talk = turns(("user", "q"), ("assistant", "a"))
    records = [{"messages": talk}, {"messages": talk * 2}, {"messages": talk * 3}]
    assert unread(*records) == ({"earlier turns": 2}, 3)
    reading = read_file(jsonl(*records), "file.jsonl", "b1", RecordSettings())
    assert not_read(reading.facts) == [
        "earlier turns are not read: 2 of 3 records have some; see records.multi_turn and records.context"
    ]
    for settings in (RecordSettings(multi_turn="every"), RecordSettings(context="history")):
        assert not read_file(jsonl(*records), "file.jsonl", "b1", settings).unread


def unread(*records: dict[str, Any]) -> tuple[dict[str, int], int]:
    reading = read_file(jsonl(*records), "file.jsonl", "b1", RecordSettings())
    assert set(reading.frame["status"]) == {"accepted"}
    return dict(reading.unread), reading.num_records


def test_named_fields_are_those_of_the_files_that_have_them() -> None:
    fields = {"query": ["ask"], "answer": ["reply"]}
    files = {
        "named": {"ask": "q", "reply": "a", "question": "other"},
        "talk": {"messages": turns(("user", "q"), ("assistant", "a"))},
        "usual": {"question": "q", "answer": "a"},
    }
    for record in files.values():
        row = only(read(jsonl(record), fields=fields))
        assert (row["query"], row["answer"], row["reason"]) == ("q", "a", None), record
    assert only(read(jsonl({"ask": None, "question": "q", "answer": "a"}), fields=fields))["reason"] == "missing_query"
    csv_file = b"ask,reply\nq,a\n"
    assert (
        only(read(csv_file, fields=fields))["answer"] == only(read(b"question,answer\nq,a\n", fields=fields))["answer"]
    )


def test_of_a_preference_the_chosen_answer_is_read() -> None:
    asked, chosen, other = turns(("user", "q")), turns(("assistant", "a")), turns(("assistant", "no"))
    shapes = [
        {"prompt": "q", "chosen": "a", "rejected": "no"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "no"},
        {"prompt": asked, "chosen": chosen, "rejected": other},
        {"chosen": asked + chosen, "rejected": asked + other},
        {"prompt": "q", "chosen": chosen, "rejected": other},
        {
            "chosen_messages": asked + chosen,
            "rejected_messages": asked + other,
        },
        {"messages": asked + chosen, "chosen": asked + chosen, "rejected": asked + other},
        {
            "conversations": turns(("human", "q"), keys=("from", "value")),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ]
    for record in shapes:
        row = only(read(jsonl(record)))
        assert (row["query"], row["answer"], row["reason"]) == ("q", "a", None), record
        assert unread(record) == ({}, 1), record


@pytest.mark.parametrize("field", ["images", "image", "videos", "audios"])
@pytest.mark.parametrize("value", [["a.png"], {"path": "a.png", "bytes": None}])
def test_a_record_with_a_picture_or_a_sound_is_no_pair_of_text(field: str, value: object) -> None:
    for record in (ALPACA, {"messages": turns(("user", "Who is it? <image>"), ("assistant", "Nobody."))}):
        row = only(read(jsonl(record | {field: value})))
        assert (row["reason"], field in row["detail"]) == ("other_than_text", True)
        assert not read_file(jsonl(record | {field: value}), "a.jsonl", "b1", RecordSettings()).unread
        assert only(read(jsonl(record | {field: []})))["status"] == "accepted"


@pytest.mark.parametrize(
    "place", ["coco/1.jpg", "https://example.org/a.webp?size=1", "data:image/png;base64,AA==", "7"]
)
def test_the_place_of_a_picture_is_a_picture_and_the_image_of_a_container_is_not(place: str) -> None:
    assert only(read(jsonl(ALPACA | {"image": place})))["reason"] == "other_than_text"
    for name in ("python:3.11", "ghcr.io/a/b:latest", "localhost:5000/a:1", "", " "):
        assert only(read(jsonl(ALPACA | {"image": name})))["status"] == "accepted", name


def test_a_picture_in_bytes_is_a_picture() -> None:
    assert only(read(parquet(ALPACA | {"image": b"RIFF"})))["reason"] == "other_than_text"


# Conversations


@pytest.mark.parametrize(
    "parts",
    [["a", "b"], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], [{"type": "text", "value": "ab"}]],
)
def test_parts_that_are_text_are_one_text(parts: list[Any]) -> None:
    row = only(read(jsonl({"messages": turns(("user", parts), ("assistant", parts))})))
    assert (row["query"], row["answer"]) == ("ab", "ab")


@pytest.mark.parametrize("mark", ["weight", "loss", "train", "loss_weight"])
@pytest.mark.parametrize("no", [0, 0.0, False, "false"])
def test_an_answer_that_is_marked_as_not_to_be_trained_on_is_not_taken(mark: str, no: Any) -> None:
    said = turns(("user", "q"), ("assistant", "a"), ("user", "more"), ("assistant", "sorry"))
    said[1][mark], said[3][mark] = 1, no
    row = only(read(jsonl({"messages": said})))
    assert (row["query"], row["answer"], row["turn_index"]) == ("q", "a", 0)
    assert read(jsonl({"messages": said}), multi_turn="every")["reason"].to_list() == [None, "not_for_training"]
    said[1][mark] = no
    row = only(read(jsonl({"messages": said})))
    assert (row["reason"], row["turn_index"]) == ("not_for_training", 1)
    assert "`messages[3].content`" in row["detail"]


def test_assistant_turns_that_follow_each_other_are_one_answer() -> None:
    row = only(read(jsonl({"messages": turns(("user", "q"), ("assistant", "a"), ("assistant", "b"))})))
    assert row["answer"] == "a\n\nb"


TAGGED = "<think>\nWell.\n</think>\n\n"
WITH_REASONING = {
    "field": {"role": "assistant", "content": "a", "reasoning_content": "Well."},
    "other_field": {"role": "assistant", "content": "a", "thinking": " Well.\n"},
    "inline": {"role": "assistant", "content": TAGGED + "a"},
    "part": {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "Well."}, {"type": "text", "text": "a"}],
    },
    "part_value": {"role": "gpt", "content": [{"type": "reasoning", "value": "Well."}, {"type": "text", "value": "a"}]},
}


@pytest.mark.parametrize("turn", WITH_REASONING.values(), ids=WITH_REASONING)
def test_reasoning_is_kept_apart_from_the_answer_or_scored_with_it(turn: dict[str, Any]) -> None:
    content = jsonl({"messages": [*turns(("user", "q")), turn]})
    reading = read_file(content, "file.jsonl", "b1", RecordSettings())
    row = only(reading.frame)
    assert (row["answer"], row["reasoning"], dict(reading.unread)) == ("a", TAGGED, {})
    assert row["pair_id"] == pair_id(None, "q", "a")
    scored = only(read(content, reasoning="score"))
    assert (scored["answer"], scored["reasoning"]) == (TAGGED + "a", None)


def test_the_reasoning_of_a_record_that_is_no_conversation() -> None:
    frame = read(jsonl({"query": "q", "answer": "a", "reasoning": "Well."}, {"query": "q", "answer": TAGGED + "a"}))
    assert frame.select("answer", "reasoning").rows() == [("a", TAGGED)] * 2


def test_reasoning_stands_once_and_the_first_line_of_the_answer_keeps_its_indentation() -> None:
    frame = read(
        jsonl(
            {"query": "q", "answer": TAGGED + "a", "reasoning": "Well."},
            {"query": "q", "answer": "a", "reasoning": TAGGED},
            {"query": "q", "answer": TAGGED + "a", "reasoning": "First."},
            {"query": "q", "answer": "<think>Well.</think>\n\n    return x"},
            {"query": "q", "answer": "<think>Well.</think> return x"},
        )
    )
    assert frame.select("answer", "reasoning").rows() == [
        ("a", TAGGED),
        ("a", TAGGED),
        ("a", "<think>\nFirst.\n</think>\n\n" + TAGGED),
        ("    return x", "<think>Well.</think>\n\n"),
        ("return x", "<think>Well.</think> "),
    ]
    assert unread({"query": "q", "answer": "a", "reasoning": ["s"]}) == ({"reasoning": 1}, 1)


@pytest.mark.parametrize("answer", [TAGGED, "<think>Well.", "a <think>Well.</think>", "<thing>x</thing> a"])
def test_an_answer_of_nothing_but_reasoning_or_with_tags_elsewhere_is_left_whole(answer: str) -> None:
    row = only(read(jsonl({"query": "q", "answer": answer})))
    assert (row["answer"], row["reasoning"]) == (answer, None)


@pytest.mark.parametrize(
    ("record", "is_barred"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, True),
        ({"prompt": "q", "completion": "a", "label": True}, False),
        ({"messages": turns(("user", "q"), ("assistant", "a")), "label": False}, True),
        ({"instruction": "q", "output": "a", "kto_tag": False}, True),
        ({"query": "Is it a bug?", "answer": "No.", "label": False}, False),
    ],
)
def test_a_label_of_kto_says_which_answer_is_a_bad_one(record: dict[str, Any], *, is_barred: bool) -> None:
    assert only(read(jsonl(record)))["reason"] == ("not_for_training" if is_barred else None)


@pytest.mark.parametrize("no", [0, "False", "false"])
def test_a_label_can_be_written_in_other_ways(no: Any) -> None:
    assert only(read(jsonl({"prompt": "q", "completion": "a", "label": no})))["reason"] == "not_for_training"


def test_an_answer_of_a_prompt_is_never_taken_for_the_completion() -> None:
    prompt = turns(("user", "u1"), ("assistant", "few-shot"), ("user", "u2"))
    completion = [{"role": "assistant", "content": "c", "weight": 0}]
    row = only(read(jsonl({"prompt": prompt, "completion": completion})))
    assert (row["query"], row["reason"]) == ("u2", "not_for_training")


def test_a_part_that_is_no_text_costs_its_own_exchange_only() -> None:
    image = [{"type": "image_url"}, {"type": "text", "text": "What is it?"}]
    said = turns(("user", image), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
    assert only(read(jsonl({"messages": said})))["query"] == "q2"
    assert read(jsonl({"messages": said}), multi_turn="every")["reason"].to_list() == ["other_than_text", None]
    used = turns(("user", "q"), ("assistant", [{"type": "tool_use", "name": "f"}]), ("user", "q2"), ("assistant", "a2"))
    assert only(read(jsonl({"messages": used})))["answer"] == "a2"


def test_keys_that_parquet_fills_with_null_say_nothing() -> None:
    call = {"name": None, "arguments": None}
    parts = [{"type": "thinking", "text": None, "thinking": "Well."}, {"type": "text", "text": None, "value": "a"}]
    said = [
        {"role": "user", "content": "q", "function_call": call},
        {"role": "assistant", "content": parts, "function_call": call},
    ]
    row = only(read(jsonl({"messages": said})))
    assert (row["answer"], row["reasoning"]) == ("a", TAGGED)


def test_turns_without_text_are_no_part_of_a_text() -> None:
    said = turns(("user", None), ("user", "q"), ("user", " "), ("assistant", None), ("assistant", "a"))
    row = only(read(jsonl({"messages": said})))
    assert (row["query"], row["answer"]) == ("q", "a")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TOOL_TURNS = {
    "openai": [
        CALL,
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        {"role": "assistant", "content": "It is 1."},
    ],
    "sharegpt": turns(("function_call", "{}"), ("observation", "1"), ("gpt", "It is 1."), keys=("from", "value")),
    "inline": turns(("assistant", "<tool_call>{}</tool_call>"), ("user", "1")),
}


@pytest.mark.parametrize("used", TOOL_TURNS.values(), ids=TOOL_TURNS)
def test_an_ordinary_pair_is_not_lost_to_a_tool_turn_before_it(used: list[dict[str, Any]]) -> None:
    asked, pair = turns(("user", "What is it?")), turns(("user", "q"), ("assistant", "a"))
    row = only(read(jsonl({"messages": [*asked, *used, *pair]})))
    assert (row["query"].endswith("q"), row["answer"]) == (True, "a")
    assert only(read(jsonl({"messages": [*asked, *used]})))["reason"] == "uses_tools"


# Rejected rows


def said(*said_turns: tuple[Any, Any]) -> bytes:
    return jsonl({"messages": turns(*said_turns)})


REJECTED: dict[str, tuple[bytes, RejectReason, str]] = {
    "torn": (b'{"query": "q", "answer": ', RejectReason.BAD_JSON, "column 26"),
    "deep": (b'{"query":' + b"[" * 100_000, RejectReason.BAD_JSON, "nested too deep"),
    "bytes": (b'{"query": "q\xff", "answer": "a"}', RejectReason.INVALID_UTF8, r"character 13 .*\\xff"),
    "torn_bytes": (b'{"query": "q\xff', RejectReason.INVALID_UTF8, r"\\xff"),
    "surrogate": (b'{"query": "q", "answer": "\\ud800"}', RejectReason.INVALID_UTF8, "`answer` contains half"),
    "list": (b'"[]"', RejectReason.NOT_AN_OBJECT, "is a text"),
    "null": (b"null", RejectReason.NOT_AN_OBJECT, "is null"),
    "no_query": (jsonl({"answer": "a"}), RejectReason.MISSING_QUERY, "`query` / `question` .*of the row: 'answer'"),
    "null_output": (jsonl(ALPACA | {"output": None}), RejectReason.MISSING_ANSWER, "shape alpaca: `output` is absent"),
    "no_answer": (b'{"query": "q", "\\ud800": "a"}', RejectReason.MISSING_ANSWER, r"'query', '\\ud800'"),
    "no_field": (jsonl({}), RejectReason.MISSING_QUERY, "fields of the row: none"),
    "empty_query": (jsonl({"query": " \u3000\u00a0\u200b\n", "answer": "a"}), RejectReason.EMPTY_QUERY, "`query`"),
    "empty_answer": (jsonl({"query": "q", "answer": ""}), RejectReason.EMPTY_ANSWER, "`answer` is empty"),
    "answer_bool": (jsonl({"query": "q", "answer": True}), RejectReason.WRONG_TYPE, "`answer` is a boolean"),
    "answer_number": (b'{"query": "q", "answer": NaN}', RejectReason.WRONG_TYPE, "`answer` is a number"),
    "answer_huge": (b'{"query": "q", "answer": %s}' % (b"9" * 5000), RejectReason.WRONG_TYPE, "a number"),
    "query_object": (jsonl({"query": {}, "answer": "a"}), RejectReason.WRONG_TYPE, "`query` is an object"),
    "instruction": (jsonl(ALPACA | {"instruction": 1, "input": "x"}), RejectReason.WRONG_TYPE, "`instruction` is a n"),
    "input": (jsonl(ALPACA | {"input": ["x"]}), RejectReason.WRONG_TYPE, "`input` is a list"),
    "system": (jsonl(ALPACA | {"system": 7}), RejectReason.WRONG_TYPE, "`system` is a number"),
    "half_turns": (jsonl({"prompt": [], "completion": "a"}), RejectReason.WRONG_TYPE, "`prompt` is a list"),
    "turns_text": (jsonl({"messages": "hi"}), RejectReason.WRONG_TYPE, "`messages` is a text; a list of turns"),
    "turn_text": (jsonl({"messages": ["hi"]}), RejectReason.WRONG_TYPE, r"`messages\[0\]` is a text"),
    "image": (
        said(("user", [{"type": "image_url"}]), ("assistant", "a")),
        RejectReason.OTHER_THAN_TEXT,
        r"`messages\[0\].content\[0\]` is a part of type 'image_url'",
    ),
    "part": (said(("user", [1]), ("assistant", "a")), RejectReason.WRONG_TYPE, r"content\[0\]` is a number"),
    "part_text": (said(("user", [{"text": 1}]), ("assistant", "a")), RejectReason.WRONG_TYPE, "is a number; text"),
    "no_parts": (said(("user", []), ("assistant", "a")), RejectReason.MISSING_QUERY, r"`messages\[0\].content`"),
    "system_turn": (said(("system", 1), ("user", "q"), ("gpt", "a")), RejectReason.WRONG_TYPE, "content` is a number"),
    "no_content": (said(("user", "q"), ("assistant", None)), RejectReason.MISSING_ANSWER, r"`messages\[1\].content`"),
    "tool": (
        said(("user", "q"), ("tool", "t"), ("assistant", "a")),
        RejectReason.USES_TOOLS,
        r"`messages\[1\].content` is a call of a tool, or what a tool said",
    ),
    "call": (
        jsonl({"messages": [*turns(("user", "q")), CALL]}),
        RejectReason.USES_TOOLS,
        r"`messages\[1\].tool_calls` is a call",
    ),
    "call_alone": (
        jsonl({"messages": [*turns(("user", "q")), {"role": "assistant", "tool_calls": CALL["tool_calls"]}]}),
        RejectReason.USES_TOOLS,
        r"`messages\[1\].tool_calls` is a call",
    ),
    "no_text": (
        jsonl({"messages": [{"role": "user"}, {"role": "gpt"}]}),
        RejectReason.MISSING_QUERY,
        r"`messages\[0\].content`",
    ),
    "role": (said(("user", "q"), ("critic", "t"), ("assistant", "a")), RejectReason.UNKNOWN_ROLE, "role` is 'critic'"),
    "label": (jsonl({"prompt": "q", "completion": "a", "label": False}), RejectReason.NOT_FOR_TRAINING, "`label` is"),
    "no_role": (jsonl({"messages": [{"content": "q"}]}), RejectReason.UNKNOWN_ROLE, r"`messages\[0\].role` is null"),
    "unanswered": (said(("assistant", "a"), ("user", "q")), RejectReason.NO_ANSWERED_TURN, "2 turns"),
    "no_turns": (said(), RejectReason.NO_ANSWERED_TURN, "0 turns"),
    "unprompted": (
        jsonl({"prompt": turns(("user", "q"), ("gpt", "a")), "completion": turns(("gpt", "a"))}),
        RejectReason.NO_ANSWERED_TURN,
        "`prompt` does not end with a user turn",
    ),
}


@pytest.mark.parametrize(("line", "reason", "detail"), REJECTED.values(), ids=REJECTED)
def test_a_rejected_row_keeps_its_place_its_record_and_its_reason(
    line: bytes, reason: RejectReason, detail: str
) -> None:
    row = read(b"\n\n" + line.rstrip(b"\n") + b"\n{}").row(0, named=True)
    assert (row["source_row"], row["turn_index"], row["status"], row["reason"]) == (3, 0, Status.REJECTED, reason)
    assert row["record"].encode() == line.rstrip(b"\n").replace(b"\xff", b"\\xff")
    assert row["pair_id"] is None
    assert pl.DataFrame(row).select(pl.col("detail").str.contains(detail)).item(), row["detail"]


def test_every_reject_reason_is_tested() -> None:
    of_rows = set(RejectReason) - {RejectReason.UNREADABLE_FILE, RejectReason.BAD_CSV}
    assert {reason for _, reason, _ in REJECTED.values()} == of_rows


def test_a_file_that_cannot_be_cut_into_rows_can_stand_as_one_rejected_row() -> None:
    with pytest.raises(UnreadableFileError) as caught:
        read(b"PAR1 torn")
    row = only(enforce(RawData, unreadable_file(caught.value, "rows.parquet", "b1")))
    assert (row["status"], row["reason"], row["record"]) == (Status.REJECTED, RejectReason.UNREADABLE_FILE, "")
    assert row["detail"] == str(caught.value)


def limited(contents: dict[str, bytes], settings: RecordSettings, limit: int) -> pl.DataFrame:
    """The rows of the first records of a delivery."""
    sizes = {name: len(content) for name, content in contents.items()}
    parts = delivery_parts(sizes, contents.__getitem__, "b1", settings, limit)
    return pl.concat(part.frame for part in parts)


def test_a_delivery_is_its_files_in_order_up_to_its_limit() -> None:
    contents = {"b.jsonl": jsonl(*PAIRS), "torn.parquet": b"PAR1 torn", "a.json": json_array(*PAIRS)}
    rows = enforce(RawData, read_delivery(contents, "b1", RecordSettings()).frame)
    assert rows["source_file"].to_list() == ["a.json"] * 3 + ["b.jsonl"] * 3 + ["torn.parquet"]
    assert rows["reason"].drop_nulls().to_list() == [RejectReason.UNREADABLE_FILE]
    assert_frame_equal(limited(contents, RecordSettings(), 5), rows.head(5))
    assert enforce(RawData, read_delivery({}, "b1", RecordSettings()).frame).is_empty()


DOCUMENTS = {
    "AUTHORS": NO_ROWS["names"],
    "LICENSE-DATA": NO_ROWS["prose"],
    "README": NO_ROWS["prose"],
    "Thumbs.db": b"\xd0\xcf\x11\xe0" * 9,
    "logo.webp": NO_ROWS["binary"],
    "notes/paper.bib": b"@article{x,\n title={y}\n}\n",
}


@pytest.mark.parametrize("data", ["data/train.csv", "pairs.txt", "zz/part-0"])
def test_documents_beside_rows_are_told_by_their_content_and_left_aside(data: str) -> None:
    contents = {**DOCUMENTS, "README.md": NO_ROWS["prose"], data: FORMATS["csv"]}
    reading = read_delivery(contents, "b1", RecordSettings())
    assert reading.frame.select("source_file", "status").unique().rows() == [(data, "accepted")]
    assert reading.facts["files_left_aside"] == sorted(contents.keys() - {data})
    check_delivery(contents, RecordSettings())


@pytest.mark.parametrize("contents", [DOCUMENTS, {"README.md": NO_ROWS["prose"]}, {"pairs": NO_ROWS["yaml"]}])
def test_documents_alone_are_no_delivery(contents: dict[str, bytes]) -> None:
    reading = read_delivery(contents, "b1", RecordSettings())
    assert reading.frame.select("source_file", "reason").rows() == [
        (name, RejectReason.UNREADABLE_FILE) for name in sorted(contents)
    ]
    assert not reading.left_aside
    with pytest.raises(NoRowsError, match=min(contents)):
        check_delivery(contents, RecordSettings())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.jsonl", NO_ROWS["binary"]),
        ("b.csv.gz", gzip.compress(NO_ROWS["names"])),
        ("b.json-0", NO_ROWS["prose"]),
        ("part-1", FORMATS["parquet"][:-5]),
        ("part-1", FORMATS["jsonl.gz"][:-5]),
        ("part-1", jsonl(*PAIRS).decode().encode("utf-16")),
    ],
    ids=["binary", "csv.gz", "prose", "parquet", "jsonl.gz", "utf-16"],  # Compressed bytes hold the time.
)
def test_a_damaged_file_of_rows_is_never_left_aside(name: str, content: bytes) -> None:
    contents = {"a.jsonl": jsonl(*PAIRS), name: content}
    reading = read_delivery(contents, "b1", RecordSettings())
    assert reading.frame["reason"].to_list() == [None, None, None, RejectReason.UNREADABLE_FILE]
    with pytest.raises(UnreadableFileError, match=name):
        check_delivery(contents, RecordSettings())


@pytest.mark.parametrize("empty", [b"query,answer\n", b"[]", NO_PARQUET_ROWS], ids=["csv", "array", "parquet"])
def test_a_file_without_a_row_is_named(empty: bytes) -> None:
    for others in ({}, {"a.jsonl": jsonl(*PAIRS)}):
        reading = read_delivery({**others, "b": empty}, "b1", RecordSettings())
        assert (reading.frame.height, reading.left_aside) == (3 * len(others), ["b"])


def test_a_limit_counts_records_and_not_turns() -> None:
    talk = {"messages": turns(*DIALOGUE)}
    rows = limited({"a.jsonl": jsonl(talk, talk)}, RecordSettings(multi_turn="every"), 1)
    assert rows["source_row"].to_list() == [1, 1]


def test_without_a_language_field_a_code_fence_of_the_answer_says_the_language() -> None:
    pair = {"instruction": "Write it.", "input": "", "output": "So:\n```py\nx = 1\n```"}
    assert only(read(jsonl(pair)))["language"] == "python"
    assert only(read(jsonl(pair | {"language": "lua"})))["language"] == "lua"


def test_a_rejected_row_keeps_what_is_known() -> None:
    row = only(read(jsonl(ALPACA | {"output": ["a"], "source": "s", "language": 1})))
    assert (row["query"], row["answer"], row["source"], row["language"]) == ("Sort.", None, "s", None)


def test_a_bad_row_of_an_array_costs_that_row_only() -> None:
    content = json.dumps([PAIRS[0], {"query": "?", "answer": "x"}, None, PAIRS[1]]).encode().replace(b"?", b"\xfe")
    frame = read(content)
    assert frame["reason"].to_list() == [None, "invalid_utf8", "not_an_object", None]
    assert frame["record"][1] == '{"query": "\\xfe", "answer": "x"}'


@pytest.mark.parametrize("answer", [["print(1)"], [], {"code": "x"}, 1, 1.5, False])
@pytest.mark.parametrize(("query_field", "answer_field"), [("instruction", "output"), ("query", "answer")])
@pytest.mark.parametrize("write", [jsonl, json_array, parquet])
def test_an_answer_that_is_no_text_never_ends_up_as_its_python_repr(
    answer: Any, query_field: str, answer_field: str, write: Any
) -> None:
    row = only(read(write({query_field: "q", answer_field: answer})))
    assert (row["answer"], row["reason"]) == (None, "wrong_type")


# Identity


def test_pair_id_is_pinned() -> None:
    assert pair_id("S", "Q", "Ä") == "c01085b1699162225d0475c2efa8efde"


def test_pair_id_tells_the_texts_apart_and_no_system_is_an_empty_one() -> None:
    assert len({pair_id("a", "b", "c"), pair_id("ab", "", "c"), pair_id("", "ab", "c"), pair_id("", "a", "bc")}) == 4
    assert pair_id(None, "q", "a") == pair_id("", "q", "a")
    frame = read(jsonl(ALPACA, ALPACA | {"system": ""}))
    assert frame["system"].to_list() == [None, None]
    assert frame["pair_id"].unique().to_list() == [pair_id(None, "Sort.", "sorted(x)")]


def test_code_alpaca_2k(code_alpaca: Path) -> None:
    frame = read(code_alpaca.read_bytes())
    assert frame.height == 2017
    assert frame["reason"].drop_nulls().to_list() == ["empty_answer"] * 2
