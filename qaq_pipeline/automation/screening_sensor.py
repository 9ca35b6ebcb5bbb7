"""The sensor that screens a batch again when an older batch, or the withdrawals, changed."""

import dagster as dg

from qaq_pipeline.automation.sensor_status import MOST_BATCHES_A_TICK, default_status, status_sentence
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import RESCREENING_TAG
from qaq_pipeline.runs.deployment import Deployment

_MOST_TRIES = 3


def build_screening_sensor(settings: Settings) -> dg.SensorDefinition:
    """Build the sensor that requests a run for each stale screening."""
    screened_data, decisions = dg.AssetKey("screened_data"), dg.AssetKey("decisions")

    @dg.sensor(
        target=dg.AssetSelection.assets(screened_data),
        minimum_interval_seconds=settings.automation.interval_seconds,
        default_status=default_status(settings),
        description=(
            "Screens a batch again when an older batch that it was compared with has changed. Later assets run only if "
            f"the result differs.{status_sentence(settings)}"
        ),
    )
    def rescreening(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        records = context.instance.get_asset_records([screened_data, decisions])
        position = str(sorted(one.asset_entry.last_materialization_storage_id or 0 for one in records))
        if position == context.cursor:
            return dg.SensorResult(skip_reason="no batch was screened or decided since the last tick", cursor=position)
        freshness = Deployment(settings, context.instance).freshness()
        stale = {
            batch: state for batch in freshness.batches() if (state := freshness.wanted_screening(batch)) is not None
        }
        due = [batch for batch, state in stale.items() if _may_be_screened(context, batch, state)]
        requests = [
            dg.RunRequest(partition_key=batch, asset_selection=[screened_data], tags={RESCREENING_TAG: stale[batch]})
            for batch in due[:MOST_BATCHES_A_TICK]
        ]
        waiting = f"waiting for {', '.join(stale)}" if stale else "no screening is stale"
        return dg.SensorResult(
            run_requests=requests,
            cursor="" if stale else position,  # An empty cursor: the next tick looks again.
            skip_reason=None if requests else waiting,
        )

    return rescreening


def _may_be_screened(context: dg.SensorEvaluationContext, batch: str, state: str) -> bool:
    """Return whether no such run is active and fewer than _MOST_TRIES exist; the nightly job retries in any case."""
    tags = {RESCREENING_TAG: state, "dagster/partition": batch}
    runs = context.instance.get_runs(dg.RunsFilter(tags=tags), limit=_MOST_TRIES)
    if len(runs) == _MOST_TRIES and runs[0].is_finished:
        context.log.warning("screening batch %s again failed %d times: see its runs", batch, _MOST_TRIES)
    return len(runs) < _MOST_TRIES and all(run.is_finished for run in runs)
