"""From the bytes of a file that others made to its rows, whose fields are not looked at.

Belongs here: compression, the file formats, and what a file is that cannot be split into rows. Does not belong here:
the fields of a row, where files come from, and our own tables (`parquet_file`).

The format is detected from the content, never from the name: gzip, bzip2, xz or zstandard around any of the others;
Parquet; Arrow, as a file or a stream; a JSON array (the first character is `[`); CSV, where the first line names the
fields of a query and of an answer; JSONL, where any of the first lines is, or begins as, a JSON object. A row that
cannot be parsed carries its fault. A file that cannot be split into rows raises `UnreadableFileError`, one that is in
no format of rows, such as a document, `NoRowsError`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice, starmap
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from qaq_pipeline.schema.vocabularies import RejectReason

Fits = Callable[[Mapping[str, object]], bool]
"""Whether a record has the fields of a pair."""

_GZIP, _BZIP2 = b"\x1f\x8b", b"BZh"
_XZ = (b"\xfd7zXZ\x00", b"]\x00\x00")
"""Of xz, and of the older .lzma."""
# A frame, or a skippable one, as pzstd puts first.
_ZSTANDARD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_PARQUET = b"PAR1"
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"[\0", b"\0{", b"\0[")
"""With a byte order mark, or JSON without one."""
_ZIP = b"PK\x03\x04"
_OTHERS = {
    _ZIP: "is a zip archive. Unpack it, and deliver the files in it.",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive. Unpack it, and deliver the files in it.",
    b"\x04\x22\x4d\x18": "is compressed with LZ4. Decompress it, or use zstandard.",
    b"ORC": "is an ORC file. Deliver its rows, such as Parquet.",
    b"Obj\x01": "is an Avro file. Deliver its rows, such as Parquet.",
    **{bytes([0x80, version]): "is a pickle of Python. Deliver its rows, such as JSONL." for version in range(2, 6)},
    b"SQLite format 3": "is a SQLite database. Deliver its rows, such as JSONL.",
    b"\x89HDF": "is an HDF5 file. Deliver its rows, such as JSONL.",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`.",
}
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_ARRAY = re.compile(rb"[ \t\r\n]*\[")
_CSV_SEPARATORS = ",\t;|"
_CSV_NAME = re.compile(r"[^\W\d][\w .()-]{0,39}")
_EXCEL_SEPARATOR = re.compile(rb"sep=[,\t;|]\r?\n", re.IGNORECASE)
"""Line before the header of CSV, for Excel."""
_LONGEST_HEADER = 10_000
"""Bytes of a file in which the first two lines of CSV are looked for."""
_LARGEST_WINDOW = 2**31
"""Largest window of a zstandard frame that is read, as `zstd --long=31` writes it."""
_FIRST_LINES = 20
"""Lines of which any shows that a file is JSONL."""
_OBJECT = re.compile(r'\s*\{\s*"')
"""The beginning of a JSON object, which may be torn."""
_ROWS_AT_ONCE = 10_000
"""Rows of a table that are in memory as Python objects."""

T = TypeVar("T")


class UnreadableFileError(ValueError):
    """The file cannot be split into rows. The text names the file, the fault, its position and the remedy."""


class NoRowsError(UnreadableFileError):
    """The file is in no format of rows. It may be a document that came with the data."""


class _UnreadableError(Exception):
    """The fault of a file, and the remedy."""


class _NoRowsError(_UnreadableError):
    """The fault of a file in no format of rows, and the remedy."""


class RejectedError(Exception):
    """The reason why one row cannot be read."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def of_shape(self, shape: str) -> RejectedError:
        """Return the reason with the shape as which the row was read."""
        return RejectedError(self.reason, f"shape {shape}: {self.detail}")


class DeliveredRow(NamedTuple):
    """One delivered row, before its fields are looked at."""

    source_row: int
    record: str
    """As delivered; rows of Parquet, Arrow and CSV as JSON."""
    value: object = None
    fault: RejectedError | None = None


def split(content: bytes, source_file: str, fits: Fits) -> Iterable[DeliveredRow]:
    """Check now that a file can be split into rows, and make each row when it is asked for: no file is held as objects.

    Args:
        content: of the file.
        source_file: its name, for messages.
        fits: whether a record has the fields of a pair: then it is no wrapper around a list, and a first line that
            names them is the header of CSV.

    Raises:
        NoRowsError: the file is in no format of rows.
        UnreadableFileError: it is empty, damaged, or not a list of rows.
    """
    try:
        return _split(_decompress(content), fits)
    except _NoRowsError as error:
        raise NoRowsError(f"{source_file}: {error}") from error
    except _UnreadableError as error:
        raise UnreadableFileError(f"{source_file}: {error}") from error


def encoding_fault(text: str) -> RejectedError | None:
    """The fault of a text with bytes that are not UTF-8, decoded as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        detail = f"character {error.start + 1} of the row, the byte \\x{byte:02x}, is not UTF-8"
        return RejectedError(RejectReason.INVALID_UTF8, detail)
    return None


_KINDS: dict[type, str] = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
}


def kind(value: object) -> str:
    """The JSON type of a value, with its article."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def shown(value: object) -> str:
    """A value in a message: a text as its repr, which escapes characters that cannot be stored."""
    return f"{value!r:.60}" if isinstance(value, str) else kind(value)


# --- compression ----------------------------------------------------------------------------------------------------


def decompress(content: bytes, source_file: str) -> bytes:
    """The content of a file that may be compressed. Raises UnreadableFileError."""
    try:
        return _decompress(content)
    except _UnreadableError as error:
        raise UnreadableFileError(f"{source_file}: {error}") from error


def _decompress(content: bytes) -> bytes:
    try:
        plain = _plain(content)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, zstandard.ZstdError) as error:
        fault = f"the compressed data are cut off or damaged ({error})"
        raise _UnreadableError(f"{fault}. Copy or compress the file again.") from error
    if plain is not content and _is_compressed(plain):
        raise _UnreadableError("is compressed twice. Decompress it once.")
    return plain


def _is_compressed(content: bytes) -> bool:
    return content.startswith((_GZIP, _BZIP2, *_XZ)) or _ZSTANDARD.match(content) is not None


def _plain(content: bytes) -> bytes:
    if content.startswith(_GZIP):
        return gzip.decompress(content)
    if content.startswith(_BZIP2):
        return bz2.decompress(content)
    if content.startswith(_XZ):
        return lzma.decompress(content)
    if _ZSTANDARD.match(content):
        return b"".join(_zstandard_frames(content))
    return content


def _zstandard_frames(content: bytes) -> Iterator[bytes]:
    while content:
        # A stream reader silently returns part of a truncated frame; only this object reports the end.
        frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        try:
            yield frame.decompress(content)
        except zstandard.ZstdError:
            if dictionary := zstandard.get_frame_parameters(content).dict_id:
                fault = f"is compressed with a zstandard dictionary (id {dictionary}), which is not in the file"
                raise _UnreadableError(f"{fault}. Decompress it with `zstd -d -D DICTIONARY`.") from None
            raise
        if not frame.eof:
            raise EOFError("the last zstandard frame is cut off")
        content = frame.unused_data


# --- formats --------------------------------------------------------------------------------------------------------


def _split(content: bytes, fits: Fits) -> Iterable[DeliveredRow]:
    if content.startswith(_PARQUET):
        return _of_parquet(content)
    if content.startswith((_ARROW_FILE, _ARROW_STREAM)):
        return _of_arrow(content)
    _refuse_other_formats(content)
    content = content.removeprefix(_UTF8_BOM)
    if (line := _EXCEL_SEPARATOR.match(content)) is not None:
        content = content[line.end() :]
    if not content or content.isspace():
        raise _UnreadableError("is empty. Write its rows into it, or `[]` where it has none.")
    if _ARRAY.match(content):
        return _of_array(content)
    if (separator := _csv_separator(content, fits)) is not None:
        return _of_csv(content, separator)
    return _of_lines(content, fits)


def _refuse_other_formats(content: bytes) -> None:
    if content.startswith(_UTF16):
        raise _UnreadableError("is UTF-16 text. Convert it to UTF-8.")
    if content[_TAR_OFFSET:].startswith(_TAR_MAGIC):
        raise _UnreadableError("is a tar archive. Unpack it, and deliver the files in it.")
    if content.startswith(_ZIP) and b"xl/workbook.xml" in content:
        raise _UnreadableError("is an Excel workbook. Save its sheet as CSV in UTF-8.")
    for magic, what in _OTHERS.items():
        if content.startswith(magic):
            raise _UnreadableError(what)


# Parquet and Arrow


def _of_parquet(content: bytes) -> Iterable[DeliveredRow]:
    def read() -> Iterator[pa.RecordBatch]:
        return pq.ParquetFile(pa.BufferReader(content)).iter_batches(_ROWS_AT_ONCE, use_threads=False)

    return _of_batches(read, "Parquet")


def _of_arrow(content: bytes) -> Iterable[DeliveredRow]:
    """Arrow's file format, and its stream, which `save_to_disk` of datasets writes."""

    def read() -> Iterator[pa.RecordBatch]:
        source = pa.BufferReader(content)
        if content.startswith(_ARROW_STREAM):
            yield from pa.ipc.open_stream(source)
            return
        file = pa.ipc.open_file(source)
        yield from map(file.get_batch, range(file.num_record_batches))

    return _of_batches(read, "Arrow")


def _of_batches(read: Callable[[], Iterator[pa.RecordBatch]], name: str) -> Iterable[DeliveredRow]:
    def rows() -> Iterator[dict[str, object]]:
        for batch in read():
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from _cells_of(batch.slice(start, _ROWS_AT_ONCE))

    try:
        checked = _checked(rows)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        fault = f"is no complete {name} file that can be read ({error})"
        raise _UnreadableError(f"{fault}. Copy or write the file again.") from error
    return (_delivered_cells(number, row) for number, row in enumerate(checked, 1))


def _checked(read: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The items, read once before: a fault at the end of a file shows before its first row is taken."""
    deque(read(), maxlen=0)
    return read()


def _cells_of(batch: pa.RecordBatch) -> list[dict[str, object]]:
    names = [field.name for field in batch.schema]
    cells = [_cells(column) for column in batch]
    return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)] if names else []


def _cells(column: pa.Array) -> list[object]:
    """The cells of a column, of which none costs the file: dates and times as text, and a text that is not UTF-8 with
    lone surrogates, so that it costs its row. Beside an impossible date or time, all of the column are numbers.
    """
    kind = column.type
    try:
        column.validate(full=True)  # Offsets of damaged data can lead anywhere.
    except pa.ArrowInvalid:
        column = column.cast(_with_leaves(kind, _unchecked))
        column.validate(full=True)
    has_texts = column.type == kind
    # No Python object holds nanoseconds, years past 9999 or long durations. A time zone can be unknown here.
    for leaf in (_in_utc, _text_for_time):
        column = column.cast(_with_leaves(column.type, leaf))
    cells = column.to_pylist()
    return cells if has_texts else [_decoded(cell, kind) for cell in cells]


def _with_leaves(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with other types of its values, at any depth."""

    def of(field: pa.Field) -> pa.Field:
        return field.with_type(_with_leaves(field.type, leaf))

    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _with_leaves(kind.value_type, leaf), kind.ordered)
    if pa.types.is_struct(kind):
        return pa.struct([of(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(of(kind.key_field), of(kind.item_field), kind.keys_sorted)
    if pa.types.is_large_list(kind):
        return pa.large_list(of(kind.value_field))
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(of(kind.value_field), kind.list_size if pa.types.is_fixed_size_list(kind) else -1)
    return leaf(kind)


_UNCHECKED = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
    pa.date64(): pa.int64(),
    **{pa.time32(unit): pa.int32() for unit in ("s", "ms")},
    **{pa.time64(unit): pa.int64() for unit in ("us", "ns")},
}
"""Types that hold the same bytes, by the types that allow only some values."""


def _unchecked(kind: pa.DataType) -> pa.DataType:
    return _UNCHECKED.get(kind, kind)


def _in_utc(kind: pa.DataType) -> pa.DataType:
    return pa.timestamp(kind.unit, "UTC") if pa.types.is_timestamp(kind) and kind.tz is not None else kind


def _text_for_time(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) and not pa.types.is_interval(kind) else kind


def _decoded(cell: Any, kind: pa.DataType) -> object:
    """A cell with texts in place of the bytes that were read for them."""
    if cell is None:
        return None
    if pa.types.is_dictionary(kind):
        return _decoded(cell, kind.value_type)
    if pa.types.is_struct(kind):
        return {field.name: _decoded(cell[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return [(_decoded(key, kind.key_type), _decoded(value, kind.item_type)) for key, value in cell]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_decoded(one, kind.value_type) for one in cell]
    is_text = kind in _UNCHECKED and isinstance(cell, bytes)
    return cell.decode("utf-8", "surrogateescape") if is_text else cell


def _delivered_cells(number: int, row: dict[str, object]) -> DeliveredRow:
    return DeliveredRow(number, _shown_record(json.dumps(row, ensure_ascii=False, default=str)), row)


# JSON


def _parse_int(digits: str) -> int | float:
    # Python refuses integers of more than 4,300 digits. A number is never text, so its value does not matter.
    try:
        return int(digits)
    except ValueError:
        return float(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def _of_array(content: bytes) -> Iterable[DeliveredRow]:
    # Invalid bytes become lone surrogates, so that they reject their row and not the file.
    text = content.decode("utf-8", "surrogateescape")
    try:
        elements = _checked(lambda: _array_elements(text))
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


def _of_lines(content: bytes, fits: Fits) -> Iterator[DeliveredRow]:
    # Only the first lines are parsed now: no later line can make the file unreadable.
    lines = ((number, line) for number, line in enumerate(io.BytesIO(content), 1) if line.strip())
    first = [_delivered_line(*line) for line in islice(lines, _FIRST_LINES)]
    if first[0].fault is not None:
        _refuse_object_over_lines(content, first[0].source_row, fits)
    if not any(isinstance(row.value, dict) or _OBJECT.match(row.record) for row in first):
        found = f"none of its first lines is a JSON object (line {first[0].source_row}: {shown(first[0].record)})"
        raise _NoRowsError(
            f"is no Parquet, Arrow, JSON array or CSV with known columns, and {found}. Deliver one of these, or JSONL."
        )
    if len(first) == 1 and isinstance(first[0].value, dict):
        _refuse_wrapped_list(first[0].value, fits)
    return chain(first, starmap(_delivered_line, lines))


def _delivered_line(number: int, line: bytes) -> DeliveredRow:
    text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
    try:
        return _delivered_value(number, text, _DECODER.decode(text))
    except json.JSONDecodeError as error:
        fault = RejectedError(RejectReason.BAD_JSON, f"column {error.colno}: {error.msg}")
    except RecursionError:
        fault = RejectedError(RejectReason.BAD_JSON, "the JSON is nested too deep to be read")
    return DeliveredRow(number, _shown_record(text), None, encoding_fault(text) or fault)


def _delivered_value(number: int, text: str, value: object) -> DeliveredRow:
    fault = encoding_fault(text)
    if fault is None and not isinstance(value, dict):
        fault = RejectedError(RejectReason.NOT_AN_OBJECT, f"the row is {kind(value)}; an object is expected")
    return DeliveredRow(number, _shown_record(text), value if fault is None else None, fault)


def _shown_record(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refuse_object_over_lines(content: bytes, first_line: int, fits: Fits) -> None:
    text = content.decode("utf-8", "surrogateescape")
    start = _skip_space(text, 0)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        return
    if isinstance(value, dict) and "\n" in text[start:end]:
        _refuse_wrapped_list(value, fits)
        fault = f"line {first_line}, column 1: a JSON object goes over several lines"
        raise _UnreadableError(f"{fault}. Write one object per line (`jq -c .` does so), or one JSON array of objects.")


def _refuse_wrapped_list(value: dict[str, object], fits: Fits) -> None:
    if fits(value):
        return
    for name, content in value.items():
        if isinstance(content, list) and content and isinstance(content[0], dict):
            fault = f"the whole file is one JSON object, whose field {shown(name)} holds the list"
            raise _UnreadableError(f"{fault}. Deliver that list itself, as a JSON array or JSONL.")


# CSV


def _csv_separator(content: bytes, fits: Fits) -> str | None:
    """The separator of CSV whose first line names the fields of a pair; None: the file is something else."""
    lines = re.split(rb"\r\n?|\n", content[:_LONGEST_HEADER].lstrip(b"\r\n"), maxsplit=2)
    header, second = (one.decode("utf-8", "replace") for one in (*lines, b"")[:2])
    if len(lines) < 2 or header.lstrip().startswith("{"):
        return None
    by_separator = {one: _csv_cells(header, one) for one in _CSV_SEPARATORS}
    for separator, names in by_separator.items():
        if fits(dict.fromkeys(names, "")):
            if len(set(names)) < len(names):
                raise _UnreadableError(f"is CSV in which two columns have one name ({header:.200}). Rename one.")
            return separator
    for separator, names in by_separator.items():
        is_header = len(names) > 1 and all(_CSV_NAME.fullmatch(name) for name in names)
        if is_header and len(_csv_cells(second, separator)) == len(names):
            raise _NoRowsError(
                f"looks like CSV, and of its columns ({', '.join(names)}) no two are known as a query and an answer. "
                "Name them in records.fields, as `query` and `answer`."
            )
    return None


def _csv_cells(line: str, separator: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return []


def _of_csv(content: bytes, separator: str) -> Iterator[DeliveredRow]:
    csv.field_size_limit(2**31 - 1)  # A text can be longer than the 128 KiB that are allowed by default.

    def read() -> Iterator[list[str]]:
        text = io.TextIOWrapper(io.BytesIO(content), "utf-8", "surrogateescape", newline="")
        reader = csv.reader(text, delimiter=separator, strict=True)  # Else an open quote would hold the file's rest.
        try:
            yield from filter(None, reader)
        except csv.Error as error:
            fault = f"is CSV that cannot be read: before line {reader.line_num + 1}, {error}"
            raise _UnreadableError(f"{fault}. Correct its quotes, or deliver JSONL.") from error

    rows = _checked(read)
    names = [name.strip() for name in next(rows)]
    return (_delivered_csv(number, names, cells) for number, cells in enumerate(rows, 1))


def _delivered_csv(number: int, names: list[str], cells: list[str]) -> DeliveredRow:
    if len(cells) != len(names):
        found = (
            f"the row has {len(cells)} cells, the header {len(names)}; texts with a separator or a quote need quotes"
        )
        return DeliveredRow(
            number,
            _shown_record(json.dumps(cells, ensure_ascii=False)),
            None,
            RejectedError(RejectReason.BAD_CSV, found),
        )
    return _delivered_cells(number, {name: cell or None for name, cell in zip(names, cells, strict=True)})
