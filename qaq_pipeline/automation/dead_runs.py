"""The sensor that ends runs whose process is gone."""

import dagster as dg

from qaq_pipeline.orchestration import liveness
from qaq_pipeline.runs.job_runs import lock_directory

_LOOK_FOR_DEAD_S = 30


# --- after a reboot --------------------------------------------------------------------------------------------


def build_dead_runs_sensor() -> dg.SensorDefinition:
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
