"""parquet_file: a file notices every changed byte of itself."""

from __future__ import annotations

import io
import json

from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.parquet_file import file_fault
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import raw_rows
from qaq_pipeline_tests.support.sentences import Check


def test_a_file_notices_every_changed_byte_of_itself(storage: Storage) -> None:
    storage.tables.write(StoredTable(raw_rows({}, {}), {"note": "Größe"}), "raw_data", Partition("b1"))
    data = storage.files.read_bytes("raw_data", "b1", "table.parquet")
    assert file_fault(io.BytesIO(data)) is None
    for offset in range(len(data)):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        assert file_fault(io.BytesIO(changed)) is not None, offset
    assert file_fault(io.BytesIO(data[:-1])) is not None
    assert file_fault(io.BytesIO()) is not None


def test_a_file_without_its_own_hash_has_a_fault(check_sentence: Check) -> None:
    frame, buffer = raw_rows({}, {}), io.BytesIO()
    footer = {"provenance": {}, "data_version": StoredTable(frame).data_version}
    frame.write_parquet(buffer, compression="zstd", metadata={"qaq_pipeline": json.dumps(footer)})
    check_sentence(file_fault(buffer))
