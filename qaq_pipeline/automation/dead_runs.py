"""The sensor that ends runs whose process is gone."""

import dagster as dg

from qaq_pipeline.orchestration import liveness
from qaq_pipeline.runs.job_runs import lock_directory

_LOOK_FOR_DEAD_S = 30


# --- after a reboot --------------------------------------------------------------------------------------------


def build_dead_runs_sensor() -> dg.SensorDefinition:
    """Build a sensor that runs whatever `automation.started` says: a dead run keeps every other from starting."""

    @dg.sensor(
        name="dead_runs",
        minimum_interval_seconds=_LOOK_FOR_DEAD_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Ends runs whose process is gone, as after a reboot. Otherwise Dagster would list them as started for "
            "ever, and all other runs would wait. The daemon retries them (run_retries). Runs from the start."
        ),
    )
    def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        ended = liveness.end_dead_runs(context.instance, lock_directory())
        for run_id in ended:
            context.log.warning("run %s: its process is gone; the run is marked as failed", run_id)
        return dg.SkipReason(f"{len(ended)} dead runs ended" if ended else "no run is dead")

    return dead_runs
