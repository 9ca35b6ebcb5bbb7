"""The nightly job and its schedule."""

import dagster as dg

from qaq_pipeline.automation.sensor_status import status_sentence
from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs import refresh
from qaq_pipeline.runs.job_runs import Events

NIGHTLY = "recurate"


# --- every night -----------------------------------------------------------------------------------------------


def build_nightly_job(settings: Settings) -> dg.JobDefinition:
    """The job that refreshes what is stale."""

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


def build_nightly_schedule(settings: Settings, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """When the nightly job runs."""
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
                f"benchmarks' list, withdrawals. Publishes only if something changed.{status_sentence(settings)}"
            ),
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise SettingsError(
            f"automation.recuration_cron: {automation.recuration_cron!r} is no cron, such as 0 3 * * * ({error})"
        ) from error
