"""batch_order: a batch keeps its place, and is compared with the batches before it."""

from __future__ import annotations

import pytest

from qaq_pipeline.screening import batch_order
from qaq_pipeline.storage.storage import Storage


def test_a_batch_takes_the_next_place_once_and_keeps_it(storage: Storage) -> None:
    assert batch_order.batches_in_order(storage) == []
    for batch in ("b2", "b1", "b2"):
        batch_order.take_place(storage, batch)
    assert batch_order.batches_in_order(storage) == ["b2", "b1"]


def test_the_batches_before_one_without_a_place_are_all(storage: Storage) -> None:
    for batch in ("b2", "b1"):
        batch_order.take_place(storage, batch)
    assert batch_order.batches_before(storage, "b1") == ["b2"]
    assert batch_order.batches_before(storage, "b2") == []
    assert batch_order.batches_before(storage, "b3") == ["b2", "b1"]


def test_a_hostile_name_gets_no_place(storage: Storage) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        batch_order.take_place(storage, "../b1")
    assert batch_order.batches_in_order(storage) == []
