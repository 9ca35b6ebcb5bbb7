"""The asset validity_cuts[batch]: the cut of each signal, before anything is selected."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, version_of
from qaq_pipeline.reports.table_numbers import of_validity_cuts
from qaq_pipeline.schema.partition import Input
from qaq_pipeline.scoring.stored_scores import scored_by
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.storage.origin import batch_of
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity import stored_cuts
from qaq_pipeline.validity.judgement import choose_cuts
from qaq_pipeline.validity.planted_sample import PlantedSample
from qaq_pipeline.validity.words import warnings

VERSION = "1"


def build_validity_cuts(settings: Settings) -> dg.AssetsDefinition:
    """validity_cuts[batch]: from its own planted rows, those of an older batch, or the reference."""
    ranking, signals = settings.ranking, settings.validity
    cut_by = [ranking.reference] if ranking.pool == "reference" else []

    @asset(settings, VERSION, reads=[signals, *cut_by])
    def validity_cuts(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        screened_data: StoredTable,
        planted_rows: StoredTable,
        rmi_scores: dict[str, StoredTable],
        planted_scores: dict[str, StoredTable],
    ) -> dg.MaterializeResult:
        planted = PlantedSample(raw_data, screened_data, rmi_scores, planted_rows, planted_scores)
        inputs = dict(planted.inputs)
        if ranking.pool == "reference":
            frozen = stored_reference.read_cuts(storage, ranking, signals)
            stored_reference.require_comparable(frozen, rmi_scores)
            frame, inputs[stored_reference.CUTS] = frozen.frame, frozen
        else:
            frame = choose_cuts(planted.sample, signals)
            if stored_cuts.lacks_rows(frame):
                older = stored_cuts.newest_older(storage, context.partition_key, rmi_scores, version_of(context))
                if older is not None:
                    frame = stored_cuts.filled(frame, older.frame)
                    inputs[str(Input(stored_cuts.NAME, batch=batch_of(older)))] = older
        for warning in warnings(frame):
            context.log.warning(warning)
        return table_result(context, frame, inputs, of_validity_cuts(frame), scored_by=scored_by(rmi_scores))

    return validity_cuts
