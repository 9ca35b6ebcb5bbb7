"""The Dagster code location: the jobs and the automation for the current settings.

Belongs here: nothing else. Settings are read when the definitions are built, never at import.
"""

import dagster as dg

from qaq_pipeline.automation.sensors import build_automation
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.jobs import build_job_defs


def build_defs(settings: Settings) -> dg.Definitions:
    """Build new definitions."""
    return dg.Definitions.merge(build_job_defs(settings), build_automation(settings))


@dg.definitions
def defs() -> dg.Definitions:
    """Return the definitions for the settings in `QAQ_CONFIG`."""
    return build_defs(load_settings())
