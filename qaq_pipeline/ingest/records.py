"""Parsing of delivered bytes into a RawData frame: one row per record, or per turn of a conversation.

Belongs here: the file formats, the shapes of records, and the reasons why a row cannot be read. Strings only.
Does not belong here: file locations, what happens to the rows later, and anything about models or tokenizers.

The format is detected from the content, never from the name: gzip or zstandard around any of the others; Parquet; a
JSON array (the first character is `[`); else JSONL. An unreadable row is kept and rejected with a reason. A file that
cannot be split into rows raises `UnreadableFileError`.

Shapes. A file has one shape: the one whose fields most of its first 100 objects have. Ties go to the first in this
order. A row of another shape is rejected, without guessing.

    messages           messages: a list of turns
    sharegpt           conversations: a list of turns
    prompt_completion  prompt, completion: two texts, or two lists of turns
    alpaca             instruction, input, output
    query_answer       the first present of QUERY_FIELDS, the first present of ANSWER_FIELDS

A turn is {role, content} or {from, value} in both lists. If the query is an `instruction` and `input` has text,
the query is instruction, newline, input. Query and answer are stored exactly as delivered.

Conversations. A pair is a user turn and the assistant turn directly after it; system turns are ignored. `last` takes
the last pair, `every` takes each pair as its own row. The turns before a pair are not part of its query. A list of
prompt turns must end with a user turn; of the completion, only the first assistant turn is read. The system text of
every pair is the system turns, joined by newlines; if there are none, it is the row's `system` field.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, pairwise, starmap
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest import code_fences
from qaq_pipeline.schema.tables import RawData, dtypes
from qaq_pipeline.schema.vocabularies import RejectReason, Status

QUERY_FIELDS = ("query", "question", "problem", "instruction", "prompt")
ANSWER_FIELDS = ("response", "answer", "solution", "output", "completion")
DETECTION_ROWS = 100

# In order of preference. A shape needs one field of each group.
_SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "prompt_completion": (("prompt",), ("completion",)),
    "alpaca": (("instruction",), ("output",)),
    "query_answer": (QUERY_FIELDS, ANSWER_FIELDS),
}
_CONVERSATIONS = ("messages", "sharegpt")

_ROLES = (
    dict.fromkeys(("user", "human"), "user")
    | dict.fromkeys(("assistant", "gpt", "model", "bing", "chatgpt", "bard"), "assistant")
    | dict.fromkeys(("system", "developer"), "system")
)

_GZIP = b"\x1f\x8b"
# A frame, or a skippable one, as pzstd puts first.
_ZSTANDARD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_PARQUET = b"PAR1"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
# Unicode does not count zero-width characters as white space, but they are invisible too.
_BLANK = re.compile(r"[\s\u200b\u2060\ufeff]*")


class UnreadableFileError(ValueError):
    """The file cannot be split into rows. The text names the file, the fault, its position and the remedy."""


class _UnreadableError(Exception):
    """The fault of a file, and the remedy."""


class _RejectedError(Exception):
    """The reason why one row cannot be read."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def of_shape(self, shape: str) -> _RejectedError:
        """Return the reason with the shape as which the row was read."""
        return _RejectedError(self.reason, f"shape {shape}: {self.detail}")


class _Delivered(NamedTuple):
    """One delivered row, before its shape is known."""

    source_row: int
    record: str
    value: object = None
    fault: _RejectedError | None = None


class _Field(NamedTuple):
    """A value that should be text, and its name in the row. None: absent or null."""

    name: str
    value: object


class _Turn(NamedTuple):
    role: str
    text: _Field


class _Candidate(NamedTuple):
    """A query and an answer, not yet checked to be text."""

    system: _Field
    query: _Field
    answer: _Field
    turn_index: int = 0


_NO_CANDIDATE = _Candidate(_Field("system", None), _Field("query", None), _Field("answer", None))


def field_of(record: pl.Expr, name: str) -> pl.Expr:
    """The text of a top-level field of JSON objects; null if it is absent or null, or the record is not JSON.

    Args:
        record: the objects.
        name: of the field; without quotes and backslashes.
    """
    return record.str.json_path_match(f"$['{name}']")


def read_file(content: bytes, source_file: str, batch: str, settings: RecordSettings) -> pl.DataFrame:
    """Read every row of a delivered file, accepted or rejected, with the columns of RawData in order.

    Raises:
        UnreadableFileError: the file is empty, damaged, or not a list of rows.
    """
    delivered = list(_deliver(content, source_file))
    shape = _detect_shape(delivered) if settings.shape == "auto" else settings.shape
    rows = [(batch, source_file, *cells) for row in delivered for cells in _read_row(row, shape, settings.multi_turn)]
    return pl.DataFrame(rows, schema=dtypes(RawData), orient="row")


def read_delivery(
    contents: Mapping[str, bytes], batch: str, settings: RecordSettings, limit: int | None = None
) -> pl.DataFrame:
    """Read all rows of the delivered files, in file order, or the rows of the first `limit` records.

    A file that cannot be split into rows becomes one rejected row, which gates the batch.
    """
    frames = [_read_or_reject(content, name, batch, settings) for name, content in contents.items()]
    rows = pl.concat([pl.DataFrame(schema=dtypes(RawData)), *frames])
    if limit is None:
        return rows
    first = rows.select("source_file", "source_row").unique(maintain_order=True).head(limit)
    return rows.join(first, on=["source_file", "source_row"], how="semi", maintain_order="left")


def _read_or_reject(content: bytes, name: str, batch: str, settings: RecordSettings) -> pl.DataFrame:
    try:
        return read_file(content, name, batch, settings)
    except UnreadableFileError as error:
        return unreadable_file(error, name, batch)


def check_file(content: bytes, source_file: str) -> None:
    """Check that a file can be split into rows, without reading them.

    Raises:
        UnreadableFileError: as `read_file`.
    """
    _deliver(content, source_file)


def unreadable_file(error: UnreadableFileError, source_file: str, batch: str) -> pl.DataFrame:
    """Return one rejected row for a file that cannot be split into rows: for unattended runs."""
    rejection = (Status.REJECTED.value, RejectReason.UNREADABLE_FILE.value, str(error))
    row = (batch, source_file, 1, 0, *[None] * 6, "", *rejection)
    return pl.DataFrame([row], schema=dtypes(RawData), orient="row")


def pair_id(system: str | None, query: str, answer: str) -> str:
    """Content hash of a pair: blake2b-128 of the three texts in UTF-8, each preceded by its length in 8 bytes.

    An absent system text equals an empty one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in (system or "", query, answer):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


# Files -> delivered rows


def _deliver(content: bytes, source_file: str) -> Iterable[_Delivered]:
    """Split a file into rows now, and parse each row when it is requested."""
    try:
        return _split(_decompress(content))
    except _UnreadableError as error:
        raise UnreadableFileError(f"{source_file}: {error}") from error


def _decompress(content: bytes) -> bytes:
    try:
        plain = _plain(content)
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        fault = f"the compressed data are cut off or damaged ({error})"
        raise _UnreadableError(f"{fault}. Copy or compress the file again.") from error
    if plain is not content and _is_compressed(plain):
        raise _UnreadableError("is compressed twice. Decompress it once.")
    return plain


def _is_compressed(content: bytes) -> bool:
    return content.startswith(_GZIP) or _ZSTANDARD.match(content) is not None


def _plain(content: bytes) -> bytes:
    if content.startswith(_GZIP):
        return gzip.decompress(content)
    if _ZSTANDARD.match(content):
        return b"".join(_zstandard_frames(content))
    return content


def _zstandard_frames(content: bytes) -> Iterator[bytes]:
    while content:
        # A stream reader silently returns part of a truncated frame; only this object reports the end.
        frame = zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(content)
        if not frame.eof:
            raise EOFError("the last zstandard frame is cut off")
        content = frame.unused_data


def _split(content: bytes) -> Iterable[_Delivered]:
    if content.startswith(_PARQUET):
        return _deliver_parquet(content)
    if content.startswith(_UTF16_BOMS):
        raise _UnreadableError("is UTF-16 text. Convert it to UTF-8.")
    content = content.removeprefix(_UTF8_BOM)
    if not content.strip():
        raise _UnreadableError("is empty. Write its rows into it, or `[]` where it has none.")
    if content.lstrip(b" \t\r\n").startswith(b"["):
        return _deliver_array(content)
    return _deliver_lines(content)


def _deliver_parquet(content: bytes) -> Iterable[_Delivered]:
    try:
        rows = list(_parquet_rows(content))
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        fault = f"is no complete Parquet file that can be read ({error})"
        raise _UnreadableError(f"{fault}. Copy or write the file again.") from error
    return (
        _Delivered(number, json.dumps(row, ensure_ascii=False, default=str), row) for number, row in enumerate(rows, 1)
    )


def _parquet_rows(content: bytes) -> Iterator[dict[str, object]]:
    for batch in pq.ParquetFile(pa.BufferReader(content)).iter_batches(use_threads=False):
        # A Python datetime holds neither nanoseconds nor the years past 9999.
        names = [field.name for field in batch.schema]
        columns = [column.cast(pa.string()) if pa.types.is_timestamp(column.type) else column for column in batch]
        yield from pa.RecordBatch.from_arrays(columns, names=names).to_pylist()


def _parse_int(digits: str) -> int | float:
    # Python refuses integers of more than 4,300 digits. A number is never text, so its value does not matter.
    try:
        return int(digits)
    except ValueError:
        return float(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def _deliver_array(content: bytes) -> Iterable[_Delivered]:
    # Invalid bytes become lone surrogates, so that they reject their row and not the file.
    text = content.decode("utf-8", "surrogateescape")
    try:
        elements = list(_array_elements(text))
    except json.JSONDecodeError as error:
        fault = f"line {error.lineno}, column {error.colno}: the JSON array cannot be read: {error.msg}"
        raise _UnreadableError(f"{fault}. Write it again, or deliver one object per line.") from error
    except RecursionError as error:
        fault = "the JSON array holds a value that is nested too deep"
        raise _UnreadableError(f"{fault}. Deliver one object per line.") from error
    return (_delivered_value(number, text[start:end], value) for number, (start, end, value) in enumerate(elements, 1))


def _array_elements(text: str) -> Iterator[tuple[int, int, object]]:
    """Yield start, end and value of each element; decoding one at a time keeps its text."""
    position = _skip_space(text, _skip_space(text, 0) + 1)
    separator = "]" if text.startswith("]", position) else ","
    end = position
    while separator == ",":
        value, end = _DECODER.raw_decode(text, position)
        yield position, end, value
        end = _skip_space(text, end)
        separator = text[end : end + 1]
        position = _skip_space(text, end + 1)
    if separator != "]":
        raise json.JSONDecodeError("',' or ']' is expected after a value", text, end)
    rest = _skip_space(text, end + 1)
    if rest != len(text):
        raise json.JSONDecodeError("the array has ended, yet more follows", text, rest)


def _skip_space(text: str, position: int) -> int:
    found = _JSON_SPACE.match(text, position)
    return found.end() if found else position


def _deliver_lines(content: bytes) -> Iterator[_Delivered]:
    # Only the first two lines are parsed now: no later line can make the file unreadable.
    lines = ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())
    first = [_delivered_line(*line) for line in islice(lines, 2)]
    if first[0].fault is not None:
        _refuse_object_over_lines(content, first[0].source_row)
    if len(first) == 1 and isinstance(first[0].value, dict):
        _refuse_wrapped_list(first[0].value)
    return chain(first, starmap(_delivered_line, lines))


def _delivered_line(number: int, line: bytes) -> _Delivered:
    text = line.removesuffix(b"\r").decode("utf-8", "surrogateescape")
    try:
        return _delivered_value(number, text, _DECODER.decode(text))
    except json.JSONDecodeError as error:
        fault = _RejectedError(RejectReason.BAD_JSON, f"column {error.colno}: {error.msg}")
    except RecursionError:
        fault = _RejectedError(RejectReason.BAD_JSON, "the JSON is nested too deep to be read")
    return _Delivered(number, _shown_record(text), None, _encoding_fault(text) or fault)


def _delivered_value(number: int, text: str, value: object) -> _Delivered:
    fault = _encoding_fault(text)
    if fault is None and not isinstance(value, dict):
        fault = _RejectedError(RejectReason.NOT_AN_OBJECT, f"the row is {_kind(value)}; an object is expected")
    return _Delivered(number, _shown_record(text), value if fault is None else None, fault)


def _encoding_fault(text: str) -> _RejectedError | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        detail = f"character {error.start + 1} of the row, the byte \\x{byte:02x}, is not UTF-8"
        return _RejectedError(RejectReason.INVALID_UTF8, detail)
    return None


def _shown_record(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refuse_object_over_lines(content: bytes, first_line: int) -> None:
    text = content.decode("utf-8", "surrogateescape")
    start = _skip_space(text, 0)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        return
    if isinstance(value, dict) and "\n" in text[start:end]:
        _refuse_wrapped_list(value)
        fault = f"line {first_line}, column 1: a JSON object goes over several lines"
        raise _UnreadableError(f"{fault}. Write one object per line (`jq -c .` does so), or one JSON array of objects.")


def _refuse_wrapped_list(value: dict[str, object]) -> None:
    if any(_fits(value, shape) for shape in _SHAPES):
        return
    for name, content in value.items():
        if isinstance(content, list) and content and isinstance(content[0], dict):
            fault = f"the whole file is one JSON object, whose field {_shown(name)} holds the list"
            raise _UnreadableError(f"{fault}. Deliver that list itself, as a JSON array or JSONL.")


# Shapes


def _detect_shape(delivered: list[_Delivered]) -> str:
    readable = (row.value for row in delivered if isinstance(row.value, dict))
    sample = list(islice(readable, DETECTION_ROWS))

    def support(shape: str) -> tuple[int, int]:
        fitting = sum(_fits(value, shape) for value in sample)
        return fitting, sum(_fits(value, shape, null_counts=True) for value in sample)

    best = max(_SHAPES, key=support)
    # If no row has both sides, the shape with the most names describes best which one is missing.
    return best if any(support(best)) else "query_answer"


def _fits(value: dict[str, object], shape: str, *, null_counts: bool = False) -> bool:
    def present(field: str) -> bool:
        return field in value if null_counts else value.get(field) is not None

    return all(any(map(present, group)) for group in _SHAPES[shape])


def _read_row(row: _Delivered, shape: str, multi_turn: str) -> Iterator[tuple[object, ...]]:
    if not isinstance(row.value, dict) or row.fault is not None:
        yield _cells(row, _NO_CANDIDATE, row.fault)
        return
    try:
        candidates = _candidates(row.value, shape, multi_turn)
    except _RejectedError as fault:
        yield _cells(row, _NO_CANDIDATE, fault.of_shape(shape))
        return
    for candidate in candidates:
        fault = _fault(candidate, row.value)
        yield _cells(row, candidate, fault and fault.of_shape(shape))


def _cells(row: _Delivered, candidate: _Candidate, fault: _RejectedError | None) -> tuple[object, ...]:
    """Build the columns of RawData after `source_file`."""
    # An empty system text becomes null: both have the same pair_id, so models must get the same input.
    system = _storable(candidate.system.value) or None
    query, answer = _storable(candidate.query.value), _storable(candidate.answer.value)
    fields = row.value if isinstance(row.value, dict) else {}
    language = _storable(fields.get("language")) or code_fences.language_of(answer or "")
    origin = (_storable(fields.get("source")), language, row.record)
    key = (row.source_row, candidate.turn_index)
    identity = None if fault or query is None or answer is None else pair_id(system, query, answer)
    rejection = (Status.REJECTED.value, fault.reason.value, fault.detail) if fault else None
    verdict = rejection or (Status.ACCEPTED.value, None, None)
    return (*key, identity, system, query, answer, *origin, *verdict)


def _storable(value: object) -> str | None:
    """Return the value if it is text that UTF-8 can encode; a lone surrogate, as JSON can escape it, is not."""
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _fault(candidate: _Candidate, record: dict[str, object]) -> _RejectedError | None:
    system, query, answer, _ = candidate
    for field, reason in ((query, RejectReason.MISSING_QUERY), (answer, RejectReason.MISSING_ANSWER)):
        if field.value is None:
            return _missing(field.name, reason, record)
    for field in (system, query, answer):
        if field.value is not None and not isinstance(field.value, str):
            return _RejectedError(RejectReason.WRONG_TYPE, f"{field.name} is {_kind(field.value)}; text is expected")
    for field in (system, query, answer):
        if field.value is not None and _storable(field.value) is None:
            found = f"{field.name} contains half of a UTF-16 surrogate pair, which UTF-8 cannot store"
            return _RejectedError(RejectReason.INVALID_UTF8, found)
    for field, reason in ((query, RejectReason.EMPTY_QUERY), (answer, RejectReason.EMPTY_ANSWER)):
        if _BLANK.fullmatch(str(field.value)):
            return _RejectedError(reason, f"{field.name} is empty or only white space")
    return None


def _missing(name: str, reason: RejectReason, record: dict[str, object]) -> _RejectedError:
    names = ", ".join(_shown(field) for field in islice(record, 10)) or "none"
    return _RejectedError(reason, f"{name} is absent or null; fields of the row: {names}")


_KINDS: dict[type, str] = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def _shown(value: object) -> str:
    # The repr of a text escapes characters that cannot be stored.
    return f"{value!r:.60}" if isinstance(value, str) else _kind(value)


def _candidates(record: dict[str, object], shape: str, multi_turn: str) -> list[_Candidate]:
    if shape in _CONVERSATIONS:
        [[field]] = _SHAPES[shape]
        if record.get(field) is None:
            raise _missing(f"`{field}`", RejectReason.MISSING_QUERY, record)
        return _answered_turns(record, _turns(record[field], field), multi_turn)
    sides = (record.get("prompt"), record.get("completion"))
    if shape == "prompt_completion" and all(isinstance(side, list) for side in sides):
        return _answered_turns(record, _prompted_turns(record), multi_turn)
    return [_single_pair(record, shape)]


def _single_pair(record: dict[str, object], shape: str) -> _Candidate:
    query_fields, answer_fields = _SHAPES[shape]
    query = _first_present(record, query_fields)
    if query.name == "`instruction`":
        query = _with_input(query, record.get("input"))
    return _Candidate(_Field("`system`", record.get("system")), query, _first_present(record, answer_fields))


def _first_present(record: dict[str, object], fields: tuple[str, ...]) -> _Field:
    for field in fields:
        if record.get(field) is not None:
            return _Field(f"`{field}`", record[field])
    return _Field(" / ".join(f"`{field}`" for field in fields), None)


def _with_input(instruction: _Field, content: object) -> _Field:
    if content is None or not isinstance(instruction.value, str):
        return instruction
    if not isinstance(content, str):
        return _Field("`input`", content)
    if _BLANK.fullmatch(content):
        return instruction
    if _BLANK.fullmatch(instruction.value):
        return _Field("`input`", content)
    return _Field("`instruction` with `input`", f"{instruction.value}\n{content}")


def _turns(value: object, field: str) -> list[_Turn]:
    if not isinstance(value, list):
        raise _RejectedError(RejectReason.WRONG_TYPE, f"`{field}` is {_kind(value)}; a list of turns is expected")
    return [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(value)]


def _turn(value: object, place: str) -> _Turn:
    if not isinstance(value, dict):
        found = f"`{place}` is {_kind(value)}; an object with role and content is expected"
        raise _RejectedError(RejectReason.WRONG_TYPE, found)
    role_field = "role" if "role" in value else "from"
    text_field = "content" if "content" in value else "value"
    name = value.get(role_field)
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        found = f"`{place}.{role_field}` is {_shown(name)}; known roles: {', '.join(_ROLES)}"
        raise _RejectedError(RejectReason.UNKNOWN_ROLE, found)
    return _Turn(role, _Field(f"`{place}.{text_field}`", value.get(text_field)))


def _prompted_turns(record: dict[str, object]) -> list[_Turn]:
    prompt = _turns(record["prompt"], "prompt")
    completion = _turns(record["completion"], "completion")
    asked = [turn.role for turn in prompt if turn.role != "system"]
    answers = [turn for turn in completion if turn.role == "assistant"]
    if asked[-1:] != ["user"] or not answers:
        found = "`prompt` does not end with a user turn, or `completion` has no assistant turn"
        raise _RejectedError(RejectReason.NO_ANSWERED_TURN, found)
    return [*prompt, answers[0]]


def _answered_turns(record: dict[str, object], turns: list[_Turn], multi_turn: str) -> list[_Candidate]:
    spoken = [turn for turn in turns if turn.role != "system"]
    answered = [(q.text, a.text) for q, a in pairwise(spoken) if (q.role, a.role) == ("user", "assistant")]
    if not answered:
        found = f"no user turn is directly followed by an assistant turn; {len(turns)} turns"
        raise _RejectedError(RejectReason.NO_ANSWERED_TURN, found)
    system = _system_of(record, turns)
    pairs = [_Candidate(system, query, answer, index) for index, (query, answer) in enumerate(answered)]
    return pairs if multi_turn == "every" else pairs[-1:]


def _system_of(record: dict[str, object], turns: list[_Turn]) -> _Field:
    given = [turn.text for turn in turns if turn.role == "system" and turn.text.value is not None]
    texts = [field.value for field in given if isinstance(field.value, str)]
    if len(texts) < len(given):
        return next(field for field in given if not isinstance(field.value, str))
    if given:
        return _Field(given[0].name, "\n".join(texts))
    return _Field("`system`", record.get("system"))
