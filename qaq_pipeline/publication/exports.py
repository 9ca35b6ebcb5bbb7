"""The training files of selected rows, in every exported format. They hold no scores.

Belongs here: the record of each format, its files, and what a reader of the files has to know. Does not belong
here: which rows are exported, and where the files are stored.

Rows are SelectedSubset, optionally with the column `meta` (`with_meta`); every record then has it. All records of a
format have the same fields with the same types, whatever the rows hold: no field is missing or null. Only
`conversation` gives each record back as it was delivered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.schema.row_place import ROW_KEY, without_records_of
from qaq_pipeline.storage import parquet_file

KEYS = "keys.parquet"
"""File in the folder of a selection that leads from a record back to its row."""

CONVERSATION = "conversation"
"""The format of delivered records."""

Span = list[int]
"""The first byte, and the one after the last."""

_ARRAY, _LINES = (b"[\n", b",\n", b"\n]\n"), (b"", b"\n", b"\n")
"""What a file of JSON has before its records, between two of them, and after them."""

_ROWS_AT_A_TIME = 10_000
"""Rows in one Arrow record batch, whose texts must stay below 2 GB."""

_META = (*ROW_KEY, "pair_id", "source", "language", "record")


def with_meta(rows: pl.DataFrame, raw: pl.DataFrame, barred: pl.DataFrame) -> pl.DataFrame:
    """Add the column `meta`: the origin of each row and its delivered record, a JSON object as text.

    A record holds all turns of a conversation: if one of them may not be published, no turn gets the record.

    Args:
        rows: SelectedSubset.
        raw: RawData of the same rows, or of more.
        barred: keys of the rows whose text may not be published.

    It is text because the values vary. From JSON objects `datasets` would infer dates where batches are named by their
    day, and nulls where no row has a source, so that the columns of two files would differ in type.
    """
    records = without_records_of(with_records(rows, raw), barred)
    return rows.with_columns(records.select(meta=pl.struct(_META).struct.json_encode()))


def with_records(rows: pl.DataFrame, raw: pl.DataFrame) -> pl.DataFrame:
    """Add the column `record`: the delivered record of each row, of which no other row was made.

    Args:
        rows: SelectedSubset.
        raw: RawData of the same rows, or of more.
    """
    return rows.join(raw.select(*ROW_KEY, "record"), on=ROW_KEY, how="left", validate="1:1")


@dataclass(frozen=True)
class Format:
    """One of `export.formats`, or `export.rows: conversation`."""

    path: str
    """File or folder in the folder of a selection; its suffix says how the records are written."""
    fields: Mapping[str, pl.Expr]
    """The fields of its records, without `meta`, from the columns of the rows."""
    columns: pa.Schema
    """Columns of its records as `datasets` loads them, without `meta`; `record` alone stands for those of the delivered
    records, which vary."""
    llama_factory: Mapping[str, Any] | None = None
    """Entry that tells LLaMA-Factory how to read the file; None: it cannot read it."""

    @property
    def is_json(self) -> bool:
        """True if `datasets` reads it with its JSON loader."""
        return self.path.endswith((".json", ".jsonl"))


def write(name: str, rows: pl.DataFrame, folder: Path) -> None:
    """Write the rows in a format of Parquet or Arrow, in the folder of a selection."""
    path = folder / WRITTEN[name].path
    if path.suffix:
        pq.write_table(_table(name, rows), path, compression="zstd")
    else:
        _save_to_disk(name, rows, path)


def write_json(name: str, batches: Mapping[str, pl.DataFrame | Iterable[bytes]], folder: Path) -> dict[str, Span]:
    """Write the records of batches in a format of JSON, in the folder of a selection.

    Args:
        name: of the format.
        batches: the rows of each batch, or the bytes of its records, as they were written before; of a batch without
            records no bytes, but rows.
        folder: of the selection.

    Returns:
        The bytes of each batch that has records, from the first to the one after the last.
    """
    path, spans = folder / WRITTEN[name].path, {}
    begin, between, end = _ARRAY if path.suffix == ".json" else _LINES
    with path.open("wb") as stream:
        stream.write(begin)
        for batch, records in batches.items():
            if isinstance(records, pl.DataFrame) and records.is_empty():
                continue
            stream.write(between if spans else b"")
            start = stream.tell()
            stream.writelines(_json(name, records, between) if isinstance(records, pl.DataFrame) else records)
            spans[batch] = [start, stream.tell()]
        stream.write(end if spans or begin else b"")
    return spans


def keys(rows: pl.DataFrame) -> pl.DataFrame:
    """The key and the pair_id of each row."""
    return rows.select(*ROW_KEY, "pair_id")


def write_keys(rows: pl.DataFrame, folder: Path) -> None:
    """Write the `keys` of the records of a selection, by their place in the training files.

    `line` counts the records of every format from 1. The file is there because trainers refuse other fields in a
    record; `meta` adds them to the records, too.
    """
    numbered = rows.select(pl.int_range(1, pl.len() + 1).alias("line"), pl.all())
    (folder / KEYS).write_bytes(parquet_file.encode(numbered, {}))


def columns(name: str, *, has_meta: bool) -> pa.Schema:
    """The columns of a format's records, as `datasets` loads them; `record`: whatever was delivered."""
    meta = _strings("meta") if has_meta else []
    return pa.schema([*WRITTEN[name].columns, *meta])


def format_of(path: str) -> str | None:
    """The format of a file, by its path in the folder of a selection; None: it is not a training file."""
    written = (name for name, one in WRITTEN.items() if path == one.path or path.startswith(f"{one.path}/"))
    return next(written, None)


def check_installed(formats: Sequence[str]) -> None:
    """Raises `SettingsError` if the package of a format is not installed."""
    if "hf" in formats and find_spec("datasets") is None:
        raise SettingsError(
            "export.formats: hf needs the package datasets; install qaq-pipeline[datasets], or leave hf out"
        )


def llama_factory_entries(
    exported: Mapping[str, int], formats: Sequence[str], turns: str | None
) -> dict[str, dict[str, Any]]:
    """The entries of LLaMA-Factory's dataset_info.json.

    There is one, `<selection>_<format>`, for each file that has rows and that it can read.

    Args:
        exported: rows of each selection.
        formats: that are written.
        turns: as `field_of_turns`.
    """
    readings = {name: WRITTEN[name].llama_factory for name in formats}
    if turns is not None:
        readings[CONVERSATION] = _LLAMA_FACTORY_TURNS[turns]
    return {
        f"{selection}_{name}": {"file_name": f"{selection}/{WRITTEN[name].path}", **reading}
        for selection, num_rows in exported.items()
        for name in formats
        if num_rows and (reading := readings[name]) is not None
    }


def field_of_turns(records: Iterable[str]) -> str | None:
    """The field that has the turns of all these delivered records; None: there is none."""
    shared: set[str] | None = None
    for record in map(json.loads, records):
        lists = {name for name, value in record.items() if isinstance(value, list)}
        shared = lists if shared is None else shared & lists
    return next((name for name in _LLAMA_FACTORY_TURNS if name in (shared or ())), None)


# --- records ------------------------------------------------------------------------------------------------------


def _strings(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.string()) for name in names]


_TURNS = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
_NO_TURN = pl.lit([], _TURNS)
_ROLE, _CONTENT = (pl.element().struct.field(name) for name in ("role", "content"))
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _turn(role: str, text: pl.Expr) -> pl.Expr:
    return pl.concat_list(pl.struct(role=pl.lit(role), content=text))


_SYSTEM = pl.col("system").fill_null("")
_ANSWER = pl.col("reasoning").fill_null("") + pl.col("answer")
"""The answer, after its reasoning if there is some."""

_PROMPT = pl.concat_list(
    pl.when(_SYSTEM != "").then(_turn("system", _SYSTEM)).otherwise(_NO_TURN),
    pl.col("history").list.eval(pl.element().filter(_ROLE != "tools")).fill_null(_NO_TURN),  # Tools are no turn.
    _turn("user", pl.col("query")),
)
"""The row's own system text and earlier turns, if any, then Q."""

_COMPLETION = _turn("assistant", _ANSWER)

_MESSAGES = {"messages": pl.concat_list(_PROMPT, _COMPLETION)}
"""OpenAI messages, one conversation: the row's own system text and earlier turns, if any, then Q and A."""

_PROMPT_COMPLETION = {"prompt": _PROMPT, "completion": _COMPLETION}
"""Prompt and completion as lists of messages: the row's own system text and earlier turns, if any, and Q; then A.

TRL would join plain texts without the turns of a chat template and without a system text. It renders lists of
messages with the template, and the loss is on the completion alone.
"""

_SHAREGPT = {
    "conversations": pl.concat_list(_PROMPT, _COMPLETION).list.eval(
        pl.struct(_ROLE.replace_strict(_SPEAKERS, return_dtype=pl.String).alias("from"), _CONTENT.alias("value"))
    )
}
"""ShareGPT, one conversation: from system (if the row has a system text), human and gpt, and tools that spoke."""

_ALPACA = {"instruction": pl.col("query"), "input": pl.lit(""), "output": _ANSWER, "system": _SYSTEM}
"""Alpaca: instruction (all of Q), input (empty), output (A) and system (may be empty)."""


def _records(name: str, rows: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The records of the rows, some thousand at a time, each field a column."""
    meta = ["meta"] if "meta" in rows.columns else []
    for part in [rows.clear()] if rows.is_empty() else rows.iter_slices(_ROWS_AT_A_TIME):
        yield part.select(*(field.alias(to) for to, field in WRITTEN[name].fields.items()), *meta)


# --- files --------------------------------------------------------------------------------------------------------


def _json(name: str, rows: pl.DataFrame, between: bytes) -> Iterator[bytes]:
    """The records in JSON, each without a line break, some thousand at a time."""
    for number, records in enumerate(_records(name, rows)):
        if name == CONVERSATION:  # JSON has line breaks between its values only, where white space means nothing.
            texts = records["record"].str.replace_all(r"[\r\n]", " ")
        else:
            texts = records.select(pl.struct(pl.all()).struct.json_encode()).to_series()
        yield (between if number else b"") + texts.str.join(between.decode()).item().encode()


def _table(name: str, rows: pl.DataFrame) -> pa.Table:
    """The records with the types that `datasets` gives to them when it reads them from JSONL."""
    schema = columns(name, has_meta="meta" in rows.columns)
    parts = (part.to_arrow(compat_level=pl.CompatLevel.oldest()) for part in _records(name, rows))
    return pa.concat_tables(part.cast(schema) for part in parts)


def _save_to_disk(name: str, rows: pl.DataFrame, folder: Path) -> None:
    """Write the records as the files of `Dataset.save_to_disk`; needs the extra `datasets`.

    The fingerprint is a hash of the rows, not a random number: the same rows give the same files.
    """
    from datasets import Dataset

    fingerprint = hashlib.blake2b(digest_size=8)
    for data in _json(name, rows, b"\n"):
        fingerprint.update(data)
    # One shard even without rows: `load_from_disk` fails if there is none.
    Dataset(_table(name, rows), fingerprint=fingerprint.hexdigest()).save_to_disk(str(folder), num_shards=1)


# --- the formats --------------------------------------------------------------------------------------------------


_CHAT = pa.list_(pa.struct(_strings("role", "content")))
_CHAT_COLUMNS = pa.schema([pa.field("messages", _CHAT)])
_LLAMA_FACTORY_MESSAGES = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "system_tag": "system",
    },
}

_LLAMA_FACTORY_TURNS: Mapping[str, Mapping[str, Any]] = {
    "messages": {
        **_LLAMA_FACTORY_MESSAGES,
        "formatting": "openai",
        "columns": {"messages": "messages", "tools": "tools"},
    },
    "conversations": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
}
"""How LLaMA-Factory reads delivered records, by the field of their turns."""

FORMATS = {
    "messages": Format("messages.jsonl", _MESSAGES, _CHAT_COLUMNS, _LLAMA_FACTORY_MESSAGES),
    "prompt_completion": Format(
        "prompt_completion.jsonl",
        _PROMPT_COMPLETION,
        pa.schema([pa.field("prompt", _CHAT), pa.field("completion", _CHAT)]),
    ),
    "alpaca": Format(
        "alpaca.json",
        _ALPACA,
        pa.schema(_strings("instruction", "input", "output", "system")),
        {"columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}},
    ),
    "sharegpt": Format(
        "sharegpt.jsonl",
        _SHAREGPT,
        pa.schema([pa.field("conversations", pa.list_(pa.struct(_strings("from", "value"))))]),
        {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    ),
    "parquet": Format("messages.parquet", _MESSAGES, _CHAT_COLUMNS, _LLAMA_FACTORY_MESSAGES),
    "hf": Format("hf", _MESSAGES, _CHAT_COLUMNS),
}
"""By name in `export.formats`."""

WRITTEN = FORMATS | {
    CONVERSATION: Format("conversations.jsonl", {"record": pl.col("record")}, pa.schema(_strings("record")))
}
"""The same, and the one of `export.rows: conversation`."""
