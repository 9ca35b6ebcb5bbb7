"""Read the results of a finished run from Dagster's event log: failed checks, and metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import dagster as dg

from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.partition import Partition

Results = dict[tuple[str, Partition | None], dict[str, Any]]
"""The metadata of each asset that was made, by the asset's name and partition."""

_REPORTED_ELSEWHERE = (("disagreement_scores", "strata_are_filled"), ("curated_dataset", "every_batch_is_in_it"))
"""Checks whose assets report the same as a warning."""


def failed_checks(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    """A sentence for each asset check that failed in the run, except those reported elsewhere."""
    events = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
    found = (record.event_log_entry.dagster_event for record in events)
    return unpassed(event.asset_check_evaluation_data for event in found if event is not None)


def unpassed(evaluations: Iterable[dg.AssetCheckEvaluation]) -> list[str]:
    """A sentence for each of the evaluations that failed, except those reported elsewhere."""
    found = []
    for evaluation in evaluations:
        asset, name, partition = evaluation.asset_key.to_user_string(), evaluation.check_name, evaluation.partition
        if not evaluation.passed and (asset, name) not in _REPORTED_ELSEWHERE:
            place = asset if partition is None else f"{asset} of {partition}"
            found.append(f"check {name} of {place}: {evaluation.description}")
    return found


def materialisation_metadata(instance: dg.DagsterInstance, run_id: str, asset: str) -> dict[str, Any]:
    """The metadata of the asset's materialisation in the run. Raises `RunError` if there is none."""
    events = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    for record in events:
        materialisation = record.asset_materialization
        if materialisation and materialisation.asset_key == dg.AssetKey(asset):
            return {name: value.value for name, value in materialisation.metadata.items()}
    raise RunError(f"run {run_id} succeeded without materialising {asset}; see its log in the UI")
