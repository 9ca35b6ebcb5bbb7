"""storage: every store refuses a name that is not a valid file name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.storage.conftest import files_under
from qaq_pipeline_tests.support.frames import HOSTILE_NAMES, raw_rows, rejected

ROWS = raw_rows({"query": "Größe?\n", "system": "Be brief."}, rejected(), {"answer": ""})
FILES = {"a.jsonl": b'{"query": "q", "response": "a"}\n', "b.jsonl": b"\x00\xff"}

PATH_TAKING: dict[str, Callable[[Storage, str], Any]] = {
    "write_table": lambda storage, name: storage.tables.write(StoredTable(ROWS), "raw_data", Partition(name)),
    "write_table_of_model": lambda storage, name: storage.tables.write(
        StoredTable(ROWS), "raw_data", Partition("b1", name)
    ),
    "read_table": lambda storage, name: storage.tables.read("raw_data", Partition(name)),
    "has_table": lambda storage, name: storage.tables.has("raw_data", Partition(name)),
    "table_url": lambda storage, name: storage.tables.url("raw_data", Partition(name)),
    "store_delivery": lambda storage, name: storage.deliveries.store(name, FILES),
    "current_delivery": lambda storage, name: storage.deliveries.current(name),
    "read_delivery": lambda storage, name: storage.deliveries.read(Delivery(name, {"a.jsonl": "0"}), "a.jsonl"),
    "lock": lambda storage, name: storage.locks.hold("raw_data", name).__enter__(),
    "lock_of_model": lambda storage, name: storage.locks.hold("raw_data", "b1", name).__enter__(),
}


@pytest.mark.parametrize("function", list(PATH_TAKING))
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_batch_name_is_refused_and_nothing_is_written(
    storage: Storage, tmp_path: Path, function: str, name: str
) -> None:
    with pytest.raises(ValueError, match=r"batch name .* cannot be used: give a letter or digit"):
        PATH_TAKING[function](storage, name)
    assert files_under(tmp_path) == []
