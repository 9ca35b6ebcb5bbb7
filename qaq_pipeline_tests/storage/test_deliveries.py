"""deliveries: immutable copies, checked when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.storage.conftest import files_under
from qaq_pipeline_tests.support.delivered import delivered
from qaq_pipeline_tests.support.sentences import Check

FILES = {"a.jsonl": b'{"query": "q", "response": "a"}\n', "b.jsonl": b"\x00\xff"}


def test_a_delivery_comes_back(any_storage: Storage) -> None:
    delivery = any_storage.deliveries.store("b1", FILES, limit=3)
    assert any_storage.deliveries.current("b1") == delivery
    assert list(delivery.files) == ["a.jsonl", "b.jsonl"]
    assert delivered(any_storage, delivery) == FILES
    assert any_storage.deliveries.sizes(delivery) == {"a.jsonl": 32, "b.jsonl": 2}


def test_a_new_delivery_of_a_batch_keeps_the_old_copy(any_storage: Storage) -> None:
    first = any_storage.deliveries.store("b1", FILES)
    second = any_storage.deliveries.store("b1", FILES | {"b.jsonl": b"other"})
    assert any_storage.deliveries.current("b1") == second
    assert first.content_hash != second.content_hash
    assert delivered(any_storage, first) == FILES
    assert delivered(any_storage, second)["b.jsonl"] == b"other"


def test_the_same_delivery_twice_is_stored_once(storage: Storage, tmp_path: Path) -> None:
    first = storage.deliveries.store("b1", FILES)
    copy = Path(storage.files.url("deliveries", "b1", first.content_hash, "a.jsonl"))
    written = copy.stat().st_mtime_ns
    assert storage.deliveries.store("b1", FILES) == first
    assert copy.stat().st_mtime_ns == written
    assert len(files_under(tmp_path / "storage" / "deliveries")) == len(FILES) + 1


def test_the_hash_of_a_delivery_knows_its_files_their_names_and_its_limit(storage: Storage) -> None:
    first = FILES["a.jsonl"]
    deliveries = [
        storage.deliveries.store("b1", {"a.jsonl": first}),
        storage.deliveries.store("b1", {"a.jsonl": first}, limit=3),
        storage.deliveries.store("b1", {"c.jsonl": first}),
        storage.deliveries.store("b1", {"a.jsonl": first + b" "}),
    ]
    assert len({delivery.content_hash for delivery in deliveries}) == len(deliveries)
    assert all(delivered(storage, delivery) for delivery in deliveries)


def test_a_flipped_byte_in_a_delivered_copy_is_found_and_named(any_storage: Storage, check_sentence: Check) -> None:
    delivery = any_storage.deliveries.store("b1", FILES)
    copy = ("deliveries", "b1", delivery.content_hash, "a.jsonl")
    flipped = bytes([FILES["a.jsonl"][0] ^ 1]) + FILES["a.jsonl"][1:]
    any_storage.files.write_bytes(flipped, *copy)
    with pytest.raises(StorageError) as error:
        delivered(any_storage, delivery)
    check_sentence(error.value)


def test_delivering_again_fixes_a_changed_copy(storage: Storage) -> None:
    delivery = storage.deliveries.store("b1", FILES)
    storage.files.write_bytes(b"damaged", "deliveries", "b1", delivery.content_hash, "a.jsonl")
    assert delivered(storage, storage.deliveries.store("b1", FILES)) == FILES


def test_a_batch_that_was_never_delivered_is_named_with_its_remedy(any_storage: Storage, check_sentence: Check) -> None:
    with pytest.raises(StorageError) as error:
        any_storage.deliveries.current("b9")
    check_sentence(error.value)
