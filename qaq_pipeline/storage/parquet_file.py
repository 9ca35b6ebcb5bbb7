"""Parquet files with a footer of our own: provenance, the hash of the columns, and the hash of the whole file.

Belongs here: encoding, decoding and hashing. Does not belong here: paths, and what a table means (`tables`).
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

from qaq_pipeline.storage import row_lookup

_FOOTER_KEY = "qaq_pipeline"
_FILE_HASH = "file_hash"
_NO_HASH = "0" * 32
"""Fills the place of a file's own hash while the hash is computed."""
_FOOTER_TAIL_BYTES = 8
_KNOWN_FIELDS = {"provenance", "data_version", "scored_with", _FILE_HASH}

UNREADABLE = (PolarsError, PanicException, pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""Raised while rows or a footer are read from a file that is none of ours, or a damaged one."""


def encode(frame: pl.DataFrame, footer: Mapping[str, Any]) -> bytes:
    """The frame as a Parquet file. A footer that is not empty also gets the hash of the whole file."""
    buffer = io.BytesIO()
    metadata = {_FOOTER_KEY: json.dumps({**footer, _FILE_HASH: _NO_HASH}, sort_keys=True)} if footer else None
    rows = row_lookup.rows_per_group(frame.height)
    frame.rechunk().write_parquet(buffer, compression="zstd", row_group_size=rows, metadata=metadata)
    data = buffer.getvalue()
    if metadata is None:
        return data
    mark = f'"{_FILE_HASH}": "'.encode()
    before, _, after = data.rpartition(mark + _NO_HASH.encode())
    return b"".join([before, mark, _hash(data).encode(), after])


def decode(data: bytes) -> pl.DataFrame:
    """The rows. Raises one of `UNREADABLE`."""
    return pl.read_parquet(io.BytesIO(data), glob=False)


def footer_of(data: bytes) -> dict[str, Any]:
    """The footer of a file in memory. Raises one of `UNREADABLE`."""
    return json.loads(pl.read_parquet_metadata(io.BytesIO(data))[_FOOTER_KEY])


def read_footer(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """The footer of a file, and the number of its rows, without its rows. Raises one of `UNREADABLE`."""
    metadata = pq.read_metadata(stream)
    return json.loads((metadata.metadata or {})[_FOOTER_KEY.encode()]), metadata.num_rows


def content_hash(data: bytes) -> str:
    """Hash of the columns' bytes, without the footer, which names its writer (32 hex digits)."""
    # A Parquet file ends: …columns | footer | length of the footer, 4 bytes little-endian | PAR1
    footer_bytes = int.from_bytes(data[-_FOOTER_TAIL_BYTES:-4], "little")
    return _hash(data[: -(footer_bytes + _FOOTER_TAIL_BYTES)])


def unreadable(error: Exception) -> str:
    """One of `UNREADABLE` as a sentence: a `KeyError` alone would give only the name of the missing field."""
    return f"it cannot be read ({f'its footer has no field {error}' if isinstance(error, KeyError) else error})"


def file_fault(data: bytes) -> str | None:
    """The fault of a table or a shard of which a byte changed since it was written, as a sentence; None: no fault."""
    try:
        footer = read_footer(io.BytesIO(data))[0]
        version, file_hash = footer["data_version"], footer[_FILE_HASH]
    except UNREADABLE as error:
        return unreadable(error)
    before, _, after = data.rpartition(file_hash.encode())
    is_whole = _hash(before, _NO_HASH.encode(), after) == file_hash
    is_ours = footer.keys() <= _KNOWN_FIELDS and content_hash(data) == version
    return None if is_whole and is_ours else "it was changed since it was written"


def _hash(*parts: bytes) -> str:
    """Hash of bytes (32 hex digits), in parts."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
