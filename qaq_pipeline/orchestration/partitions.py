"""Partitions definitions of the assets."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import Asset, Partitioning

BATCHES = dg.DynamicPartitionsDefinition(name="batch")
"""One partition for each batch."""


def batch_by_model(settings: Settings) -> dg.MultiPartitionsDefinition:
    """One partition for each batch and each model of the settings."""
    return dg.MultiPartitionsDefinition(
        {"batch": BATCHES, "model": dg.StaticPartitionsDefinition(sorted(settings.models))}
    )


def partitions_of(asset: Asset, settings: Settings) -> dg.PartitionsDefinition | None:
    """The partitions definition of an asset; None: it has no partitions."""
    match asset.partitioning:
        case Partitioning.BATCH:
            return BATCHES
        case Partitioning.BATCH_AND_MODEL:
            return batch_by_model(settings)
        case Partitioning.REFERENCE | Partitioning.NONE:
            return None
