"""A damaged table takes no row from the dataset and adds none: work that needs it stops, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qaq_pipeline.publication import versions
from qaq_pipeline.runs import refresh, registration, run_batch, withdrawal
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.support.daemon import Daemon, some_rows
from qaq_pipeline_tests.support.sentences import Check


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """One bit of the first column is another."""
    return data[:10] + bytes([data[10] ^ 1]) + data[11:]


@pytest.mark.parametrize(("table", "damage"), [("raw_data", torn), ("screened_data", flipped), ("decisions", flipped)])
def test_no_batch_is_published_beside_a_damaged_one_until_it_is_whole_again(
    two_batches: Daemon, tmp_path: Path, table: str, damage: Callable[[bytes], bytes], check_sentence: Check
) -> None:
    storage, deployment = open_storage(two_batches.settings), two_batches.deployment
    path = Path(storage.tables.url(table, Partition("b1")))
    whole, log = path.read_bytes(), versions.log(storage)
    path.write_bytes(damage(whole))
    registration.register(deployment, "b3", [write_jsonl(tmp_path / "b3.jsonl", some_rows(3, 14, 15, 16))], None)
    with pytest.raises(RunError) as error:
        run_batch.run_batch(deployment, "b3")
    check_sentence(error.value)
    assert str(path) in str(error.value)
    assert versions.log(storage) == log
    path.write_bytes(whole)
    run_batch.run_batch(deployment, "b3")
    assert two_batches.statuses("b3")[0] == "duplicate"
    newest = versions.latest(storage)
    assert newest is not None
    assert set(versions.decided_batches(storage, newest.version)) == {"b1", "b2", "b3"}


def test_a_torn_table_is_made_again_by_a_refresh(two_batches: Daemon) -> None:
    storage = open_storage(two_batches.settings)
    path = Path(storage.tables.url("raw_data", Partition("b1")))
    whole, log = path.read_bytes(), versions.log(storage)
    path.write_bytes(torn(whole))
    refresh.refresh_all(two_batches.deployment)
    assert path.read_bytes() == whole
    assert versions.log(storage) == log


def test_a_withdrawal_that_ended_after_the_screening_is_done_by_the_next_one(
    two_batches: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = withdrawal.Withdrawal("b1", "b1.jsonl:3", "a claim")
    with monkeypatch.context() as patch:
        run_again = refresh._run_again

        def end_after_the_screening(driver, one, rebuilt):
            if one.table not in ("signatures", "screened_data"):
                raise KeyboardInterrupt
            return run_again(driver, one, rebuilt)

        patch.setattr(refresh, "_run_again", end_after_the_screening)
        with pytest.raises(KeyboardInterrupt):
            withdrawal.withdraw(two_batches.deployment, what)
    assert two_batches.statuses("b1")[2] == "withdrawn"
    assert "decisions is older than screened_data" in two_batches.left_out()["b1"]
    withdrawal.withdraw(two_batches.deployment, what)
    assert two_batches.left_out() == {}
    storage = open_storage(two_batches.settings)
    newest = versions.latest(storage)
    assert newest is not None
    assert set(versions.decided_batches(storage, newest.version)) == {"b1", "b2"}
    assert len(storage.files.read_json("withdrawals.json")) == 1


def test_a_revocation_that_ended_before_the_publication_is_done_by_the_next_one(
    two_batches: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    withdrawal.withdraw(two_batches.deployment, withdrawal.Withdrawal("b1", "b1.jsonl:3", "a claim"))
    back = withdrawal.Withdrawal("b1", "b1.jsonl:3", "it was settled", is_withdrawn=False)
    with monkeypatch.context() as patch:
        patch.setattr(withdrawal, "refresh_stale", end)
        with pytest.raises(KeyboardInterrupt):
            withdrawal.withdraw(two_batches.deployment, back)
    assert two_batches.statuses("b1")[2] == "withdrawn"
    withdrawal.withdraw(two_batches.deployment, back)
    assert two_batches.statuses("b1")[2] == "accepted"
    assert two_batches.left_out() == {}


def end(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
