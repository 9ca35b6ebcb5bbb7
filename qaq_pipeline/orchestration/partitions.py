"""Partitions definitions, and the tags of runs."""

import dagster as dg

from qaq_pipeline.config.settings import Settings

LANDED_TAG = "qaq/delivery"
"""Tag of the runs that the landing zone's sensor asks for; its value is the delivery's name there."""

RESCREENING_TAG = "qaq/rescreening"
"""Tag of runs that screen a batch anew because an older one is another now."""

BATCHES = dg.DynamicPartitionsDefinition(name="batch")
"""One partition a delivery."""


def batch_by_model(settings: Settings) -> dg.MultiPartitionsDefinition:
    """One partition for each batch and each model of the settings."""
    return dg.MultiPartitionsDefinition(
        {"batch": BATCHES, "model": dg.StaticPartitionsDefinition(sorted(settings.models))}
    )
