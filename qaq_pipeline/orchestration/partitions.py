"""Partitions definitions of the assets."""

from collections.abc import Sequence

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE, Asset, Partitioning

BATCHES = dg.DynamicPartitionsDefinition(name="batch")
"""One partition for each batch."""

VERSIONS = dg.DynamicPartitionsDefinition(name="version")
"""One partition for each published version of the dataset."""


def partitions_of(asset: Asset, settings: Settings) -> dg.PartitionsDefinition | None:
    """The partitions definition of an asset; None: it has no partitions."""
    models = dg.StaticPartitionsDefinition(sorted(settings.models))
    definitions = {
        Partitioning.BATCH: BATCHES,
        Partitioning.VERSION: VERSIONS,
        Partitioning.BATCH_AND_MODEL: dg.MultiPartitionsDefinition({"batch": BATCHES, "model": models}),
    }
    return definitions.get(asset.partitioning)


def of_all_batches(names: Sequence[str]) -> list[dg.AssetDep]:
    """The inputs of an asset of a version: which batches the version contains is in its manifest."""
    without = (Partitioning.NONE, Partitioning.REFERENCE)
    mappings = {name: None if PIPELINE[name].partitioning in without else dg.AllPartitionMapping() for name in names}
    return [dg.AssetDep(name, partition_mapping=mapping) for name, mapping in mappings.items()]


def of_reference_batches(
    name: str, batches: Sequence[str], roles: Sequence[str], others: Sequence[str] = ()
) -> list[dg.AssetDep]:
    """The inputs of an asset of a reference: the partitions of exactly these batches, so other batches leave it fresh.

    Args:
        name: of the asset.
        batches: of the reference.
        roles: of the models.
        others: further inputs, with partitions of batches or none.
    """
    of_models = [dg.MultiPartitionKey({"batch": batch, "model": role}) for batch in batches for role in roles]
    found = []
    for source in (PIPELINE[one] for one in (*PIPELINE[name].inputs, *others)):
        if source.partitioning is Partitioning.REFERENCE:
            found.append(dg.AssetDep(source.name))
            continue
        keys = of_models if source.has_models else batches
        found.append(dg.AssetDep(source.name, partition_mapping=dg.SpecificPartitionsPartitionMapping(keys)))
    return found
