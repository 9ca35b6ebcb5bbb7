"""The asset logprobs[batch and model]: the only GPU step."""

from functools import partial

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.executors import gpus_to_score, on_gpu
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, gate_metadata
from qaq_pipeline.orchestration.run_log import score
from qaq_pipeline.reports.table_numbers import of_scoring
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.scoring.pairs import Pairs, accepted_parts
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.screening import gates
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable

VERSION = "3"


def build_logprobs(settings: Settings) -> dg.AssetsDefinition:
    """logprobs[batch and model]: sums of NLL of every distinct accepted pair."""
    models = {role: model.model_dump(exclude={"device", "gpus"}) for role, model in settings.models.items()}

    @asset(settings, VERSION, reads=[models, settings.scoring], **on_gpu(settings, gpus_to_score(settings)))
    def logprobs(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        model_runtime: dg.ResourceParam[ModelRuntime],
        raw_data: StoredTable,
        screened_data: StoredTable,
    ) -> dg.MaterializeResult:
        gate = gates.of_provenance(screened_data.provenance)
        if gate is not None:
            context.log.warning("%s is not scored: %s", context.partition_key, gate.sentence)
        accepted = Pairs(partial(accepted_parts, raw_data, screened_data))
        scored = score(context, storage, model_runtime, accepted if gate is None else Pairs.of([]))
        inputs = {"raw_data": raw_data, "screened_data": screened_data}
        metadata = {**of_scoring(scored), **gate_metadata(gate)}
        with storage.tables.begin("logprobs", Partition.parse(context.partition_key)) as table:
            for part in scored.rows.parts():
                table.append(part)
            return table_result(context, table, inputs, metadata, **scored.provenance)

    return logprobs
