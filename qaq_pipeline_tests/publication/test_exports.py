"""exports: the files that a trainer loads, to the byte."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import ExportSettings
from qaq_pipeline.publication.exports import (
    FORMATS,
    check_installed,
    columns,
    field_of_turns,
    llama_factory_entries,
    open_file,
    with_meta,
)
from qaq_pipeline.schema.tables import SelectedSubset, dtypes, enforce
from qaq_pipeline_tests.support.frames import pair_name, raw_rows
from qaq_pipeline_tests.support.sentences import Check


def selected(*texts: tuple[str | None, str, str]) -> pl.DataFrame:
    """SelectedSubset of (system, query, answer)."""
    rows = [
        {
            "batch": "b1",
            "source_file": "a.jsonl",
            "source_row": number,
            "turn_index": 0,
            "position": number,
            "pair_id": pair_name(number),
            "system": system,
            "query": query,
            "answer": answer,
        }
        for number, (system, query, answer) in enumerate(texts, start=1)
    ]
    return enforce(SelectedSubset, pl.DataFrame(rows, schema=dtypes(SelectedSubset)))


TWO = selected((None, 'Say "größer" in 日本語', "a\nb\t\\ \u2028 😀 \0"), ("Be brief.", "  indent kept \n", "</s>"))


def export(name: str, rows: pl.DataFrame) -> dict[str, bytes]:
    """The files of the rows in a format, by path in the folder of a selection."""
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        with open_file(name, folder, has_meta="meta" in rows.columns) as file:
            file.append("b1", rows)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {
    "messages": [
        r'{"messages":[{"role":"user","content":"Say \"größer\" in 日本語"},'
        '{"role":"assistant","content":"a\\nb\\t\\\\ \u2028 😀 \\u0000"}]}',
        r'{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"  indent kept \n"},'
        r'{"role":"assistant","content":"</s>"}]}',
    ],
    "prompt_completion": [
        r'{"prompt":[{"role":"user","content":"Say \"größer\" in 日本語"}],'
        '"completion":[{"role":"assistant","content":"a\\nb\\t\\\\ \u2028 😀 \\u0000"}]}',
        r'{"prompt":[{"role":"system","content":"Be brief."},{"role":"user","content":"  indent kept \n"}],'
        r'"completion":[{"role":"assistant","content":"</s>"}]}',
    ],
    "sharegpt": [
        r'{"conversations":[{"from":"human","value":"Say \"größer\" in 日本語"},'
        '{"from":"gpt","value":"a\\nb\\t\\\\ \u2028 😀 \\u0000"}]}',
        r'{"conversations":[{"from":"system","value":"Be brief."},{"from":"human","value":"  indent kept \n"},'
        r'{"from":"gpt","value":"</s>"}]}',
    ],
    "alpaca": [
        r'{"instruction":"Say \"größer\" in 日本語","input":"",'
        '"output":"a\\nb\\t\\\\ \u2028 😀 \\u0000","system":""}',
        r'{"instruction":"  indent kept \n","input":"","output":"</s>","system":"Be brief."}',
    ],
}
JSONL = ["messages", "prompt_completion", "sharegpt"]


@pytest.mark.parametrize("name", JSONL)
def test_jsonl_is_one_record_a_line_to_the_byte(name: str) -> None:
    assert export(name, TWO) == {f"{name}.jsonl": "".join(line + "\n" for line in EXPECTED[name]).encode()}


@pytest.mark.parametrize("name", ["messages", "prompt_completion", "sharegpt", "alpaca"])
def test_reasoning_that_was_not_scored_stands_before_its_answer(name: str) -> None:
    thought = "<think>\nWell.\n</think>\n\n"
    rows = selected((None, "q", "a")).with_columns(reasoning=pl.lit(thought))
    assert export(name, rows) == export(name, selected((None, "q", thought + "a")))


def test_earlier_turns_stand_before_the_query_where_a_format_has_turns() -> None:
    turns = [("tools", "[]"), ("user", "u"), ("assistant", "s"), ("tool", "t"), ("assistant", "v")]
    history = [{"role": role, "content": text} for role, text in turns]
    rows = selected(("Be brief.", "q", "a")).with_columns(
        history=pl.Series([history], dtype=dtypes(SelectedSubset)["history"])
    )
    said = [("system", "Be brief."), *turns[1:], ("user", "q"), ("assistant", "a")]
    (messages,), (parts,), (chat,) = (read_back(name, rows) for name in ("messages", "prompt_completion", "sharegpt"))
    assert messages == {"messages": [{"role": role, "content": text} for role, text in said]}
    assert parts == {"prompt": messages["messages"][:-1], "completion": messages["messages"][-1:]}
    speakers = ["system", "human", "gpt", "observation", "gpt", "human", "gpt"]
    assert chat == {
        "conversations": [{"from": who, "value": text} for who, (_, text) in zip(speakers, said, strict=True)]
    }


def test_a_delivered_record_comes_back_to_the_byte_on_a_line_of_its_own() -> None:
    records = ['{"b": 1.10, "a": "x\\ny", "a2": [ ]}', '{\n "c": "ü\u2028"\r\n}']
    rows = selected((None, "q", "a"), (None, "q2", "a2")).with_columns(record=pl.Series(records))
    written = export("conversation", rows)["conversations.jsonl"]
    assert written.split(b"\n") == [records[0].encode(), '{  "c": "ü\u2028"  }'.encode(), b""]


def test_alpaca_is_one_json_array_to_the_byte() -> None:
    assert export("alpaca", TWO) == {
        "alpaca.json": f"[\n{EXPECTED['alpaca'][0]},\n{EXPECTED['alpaca'][1]}\n]\n".encode()
    }


def test_parquet_holds_the_messages() -> None:
    records = pq.read_table(io.BytesIO(export("parquet", TWO)["messages.parquet"])).to_pylist()
    assert records == [json.loads(line) for line in EXPECTED["messages"]]


def test_the_folder_holds_the_messages_and_the_same_rows_give_the_same_bytes() -> None:
    pytest.importorskip("datasets")
    files = export("hf", TWO)
    assert sorted(files) == ["hf/data-00000-of-00001.arrow", "hf/dataset_info.json", "hf/state.json"]
    assert read_back("hf", TWO) == [json.loads(line) for line in EXPECTED["messages"]]
    assert export("hf", TWO.clone()) == files
    changed = export("hf", TWO[::-1])
    assert json.loads(changed["hf/state.json"])["_fingerprint"] != json.loads(files["hf/state.json"])["_fingerprint"]


def read_back(name: str, rows: pl.DataFrame) -> list[dict[str, Any]]:
    """The records of an export, by plain json and pyarrow."""
    files = export(name, rows)
    path = next(path for path in files if not path.endswith(("info.json", "state.json")))
    match path.rpartition(".")[2]:
        case "jsonl":
            return [json.loads(line) for line in files[path].split(b"\n")[:-1]]
        case "json":
            return json.loads(files[path])
        case "parquet":
            return pq.read_table(io.BytesIO(files[path])).to_pylist()
        case _:
            return pa.ipc.open_stream(files[path]).read_all().to_pylist()


def as_pair(record: dict[str, Any]) -> tuple[str, str, str]:
    """(system, query, answer) of a record of any format; an absent system text is empty."""
    if "instruction" in record:
        assert record["input"] == ""
        return record["system"], record["instruction"], record["output"]
    turns = record.get("messages") or record.get("conversations") or [*record["prompt"], *record["completion"]]
    said = [tuple(turn.values()) for turn in turns]
    roles = [role for role, _ in said]
    assert roles[-2:] in (["user", "assistant"], ["human", "gpt"])
    assert roles[:-2] in ([], ["system"])
    texts = [text for _, text in said]
    return ("" if len(texts) == 2 else texts[0], texts[-2], texts[-1])


def fields_of(value: Any) -> set[tuple[str, type]]:
    """Name and type of every field in a record, also of those in its lists."""
    if isinstance(value, list):
        return set().union(*map(fields_of, value))
    return {field for name, inner in value.items() for field in ({(name, type(inner))} | nested(inner))}


def nested(value: Any) -> set[tuple[str, type]]:
    return fields_of(value) if isinstance(value, list | dict) else set()


TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(["2026-11-02", "null", "1", "\0", "\r\n"])
HOSTILE = st.lists(st.tuples(st.none() | TEXT, TEXT, TEXT), max_size=5)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "hf"])
@settings(max_examples=40)
@given(texts=HOSTILE)
def test_any_text_comes_back_and_every_record_has_the_same_fields(
    name: str, texts: list[tuple[str | None, str, str]]
) -> None:
    records = read_back(name, selected(*texts))
    assert [as_pair(record) for record in records] == [(system or "", q, a) for system, q, a in texts]
    assert len({frozenset(fields_of(record)) for record in records}) <= 1
    assert all(list(record) == columns(name, has_meta=False).names for record in records)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "hf"])
def test_an_empty_selection_is_a_file_without_records(name: str) -> None:
    assert read_back(name, selected()) == []


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "hf"])
def test_the_order_of_the_rows_is_that_of_the_selection(name: str) -> None:
    assert read_back(name, TWO[::-1]) == read_back(name, TWO)[::-1]


def test_a_table_of_many_parts_is_whole() -> None:
    many = pl.concat([TWO] * 5_001)
    assert pq.read_table(io.BytesIO(export("parquet", many)["messages.parquet"])).num_rows == 10_002


@pytest.mark.parametrize("name", list(FORMATS))
def test_training_files_hold_texts_and_no_score(name: str) -> None:
    names = {"messages", "role", "content", "instruction", "input", "output", "system", "prompt", "completion"}
    names |= {"conversations", "from", "value"}
    assert {field for field, _ in fields_of([pa_like(columns(name, has_meta=False))])} <= names


def pa_like(schema: pa.Schema) -> dict[str, Any]:
    """A record with the fields of the schema."""
    return {
        field.name: [pa_like(pa.schema(field.type.value_type))] if pa.types.is_list(field.type) else ""
        for field in schema
    }


def test_every_format_of_the_settings_has_a_file_of_its_own() -> None:
    allowed = get_args(get_args(ExportSettings.model_fields["formats"].annotation)[0])
    assert set(FORMATS) == set(allowed)
    assert len({one.path for one in FORMATS.values()}) == len(FORMATS)


def test_a_format_whose_package_is_missing_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    check_installed(["messages", "parquet"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    check_installed(["messages", "parquet"])
    with pytest.raises(SettingsError) as error:
        check_installed(["messages", "hf"])
    check_sentence(error.value)


# --- meta -----------------------------------------------------------------------------------------------------------


def test_a_record_of_which_a_turn_is_barred_is_no_meta_of_the_other_turns() -> None:
    raw = raw_rows({"record": "my key is SECRET"}, {"record": "harmless"})
    rows = selected(("s", "q", "a"), (None, "r", "b"))
    other_turn = raw.select("batch", "source_file", "source_row", turn_index=pl.lit(1, pl.Int64)).head(1)
    found = [json.loads(text)["record"] for text in with_meta(rows, raw, other_turn)["meta"]]
    assert found == [None, "harmless"]


def test_meta_is_text_with_the_key_the_origin_and_the_record_as_delivered() -> None:
    raw = raw_rows({"record": '{"q": 1}'}, {"record": "x\0", "source": "2026-11-02"}, {})
    rows = selected(("s", "q", "a"), (None, "r", "b")).with_columns(source=pl.Series([None, "2026-11-02"]))
    found = with_meta(rows, raw, raw.clear())
    assert found.drop("meta").equals(rows)
    assert [json.loads(text) for text in found["meta"]] == [
        {
            "batch": "b1",
            "source_file": "a.jsonl",
            "source_row": number,
            "turn_index": 0,
            "pair_id": pair_name(number),
            "source": source,
            "language": None,
            "record": record,
        }
        for number, (source, record) in enumerate([(None, '{"q": 1}'), ("2026-11-02", "x\0")], start=1)
    ]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "hf"])
def test_meta_is_the_last_field_of_every_record_of_every_format(name: str) -> None:
    raw = raw_rows({}, {})
    rows = with_meta(TWO, raw, raw.clear())
    records = read_back(name, rows)
    assert [record.pop("meta") for record in records] == rows["meta"].to_list()
    assert records == read_back(name, TWO)
    assert columns(name, has_meta=True).names == [*columns(name, has_meta=False).names, "meta"]


# --- LLaMA-Factory --------------------------------------------------------------------------------------------------


def test_dataset_info_has_an_entry_for_every_file_with_rows_that_can_be_read() -> None:
    entries = llama_factory_entries({"mine": 2, "empty": 0}, list(FORMATS), None)
    assert {name: entry["file_name"] for name, entry in entries.items()} == {
        "mine_messages": "mine/messages.jsonl",
        "mine_alpaca": "mine/alpaca.json",
        "mine_sharegpt": "mine/sharegpt.jsonl",
        "mine_parquet": "mine/messages.parquet",
    }
    assert entries["mine_alpaca"]["columns"] == {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
    }
    assert entries["mine_messages"]["formatting"] == entries["mine_sharegpt"]["formatting"] == "sharegpt"


@pytest.mark.parametrize(
    ("records", "field"),
    [
        ([], None),
        (['{"messages": []}', '{"messages": [], "conversations": []}'], "messages"),
        (['{"conversations": []}'], "conversations"),
        (['{"messages": []}', '{"conversations": []}'], None),
        (['{"messages": "text"}'], None),
    ],
)
def test_delivered_records_have_an_entry_where_all_have_their_turns_in_one_field(
    records: list[str], field: str | None
) -> None:
    assert field_of_turns(records) == field
    entries = llama_factory_entries({"mine": 1}, ["conversation"], field)
    assert [entry["columns"]["messages"] for entry in entries.values()] == ([field] if field else [])
