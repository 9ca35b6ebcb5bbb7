"""Partitions definitions of the assets."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import Asset, Partitioning

BATCHES = dg.DynamicPartitionsDefinition(name="batch")
"""One partition for each batch."""


def partitions_of(asset: Asset, settings: Settings) -> dg.PartitionsDefinition | None:
    """The partitions definition of an asset; None: it has no partitions."""
    models = dg.StaticPartitionsDefinition(sorted(settings.models))
    definitions = {
        Partitioning.BATCH: BATCHES,
        Partitioning.BATCH_AND_MODEL: dg.MultiPartitionsDefinition({"batch": BATCHES, "model": models}),
    }
    return definitions.get(asset.partitioning)
