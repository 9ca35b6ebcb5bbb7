"""Read the results of a finished run from Dagster's event log: failed checks, and metadata."""

from __future__ import annotations

from typing import Any

import dagster as dg

from qaq_pipeline.orchestration.checks import evaluate
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.partition import Partition

Results = dict[tuple[str, Partition | None], dict[str, Any]]
"""The metadata of each asset that was made, by the asset's name and partition."""

_REPORTED_ELSEWHERE = (("disagreement_scores", "strata_are_filled"), ("curated_dataset", "every_batch_is_in_it"))
"""Checks whose assets report the same as a warning."""


def failed_checks(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    """A sentence for each asset check that failed in the run, except those reported elsewhere."""
    events = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
    found = []
    for record in events:
        event = record.event_log_entry.dagster_event
        evaluation = event.asset_check_evaluation_data if event else None
        if evaluation is not None and not evaluation.passed:
            asset, name = evaluation.asset_key.to_user_string(), evaluation.check_name
            found += _of_check(asset, name, evaluation.partition, evaluation.description)
    return found


def unpassed_checks(deployment: Deployment, batch: str) -> list[str]:
    """The same of the checks as they would be evaluated now, of the tables of a batch and of the published version."""
    found = []
    for asset, partition, name, finding in evaluate(deployment.settings, deployment.storage, deployment.batches, batch):
        if not finding.passed:
            found += _of_check(asset, name, None if partition is None else partition.key, finding.sentence)
    return found


def _of_check(asset: str, name: str, partition: str | None, description: str | None) -> list[str]:
    if (asset, name) in _REPORTED_ELSEWHERE:
        return []
    return [f"check {name} of {asset if partition is None else f'{asset} of {partition}'}: {description}"]


def materialisation_metadata(instance: dg.DagsterInstance, run_id: str, asset: str) -> dict[str, Any]:
    """The metadata of the asset's materialisation in the run. Raises `RunError` if there is none."""
    events = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    for record in events:
        materialisation = record.asset_materialization
        if materialisation and materialisation.asset_key == dg.AssetKey(asset):
            return {name: value.value for name, value in materialisation.metadata.items()}
    raise RunError(f"run {run_id} succeeded without materialising {asset}; see its log in the UI")
