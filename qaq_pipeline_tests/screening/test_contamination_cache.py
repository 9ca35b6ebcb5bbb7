"""contamination_cache: results of a benchmark are read again; unreadable ones count as absent."""

from __future__ import annotations

import pytest

from qaq_pipeline.schema.tables import Contamination
from qaq_pipeline.screening import contamination_cache
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import empty


def test_what_was_found_comes_back_by_batch_and_key(storage: Storage) -> None:
    found = empty(Contamination)
    contamination_cache.write_contamination(storage, found, "b1", "key")
    kept = contamination_cache.read_contamination(storage, "b1", "key")
    assert kept is not None
    assert kept.equals(found)
    assert contamination_cache.read_contamination(storage, "b1", "other") is None
    assert contamination_cache.read_contamination(storage, "b2", "key") is None


@pytest.mark.parametrize("content", [b"", b"torn"])
def test_a_damaged_file_is_named_and_counts_as_nothing_found(
    storage: Storage, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    storage.files.write_bytes(content, "contamination", "b1", "key.parquet")
    assert contamination_cache.read_contamination(storage, "b1", "key") is None
    assert "contamination/b1/key.parquet: cannot be read" in caplog.text
