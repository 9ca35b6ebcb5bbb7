"""Everything that runs unattended: the sensors, the nightly job and its schedule.

Belongs here: when something runs. Does not belong here: what is stale (`freshness.staleness`), when a delivery is
complete (`ingest.landing`), the assets' conditions (`orchestration.conditions`), the work itself (`runs.refresh`).
"""

import dagster as dg

from qaq_pipeline.automation.failed_runs import build_alert_sensor
from qaq_pipeline.automation.landing_sensor import build_landing_sensor
from qaq_pipeline.automation.nightly import build_nightly_job, build_nightly_schedule
from qaq_pipeline.automation.screening_sensor import build_screening_sensor
from qaq_pipeline.automation.sensor_status import default_status, status_sentence
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration import liveness
from qaq_pipeline.orchestration.executors import run_tags


def build_automation(settings: Settings) -> dg.Definitions:
    """Build the sensors, the schedule and the nightly job; they run from the start if `automation.started` is set."""
    job = build_nightly_job(settings)
    return dg.Definitions(
        jobs=[job],
        sensors=[
            build_landing_sensor(settings),
            _build_curation_sensor(settings),
            build_screening_sensor(settings),
            _build_dead_runs_sensor(settings),
            build_alert_sensor(settings),
        ],
        schedules=[build_nightly_schedule(settings, job)],
    )


def _build_curation_sensor(settings: Settings) -> dg.SensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        name="curation",
        target=dg.AssetSelection.all(),
        minimum_interval_seconds=settings.automation.interval_seconds,
        default_status=default_status(settings),
        run_tags=run_tags(settings.runtime),
        emit_backfills=False,  # One run per batch: starting a backfill takes longer than running most batches.
        description=f"Runs each asset when its automation condition is met.{status_sentence(settings)}",
    )


def _build_dead_runs_sensor(settings: Settings) -> dg.SensorDefinition:
    """Build a sensor that runs whatever `automation.started` says: a dead run keeps every other from starting."""

    @dg.sensor(
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Ends runs whose process is gone, as after a reboot. Otherwise Dagster would list them as started for "
            "ever, and all other runs would wait. The daemon retries them (run_retries). Runs from the start."
        ),
    )
    def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        ended = liveness.end_dead_runs(context.instance, liveness.run_locks(settings))
        for run_id in ended:
            context.log.warning("run %s: its process is gone; the run is marked as failed", run_id)
        return dg.SkipReason(f"{len(ended)} dead runs ended" if ended else "no run is dead")

    return dead_runs
