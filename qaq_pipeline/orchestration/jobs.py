"""The assets, their jobs, resources and executor, for the settings given: what a run needs.

Belongs here: putting these together. Does not belong here: when a run is started (`automation`).
"""

from collections.abc import Callable

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness import staleness
from qaq_pipeline.freshness.staleness import Present
from qaq_pipeline.orchestration import conditions
from qaq_pipeline.orchestration.assets import build_assets
from qaq_pipeline.orchestration.checks import build_checks
from qaq_pipeline.orchestration.io_manager import TableIOManager
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import Storage, open_storage

SELECTING = "select_from_batch"
PUBLISHING = "publish_dataset"
REPORTING, REPORTING_VERSION = "report_batch", "report_version"
PAGES = {REPORTING: ["batch_report"], REPORTING_VERSION: ["dataset_report"]}
"""Jobs of the audit pages. Nothing is made of a page, so that one that fails stops nothing."""

STAGES: dict[str, list[str]] = {
    **staleness.STAGES,
    REPORTING: PAGES[REPORTING],
    PUBLISHING: ["curated_dataset"],
    REPORTING_VERSION: PAGES[REPORTING_VERSION],
}
"""Jobs in the order in which they run. A job cannot mix partitions definitions, hence several."""

CALIBRATION_STAGES = staleness.CALIBRATION_STAGES
"""Jobs that run after these, where batches are calibrated: their failure stops no publication."""

REFERENCE_JOB = "build_reference"
"""Makes rank_reference, where one is configured."""


def build_job_defs(
    settings: Settings,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    resource_overrides: dict[str, object] | None = None,
) -> dg.Definitions:
    """Fresh definitions.

    Args:
        settings: everything that can be configured.
        on_progress: called after every scored batch, where steps run in this process.
        resource_overrides: resources to use instead, by name.
    """
    jobs = {name: assets for name, assets in STAGES.items() if settings.reports.pages or name not in PAGES}
    jobs |= {} if settings.ranking.reference is None else {REFERENCE_JOB: ["rank_reference"]}
    jobs |= CALIBRATION_STAGES if settings.is_calibrated else {}
    storage = open_storage(settings)
    resources: dict[str, object] = {
        "storage": storage,
        "io_manager": TableIOManager(storage),
        "model_runtime": ModelRuntime(settings, on_progress),
    }
    return dg.Definitions(
        assets=conditions.automate(build_assets(settings)),
        asset_checks=build_checks(settings),
        jobs=[dg.define_asset_job(name, selection=dg.AssetSelection.assets(*assets)) for name, assets in jobs.items()],
        resources=resources | (resource_overrides or {}),
        executor=build_executor(settings),
    )


def present(settings: Settings, storage: Storage) -> Present:
    """How the tables would be made now, for a review of what is stored."""
    assets = build_assets(settings)
    versions = {asset.key.to_user_string(): asset.code_versions_by_key[asset.key] for asset in assets}
    return Present(versions, sorted(settings.models), _shared_inputs(settings, storage))


def _shared_inputs(settings: Settings, storage: Storage) -> dict[str, str]:
    """Data versions of the inputs of a batch's tables that are of no one batch: the reference of the ranks."""
    wanted = settings.ranking.reference
    if settings.ranking.pool != "reference" or wanted is None:
        return {}
    version = storage.table_version("rank_reference", wanted.name)
    return {} if version is None else {"rank_reference": version}


def build_executor(settings: Settings) -> dg.ExecutorDefinition:
    """Where steps run: in the run's process, or each in one of its own, one at a time."""
    if settings.runtime.executor == "in_process":
        return dg.in_process_executor
    return dg.multiprocess_executor.configured({"max_concurrent": 1, "start_method": {"forkserver": {}}})
