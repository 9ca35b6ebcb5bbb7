"""withdrawal: a batch or a row leaves the dataset, wherever its text stands, and can come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from qaq_pipeline.config.settings import RuntimeSettings, Settings
from qaq_pipeline.lineage import row_history
from qaq_pipeline.lineage.lineage import walk
from qaq_pipeline.lineage.trace import trace
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.difference import compare
from qaq_pipeline.publication.withdrawn import withdrawn_batches
from qaq_pipeline.runs import refresh, withdrawal
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import SAMPLES, LockHolder
from qaq_pipeline_tests.support.daemon import Daemon, land, some_rows
from qaq_pipeline_tests.support.sentences import Check

SettingsFor = Callable[..., Settings]


def published_text(daemon: Daemon) -> str:
    """All that the newest version exports."""
    storage = open_storage(daemon.settings)
    folder = Path(storage.files.path(*versions.place(versions.find_version(storage, "latest").version)))
    return "".join(path.read_text() for path in folder.rglob("*.json*"))


def everything_selected(daemon: Daemon, settings_for: SettingsFor) -> None:
    """The daemon's batches, decided and published so that every row that is scored is selected."""
    all_rows = [{"name": "all", "strategy": "diff_high", "budget": {"fraction": 1.0}}]
    daemon.use(settings_for(gates={"max_rejected_share": None}, selections=all_rows))
    refresh.refresh_all(daemon.deployment)


def test_a_withdrawn_row_goes_wherever_its_text_stands(two_batches: Daemon, settings_for: SettingsFor) -> None:
    daemon = two_batches
    everything_selected(daemon, settings_for)
    assert json.dumps(SAMPLES[3][0])[1:-1] in published_text(daemon)
    what = withdrawal.Withdrawal("b1", "b1.jsonl:3", "its licence forbids training")
    done = withdrawal.withdraw(daemon.deployment, what)
    assert done.failed == {}
    assert json.dumps(SAMPLES[3][0])[1:-1] not in published_text(daemon)
    for batch in ("b1", "b2"):
        assert daemon.statuses(batch)[2] == "withdrawn"
        decision = open_storage(daemon.settings).tables.read("decisions", Partition(batch)).frame.row(2, named=True)
        assert (decision["decision"], decision["reason"]) == ("withdrawn", "row_withdrawn")
        assert decision["explanation"].endswith(": its licence forbids training.")
    assert daemon.left_out() == {}
    storage = open_storage(daemon.settings)
    assert withdrawn_batches(storage, versions.latest(storage)) == []
    newest, before = (versions.publications(storage)[place].version for place in (-1, -2))
    left = compare(storage, before, newest).filter(is_added=False)
    assert left.filter(source_row=3)["change"].unique().to_list() == ["withdrawn"]
    for version in (before, newest):
        (path,) = trace(storage, walk(storage, version), "b1/b1.jsonl:3")
        assert [row.facts["record"] for row in path.tables if row.table.name == "raw_data"] == [None]
    (match,) = row_history.find_text(storage, SAMPLES[3][0], ["b1"])
    assert (match.number, match.rows[0]["query"], match.rows[0]["answer"]) == (1, None, None)


def test_what_was_withdrawn_is_published_no_more_though_its_batch_cannot_be_screened_again(
    two_batches: Daemon, settings_for: SettingsFor, lock_holder: LockHolder, check_sentence: Check
) -> None:
    daemon = two_batches
    everything_selected(daemon, settings_for)
    holder = lock_holder(daemon.settings.home / "locks", "batch", "b1")
    what = withdrawal.Withdrawal("b1", "b1.jsonl:1", "a leaked key")
    impatient = daemon.settings.model_copy(update={"runtime": RuntimeSettings(lock_timeout_seconds=0.1)})
    with pytest.raises(RunError) as error:
        withdrawal.withdraw(Deployment(impatient, daemon.instance), what)
    check_sentence(error.value)
    assert json.dumps(SAMPLES[0][0])[1:-1] not in published_text(daemon)
    check_sentence(daemon.left_out()["b1"])
    holder.kill()
    holder.wait()
    refresh.refresh_all(daemon.deployment)
    assert daemon.left_out() == {}


def test_a_withdrawn_batch_goes_though_no_other_can_be_published(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "b1.jsonl", some_rows(0, 1, 3, 4))
    land(settings, "gated.jsonl", [{"query": ""}] * 4)
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1"), daemon.curate("gated")
    assert daemon.materialise("curated_dataset", partition=None)
    withdrawal.withdraw(Deployment(settings, instance), withdrawal.Withdrawal("b1", None, "a claim"))
    assert json.dumps(SAMPLES[0][0])[1:-1] not in published_text(daemon)
    assert daemon.night()


def test_near_rows_of_a_withdrawn_one_are_named_before_they_come_back(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    query = " ".join(f"word{number}" for number in range(40))
    land(
        settings, "b1.jsonl", [{"query": query, "response": "a = 1"}, {"query": f"{query} please", "response": "a = 1"}]
    )
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1")
    assert withdrawal.near_rows(Deployment(settings, instance), "b1", "b1.jsonl:1") == ["b1/b1.jsonl:2.0"]
    withdrawal.withdraw(Deployment(settings, instance), withdrawal.Withdrawal("b1", "b1.jsonl:1", "a leaked key"))
    assert daemon.statuses("b1") == ["withdrawn", "accepted"]


def test_a_withdrawn_row_is_withdrawn_from_what_lands_later_too(two_batches: Daemon) -> None:
    daemon = two_batches
    withdrawal.withdraw(daemon.deployment, withdrawal.Withdrawal("b1", "b1.jsonl:1", "a leaked key"))
    land(daemon.settings, "b3.jsonl", some_rows(14, 0, 15))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b3")
    assert daemon.statuses("b3") == ["accepted", "withdrawn", "accepted"]


def test_a_withdrawn_batch_is_left_out_its_duplicates_come_back_and_it_can_be_restored(two_batches: Daemon) -> None:
    daemon = two_batches
    withdrawal.withdraw(daemon.deployment, withdrawal.Withdrawal("b1", None, "a claim of its owner"))
    assert daemon.left_out() == {"b1": "gated (batch_withdrawn): it was withdrawn: a claim of its owner"}
    assert daemon.statuses("b2")[2] == "accepted"
    rows = open_storage(daemon.settings).tables.read("decisions", Partition("b1")).frame
    assert rows.height == 5
    assert set(rows["reason"]) == {"batch_withdrawn"}
    back = withdrawal.Withdrawal("b1", None, "the claim was dropped", is_withdrawn=False)
    restored = withdrawal.withdraw(daemon.deployment, back)
    assert daemon.left_out() == {}
    assert restored.version == versions.find_version(open_storage(daemon.settings), "latest").version
    assert daemon.statuses("b2")[2] == "duplicate"
    # The same content as before all this, so the same version, and the history of what lay between.
    assert len(daemon.kept()) == 2
    record = open_storage(daemon.settings).files.read_json("withdrawals.json")
    assert [(entry["is_withdrawn"], entry["reason"]) for entry in record] == [
        (True, "a claim of its owner"),
        (False, "the claim was dropped"),
    ]


def test_when_every_batch_is_withdrawn_an_empty_dataset_is_published(two_batches: Daemon) -> None:
    daemon = two_batches
    for batch in ("b1", "b2"):
        withdrawal.withdraw(daemon.deployment, withdrawal.Withdrawal(batch, None, "a claim"))
    storage = open_storage(daemon.settings)
    manifest = versions.read_manifest(storage, versions.find_version(storage, "latest").version)
    assert manifest["batches"] == []


def test_what_is_not_there_cannot_be_withdrawn(two_batches: Daemon) -> None:
    faults = {
        "there is no batch 'nope'": withdrawal.Withdrawal("nope", None, "r"),
        "b1 is not withdrawn: nothing to take back": withdrawal.Withdrawal("b1", None, "r", is_withdrawn=False),
        "has no readable row 'b1.jsonl:99'": withdrawal.Withdrawal("b1", "b1.jsonl:99", "r"),
        "cannot be used": withdrawal.Withdrawal("../b1", None, "r"),
    }
    for why, what in faults.items():
        with pytest.raises((RunError, ValueError), match=why):
            withdrawal.withdraw(two_batches.deployment, what)
    assert not open_storage(two_batches.settings).files.exists("withdrawals.json")
