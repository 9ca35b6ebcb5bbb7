"""automation: the landing zone's sensor, repeated screening, the nightly job; on tiny models and a real instance."""

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
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.ingest import landing
from qaq_pipeline.runs import refresh, registration, status
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import Events, RunError
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline.storage.tables import Tables
from qaq_pipeline_tests.conftest import delivered_rows, write_jsonl
from qaq_pipeline_tests.support.daemon import Daemon, land, some_rows, zone_of
from qaq_pipeline_tests.support.sentences import Check

SettingsFor = Callable[..., Settings]


# --- the landing zone ----------------------------------------------------------------------------------------------


def test_a_delivery_becomes_a_batch_when_it_is_complete_and_once(
    settings_for: SettingsFor, instance: dg.DagsterInstance, check_sentence: Check
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "week-1.jsonl")
    first = daemon.tick("landing_zone")
    assert not first.run_requests
    check_sentence(str(first.skip_reason))
    [request] = daemon.tick("landing_zone").run_requests or []
    assert request.partition_key == "week-1"
    assert instance.get_dynamic_partitions("batch") == ["week-1"]
    assert open_storage(settings).tables.read("raw_data", Partition("week-1")).frame.height == 20
    assert not daemon.tick("landing_zone").run_requests
    assert daemon.events("raw_data") == 1


def test_a_corrected_delivery_is_read_again_and_a_touched_one_leaves_everything_as_it_was(
    settings_for: SettingsFor, instance: dg.DagsterInstance, check_sentence: Check
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
    check_sentence(observed.asset_observation.description)
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
    settings_for: SettingsFor, instance: dg.DagsterInstance, caplog: pytest.LogCaptureFixture, check_sentence: Check
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
    check_sentence(alerts_by_tick[0][0])
    check_sentence(alerts_by_tick[0][0])
    refused = landing.read_refused(open_storage(settings))
    assert set(refused) == {"x|y.jsonl", "[x].jsonl", "a b.jsonl", "w.json", "w.jsonl"}


def test_a_zone_that_cannot_be_reached_is_said_and_keeps_the_cursor(
    settings_for: SettingsFor, instance: dg.DagsterInstance, check_sentence: Check
) -> None:
    daemon = Daemon(settings_for(landing={"url": "nonsense://zone"}), instance)
    daemon.cursors["landing_zone"] = "as it was"
    result = daemon.tick("landing_zone")
    check_sentence(str(result.skip_reason))
    assert result.cursor == "as it was"


def test_a_file_that_cannot_be_read_gates_its_batch_and_a_corrected_delivery_is_curated(
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
    assert "bad.parquet" in status.batches_left_out(Deployment(settings, instance))["week-1"]
    broken.unlink()
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("week-1")
    assert status.batches_left_out(Deployment(settings, instance)) == {}


def test_a_batch_by_hand_takes_the_place_of_the_landed_one_and_the_other_way_round(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for()
    daemon = Daemon(settings, instance)
    land(settings, "week-1.jsonl", some_rows(0, 1))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    registration.register(Deployment(settings, instance), "week-1", [delivered], None, replaces=True)
    assert daemon.materialise("raw_data", partition="week-1")
    assert open_storage(settings).tables.read("raw_data", Partition("week-1")).frame.height == 20
    land(settings, "week-1.jsonl", some_rows(0, 1, 2))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert open_storage(settings).tables.read("raw_data", Partition("week-1")).frame.height == 3


# --- repeated screening --------------------------------------------------------------------------------------------


def test_a_newer_batch_is_screened_again_when_an_older_one_changed(two_batches: Daemon, check_sentence: Check) -> None:
    daemon = two_batches
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 4, 5))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1")
    check_sentence(daemon.left_out()["b2"])
    [request] = daemon.tick("rescreening").run_requests or []
    assert request.partition_key == "b2"
    assert daemon.statuses("b2")[2] == "accepted"
    assert daemon.events("screened_data") == 4
    assert not daemon.tick("rescreening").run_requests


def test_screening_again_that_finds_the_same_lets_nothing_follow_and_the_batch_is_whole_again(
    two_batches: Daemon,
) -> None:
    daemon = two_batches
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 3, 4, 5, 6))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1")
    assert set(daemon.left_out()) == {"b2"}
    events = daemon.events("screened_data")
    daemon.tick("rescreening")
    assert daemon.events("screened_data") == events
    assert daemon.left_out() == {}


def test_a_screening_again_that_failed_is_tried_again_and_not_for_ever(two_batches: Daemon) -> None:
    daemon = two_batches
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 4, 5))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    daemon.curate("b1")
    signatures = Path(open_storage(daemon.settings).files.path("signatures", "b2", "table.parquet"))
    kept = signatures.read_bytes()
    signatures.write_bytes(kept[:-40] + bytes(40))
    review_of = [len(daemon.tick("rescreening").run_requests or []) for _ in range(5)]
    assert review_of == [1, 1, 1, 0, 0]


def test_newer_batches_are_screened_again_when_a_correction_is_taken_back(two_batches: Daemon) -> None:
    daemon = two_batches
    found = []
    for rows in (some_rows(0, 1, 4, 5), some_rows(0, 1, 3, 4, 5), some_rows(0, 1, 4, 5)):
        land(daemon.settings, "b1.jsonl", rows)
        daemon.tick("landing_zone"), daemon.tick("landing_zone")
        daemon.curate("b1")
        daemon.tick("rescreening")
        found.append(daemon.statuses("b2")[2])
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


def test_the_nightly_job_publishes_nothing_where_nothing_changed(two_batches: Daemon) -> None:
    before = two_batches.kept(), two_batches.events("curated_dataset"), two_batches.events("raw_data")
    assert two_batches.night()
    assert (two_batches.kept(), two_batches.events("curated_dataset"), two_batches.events("raw_data")) == before


def test_the_nightly_job_ends_what_was_left_undone_and_publishes_it(two_batches: Daemon) -> None:
    daemon = two_batches
    land(daemon.settings, "b3.jsonl", some_rows(14, 15, 16, 17))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    assert daemon.night()
    assert len(daemon.kept()) == 2
    assert daemon.left_out() == {}


def test_the_nightly_job_follows_changed_settings_and_scores_nothing_for_them(
    two_batches: Daemon, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = two_batches
    daemon.use(settings_for(gates={"max_rejected_share": None}, ranking={"num_strata": 1, "min_rows_per_stratum": 2}))
    with monkeypatch.context() as patch:
        patch.setattr("qaq_pipeline.lm.causal_lm.loaders", lambda *_, **__: pytest.fail("a model was loaded"))
        assert daemon.night()
    ranks = open_storage(daemon.settings).tables.read("disagreement_scores", Partition("b1")).frame
    strata = to_long(ranks, "ranks")["num_strata"]
    assert set(strata) == {1}
    assert len(daemon.kept()) == 2


def test_the_nightly_job_tries_the_others_where_a_batch_fails_and_says_which(
    two_batches: Daemon, check_sentence: Check
) -> None:
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
    with pytest.raises(RunError) as error:
        refresh.refresh_all(daemon.deployment)
    check_sentence(error.value)
    assert set(daemon.left_out()) == {"bad"}
    assert len(daemon.kept()) == 2
    assert not daemon.night()


@pytest.mark.slow
def test_a_calibration_or_a_page_that_fails_is_named_and_leaves_no_batch_out_of_date(
    two_batches: Daemon, settings_for: SettingsFor
) -> None:
    daemon = two_batches
    sections = {"calibration": {"enabled": True}, "reports": {"pages": True, "plots": False}}
    daemon.use(settings_for(gates={"max_rejected_share": None}, **sections))
    root = Path(daemon.settings.storage_root)
    (root / "calibration").write_text("no table can be written below a file")
    (root / "reports/b1/report.html").mkdir(parents=True)
    # The older batch lost a row: the newer one is screened again even if its calibration fails.
    land(daemon.settings, "b1.jsonl", some_rows(0, 1, 4, 5))
    daemon.tick("landing_zone"), daemon.tick("landing_zone")
    notices: list[str] = []
    done = refresh.refresh_all(daemon.deployment, Events(on_notice=notices.append))
    assert daemon.statuses("b2")[2] == "accepted"
    assert done.failed == {}
    assert done.version in daemon.kept()
    assert daemon.left_out() == {}
    causes = {
        "the calibration of batch b1 was not made": "calibrate_batch of b1 failed",
        "the calibration of batch b2 was not made": "calibrate_batch of b2 failed",
        "the audit page of batch b1 was not made": "report_batch of b1 failed",
    }
    assert {tuple(notice.split(": ")[:2]) for notice in notices} == set(causes.items())
    for what in causes:
        assert what in done.sentence
    assert daemon.night()
    failed = daemon.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))
    assert {run.job_name for run in failed} == {"calibrate_batch", "report_batch"}


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
    assert {part.name for part in mine} == {"landing_zone", "curation", "rescreening", "nightly_refresh"}
    assert {part.default_status.value == "RUNNING" for part in mine} == {is_started}
    assert {"Runs from the start" in (part.description or "") for part in mine} == {is_started}


def test_a_cron_that_is_none_is_named_with_its_field(settings_for: SettingsFor, check_sentence: Check) -> None:
    with pytest.raises(SettingsError) as error:
        build_defs(settings_for(automation={"refresh_cron": "every night"}))
    check_sentence(error.value)


# --- messages ------------------------------------------------------------------------------------------------------


def test_a_person_is_told_whether_the_daemon_runs_and_how_the_last_night_ended(
    instance: dg.DagsterInstance, check_sentence: Check
) -> None:
    now = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
    daemon, night = unattended.unattended(instance, now)
    assert "No daemon has run here" in daemon
    check_sentence(night)

    instance.add_daemon_heartbeat(DaemonHeartbeat(now.timestamp() - 40, "SENSOR", "id", []))
    assert unattended.unattended(instance, now)[0] == "The daemon runs."
    later = unattended.unattended(instance, now + timedelta(hours=3))[0]
    check_sentence(later)


def test_a_person_is_told_of_the_newest_night(settings_for: SettingsFor, instance: dg.DagsterInstance) -> None:
    job = build_defs(settings_for()).resolve_job_def(nightly.NIGHTLY)
    assert job.execute_in_process(instance=instance).success
    told = unattended.unattended(instance, datetime.now(UTC))[1]
    assert re.fullmatch(r"Last nightly refresh: SUCCESS, \d{4}-\d\d-\d\d \d\d:\d\d UTC\.", told)
