"""automation: the landing zone's sensor, screening anew, the nightly job; on tiny models and a real instance."""

import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._daemon.types import DaemonHeartbeat

from qaq_pipeline.automation import nightly, unattended
from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import RuntimeSettings, Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.ingest import landing
from qaq_pipeline.orchestration.jobs import CURATING
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import refresh, registration, status, withdrawal
from qaq_pipeline.runs.job_runs import Events, RunError
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline.storage.tables import Tables
from qaq_pipeline_tests.conftest import SAMPLES, LockHolder, delivered_rows, write_jsonl

STAGES = PIPELINE.jobs(*CURATING)

SettingsFor = Callable[..., Settings]


class Daemon:
    """Evaluates sensors and runs what they ask for, as Dagster's daemon does."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursors: dict[str, str | None] = {}
        self.run_keys: set[str | None] = set()
        self.use(settings)

    def use(self, settings: Settings) -> None:
        self.settings = settings
        self.defs = build_defs(settings)

    def look(self, name: str) -> dg.SensorResult:
        """One look of a sensor, of which nothing comes: the daemon dies."""
        sensor = self.defs.resolve_sensor_def(name)
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursors.get(name), repository_def=self.defs.get_repository_def()
        )
        result = sensor(context)
        assert isinstance(result, dg.SensorResult)
        return result

    def tick(self, name: str) -> dg.SensorResult:
        """One look of a sensor; partitions are added, and runs with a new key run."""
        result = self.look(name)
        if result.cursor is not None:
            self.cursors[name] = result.cursor
        for request in result.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        for request in result.run_requests or []:
            if request.run_key is None or request.run_key not in self.run_keys:
                self.run_keys |= {request.run_key} - {None}
                [asset] = {"landing_zone": ["raw_data"], "screening_anew": ["screened_data"]}[name]
                self.materialise(asset, partition=request.partition_key, tags=dict(request.tags))
        return result

    def materialise(self, *assets: str, partition: str | None, tags: dict[str, str] | None = None) -> bool:
        [job] = [name for name, of_job in STAGES.items() if set(assets) <= set(of_job)]
        return (
            self.defs.resolve_job_def(job)
            .execute_in_process(
                instance=self.instance,
                partition_key=partition,
                asset_selection=[dg.AssetKey(asset) for asset in assets],
                tags=tags,
                raise_on_error=False,
            )
            .success
        )

    def curate(self, batch: str) -> None:
        """What the conditions run of a batch whose raw_data is there."""
        assert self.materialise("signatures", "screened_data", partition=batch)
        for model in ("strong", "weak"):
            key = dg.MultiPartitionKey({"batch": batch, "model": model})
            assert self.materialise("logprobs", "rmi_scores", partition=key)
        assert self.materialise("disagreement_scores", "decisions", "selected_subset", partition=batch)

    def events(self, asset: str) -> int:
        return len(self.instance.fetch_materializations(dg.AssetKey(asset), limit=100).records)


def zone_of(settings: Settings) -> Path:
    return Path(settings.landing_url)


def land(settings: Settings, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    return write_jsonl(zone_of(settings) / name, delivered_rows() if rows is None else rows)


def some_rows(*numbers: int) -> list[dict[str, str]]:
    return [{"query": SAMPLES[number][0], "response": SAMPLES[number][1]} for number in numbers]


# --- the landing zone ----------------------------------------------------------------------------------------------


def test_a_delivery_becomes_a_batch_when_it_is_complete_and_once(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "week-1.jsonl")
    first = daemon.tick("landing_zone")
    assert not first.run_requests
    assert "1 not complete yet" in str(first.skip_reason)
    [request] = daemon.tick("landing_zone").run_requests or []
    assert request.partition_key == "week-1"
    assert instance.get_dynamic_partitions("batch") == ["week-1"]
    assert open_storage(settings).tables.read("raw_data", Partition("week-1")).frame.height == 20
    assert not daemon.tick("landing_zone").run_requests
    assert daemon.events("raw_data") == 1


def test_a_corrected_delivery_is_read_again_and_a_touched_one_leaves_everything_as_it_was(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    path = land(settings, "week-1.jsonl")
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    os.utime(path, (1, 1))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert len(daemon.run_keys) == 2
    assert daemon.events("raw_data") == 1
    [observed] = instance.fetch_observations(dg.AssetKey("raw_data"), limit=5).records
    assert observed.asset_observation is not None
    assert observed.asset_observation.description == "Made anew, with the same result."
    land(settings, "week-1.jsonl", some_rows(0, 1, 2))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert daemon.events("raw_data") == 2
    assert open_storage(settings).tables.read("raw_data", Partition("week-1")).frame.height == 3


def test_a_lost_cursor_repeats_no_run(settings_for: SettingsFor, instance: dg.DagsterInstance) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "week-1.jsonl")
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.cursors.clear()
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert daemon.events("raw_data") == len(daemon.run_keys) == 1


def test_a_sensor_that_died_before_its_cursor_was_stored_loses_and_repeats_nothing(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "week-1.jsonl")
    daemon.tick("landing_zone")
    [lost] = daemon.look("landing_zone").run_requests or []
    [request] = daemon.tick("landing_zone").run_requests or []
    assert daemon.run_keys == {request.run_key} == {lost.run_key}
    assert daemon.events("raw_data") == 1


def test_hostile_names_are_refused_visibly_once_and_never_fail_a_tick(
    settings_for: SettingsFor, instance: dg.DagsterInstance, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    for name in ("x|y.jsonl", "[x].jsonl", "a b.jsonl", "w.json", "w.jsonl"):
        land(settings, name)
    land(settings, "good.jsonl")
    alerts_by_tick = []
    for _ in range(3):
        caplog.clear()
        daemon.tick("landing_zone")
        alerts_by_tick.append([r.message for r in caplog.records if r.name == "qaq_pipeline.alerts"])
    assert instance.get_dynamic_partitions("batch") == ["good"]
    assert [len(alerts) for alerts in alerts_by_tick] == [1, 0, 0]
    assert "x|y.jsonl is refused: batch name 'x|y' cannot be used" in alerts_by_tick[0][0]
    assert "Refused in the landing zone: 5" in alerts_by_tick[0][0]
    assert set(status.refused_deliveries(settings)) == {"x|y.jsonl", "[x].jsonl", "a b.jsonl", "w.json", "w.jsonl"}


def test_a_zone_that_cannot_be_reached_is_said_and_keeps_the_cursor(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    daemon = Daemon(settings_for(landing={"url": "nonsense://zone"}), instance)
    daemon.cursors["landing_zone"] = "as it was"
    result = daemon.tick("landing_zone")
    assert "'nonsense://zone' cannot be looked into" in str(result.skip_reason)
    assert result.cursor == "as it was"


def test_a_file_that_cannot_be_read_gates_its_batch_and_a_mended_delivery_is_curated(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    write_jsonl(zone_of(settings) / "week-1" / "good.jsonl", delivered_rows())
    broken = zone_of(settings) / "week-1" / "bad.parquet"
    broken.write_bytes(b"PAR1 torn")
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("week-1")
    decisions = open_storage(settings).tables.read("decisions", Partition("week-1")).frame
    assert decisions.height == 21
    assert set(decisions["decision"]) == {"batch_gated"}
    assert "bad.parquet" in status.batches_left_out(settings, instance)["week-1"]
    broken.unlink()
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("week-1")
    assert status.batches_left_out(settings, instance) == {}


def test_a_batch_by_hand_takes_the_place_of_the_landed_one_and_the_other_way_round(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "week-1.jsonl", some_rows(0, 1))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    registration.register(settings, instance, "week-1", [delivered], None)
    assert daemon.materialise("raw_data", partition="week-1")
    assert open_storage(settings).tables.read("raw_data", Partition("week-1")).frame.height == 20
    land(settings, "week-1.jsonl", some_rows(0, 1, 2))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert open_storage(settings).tables.read("raw_data", Partition("week-1")).frame.height == 3


# --- screening anew ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_batches(settings_for: SettingsFor, instance: dg.DagsterInstance) -> Daemon:
    """Two published batches; row 3 of the second repeats row 3 of the first."""
    settings = settings_for(gates={"max_rejected_share": None})
    daemon = Daemon(settings, instance)
    land(settings, "b1.jsonl", some_rows(0, 1, 3, 4, 5))
    land(settings, "b2.jsonl", some_rows(10, 11, 3, 12, 13))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1"), daemon.curate("b2")
    assert daemon.materialise("curated_dataset", partition=None)
    daemon.tick("screening_anew")
    assert statuses(daemon, "b2")[2] == "duplicate"
    return daemon


def statuses(daemon: Daemon, batch: str) -> list[str]:
    return open_storage(daemon.settings).tables.read("screened_data", Partition(batch)).frame["status"].to_list()


def test_a_newer_batch_is_screened_anew_when_an_older_one_changed(two_batches: Daemon) -> None:
    daemon = two_batches
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 4, 5))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1")
    assert (
        "screened against another state of batch b1" in status.batches_left_out(daemon.settings, daemon.instance)["b2"]
    )
    [request] = daemon.tick("screening_anew").run_requests or []
    assert request.partition_key == "b2"
    assert statuses(daemon, "b2")[2] == "accepted"
    assert daemon.events("screened_data") == 4
    assert not daemon.tick("screening_anew").run_requests


def test_screening_anew_that_finds_the_same_lets_nothing_follow_and_the_batch_is_whole_again(
    two_batches: Daemon,
) -> None:
    daemon = two_batches
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 3, 4, 5, 6))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1")
    assert set(status.batches_left_out(daemon.settings, daemon.instance)) == {"b2"}
    events = daemon.events("screened_data")
    daemon.tick("screening_anew")
    assert daemon.events("screened_data") == events
    assert status.batches_left_out(daemon.settings, daemon.instance) == {}


def test_a_screening_anew_that_failed_is_tried_again_and_not_for_ever(two_batches: Daemon) -> None:
    daemon = two_batches
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 4, 5))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1")
    signatures = Path(open_storage(daemon.settings).files.path("signatures", "b2", "table.parquet"))
    kept = signatures.read_bytes()
    signatures.write_bytes(kept[:-40] + bytes(40))
    review_of = [len(daemon.tick("screening_anew").run_requests or []) for _ in range(5)]
    assert review_of == [1, 1, 1, 0, 0]


def test_newer_batches_are_screened_anew_when_a_correction_is_taken_back(two_batches: Daemon) -> None:
    daemon = two_batches
    found = []
    for rows in (some_rows(0, 1, 4, 5), some_rows(0, 1, 3, 4, 5), some_rows(0, 1, 4, 5)):
        land(daemon.settings, "b1.jsonl", rows)
        daemon.tick("landing_zone"), daemon.tick("landing_zone")
        daemon.curate("b1")
        daemon.tick("screening_anew")
        found.append(statuses(daemon, "b2")[2])
    assert found == ["accepted", "duplicate", "accepted"]


def test_a_process_that_died_between_table_and_event_is_made_up_for(
    settings_for: SettingsFor, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "b1.jsonl")
    write = Tables.write

    def write_and_die(*arguments: Any) -> None:
        write(*arguments)
        raise RuntimeError("the process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "write", write_and_die)
        daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert daemon.events("raw_data") == 0
    assert daemon.materialise("raw_data", partition="b1", tags={"qaq/delivery": "b1.jsonl"})
    assert daemon.events("raw_data") == 1


# --- every night ---------------------------------------------------------------------------------------------------


def night(daemon: Daemon) -> bool:
    job = daemon.defs.resolve_job_def("refresh")
    return job.execute_in_process(instance=daemon.instance, raise_on_error=False).success


def kept(daemon: Daemon) -> list[str]:
    return versions.kept_versions(open_storage(daemon.settings))


def test_the_nightly_job_publishes_nothing_where_nothing_changed(two_batches: Daemon) -> None:
    before = kept(two_batches), two_batches.events("curated_dataset"), two_batches.events("raw_data")
    assert night(two_batches)
    assert (kept(two_batches), two_batches.events("curated_dataset"), two_batches.events("raw_data")) == before


def test_the_nightly_job_ends_what_was_left_undone_and_publishes_it(two_batches: Daemon) -> None:
    daemon = two_batches
    land(daemon.settings, "b3.jsonl", some_rows(14, 15, 16, 17))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert night(daemon)
    assert len(kept(daemon)) == 2
    assert status.batches_left_out(daemon.settings, daemon.instance) == {}


def test_the_nightly_job_follows_changed_settings_and_scores_nothing_for_them(
    two_batches: Daemon, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = two_batches
    daemon.use(settings_for(gates={"max_rejected_share": None}, ranking={"num_strata": 1, "min_rows_per_stratum": 2}))
    with monkeypatch.context() as patch:
        patch.setattr("qaq_pipeline.lm.causal_lm.loaders", lambda *_, **__: pytest.fail("a model was loaded"))
        assert night(daemon)
    ranks = open_storage(daemon.settings).tables.read("disagreement_scores", Partition("b1")).frame
    strata = to_long(ranks, "ranks")["num_strata"]
    assert set(strata) == {1}
    assert len(kept(daemon)) == 2


def test_the_nightly_job_tries_the_others_where_a_batch_fails_and_says_which(two_batches: Daemon) -> None:
    daemon = two_batches
    path = land(daemon.settings, "bad.jsonl", some_rows(18))
    land(daemon.settings, "fine.jsonl", some_rows(14, 15, 16))
    daemon.tick("landing_zone")
    storage = open_storage(daemon.settings)
    [landed] = [
        one
        for one in landing.look(daemon.settings.landing_url, daemon.settings.landing).deliveries
        if one.batch == "bad"
    ]
    landing.announce(storage, daemon.settings.landing_url, landed)
    path.unlink()
    daemon.instance.add_dynamic_partitions("batch", ["bad"])
    daemon.tick("landing_zone")
    with pytest.raises(RunError, match=r"not refreshed:\nbatch bad: .*gone from the landing zone"):
        refresh.refresh_all(daemon.settings, daemon.instance)
    assert set(status.batches_left_out(daemon.settings, daemon.instance)) == {"bad"}
    assert len(kept(daemon)) == 2
    assert not night(daemon)


def test_a_calibration_or_a_page_that_fails_is_named_and_leaves_no_batch_out_of_date(
    two_batches: Daemon, settings_for: SettingsFor
) -> None:
    daemon = two_batches
    sections = {"calibration": {"enabled": True}, "reports": {"pages": True, "pictures": False}}
    daemon.use(settings_for(gates={"max_rejected_share": None}, **sections))
    root = Path(daemon.settings.storage_root)
    (root / "planted_rows").write_text("no table can be written below a file")
    (root / "reports/b1/report.html").mkdir(parents=True)
    # Of the older batch a row is gone: when the newer one could not be calibrated, it is screened anew all the same.
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 4, 5))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    notices: list[str] = []
    done = refresh.refresh_all(daemon.settings, daemon.instance, Events(on_notice=notices.append))
    assert statuses(daemon, "b2")[2] == "accepted"
    assert done.failed == {}
    assert done.version in kept(daemon)
    assert status.batches_left_out(daemon.settings, daemon.instance) == {}
    causes = {
        "the calibration of batch b1 was not made": "plant_defects of b1 failed",
        "the calibration of batch b2 was not made": "plant_defects of b2 failed",
        "the audit page of batch b1 was not made": "report_batch of b1 failed",
    }
    assert {tuple(notice.split(": ")[:2]) for notice in notices} == set(causes.items())
    for what in causes:
        assert what in done.sentence
    assert night(daemon)
    failed = daemon.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))
    assert {run.job_name for run in failed} == {"plant_defects", "report_batch"}


# --- withdrawals ---------------------------------------------------------------------------------------------------


def published_text(daemon: Daemon) -> str:
    """All that the newest version exports."""
    storage = open_storage(daemon.settings)
    folder = Path(storage.files.path(versions.FOLDER, versions.latest(storage) or ""))
    return "".join(path.read_text() for path in folder.rglob("*.json*"))


def everything_selected(daemon: Daemon, settings_for: SettingsFor) -> None:
    """The daemon's batches, decided and published so that every row that is scored is selected."""
    all_rows = [{"name": "all", "strategy": "diff_high", "budget": {"fraction": 1.0}}]
    daemon.use(settings_for(gates={"max_rejected_share": None}, selections=all_rows))
    refresh.refresh_all(daemon.settings, daemon.instance)


def test_a_withdrawn_row_goes_wherever_its_text_stands(two_batches: Daemon, settings_for: SettingsFor) -> None:
    daemon = two_batches
    everything_selected(daemon, settings_for)
    assert json.dumps(SAMPLES[3][0])[1:-1] in published_text(daemon)
    what = withdrawal.Withdrawal("b1", "b1.jsonl:3", "its licence forbids training")
    done = withdrawal.withdraw(daemon.settings, daemon.instance, what)
    assert done.failed == {}
    assert json.dumps(SAMPLES[3][0])[1:-1] not in published_text(daemon)
    for batch in ("b1", "b2"):
        assert statuses(daemon, batch)[2] == "withdrawn"
        decision = open_storage(daemon.settings).tables.read("decisions", Partition(batch)).frame.row(2, named=True)
        assert (decision["decision"], decision["reason"]) == ("withdrawn", "row_withdrawn")
        assert decision["explanation"].endswith(": its licence forbids training.")
    assert status.batches_left_out(daemon.settings, daemon.instance) == {}
    assert versions.published_withdrawn(open_storage(daemon.settings)) == []


def test_what_was_withdrawn_is_published_no_more_though_its_batch_cannot_be_screened_again(
    two_batches: Daemon, settings_for: SettingsFor, lock_holder: LockHolder
) -> None:
    daemon = two_batches
    everything_selected(daemon, settings_for)
    holder = lock_holder(daemon.settings.home / "locks", "batch", "b1")
    what = withdrawal.Withdrawal("b1", "b1.jsonl:1", "a leaked key")
    impatient = daemon.settings.model_copy(update={"runtime": RuntimeSettings(lock_timeout_seconds=0.1)})
    with pytest.raises(RunError, match=r"not refreshed:\nbatch b1: batch/b1 is being written"):
        withdrawal.withdraw(impatient, daemon.instance, what)
    assert json.dumps(SAMPLES[0][0])[1:-1] not in published_text(daemon)
    assert (
        "withdrawals changed since it was screened" in status.batches_left_out(daemon.settings, daemon.instance)["b1"]
    )
    holder.kill()
    holder.wait()
    refresh.refresh_all(daemon.settings, daemon.instance)
    assert status.batches_left_out(daemon.settings, daemon.instance) == {}


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
    withdrawal.withdraw(settings, instance, withdrawal.Withdrawal("b1", None, "a claim"))
    assert json.dumps(SAMPLES[0][0])[1:-1] not in published_text(daemon)
    assert night(daemon)


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
    assert withdrawal.near_rows(settings, instance, "b1", "b1.jsonl:1") == ["b1/b1.jsonl:2.0"]
    withdrawal.withdraw(settings, instance, withdrawal.Withdrawal("b1", "b1.jsonl:1", "a leaked key"))
    assert statuses(daemon, "b1") == ["withdrawn", "accepted"]


def test_a_withdrawn_row_is_withdrawn_from_what_lands_later_too(two_batches: Daemon) -> None:
    daemon = two_batches
    withdrawal.withdraw(daemon.settings, daemon.instance, withdrawal.Withdrawal("b1", "b1.jsonl:1", "a leaked key"))
    land(daemon.settings, "b3.jsonl", some_rows(14, 0, 15))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b3")
    assert statuses(daemon, "b3") == ["accepted", "withdrawn", "accepted"]


def test_a_withdrawn_batch_is_left_out_its_duplicates_come_back_and_it_can_be_restored(two_batches: Daemon) -> None:
    daemon = two_batches
    withdrawal.withdraw(daemon.settings, daemon.instance, withdrawal.Withdrawal("b1", None, "a claim of its owner"))
    left_out = status.batches_left_out(daemon.settings, daemon.instance)
    assert left_out == {"b1": "gated (batch_withdrawn): it was withdrawn: a claim of its owner"}
    assert statuses(daemon, "b2")[2] == "accepted"
    rows = open_storage(daemon.settings).tables.read("decisions", Partition("b1")).frame
    assert rows.height == 5
    assert set(rows["reason"]) == {"batch_withdrawn"}
    back = withdrawal.Withdrawal("b1", None, "the claim was dropped", is_withdrawn=False)
    withdrawal.withdraw(daemon.settings, daemon.instance, back)
    assert status.batches_left_out(daemon.settings, daemon.instance) == {}
    assert statuses(daemon, "b2")[2] == "duplicate"
    # The same content as before all this, so the same version, and the history of what lay between.
    assert len(kept(daemon)) == 2
    record = open_storage(daemon.settings).files.read_json("withdrawals.json")
    assert [(entry["is_withdrawn"], entry["reason"]) for entry in record] == [
        (True, "a claim of its owner"),
        (False, "the claim was dropped"),
    ]


def test_when_every_batch_is_withdrawn_an_empty_dataset_is_published(two_batches: Daemon) -> None:
    daemon = two_batches
    for batch in ("b1", "b2"):
        withdrawal.withdraw(daemon.settings, daemon.instance, withdrawal.Withdrawal(batch, None, "a claim"))
    storage = open_storage(daemon.settings)
    manifest = storage.files.read_json(versions.FOLDER, versions.latest(storage) or "", "manifest.json")
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
            withdrawal.withdraw(two_batches.settings, two_batches.instance, what)
    assert not open_storage(two_batches.settings).files.exists("withdrawals.json")


# --- what runs from the start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_started", [False, True])
def test_sensors_and_schedule_start_where_the_settings_say_so_and_state_it(
    settings_for: SettingsFor, is_started: bool
) -> None:
    defs = build_defs(settings_for(automation={"started": is_started}))
    repository = defs.get_repository_def()
    parts = [*repository.sensor_defs, *repository.schedule_defs]
    always = {part.name for part in parts if part.default_status.value == "RUNNING"} - {"alert_of_failed_run"}
    assert "dead_runs" in always
    mine = [part for part in parts if part.name not in ("alert_of_failed_run", "dead_runs")]
    assert {part.name for part in mine} == {"landing_zone", "curation", "screening_anew", "nightly_refresh"}
    assert {part.default_status.value == "RUNNING" for part in mine} == {is_started}
    assert {"Runs from the start" in (part.description or "") for part in mine} == {is_started}


def test_a_cron_that_is_none_is_named_with_its_field(settings_for: SettingsFor) -> None:
    with pytest.raises(SettingsError, match=r"automation.refresh_cron: 'every night' is no cron"):
        build_defs(settings_for(automation={"refresh_cron": "every night"}))


# --- what a person is told -----------------------------------------------------------------------------------------


def test_a_person_is_told_whether_the_daemon_runs_and_how_the_last_night_ended(instance: dg.DagsterInstance) -> None:
    now = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
    daemon, night = unattended.unattended(instance, now)
    assert "No daemon ever ran here" in daemon
    assert night == "No nightly refresh has run yet."

    instance.add_daemon_heartbeat(DaemonHeartbeat(now.timestamp() - 40, "SENSOR", "id", []))
    assert unattended.unattended(instance, now)[0] == "The daemon runs."
    later = unattended.unattended(instance, now + timedelta(hours=3))[0]
    assert (
        later == "The daemon was last seen on 2026-11-25 11:59 UTC: nothing is curated by itself. `qaq ui` starts it."
    )


def test_a_person_is_told_of_the_newest_night(settings_for: SettingsFor, instance: dg.DagsterInstance) -> None:
    job = build_defs(settings_for()).resolve_job_def(nightly.NIGHTLY)
    assert job.execute_in_process(instance=instance).success
    told = unattended.unattended(instance, datetime.now(UTC))[1]
    assert re.fullmatch(r"Last nightly refresh: SUCCESS, \d{4}-\d\d-\d\d \d\d:\d\d UTC\.", told)
