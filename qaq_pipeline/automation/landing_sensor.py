"""The sensor of the landing zone: it requests a run for every complete delivery."""

import dagster as dg

from qaq_pipeline.automation.sensor_status import MOST_LINES, default_status, status_sentence
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import landing
from qaq_pipeline.ingest.landing import Seen
from qaq_pipeline.orchestration import alerts
from qaq_pipeline.orchestration.alerts import Alert
from qaq_pipeline.orchestration.materialisation import LANDED_TAG
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.storage.storage import open_storage


def build_landing_sensor(settings: Settings) -> dg.SensorDefinition:
    """Build the sensor of the landing zone."""
    zone = settings.landing

    @dg.sensor(
        target=dg.AssetSelection.assets("raw_data"),
        minimum_interval_seconds=zone.interval_seconds,
        default_status=default_status(settings),
        description=(
            f"Adds a batch for each complete delivery in {settings.landing_url} and runs its raw_data; automation "
            f"conditions run the rest. A folder or file is complete with {zone.marker}"
            f"{'' if zone.require_marker else ', or once two polls find it unchanged'}.{status_sentence(settings)}"
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
            dg.RunRequest(
                run_key=run_key,
                partition_key=landed.batch,
                asset_selection=[dg.AssetKey("raw_data")],
                tags={LANDED_TAG: landed.entry},
            )
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


def _report_refused(context: dg.SensorEvaluationContext, settings: Settings, refused: dict[str, str]) -> None:
    """Log the refused deliveries and send one alert; `qaq status` lists them as well."""
    lines = [f"{settings.landing_url}/{entry} is refused: {why}" for entry, why in refused.items()]
    for line in lines:
        context.log.warning(line)
    if lines:
        more = f"\nand {len(lines) - MOST_LINES} more: `qaq status`" if len(lines) > MOST_LINES else ""
        subject, text = f"Refused in the landing zone: {len(lines)}", "\n".join(lines[:MOST_LINES]) + more
        alerts.send(Alert(subject, text, "delivery_refused"), settings.alerts, context.log)
