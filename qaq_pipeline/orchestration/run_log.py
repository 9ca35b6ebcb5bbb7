"""Messages of assets in the log of their run: the progress of a scoring, and the verdict of a gate with its alert."""

from collections.abc import Callable

import dagster as dg

from qaq_pipeline.config.settings import AlertSettings
from qaq_pipeline.orchestration import alerts
from qaq_pipeline.scoring.logprobs import Estimate, Progress
from qaq_pipeline.screening.gates import Gate


def on_shard(context: dg.AssetExecutionContext) -> Callable[[Progress], None]:
    """A function that logs how far a scoring is."""

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


def on_start(context: dg.AssetExecutionContext) -> Callable[[Estimate], None]:
    """A function that logs the estimated work of a scoring."""

    def log(estimate: Estimate) -> None:
        context.log.info(
            "to score: %d sequences, %d tokens, %.3g FLOP; at a typical share of the matmul peak %.0f s",
            estimate.num_sequences,
            estimate.num_tokens,
            estimate.flops,
            estimate.seconds,
        )

    return log


def report_gate(context: dg.AssetExecutionContext, settings: AlertSettings, gate: Gate | None, *, is_new: bool) -> None:
    """Log the verdict of a gated batch, and send an alert of a new one."""
    if gate is None:
        return
    context.log.warning("batch %s is gated: %s", context.partition_key, gate.sentence)
    if is_new:
        alert = alerts.gated(context.partition_key, gate, context.run.run_id)
        for failure in alerts.send(alert, settings):
            context.log.error(failure)
