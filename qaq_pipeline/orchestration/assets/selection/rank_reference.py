"""The asset rank_reference: a fixed set of batches against which ranks and cuts of every batch can be computed."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import describe
from qaq_pipeline.orchestration.metadata import asset, version_of
from qaq_pipeline.orchestration.partitions import of_reference_batches
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.reports.table_numbers import of_rank_reference
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.selection.stored_reference import NAME
from qaq_pipeline.storage.storage import Storage

VERSION = "2"


def build_rank_reference(settings: Settings) -> dg.AssetsDefinition:
    """rank_reference: unpartitioned, of exactly the batches that the settings name; frozen when it is first made."""
    ranking, roles = settings.ranking, sorted(settings.models)
    wanted, frozen_with = stored_reference.named(ranking), stored_reference.frozen_with(ranking)
    signals = settings.validity if settings.is_calibrated else None
    judged_from = () if signals is None else PIPELINE[NAME].calibrated_inputs

    @asset(
        settings,
        VERSION,
        reads=[wanted.name, frozen_with, settings.gates.min_scorable_share, signals],
        deps=of_reference_batches(NAME, wanted.batches, roles, judged_from),
    )
    def rank_reference(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        batches = {
            batch: stored_reference.read_scores(storage, batch, roles, settings.gates) for batch in wanted.batches
        }
        cuts = None if signals is None else stored_reference.read_cuts(storage, ranking, signals)
        judged = None
        if signals is not None and cuts is not None:
            judged = stored_reference.judge(storage, batches, cuts, signals)
        made, warnings = stored_reference.freeze(batches, ranking, version_of(context), judged, cuts)
        for warning in warnings:
            context.log.warning(warning)
        table = stored_reference.store(storage, wanted.name, made)
        path = dg.MetadataValue.path(storage.tables.url(NAME, Partition(wanted.name)))
        metadata = of_rank_reference(table.frame, wanted.name, wanted.batches, warnings) | {"path": path}
        described = describe(NAME, table, metadata)
        return dg.MaterializeResult(data_version=dg.DataVersion(table.data_version), metadata=described)

    return rank_reference
