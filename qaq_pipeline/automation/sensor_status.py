"""The default status of sensors and schedules, and the limits of one tick."""

import dagster as dg

from qaq_pipeline.config.settings import Settings

MOST_BATCHES_A_TICK = 25
MOST_LINES = 20


def default_status(settings: Settings) -> dg.DefaultSensorStatus:
    """Return the status that a sensor has until a person starts or stops it."""
    return dg.DefaultSensorStatus.RUNNING if settings.automation.started else dg.DefaultSensorStatus.STOPPED


def status_sentence(settings: Settings) -> str:
    """Return the sentence that adds this status to a description, or nothing."""
    return " Runs from the start (automation.started)." if settings.automation.started else ""
