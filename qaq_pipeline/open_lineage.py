"""The sensor that sends OpenLineage events of runs, assets and checks, by the integration `dagster-openlineage`.

Belongs here: when that integration's own sensor may be asked. Does not belong here: what an event says, which is the
integration's, and what a column comes from (`column_lineage`), which it takes from the materialisations.
"""

import json
from collections.abc import Iterator
from typing import cast

import dagster as dg

from qaq_pipeline.config import Settings, SettingsError

NAME = "openlineage"


def build_open_lineage(settings: Settings) -> dg.Definitions:
    """The sensor, where `automation.openlineage` asks for it; else nothing.

    Raises:
        SettingsError: the extra `openlineage` is not installed.
    """
    return dg.Definitions(sensors=[_build_sensor(settings)] if settings.automation.openlineage else [])


def _build_sensor(settings: Settings) -> dg.SensorDefinition:
    try:
        from dagster_openlineage import openlineage_sensor
    except ImportError as error:
        raise SettingsError(
            f"automation.openlineage: {error}; install the extra: pip install 'qaq-pipeline[openlineage]'"
        ) from error
    # Without a limit: with one it reads the newest events first, and never comes back to those before.
    send_new_events = openlineage_sensor(include_asset_events=True, record_filter_limit=0)

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=settings.automation.interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Sends what happened since the last look to OPENLINEAGE_URL, from the first look on.",
    )
    def openlineage(context: dg.SensorEvaluationContext) -> Iterator[dg.SensorResult | dg.SkipReason]:
        log = context.instance.event_log_storage
        if log.is_run_sharded:
            yield dg.SkipReason(
                "nothing is sent: the event log has a file for each run (SQLite), which cannot be read in order; "
                "configure Postgres, or dagster._core.storage.event_log's ConsolidatedSqliteEventLogStorage, as "
                "event_log_storage in dagster.yaml"
            )
        elif context.cursor is None:  # What was before is not sent: it may be years.
            cursor = json.dumps({"last_storage_id": log.get_maximum_record_id() or 0, "running_pipelines": {}})
            yield dg.SensorResult(cursor=cursor, skip_reason="events are sent from now on")
        else:
            yield from cast("Iterator[dg.SkipReason]", send_new_events(context))

    return openlineage
