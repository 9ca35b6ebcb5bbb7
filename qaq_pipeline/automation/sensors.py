"""What runs without a hand: landing, the evaluation of conditions, screening anew, ending dead runs, the nightly job.

Belongs here: when something is run. Does not belong here: what is out of date (`recuration`), when a delivery is
complete (`landing`), the assets' conditions (`conditions`), and what is done (`assets`, `renewal`).
"""

import json
from datetime import UTC, datetime

import dagster as dg

from qaq_pipeline.config.settings import Settings, SettingsError
from qaq_pipeline.freshness import staleness
from qaq_pipeline.ingest import landing
from qaq_pipeline.ingest.landing import Landed, Seen
from qaq_pipeline.orchestration import alerts, liveness
from qaq_pipeline.orchestration.alerts import Alert
from qaq_pipeline.orchestration.jobs import present
from qaq_pipeline.orchestration.results import BATCHES, LANDED_TAG, RESCREENING_TAG
from qaq_pipeline.runs import refresh
from qaq_pipeline.runs.job_runs import Events, lock_directory
from qaq_pipeline.storage.storage import open_storage

NIGHTLY = "recurate"
_LOOK_FOR_DEAD_S = 30
_HEARTBEAT_PATIENCE_S = 120.0
"""A daemon gives a sign of life every 30 seconds."""
_MOST_BATCHES_A_TICK = 25
_MOST_TRIES = 3
_MOST_LINES = 20


def build_automation(settings: Settings) -> dg.Definitions:
    """Sensors, schedule and the nightly job; they run from the start where `automation.started` says so."""
    job = _build_nightly_job(settings)
    return dg.Definitions(
        jobs=[job],
        sensors=[
            _build_landing_sensor(settings),
            _build_curation_sensor(settings),
            _build_screening_sensor(settings),
            _build_dead_runs_sensor(),
        ],
        schedules=[_build_nightly_schedule(settings, job)],
    )


def _status(settings: Settings) -> dg.DefaultSensorStatus:
    return dg.DefaultSensorStatus.RUNNING if settings.automation.started else dg.DefaultSensorStatus.STOPPED


def _stated(settings: Settings) -> str:
    return " Runs from the start (automation.started)." if settings.automation.started else ""


# --- the landing zone ------------------------------------------------------------------------------------------


def _build_landing_sensor(settings: Settings) -> dg.SensorDefinition:
    zone = settings.landing

    @dg.sensor(
        name="landing_zone",
        target=dg.AssetSelection.assets("raw_data"),
        minimum_interval_seconds=zone.interval_seconds,
        default_status=_status(settings),
        description=(
            f"Takes what lies complete in {settings.landing_url}: adds the batch and runs raw_data of it; the rest "
            f"follows by conditions. A folder or file is complete with {zone.marker}"
            f"{'' if zone.require_marker else ', or when it stays the same for two looks'}.{_stated(settings)}"
        ),
    )
    def landing_zone(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        storage, seen = open_storage(settings), Seen.parse(context.cursor)
        try:
            found = landing.look(settings.landing_url, zone)
        except landing.LandingError as error:
            context.log.warning(str(error))
            return dg.SensorResult(skip_reason=str(error), cursor=context.cursor)
        ready, now_seen = landing.complete(found, seen, zone)
        landing.record_refused(storage, found.refused)
        _report_refused(context, settings, {e: why for e, why in found.refused.items() if seen.refused.get(e) != why})
        requests = [
            _request(landed, run_key)
            for landed in ready
            if (run_key := landing.announce(storage, settings.landing_url, landed)) is not None
        ]
        waiting = f"{len(now_seen.waiting)} not complete yet, {len(found.refused)} refused"
        return dg.SensorResult(
            run_requests=requests,
            dynamic_partitions_requests=[BATCHES.build_add_request([one.batch for one in ready])] if ready else [],
            cursor=now_seen.dump(),
            skip_reason=None if requests else f"nothing new in {settings.landing_url}: {waiting}",
        )

    return landing_zone


def _request(landed: Landed, run_key: str) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        partition_key=landed.batch,
        asset_selection=[dg.AssetKey("raw_data")],
        tags={LANDED_TAG: landed.entry},
    )


def _report_refused(context: dg.SensorEvaluationContext, settings: Settings, refused: dict[str, str]) -> None:
    """In the tick's log, and as one alert; `qaq status` lists what lies refused."""
    lines = [f"{settings.landing_url}/{entry} is refused: {why}" for entry, why in refused.items()]
    for line in lines:
        context.log.warning(line)
    if lines:
        more = f"\nand {len(lines) - _MOST_LINES} more: `qaq status`" if len(lines) > _MOST_LINES else ""
        alert = Alert(
            f"Refused in the landing zone: {len(lines)}", "\n".join(lines[:_MOST_LINES]) + more, "delivery_refused"
        )
        for failure in alerts.send(alert, settings.alerts):
            context.log.error(failure)


# --- conditions ------------------------------------------------------------------------------------------------


def _build_curation_sensor(settings: Settings) -> dg.SensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        name="curation",
        target=dg.AssetSelection.all(),
        minimum_interval_seconds=settings.automation.interval_seconds,
        default_status=_status(settings),
        emit_backfills=False,  # A run for each batch: a backfill takes longer to start than most batches to run.
        description=f"Runs each asset when its automation condition says so.{_stated(settings)}",
    )


def _build_screening_sensor(settings: Settings) -> dg.SensorDefinition:
    screened_data = dg.AssetKey("screened_data")

    @dg.sensor(
        name="screening_anew",
        target=dg.AssetSelection.assets(screened_data),
        minimum_interval_seconds=settings.automation.interval_seconds,
        default_status=_status(settings),
        description=(
            "Screens a batch anew when an older one, in which its duplicates were looked for, is another now. Nothing "
            f"follows where the same is found.{_stated(settings)}"
        ),
    )
    def screening_anew(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        newest = [_newest_event(context.instance, asset) for asset in (screened_data, dg.AssetKey("decisions"))]
        position = json.dumps(newest)
        if position == context.cursor:
            return dg.SensorResult(skip_reason="no batch was screened or decided since the last look", cursor=position)
        storage = open_storage(settings)
        registered = context.instance.get_dynamic_partitions(str(BATCHES.name))
        review = staleness.Review(storage, registered, present(settings, storage))
        stale = {batch: state for batch in review.batches() if (state := review.screened_against(batch)) is not None}
        due = [batch for batch, state in stale.items() if _may_be_screened(context, batch, state)]
        requests = [
            dg.RunRequest(partition_key=batch, asset_selection=[screened_data], tags={RESCREENING_TAG: stale[batch]})
            for batch in due[:_MOST_BATCHES_A_TICK]
        ]
        waiting = f"waiting for {', '.join(stale)}" if stale else "every batch was screened against those that stand"
        return dg.SensorResult(
            run_requests=requests,
            cursor="" if stale else position,  # It looks again until none is left.
            skip_reason=None if requests else waiting,
        )

    return screening_anew


def _newest_event(instance: dg.DagsterInstance, asset: dg.AssetKey) -> int:
    records = instance.fetch_materializations(asset, limit=1).records
    return records[0].storage_id if records else 0


def _may_be_screened(context: dg.SensorEvaluationContext, batch: str, state: str) -> bool:
    """Whether no such run is under way, and not too many have failed; the night tries again in any case."""
    tags = {RESCREENING_TAG: state, "dagster/partition": batch}
    runs = context.instance.get_runs(dg.RunsFilter(tags=tags), limit=_MOST_TRIES)
    if len(runs) == _MOST_TRIES and runs[0].is_finished:
        context.log.warning("batch %s was screened anew %d times without success: see its runs", batch, _MOST_TRIES)
    return len(runs) < _MOST_TRIES and all(run.is_finished for run in runs)


# --- after a reboot --------------------------------------------------------------------------------------------


def _build_dead_runs_sensor() -> dg.SensorDefinition:
    """It runs whether `automation.started` or not: a dead run keeps every other from starting."""

    @dg.sensor(
        name="dead_runs",
        minimum_interval_seconds=_LOOK_FOR_DEAD_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Ends runs whose process is gone, after a reboot or a kill of everything: else they would stand as started "
            "for ever, and all others wait for them. The daemon runs them again (run_retries). Runs from the start."
        ),
    )
    def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        ended = liveness.end_dead_runs(context.instance, lock_directory())
        for run_id in ended:
            context.log.warning("run %s: its process is gone; it is ended as failed", run_id)
        return dg.SkipReason(f"{len(ended)} dead runs ended" if ended else "no run is dead")

    return dead_runs


# --- every night -----------------------------------------------------------------------------------------------


def _build_nightly_job(settings: Settings) -> dg.JobDefinition:
    @dg.op(name="bring_up_to_date", description="Makes anew what is out of date, and publishes if something changed.")
    def bring_up_to_date(context: dg.OpExecutionContext) -> None:
        done = refresh.recurate(settings, context.instance, Events(on_notice=context.log.warning))
        context.log.info(done.sentence)

    @dg.job(
        name=NIGHTLY,
        executor_def=dg.in_process_executor,
        description="What `qaq recurate` does: every batch is brought up to date, the oldest first, then published.",
    )
    def recurate() -> None:
        bring_up_to_date()

    return recurate


def _build_nightly_schedule(settings: Settings, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    automation = settings.automation
    running, stopped = dg.DefaultScheduleStatus.RUNNING, dg.DefaultScheduleStatus.STOPPED
    try:
        return dg.ScheduleDefinition(
            name="nightly_recuration",
            job=job,
            cron_schedule=automation.recuration_cron,
            execution_timezone=automation.timezone,
            default_status=running if automation.started else stopped,
            description=(
                "Tries again what failed, and makes anew what is out of date by its provenance: settings, models, "
                f"benchmarks' list, withdrawals. Publishes only if something changed.{_stated(settings)}"
            ),
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise SettingsError(
            f"automation.recuration_cron: {automation.recuration_cron!r} is no cron, such as 0 3 * * * ({error})"
        ) from error


# --- what a person is told of it ---------------------------------------------------------------------------------


def unattended(instance: dg.DagsterInstance, now: datetime) -> list[str]:
    """Whether the daemon runs, and how the last night ended, as sentences."""
    return [_daemon_sentence(instance, now), _night_sentence(instance)]


def _daemon_sentence(instance: dg.DagsterInstance, now: datetime) -> str:
    seen = [heartbeat.timestamp for heartbeat in instance.get_daemon_heartbeats().values()]
    if not seen:
        return "No daemon ever ran here: nothing is curated by itself. `qaq ui` starts one."
    if now.timestamp() - max(seen) <= _HEARTBEAT_PATIENCE_S:
        return "The daemon runs."
    return f"The daemon was last seen on {_time(max(seen))}: nothing is curated by itself. `qaq ui` starts it."


def _night_sentence(instance: dg.DagsterInstance) -> str:
    records = instance.get_run_records(dg.RunsFilter(job_name=NIGHTLY), limit=1)
    if not records:
        return "No nightly re-curation has run yet."
    record = records[0]
    return f"Last nightly re-curation: {record.dagster_run.status.value}, {_time(record.create_timestamp.timestamp())}."


def _time(timestamp: float) -> str:
    return f"{datetime.fromtimestamp(timestamp, UTC):%Y-%m-%d %H:%M} UTC"
