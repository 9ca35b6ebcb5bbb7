"""Whether sensors and schedules run from the start."""

import dagster as dg

from qaq_pipeline.config.settings import Settings

MOST_BATCHES_A_TICK = 25
MOST_LINES = 20


def default_status(settings: Settings) -> dg.DefaultSensorStatus:
    """The status that a sensor or schedule has until somebody starts or stops it."""
    return dg.DefaultSensorStatus.RUNNING if settings.automation.started else dg.DefaultSensorStatus.STOPPED


def status_sentence(settings: Settings) -> str:
    """The same in words, for the description of a sensor."""
    return " Runs from the start (automation.started)." if settings.automation.started else ""
