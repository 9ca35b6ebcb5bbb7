"""The nightly job and its schedule."""

import dagster as dg

from qaq_pipeline.automation.sensor_status import status_sentence
from qaq_pipeline.config.base import SettingsError, settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration import liveness
from qaq_pipeline.orchestration.executors import run_tags
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import Events
from qaq_pipeline.runs.refresh import refresh_all
from qaq_pipeline.runs.submission import refuse_single_slot

NIGHTLY = "refresh"


def build_nightly_job(settings: Settings) -> dg.JobDefinition:
    """Build the job that refreshes what is stale."""

    @dg.op
    def refresh_stale_tables(context: dg.OpExecutionContext) -> None:
        """Rebuilds stale tables, and publishes if something changed."""
        refuse_single_slot(settings.runtime, context.instance)
        done = refresh_all(Deployment(settings, context.instance), Events(on_notice=context.log.warning))
        context.log.info(done.sentence)

    executor = liveness.in_living_process(dg.in_process_executor, liveness.run_locks(settings), settings_hash(settings))

    @dg.job(name=NIGHTLY, executor_def=executor, run_tags=run_tags(settings.runtime))
    def refresh() -> None:
        """Does the same as `qaq refresh`: rebuilds stale tables, the oldest batch first, then publishes."""
        refresh_stale_tables()

    return refresh


def build_nightly_schedule(settings: Settings, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Build the schedule of the nightly job."""
    automation = settings.automation
    running, stopped = dg.DefaultScheduleStatus.RUNNING, dg.DefaultScheduleStatus.STOPPED
    try:
        return dg.ScheduleDefinition(
            name="nightly_refresh",
            job=job,
            cron_schedule=automation.refresh_cron,
            execution_timezone=automation.timezone,
            default_status=running if automation.started else stopped,
            description=(
                "Retries failed steps, and rebuilds tables whose provenance is stale: settings, models, benchmarks or "
                f"withdrawals changed. Publishes only if something changed.{status_sentence(settings)}"
            ),
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise SettingsError(
            f"automation.refresh_cron: {automation.refresh_cron!r} is not a cron expression such as 0 3 * * * ({error})"
        ) from error
