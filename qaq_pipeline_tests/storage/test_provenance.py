"""provenance: a record is written once, resolves permanently, and is refused after a change."""

from __future__ import annotations

import pytest

from qaq_pipeline.storage.files import StorageError, hash_json
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.sentences import Check


def test_an_id_resolves_after_the_batch_was_decided_again(any_storage: Storage) -> None:
    old, new = {"files": {"a": "0"}, "models": {}}, {"files": {"a": "1"}, "models": {}}
    first = any_storage.provenance.write(old, "run-1")
    any_storage.provenance.write(new, "run-2")
    any_storage.provenance.write(old, "run-3")
    found = any_storage.provenance.read(first)
    assert found.made_of == old
    assert sorted(run["run_id"] for run in found.runs) == ["run-1", "run-3"]
    assert first == hash_json(old)


def test_an_id_without_a_record_has_neither_content_nor_runs(any_storage: Storage) -> None:
    found = any_storage.provenance.read("0" * 32)
    assert (found.made_of, found.runs) == (None, [])


def test_a_changed_record_is_refused_with_its_remedy(any_storage: Storage, check_sentence: Check) -> None:
    provenance_id = any_storage.provenance.write({"files": {"a": "0"}}, "run-1")
    any_storage.files.write_json({"files": {"a": "1"}}, *any_storage.provenance.place(provenance_id))
    with pytest.raises(StorageError) as error:
        any_storage.provenance.read(provenance_id)
    check_sentence(error.value)
