"""The part of the pipeline that is made where `calibration.enabled` is false, as in the settings of most tests."""

from qaq_pipeline.orchestration.jobs import CURATING
from qaq_pipeline.pipeline import PIPELINE, Purpose

UNCALIBRATED = PIPELINE.part(lambda asset: not asset.needs_calibration)
STAGES = UNCALIBRATED.jobs(*CURATING)
TABLES = UNCALIBRATED.tables_of_batch(Purpose.CURATION)
