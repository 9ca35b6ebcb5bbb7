"""The asset logprobs[batch and model]: the only GPU step."""

import math
from collections.abc import Callable

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.io_manager import partition_parts
from qaq_pipeline.orchestration.metadata import code_version, definition, gate_metadata
from qaq_pipeline.orchestration.partitions import batch_by_model
from qaq_pipeline.orchestration.results import table_result
from qaq_pipeline.reports.check_metrics import count_by
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.scoring.logprobs import Estimate, Progress, accepted_pairs
from qaq_pipeline.scoring.runtime import ModelRuntime, ScoredPairs
from qaq_pipeline.screening import gates
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable

VERSION = "2"
GPU_POOL = "gpu"


def build_logprobs(settings: Settings) -> dg.AssetsDefinition:
    """logprobs[batch and model]: sums of NLL of every distinct accepted pair."""
    models = {role: model.model_dump(exclude={"device"}) for role, model in settings.models.items()}

    @dg.asset(
        **definition("logprobs"),
        group_name="scoring",
        kinds={"pytorch", "huggingface"},
        partitions_def=batch_by_model(settings),
        pool=GPU_POOL,
        code_version=code_version(VERSION, models, settings.scoring),
    )
    def logprobs(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        model_runtime: dg.ResourceParam[ModelRuntime],
        raw_data: StoredTable,
        screened_data: StoredTable,
    ) -> dg.MaterializeResult:
        batch, role = partition_parts(context.partition_key)
        gate = gates.of_provenance(screened_data.provenance)
        if gate is not None:
            context.log.warning("batch %s is not scored: %s", batch, gate.sentence)
        pairs = [] if gate is not None else accepted_pairs(raw_data.frame, screened_data.frame)
        with storage.locks.hold("logprobs", batch, role):
            scored = model_runtime.score(role, pairs, storage, logger(context), start_logger(context))
        inputs = {"raw_data": raw_data, "screened_data": screened_data}
        metadata = {**scoring_metadata(scored), **gate_metadata(gate)}
        return table_result(context, scored.frame, inputs, metadata, **scored.provenance)

    return logprobs


def logger(context: dg.AssetExecutionContext) -> Callable[[Progress], None]:
    """Says in the run's log how far a scoring is."""

    def log(progress: Progress) -> None:
        context.log.info(
            "%s: %d of %d sequences, %d tokens/s, %.0f s left",
            progress.model,
            progress.done_sequences,
            progress.total_sequences,
            progress.tokens_per_second,
            progress.seconds_left,
        )

    return log


def start_logger(context: dg.AssetExecutionContext) -> Callable[[Estimate], None]:
    """Says in the run's log what a scoring will take."""

    def log(estimate: Estimate) -> None:
        context.log.info(
            "to score: %d sequences, %d tokens, %.3g FLOP; at a typical share of the matmul peak %.0f s",
            estimate.num_sequences,
            estimate.num_tokens,
            estimate.flops,
            estimate.seconds,
        )

    return log


def scoring_metadata(scored: ScoredPairs) -> dict[str, object]:
    """What a scoring did, for people."""
    report, frame = scored.report, scored.frame
    identity = scored.provenance["identity"]
    speed: dict[str, object] = {}
    if report.tokens_per_second is not None:
        speed = {
            "runner": report.runner,
            "processes": report.num_workers,
            "tokens_per_second": round(report.tokens_per_second, 1),
            "pairs_per_second": round(report.num_scored_pairs / report.seconds, 2),
            "computed_per_real_token": round(report.num_computed_tokens / report.num_tokens, 4),
        }
    if report.estimate is not None and math.isfinite(report.estimate.seconds):
        speed |= {"estimated_seconds": round(report.estimate.seconds, 1), "teraflop": report.estimate.flops / 1e12}
    if report.peak_share is not None:
        speed["share_of_matmul_peak"] = round(report.peak_share, 3)
    return {
        "model": identity["model"],
        "revision": identity["revision"],
        "dtype": identity["dtype"],
        "template_hash": identity["template_hash"],
        "identity_hash": scored.provenance["identity_hash"],
        "pairs": report.num_pairs,
        "pairs_scored": report.num_scored_pairs,
        "truncated_answers": int(frame["is_truncated"].sum()),
        "quantities_scored": report.num_scored_quantities,
        "quantities_from_cache": report.num_cached_quantities,
        "sequences": report.num_sequences,
        "tokens": report.num_tokens,
        "computed_tokens": report.num_computed_tokens,
        "batches_halved": report.num_splits,
        "seconds": round(report.seconds, 2),
        **speed,
        "null_reasons": {q.value: counts for q in Quantity if (counts := count_by(frame[f"null_reason_{q}"]))},
    }
