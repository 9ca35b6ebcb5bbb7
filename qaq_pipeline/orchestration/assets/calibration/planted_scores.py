"""The asset planted_scores[batch and model]."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.orchestration.assets.scoring.logprobs import GPU_POOL, logger, scoring_metadata, start_logger
from qaq_pipeline.orchestration.io_manager import partition_parts
from qaq_pipeline.orchestration.metadata import code_version, definition, gate_metadata
from qaq_pipeline.orchestration.partitions import batch_by_model
from qaq_pipeline.orchestration.results import stored_gate, table_result
from qaq_pipeline.scoring import rmi_scores
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.screening import gates
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable

VERSION = "1"


def build_planted_scores(settings: Settings) -> dg.AssetsDefinition:
    """planted_scores[batch and model]: what logprobs and rmi_scores are for the batch's pairs, for the planted ones."""
    models = {role: model.model_dump(exclude={"device"}) for role, model in settings.models.items()}
    eligibility = settings.eligibility

    @dg.asset(
        **definition("planted_scores"),
        group_name="calibration",
        kinds={"pytorch", "huggingface"},
        partitions_def=batch_by_model(settings),
        pool=GPU_POOL,
        code_version=code_version(VERSION, models, settings.scoring, eligibility),
    )
    def planted_scores(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        model_runtime: dg.ResourceParam[ModelRuntime],
        planted_rows: StoredTable,
    ) -> dg.MaterializeResult:
        batch, role = partition_parts(context.partition_key)
        columns = ("pair_id", "system", "query", "answer")
        pairs = [Pair(*row) for row in planted_rows.frame.select(columns).iter_rows()]
        with storage.locks.hold("planted_scores", batch, role):
            scored = model_runtime.score(role, pairs, storage, logger(context), start_logger(context))
        frame = rmi_scores.rmi_scores(
            scored.frame,
            min_query_tokens=eligibility.min_query_tokens,
            short_query_tokens=eligibility.short_query_tokens,
        )
        gate = gates.of_provenance(planted_rows.provenance)
        metadata = {**scoring_metadata(scored), **gate_metadata(gate)}
        made_of = scored.provenance | stored_gate(gate)
        return table_result(context, frame, {"planted_rows": planted_rows}, metadata, **made_of)

    return planted_scores
