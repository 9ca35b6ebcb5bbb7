"""The asset planted_scores[batch and model]."""

from functools import partial

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.executors import gpus_to_score, on_gpu
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.orchestration.run_log import score
from qaq_pipeline.reports.table_numbers import of_scoring
from qaq_pipeline.scoring import rmi_scores
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable

VERSION = "1"


def build_planted_scores(settings: Settings) -> dg.AssetsDefinition:
    """planted_scores[batch and model]: the scores of the planted pairs, as logprobs and rmi_scores make them."""
    models = {role: model.model_dump(exclude={"device", "gpus"}) for role, model in settings.models.items()}
    eligibility = settings.eligibility

    @asset(
        settings, VERSION, reads=[models, settings.scoring, eligibility], **on_gpu(settings, gpus_to_score(settings))
    )
    def planted_scores(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        model_runtime: dg.ResourceParam[ModelRuntime],
        planted_rows: StoredTable,
    ) -> dg.MaterializeResult:
        scored = score(context, storage, model_runtime, Pairs(partial(planted_rows.parts, "pair_id")))
        frame = rmi_scores.rmi_scores(scored.frame, eligibility)
        return table_result(context, frame, {"planted_rows": planted_rows}, of_scoring(scored), **scored.provenance)

    return planted_scores
