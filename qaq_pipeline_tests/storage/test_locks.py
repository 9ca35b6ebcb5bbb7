"""locks: held between processes, freed when their holder ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.conftest import LockHolder
from qaq_pipeline_tests.support.frames import raw_rows


@pytest.fixture
def impatient(tmp_path: Path) -> Storage:
    """Storage that waits a tenth of a second for a lock."""
    return Storage(str(tmp_path / "storage"), tmp_path / "locks", lock_timeout_seconds=0.1)


def test_a_lock_holds_between_processes_and_is_freed_when_its_holder_is_killed(
    impatient: Storage, lock_holder: LockHolder, tmp_path: Path
) -> None:
    holder = lock_holder(tmp_path / "locks", "logprobs", "b1", "strong")
    with pytest.raises(PartitionBusyError) as caught, impatient.locks.hold("logprobs", "b1", "strong"):
        pytest.fail("two processes hold one lock")
    text = str(caught.value)
    assert "logprobs/b1/strong is being written by another process" in text
    assert str(tmp_path / "locks" / "logprobs__b1__strong.lock") in text
    assert "wait for it to end" in text
    with impatient.locks.hold("logprobs", "b1", "weak"), impatient.locks.hold("logprobs", "b2", "strong"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with impatient.locks.hold("logprobs", "b1", "strong"):
        pass


def test_the_holder_of_a_lock_may_take_it_again(impatient: Storage) -> None:
    with impatient.locks.hold("raw_data", "b1"):
        with impatient.locks.hold("raw_data", "b1"):
            pass
        impatient.tables.write(StoredTable(raw_rows({})), "raw_data", Partition("b1"))
    with impatient.locks.hold("raw_data", "b1"):
        pass


def test_a_lock_is_freed_when_its_work_fails(impatient: Storage) -> None:
    with pytest.raises(KeyError), impatient.locks.hold("raw_data", "b1"):
        raise KeyError
    with impatient.locks.hold("raw_data", "b1"):
        pass
