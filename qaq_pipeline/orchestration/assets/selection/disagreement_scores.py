"""The asset disagreement_scores[batch]."""

import dagster as dg

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, pictures
from qaq_pipeline.reports import pages
from qaq_pipeline.reports.table_numbers import of_disagreement_scores
from qaq_pipeline.scoring import stored_scores
from qaq_pipeline.selection import scored_batch, stored_reference
from qaq_pipeline.storage.origin import by_model
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable

VERSION = "2"


def build_disagreement_scores(settings: Settings) -> dg.AssetsDefinition:
    """disagreement_scores[batch]: strata, ranks and the gap, in the pool of the batch or against the reference."""
    ranking = settings.ranking
    # A reference that only drift is measured against changes no rank.
    ranked_by = ranking if ranking.pool == "reference" else ranking.model_dump(exclude={"reference"})

    @asset(settings, VERSION, reads=[ranked_by])
    def disagreement_scores(
        context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage], rmi_scores: dict[str, StoredTable]
    ) -> dg.MaterializeResult:
        frozen = stored_reference.read_pool(storage, ranking)
        facts = {
            "pool_id": stored_reference.pool_id(context.partition_key, ranking, frozen),
            "ranking_hash": settings_hash(ranking.without_pool()),
            "models": stored_scores.identities(rmi_scores),
        }
        frame, warnings = scored_batch.rank(rmi_scores, ranking, facts["pool_id"], frozen)
        for warning in warnings:
            context.log.warning(warning)
        inputs = by_model("rmi_scores", rmi_scores) | stored_reference.as_input(frozen)
        metadata = of_disagreement_scores(frame, warnings)
        metadata |= pictures(context, settings, lambda: [pages.rank_plot(frame)])
        return table_result(context, frame, inputs, metadata, **facts)

    return disagreement_scores
