"""Messages of assets in the log of their run: the progress of a scoring, and the verdict of a gate with its alert."""

import dagster as dg

from qaq_pipeline.config.settings import AlertSettings
from qaq_pipeline.orchestration import alerts
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ModelRuntime, ScoredPairs
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.storage.storage import Storage


def score(context: dg.AssetExecutionContext, storage: Storage, runtime: ModelRuntime, pairs: Pairs) -> ScoredPairs:
    """Score pairs under the model of the partition, which is locked meanwhile; log the estimate and the progress."""
    partition = Partition.parse(context.partition_key)
    with storage.locks.hold(context.asset_key.path[-1], *partition.parts):
        return runtime.score(
            str(partition.model),
            pairs,
            storage,
            lambda progress: context.log.info("%s: %s", progress.model, progress.sentence),
            lambda estimate: context.log.info("to score: %s", estimate.sentence),
        )


def report_gate(context: dg.AssetExecutionContext, settings: AlertSettings, gate: Gate | None, *, is_new: bool) -> None:
    """Log the verdict of a gated batch, and send an alert of a new one."""
    if gate is None:
        return
    context.log.warning("batch %s is gated: %s", context.partition_key, gate.sentence)
    if is_new:
        alerts.send(alerts.gated(context.partition_key, gate, context.run.run_id), settings, context.log)
