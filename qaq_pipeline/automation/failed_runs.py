"""The sensor that sends an alert for every failed run.

Belongs here: the alert for a failed run. Does not belong here: the channels, and alerts for gated batches, which the
assets that gate them send.
"""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration import alerts
from qaq_pipeline.orchestration.alerts import Alert
from qaq_pipeline.orchestration.failures import describe


def build_alert_sensor(settings: Settings) -> dg.SensorDefinition:
    """Build a sensor that sends one alert for each failed run, including runs by `qaq run`, outside a code location."""

    @dg.run_failure_sensor(
        description="Sends an alert for every failed run through the channels in alerts.channels.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        monitor_all_code_locations=True,
    )
    def alert_of_failed_run(context: dg.RunFailureSensorContext) -> None:
        alerts.send(failed_run(context), settings.alerts, context.log)

    return alert_of_failed_run


def failed_run(context: dg.RunFailureSensorContext) -> Alert:
    """Return the alert for a failed run: its job, its partition, the first step that failed, and that step's error."""
    run = context.dagster_run
    partition = run.tags.get("dagster/partition")
    what = f"{_name(run)} of {partition}" if partition else _name(run)
    return Alert(
        subject=f"{what} failed",
        text=describe(what, [*context.get_step_failure_events(), context.failure_event], run.run_id),
        kind="run_failed",
        batch=run.tags.get("dagster/partition/batch", partition),
        run_id=run.run_id,
    )


def _name(run: dg.DagsterRun) -> str:
    """Return the name of the job, or the assets that were selected in the UI if Dagster made the job for them."""
    picked = sorted(key.to_user_string() for key in run.asset_selection or ())
    return ", ".join(picked) if run.job_name.startswith("__") and picked else run.job_name
