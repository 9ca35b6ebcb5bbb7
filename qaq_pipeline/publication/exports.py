"""The training files of selected rows, in every exported format. They hold no scores.

Belongs here: one function per format, from rows to bytes, and what a reader of the files has to know. Does not belong
here: which rows are exported, and where the files are stored.

Rows are SelectedSubset, optionally with the column `meta` (`with_meta`); every record then has it. All records of a
format have the same fields with the same types, whatever the rows hold: no field is missing or null.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.schema.row_place import ROW_KEY

_ROWS_AT_A_TIME = 10_000
"""Rows in one Arrow record batch, whose texts must stay below 2 GB."""

_META = (*ROW_KEY, "pair_id", "source", "language", "record")


def messages_jsonl(rows: pl.DataFrame) -> bytes:
    """OpenAI messages, one conversation per line: the row's own system text, if any, then Q and A."""
    return _jsonl(_records(rows, _messages))


def alpaca_json(rows: pl.DataFrame) -> bytes:
    """Alpaca: a JSON array of instruction (all of Q), input (empty), output (A) and system (may be empty)."""
    return b"[\n" + b",\n".join(map(_json, _records(rows, _alpaca))) + b"\n]\n"


def prompt_completion_jsonl(rows: pl.DataFrame) -> bytes:
    """Prompt and completion as lists of messages: the row's own system text, if any, and Q; then A.

    TRL would join plain texts without the turns of a chat template and without a system text. It renders lists of
    messages with the template, and the loss is on the completion alone.
    """
    return _jsonl(_records(rows, _prompt_completion))


def sharegpt_jsonl(rows: pl.DataFrame) -> bytes:
    """ShareGPT, one conversation per line: from system (if the row has a system text), human and gpt."""
    return _jsonl(_records(rows, _sharegpt))


def messages_parquet(rows: pl.DataFrame) -> bytes:
    """The records of `messages_jsonl` as Parquet, with the types that `datasets` gives to the JSONL."""
    stream = io.BytesIO()
    pq.write_table(_messages_table(rows), stream, compression="zstd")
    return stream.getvalue()


def messages_folder(rows: pl.DataFrame) -> dict[str, bytes]:
    """The records of `messages_jsonl` as the files of `Dataset.save_to_disk`, by name; needs the extra `datasets`.

    The fingerprint is a hash of the rows, not a random number: the same rows give the same files.
    """
    from datasets import Dataset

    fingerprint = hashlib.blake2b(messages_jsonl(rows), digest_size=8).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        # One shard even without rows: `load_from_disk` fails if there is none.
        Dataset(_messages_table(rows), fingerprint=fingerprint).save_to_disk(folder, num_shards=1)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def with_meta(rows: pl.DataFrame, raw: pl.DataFrame, barred: pl.DataFrame) -> pl.DataFrame:
    """Add the column `meta`: the origin of each row and its delivered record, a JSON object as text.

    A record holds all turns of a conversation: if one of them may not be published, no turn gets the record.

    Args:
        rows: SelectedSubset.
        raw: RawData of the same batches.
        barred: keys of the rows whose text may not be published.

    It is text because the values vary. From JSON objects `datasets` would infer dates where batches are named by their
    day, and nulls where no row has a source, so that the columns of two files would differ in type.
    """
    of_record = [name for name in ROW_KEY if name != "turn_index"]
    is_barred = barred.select(of_record).unique().with_columns(is_barred=pl.lit(True))
    records = (
        rows.join(raw.select(*ROW_KEY, "record"), on=ROW_KEY, how="left", validate="1:1")
        .join(is_barred, on=of_record, how="left", validate="m:1", maintain_order="left")
        .with_columns(record=pl.when(pl.col("is_barred").is_null()).then("record"))
    )
    values = [json.dumps(value, ensure_ascii=False) for value in records.select(_META).iter_rows(named=True)]
    return rows.with_columns(meta=pl.Series(values, dtype=pl.String))


@dataclass(frozen=True)
class Format:
    """One of `export.formats`."""

    path: str
    """File or folder in the folder of a selection."""
    write: Callable[[pl.DataFrame], bytes | dict[str, bytes]]
    """Converts the rows to the bytes of the file; for a folder, to the bytes of each file by its name."""
    columns: pa.Schema
    """Columns of its records as `datasets` loads them, without `meta`."""
    llama_factory: Mapping[str, Any] | None = None
    """Entry that tells LLaMA-Factory how to read the file; None: it cannot read it."""

    @property
    def is_json(self) -> bool:
        """True if `datasets` reads it with its JSON loader."""
        return self.path.endswith((".json", ".jsonl"))


def export(name: str, rows: pl.DataFrame) -> dict[str, bytes]:
    """The files of the rows in a format of `export.formats`, by path in the folder of a selection."""
    written = FORMATS[name].write(rows)
    if isinstance(written, bytes):
        return {FORMATS[name].path: written}
    return {f"{FORMATS[name].path}/{file}": data for file, data in written.items()}


def columns(name: str, *, has_meta: bool) -> pa.Schema:
    """The columns of a format's records, as `datasets` loads them."""
    meta = [pa.field("meta", pa.string())] if has_meta else []
    return pa.schema([*FORMATS[name].columns, *meta])


def format_of(path: str) -> str | None:
    """The format of a file, by its path in the folder of a selection; None: it is not a training file."""
    written = (name for name, one in FORMATS.items() if path == one.path or path.startswith(f"{one.path}/"))
    return next(written, None)


def check_installed(formats: Sequence[str]) -> None:
    """Raises `SettingsError` if the package of a format is not installed."""
    if "hf" in formats and find_spec("datasets") is None:
        raise SettingsError(
            "export.formats: hf needs the package datasets; install qaq-pipeline[datasets], or leave hf out"
        )


def llama_factory_info(exported: Mapping[str, int], formats: Sequence[str]) -> bytes:
    """LLaMA-Factory's dataset_info.json."""
    return json.dumps(llama_factory_entries(exported, formats), indent=2).encode() + b"\n"


def llama_factory_entries(exported: Mapping[str, int], formats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """An entry `<selection>_<format>` for each file that has rows and that LLaMA-Factory can read."""
    return {
        f"{selection}_{name}": {"file_name": f"{selection}/{FORMATS[name].path}", **reading}
        for selection, num_rows in exported.items()
        for name in formats
        if num_rows and (reading := FORMATS[name].llama_factory) is not None
    }


# --- records ------------------------------------------------------------------------------------------------------


def _records(rows: pl.DataFrame, record: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows.iter_rows(named=True):
        yield record(row) | ({"meta": row["meta"]} if "meta" in row else {})


def _prompt(row: Mapping[str, Any]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    return [*system, {"role": "user", "content": row["query"]}]


def _completion(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": row["answer"]}]


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": [*_prompt(row), *_completion(row)]}


def _prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": _prompt(row), "completion": _completion(row)}


def _sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [*_prompt(row), *_completion(row)]
    return {"conversations": [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]}


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"instruction": row["query"], "input": "", "output": row["answer"], "system": row["system"] or ""}


# --- files --------------------------------------------------------------------------------------------------------


def _jsonl(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(_json(record) + b"\n" for record in records)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _messages_table(rows: pl.DataFrame) -> pa.Table:
    records = columns("messages", has_meta="meta" in rows.columns)
    batches = [
        pa.RecordBatch.from_pylist(list(_records(part, _messages)), schema=records)
        for part in rows.iter_slices(_ROWS_AT_A_TIME)
    ]
    return pa.Table.from_batches(batches, schema=records)


# --- the formats --------------------------------------------------------------------------------------------------


def _strings(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.string()) for name in names]


_CHAT = pa.list_(pa.struct(_strings("role", "content")))
_MESSAGES = pa.schema([pa.field("messages", _CHAT)])
_LLAMA_FACTORY_MESSAGES = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}

FORMATS = {
    "messages": Format("messages.jsonl", messages_jsonl, _MESSAGES, _LLAMA_FACTORY_MESSAGES),
    "prompt_completion": Format(
        "prompt_completion.jsonl",
        prompt_completion_jsonl,
        pa.schema([pa.field("prompt", _CHAT), pa.field("completion", _CHAT)]),
    ),
    "alpaca": Format(
        "alpaca.json",
        alpaca_json,
        pa.schema(_strings("instruction", "input", "output", "system")),
        {"columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}},
    ),
    "sharegpt": Format(
        "sharegpt.jsonl",
        sharegpt_jsonl,
        pa.schema([pa.field("conversations", pa.list_(pa.struct(_strings("from", "value"))))]),
        {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    ),
    "parquet": Format("messages.parquet", messages_parquet, _MESSAGES, _LLAMA_FACTORY_MESSAGES),
    "hf": Format("hf", messages_folder, _MESSAGES),
}
"""By name in `export.formats`."""
