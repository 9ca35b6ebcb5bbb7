"""Read the results of a finished run from Dagster's event log: failed checks, and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.partition import Partition

Results = dict[tuple[str, Partition | None], dict[str, Any]]
"""The metadata of each asset that was made, by the asset's name and partition."""

_WORK = {"quantities_scored": 0, "tokens": 0, "seconds": 0.0, "is_new_version": False}
"""Metadata of the work of a run, as they are where nothing had to be done."""

_REPORTED_ELSEWHERE = (("disagreement_scores", "strata_are_filled"), ("curated_dataset", "every_batch_is_in_it"))
"""Checks whose assets report the same as a warning."""


def failed_checks(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    """A sentence for each asset check that failed in the run, except those reported elsewhere."""
    events = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
    found = []
    for record in events:
        event = record.event_log_entry.dagster_event
        evaluation = event.asset_check_evaluation_data if event else None
        if evaluation is None or evaluation.passed:
            continue
        asset = evaluation.asset_key.to_user_string()
        if (asset, evaluation.check_name) not in _REPORTED_ELSEWHERE:
            where = f"{asset} of {evaluation.partition}" if evaluation.partition else asset
            found.append(f"check {evaluation.check_name} of {where}: {evaluation.description}")
    return found


def materialisation_metadata(instance: dg.DagsterInstance, run_id: str, asset: str) -> dict[str, Any]:
    """The metadata of the asset's materialisation in the run. Raises `RunError` if there is none."""
    events = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    for record in events:
        materialisation = record.asset_materialization
        if materialisation and materialisation.asset_key == dg.AssetKey(asset):
            return {name: value.value for name, value in materialisation.metadata.items()}
    raise RunError(f"run {run_id} succeeded without materialising {asset}; see its log in the UI")


def repeated(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an earlier run whose result still holds: nothing was scored or published now."""
    scored = metadata.get("quantities_scored", 0)
    cached = {name: value + scored for name, value in metadata.items() if name == "quantities_from_cache"}
    return {**metadata, **cached, **{name: value for name, value in _WORK.items() if name in metadata}}
