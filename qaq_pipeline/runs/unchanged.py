"""Whether a run of a batch would repeat what is stored, so that nothing has to run.

Belongs here: what must be as it was, and the results of the runs that made it. Does not belong here: running anything
(`run_batch`), and which stage is stale (`freshness.staleness`).

It is all or nothing: if anything may come out otherwise, every stage runs, and finds its scores in the cache. A stage
whose own inputs are the same cannot be left out alone, because its stored result may be damaged, half of a model's
scores, or a failure that the next run may not meet again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from dagster._core.event_api import PartitionKeyFilter

from qaq_pipeline.freshness.staleness import Present
from qaq_pipeline.orchestration.checks import evaluate
from qaq_pipeline.orchestration.materialisation import newest_materialisation
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.publication import curated_dataset, versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.run_results import Results, unpassed
from qaq_pipeline.runs.status import batches_left_out
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.vocabularies import NullReason

_OF_THE_MACHINE = {reason.value for reason in (NullReason.OUT_OF_MEMORY, NullReason.WORKER_LOST, NullReason.NON_FINITE)}
"""Reasons of missing scores that another run may not meet."""

_WORK = {"quantities_scored": 0, "tokens": 0, "seconds": 0.0, "is_new_version": False}
"""Metadata of the work of a run, as they are where nothing had to be done."""


def stored_results(deployment: Deployment, batch: str) -> tuple[Results, list[str]] | None:
    """The results of the runs that made what is stored of a batch; None: a run may give something else.

    Returns:
        the results, which say that nothing was scored or published, as another run would, and a sentence for each
        check that failed.
    """
    freshness = deployment.freshness()
    is_same = (
        not freshness.stale(batch)
        and not freshness.has_unreadable_benchmark()
        and all(freshness.stale_screening(other) is None for other in freshness.batches())
        and _is_published(deployment, freshness.present)
        and _has_pages(deployment, batch, freshness.present)
        and _are_same_models(deployment, batch)
    )
    if not is_same:
        return None
    results: Results = {}
    for name, partition, version in _stored(deployment, batch):
        recorded = newest_materialisation(
            deployment.instance, dg.AssetKey(name), None if partition is None else partition.key
        )
        if recorded is None or version is None or recorded.data_version != version or _may_succeed(recorded.metadata):
            return None
        results[name, partition] = _repeated(recorded.metadata)
    evaluations = list(evaluate(deployment.settings, deployment.storage, deployment.batches, batch))
    if not all(_is_recorded(deployment.instance, evaluation) for evaluation in evaluations):
        return None
    return results, unpassed(evaluations)


def _stored(deployment: Deployment, batch: str) -> Iterator[tuple[str, Partition | None, str | None]]:
    """Each stored asset of a batch, and the published version, with its data version; None: any byte was changed."""
    tables, newest = deployment.storage.tables, versions.latest(deployment.storage)
    for name in deployment.pipeline.tables(Purpose.CURATION, Purpose.CALIBRATION):
        for partition in deployment.partitions(name, batch):
            yield name, partition, tables.version(name, partition) if not tables.fault(name, partition) else None
    yield "curated_dataset", None, None if newest is None else newest.version


def _is_published(deployment: Deployment, present: Present) -> bool:
    """Whether a publication would write and record what the newest one did."""
    storage, newest = deployment.storage, versions.latest(deployment.storage)
    if newest is None or newest.excluded_batches != batches_left_out(deployment):
        return False
    recorded = newest_materialisation(deployment.instance, dg.AssetKey("curated_dataset"), None)
    return (
        recorded is not None
        and recorded.code_version == present.code_versions["curated_dataset"]
        and curated_dataset.is_current(storage, deployment.batches, deployment.settings)
    )


def _has_pages(deployment: Deployment, batch: str, present: Present) -> bool:
    """Whether the pages of the batch and of the newest version show what is stored, or none are wanted."""
    if not deployment.settings.reports.pages:
        return True
    storage, newest = deployment.storage, versions.latest(deployment.storage)
    return (
        newest is not None
        and not page_store.is_stale(storage, batch, present.code_versions["batch_report"])
        and storage.files.exists(*versions.page_place(newest.version))
    )


def _are_same_models(deployment: Deployment, batch: str) -> bool:
    """Whether each model that scored is the one that would score now: its files can change under one name."""
    for name in deployment.pipeline.tables(Purpose.CURATION):
        for partition in deployment.partitions(name, batch) if PIPELINE[name].has_models else ():
            scored = deployment.storage.tables.footer(name, partition).provenance
            now = deployment.model_runtime.identity(str(partition.model)).digest()
            if scored["identity_hash"] != now or "identity_after" in scored:
                return False
    return True


def _is_recorded(instance: dg.DagsterInstance, evaluation: dg.AssetCheckEvaluation) -> bool:
    """Whether the newest evaluation of a check in the event log found the same: limits and references can change."""
    key = evaluation.asset_check_key
    of_partition = PartitionKeyFilter(key=evaluation.partition)
    newest = instance.event_log_storage.get_latest_asset_check_execution_by_key([key], of_partition).get(key)
    recorded = None if newest is None else newest.evaluation
    return recorded is not None and (recorded.passed, recorded.metadata) == (evaluation.passed, evaluation.metadata)


def _may_succeed(metadata: Mapping[str, Any]) -> bool:
    """Whether a scoring failed for some pairs for a reason that another run may not meet."""
    counts = metadata.get("null_reasons", {})
    return any(_OF_THE_MACHINE & reasons.keys() for reasons in counts.values())


def _repeated(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as another run would give it: everything in the cache, and nothing published anew."""
    scored = metadata.get("quantities_scored", 0)
    cached = {name: value + scored for name, value in metadata.items() if name == "quantities_from_cache"}
    return {**metadata, **cached, **{name: value for name, value in _WORK.items() if name in metadata}}
