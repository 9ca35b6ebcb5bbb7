"""The Dagster definitions: assets, jobs, resources, executor, for the settings in force.

Belongs here: putting the parts together. Settings are read when the definitions are built, never at import.
"""

from collections.abc import Callable

import dagster as dg

from qaq_pipeline.assets import build_assets
from qaq_pipeline.config import Settings, load_settings
from qaq_pipeline.resources import ModelRuntime, TableIOManager, open_storage
from qaq_pipeline.scoring import Progress

STAGES: dict[str, list[str]] = {
    "ingest_batch": ["raw_data", "signatures", "screened_data"],
    "score_batch": ["logprobs", "rmi_scores"],
    "select_from_batch": ["disagreement_scores", "decisions", "selected_subset"],
    "publish_dataset": ["curated_dataset"],
}
"""Jobs in the order in which they run. A job cannot mix partitions definitions, hence four."""


def build_defs(
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
    storage = open_storage(settings)
    resources: dict[str, object] = {
        "storage": storage,
        "io_manager": TableIOManager(storage),
        "model_runtime": ModelRuntime(settings, on_progress),
    }
    return dg.Definitions(
        assets=build_assets(settings),
        jobs=[
            dg.define_asset_job(name, selection=dg.AssetSelection.assets(*assets)) for name, assets in STAGES.items()
        ],
        resources=resources | (resource_overrides or {}),
        executor=build_executor(settings),
    )


def build_executor(settings: Settings) -> dg.ExecutorDefinition:
    """Where steps run: in the run's process, or each in one of its own, one at a time."""
    if settings.runtime.executor == "in_process":
        return dg.in_process_executor
    return dg.multiprocess_executor.configured({"max_concurrent": 1, "start_method": {"forkserver": {}}})


@dg.definitions
def defs() -> dg.Definitions:
    """The code location: the definitions for `QAQ_CONFIG`."""
    return build_defs(load_settings())
