"""The asset reference_cuts: the cuts of the signals, from a fixed set of batches, for every batch."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import describe
from qaq_pipeline.orchestration.metadata import asset, version_of
from qaq_pipeline.orchestration.partitions import of_reference_batches
from qaq_pipeline.reports.table_numbers import of_validity_cuts
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.selection.stored_reference import CUTS
from qaq_pipeline.storage.storage import Storage

VERSION = "1"


def build_reference_cuts(settings: Settings) -> dg.AssetsDefinition:
    """reference_cuts: unpartitioned, of exactly the batches that the settings name; frozen when it is first made."""
    ranking, roles, signals = settings.ranking, sorted(settings.models), settings.validity
    wanted, frozen_with = stored_reference.named(ranking), stored_reference.frozen_with(ranking)

    @asset(
        settings,
        VERSION,
        reads=[wanted.name, frozen_with, signals, settings.gates.min_scorable_share],
        deps=of_reference_batches(CUTS, wanted.batches, roles),
    )
    def reference_cuts(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        samples = {
            batch: stored_reference.read_sample(storage, batch, roles, settings.gates) for batch in wanted.batches
        }
        made = stored_reference.freeze_cuts(samples, ranking, signals, version_of(context))
        table = stored_reference.store(storage, wanted.name, made)
        path = dg.MetadataValue.path(storage.tables.url(CUTS, Partition(wanted.name)))
        described = describe(CUTS, table, of_validity_cuts(table.frame) | {"path": path})
        return dg.MaterializeResult(data_version=dg.DataVersion(table.data_version), metadata=described)

    return reference_cuts
