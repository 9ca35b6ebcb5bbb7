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
from typing import Any, Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.schema.row_place import ROW_KEY, without_records_of
from qaq_pipeline.schema.tables import SelectedSubset
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.tables import empty

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


def open_file(name: str, folder: Path, *, has_meta: bool) -> JsonFile | TableFile:
    """Begin the file of a format in the folder of a selection."""
    return JsonFile(name, folder) if WRITTEN[name].is_json else TableFile(name, folder, has_meta=has_meta)


def keys(rows: pl.DataFrame) -> pl.DataFrame:
    """The key and the pair_id of each row."""
    return rows.select(*ROW_KEY, "pair_id")


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
    for part in rows.iter_slices(_ROWS_AT_A_TIME):
        yield part.select(*(field.alias(to) for to, field in WRITTEN[name].fields.items()), *meta)


def _json(name: str, records: pl.DataFrame, between: bytes) -> bytes:
    """Some thousand records in JSON, each without a line break."""
    if name == CONVERSATION:  # JSON has line breaks between its values only, where white space means nothing.
        texts = records["record"].str.replace_all(r"[\r\n]", " ")
    else:
        texts = records.select(pl.struct(pl.all()).struct.json_encode()).to_series()
    return texts.str.join(between.decode()).item().encode()


# --- files --------------------------------------------------------------------------------------------------------


class JsonFile:
    """The records of a selection in a format of JSON, which are written batch by batch.

    Leaving its context ends the file.

    Args:
        name: of the format.
        folder: of the selection.
    """

    def __init__(self, name: str, folder: Path) -> None:
        path = folder / WRITTEN[name].path
        self._name = name
        self._begin, self._between, self._end = _ARRAY if path.suffix == ".json" else _LINES
        self._stream = path.open("wb")
        self._stream.write(self._begin)
        self.spans: dict[str, Span] = {}
        """The bytes of each batch that has records."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._stream:
            self._stream.write(self._end if self.spans or self._begin else b"")

    def append(self, batch: str, records: pl.DataFrame | Iterable[bytes]) -> None:
        """Write the records of a batch.

        Args:
            batch: its name.
            records: its rows, or the bytes of its records, as they were written before; of a batch without records no
                bytes, but rows.
        """
        if isinstance(records, pl.DataFrame) and records.is_empty():
            return
        self._stream.write(self._between if self.spans else b"")
        start = self._stream.tell()
        self._stream.writelines(self._encoded(records) if isinstance(records, pl.DataFrame) else records)
        self.spans[batch] = [start, self._stream.tell()]

    def _encoded(self, rows: pl.DataFrame) -> Iterator[bytes]:
        for number, records in enumerate(_records(self._name, rows)):
            yield (self._between if number else b"") + _json(self._name, records, self._between)


class TableFile:
    """The records of a selection in a format of Parquet or Arrow, which are written together.

    They come batch by batch. Until all have come, they are in a file that is then mapped into memory. Leaving the
    context writes them.

    Args:
        name: of the format.
        folder: of the selection.
        has_meta: the rows have the column `meta`.
    """

    spans = None

    def __init__(self, name: str, folder: Path, *, has_meta: bool) -> None:
        self._name, self._folder = name, folder
        self._schema = columns(name, has_meta=has_meta)
        self._so_far = folder / f".{name}.arrow"
        self._writer = pa.ipc.new_stream(str(self._so_far), self._schema)
        self._waiting: list[pl.DataFrame] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._writer:
            if kind is None and self._waiting:
                self._add(pl.concat(self._waiting))
        if kind is None:
            with pa.memory_map(str(self._so_far)) as records:
                _write_table(
                    self._name, pa.ipc.open_stream(records).read_all(), self._folder / WRITTEN[self._name].path
                )
        self._so_far.unlink()

    def append(self, _: str, rows: pl.DataFrame) -> None:
        """Add the rows of a batch."""
        waiting = pl.concat([*self._waiting, rows])
        whole = waiting.height - waiting.height % _ROWS_AT_A_TIME
        self._add(waiting[:whole])
        self._waiting = [waiting[whole:]]

    def _add(self, rows: pl.DataFrame) -> None:
        """Add records with the types that `datasets` gives to them when it reads them from JSONL."""
        for records in _records(self._name, rows):
            table = records.to_arrow(compat_level=pl.CompatLevel.oldest())
            self._writer.write_table(table.cast(self._schema))


def _write_table(name: str, records: pa.Table, path: Path) -> None:
    """Write Parquet, or the files of `Dataset.save_to_disk`, which needs the extra `datasets`."""
    if path.suffix:
        pq.write_table(records, path, compression="zstd")
        return
    from datasets import Dataset

    # The fingerprint is a hash of the rows, not a random number: the same rows give the same files.
    fingerprint = hashlib.blake2b(digest_size=8)
    for number, part in enumerate(records.to_batches()):
        fingerprint.update((b"\n" if number else b"") + _json(name, pl.DataFrame(part), b"\n"))
    # One shard even without rows: `load_from_disk` fails if there is none.
    Dataset(records, fingerprint=fingerprint.hexdigest()).save_to_disk(str(path), num_shards=1)


class KeysFile:
    """The `keys` of the records of a selection, by their place in the training files, which are written batch by batch.

    `line` counts the records of every format from 1. The file is there because trainers refuse other fields in a
    record; `meta` adds them to the records, too. Leaving its context ends the file.

    Args:
        folder: of the selection.
    """

    def __init__(self, folder: Path) -> None:
        self._stream = (folder / KEYS).open("wb")
        self._writer = parquet_file.Writer(self._stream, _numbered(keys(empty(SelectedSubset)), 0).schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._stream:
            self._writer.close({})

    @property
    def num_rows(self) -> int:
        """Number of records so far."""
        return self._writer.num_rows

    def append(self, of_batch: pl.DataFrame) -> None:
        """Write the `keys` of the next records."""
        self._writer.append(_numbered(of_batch, self.num_rows))


def _numbered(of_rows: pl.DataFrame, before: int) -> pl.DataFrame:
    return of_rows.select(pl.int_range(before + 1, before + 1 + pl.len()).alias("line"), pl.all())


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
