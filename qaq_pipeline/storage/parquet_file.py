"""Parquet files with a footer of our own: provenance, the hash of the columns, and the hash of the whole file.

Belongs here: writing, in one go or part by part, reading and hashing. Does not belong here: paths, and what a table
means (`tables`).

The bytes of the columns depend on the rows alone, in whatever parts they come: each row group has `ROWS_PER_GROUP`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars.exceptions import PanicException, PolarsError

ROWS_PER_GROUP = 16_384
"""Rows that are read or written at once: few enough to be read for one of them."""

_FOOTER_KEY = "qaq_pipeline"
_FILE_HASH = "file_hash"
_NO_HASH = "0" * 32
"""Fills the place of a file's own hash while the hash is computed."""
_FOOTER_TAIL_BYTES = 8
_KNOWN_FIELDS = {"provenance", "data_version", "scored_with", _FILE_HASH}
_BYTES_AT_ONCE = 1 << 20

UNREADABLE = (PolarsError, PanicException, pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""Raised while rows or a footer are read from a file that is none of ours, or a damaged one."""


class Writer:
    """Writes a Parquet file part by part, and hashes it meanwhile.

    Args:
        stream: where it is written, from its beginning; it must be seekable if there will be a footer.
        schema: of the rows.
    """

    def __init__(self, stream: BinaryIO, schema: pl.Schema | Mapping[str, pl.DataType]) -> None:
        self._stream = stream
        self._hashed = _Hashed(stream)
        self._waiting = pl.DataFrame(schema=schema)
        self._writer = pq.ParquetWriter(self._hashed, _arrow(self._waiting).schema, compression="zstd")
        self.num_rows = 0

    def append(self, rows: pl.DataFrame) -> None:
        """Write rows after those before."""
        self.num_rows += rows.height
        waiting = pl.concat([self._waiting, rows], rechunk=False)
        whole = waiting.height - waiting.height % ROWS_PER_GROUP
        for group in waiting[:whole].iter_slices(ROWS_PER_GROUP):
            self._write(group)
        self._waiting = waiting[whole:].rechunk() if whole else waiting

    def end(self) -> str:
        """Write the last rows, and return the hash of the content (32 hex digits); no row can follow."""
        if not self._waiting.is_empty():
            self._write(self._waiting)
        self._waiting = self._waiting.clear()
        return self._hashed.hexdigest()

    def close(self, footer: Mapping[str, Any]) -> None:
        """End the file. A footer that is not empty also gets the hash of the whole file."""
        self.end()
        if footer:
            text = json.dumps({**footer, _FILE_HASH: _NO_HASH}, sort_keys=True)
            self._writer.add_key_value_metadata({_FOOTER_KEY: text})
        self._writer.close()
        if footer:
            self._write_own_hash()

    def _write(self, group: pl.DataFrame) -> None:
        self._writer.write_table(_arrow(group.rechunk()), row_group_size=ROWS_PER_GROUP)

    def _write_own_hash(self) -> None:
        """Put the hash of the whole file into its place in the footer."""
        mark, start = f'"{_FILE_HASH}": "'.encode(), _start_of_footer(self._stream)
        self._stream.seek(start)
        self._stream.seek(start + self._stream.read().rindex(mark + _NO_HASH.encode()) + len(mark))
        self._stream.write(self._hashed.hexdigest().encode())
        self._stream.seek(0, io.SEEK_END)


class _Hashed(io.RawIOBase):
    """Hashes what is written to a stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash = stream, _new_hash()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._stream.tell()

    def hexdigest(self) -> str:
        """Hash of all bytes so far (32 hex digits)."""
        return self._hash.hexdigest()


class _Nowhere(io.RawIOBase):
    """Keeps nothing of what is written."""

    def __init__(self) -> None:
        self._place = 0

    def write(self, data: Any) -> int:
        self._place += len(data)
        return len(data)

    def tell(self) -> int:
        return self._place


def _arrow(rows: pl.DataFrame) -> pa.Table:
    return rows.to_arrow(compat_level=pl.CompatLevel.oldest())


def encode(frame: pl.DataFrame, footer: Mapping[str, Any]) -> bytes:
    """The frame as a Parquet file. A footer that is not empty also gets the hash of the whole file."""
    buffer = io.BytesIO()
    writer = Writer(buffer, frame.schema)
    writer.append(frame)
    writer.close(footer)
    return buffer.getvalue()


def hash_rows(frame: pl.DataFrame) -> str:
    """Hash of the columns' bytes as they would be written (32 hex digits)."""
    writer = Writer(_Nowhere(), frame.schema)  # type: ignore[arg-type]
    writer.append(frame)
    version = writer.end()
    writer.close({})
    return version


def decode(data: bytes) -> pl.DataFrame:
    """The rows. Raises one of `UNREADABLE`."""
    return pl.read_parquet(io.BytesIO(data), glob=False)


def read_footer(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """The footer of a file, and the number of its rows, without its rows. Raises one of `UNREADABLE`."""
    metadata = pq.read_metadata(stream)
    texts = {key.decode(errors="replace"): text for key, text in (metadata.metadata or {}).items()}
    return json.loads(texts[_FOOTER_KEY]), metadata.num_rows


def unreadable(error: Exception) -> str:
    """One of `UNREADABLE` as a sentence: a `KeyError` alone would give only the name of the missing field."""
    return f"it cannot be read ({f'its footer has no field {error}' if isinstance(error, KeyError) else error})"


def file_fault(stream: BinaryIO) -> str | None:
    """The fault of a table or a shard of which a byte changed since it was written, as a sentence; None: no fault."""
    try:
        footer = read_footer(stream)[0]
        version, file_hash = footer["data_version"], footer[_FILE_HASH]
        start = _start_of_footer(stream)
    except UNREADABLE as error:
        return unreadable(error)
    whole = _hash_of(stream, start)
    of_columns = whole.hexdigest()
    before, _, after = stream.read().rpartition(file_hash.encode())
    for part in (before, _NO_HASH.encode(), after):
        whole.update(part)
    is_ours = footer.keys() <= _KNOWN_FIELDS and of_columns == version
    return None if whole.hexdigest() == file_hash and is_ours else "it was changed since it was written"


def _start_of_footer(stream: BinaryIO) -> int:
    """Where the footer begins. A Parquet file ends: …columns | footer | its length, 4 bytes little-endian | PAR1."""
    end = stream.seek(-_FOOTER_TAIL_BYTES, io.SEEK_END)
    return max(end - int.from_bytes(stream.read(4), "little"), 0)


def _hash_of(stream: BinaryIO, num_bytes: int) -> Any:
    """The hash of the first bytes of a file, which can be told of more; the next byte to read is the one after them."""
    hashed, left = _new_hash(), num_bytes
    stream.seek(0)
    while left and (data := stream.read(min(left, _BYTES_AT_ONCE))):
        hashed.update(data)
        left -= len(data)
    return hashed


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)
