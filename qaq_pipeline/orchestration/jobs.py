"""The assets, their jobs, resources and executor, for the settings given: what a run needs.

Belongs here: putting these together. Does not belong here: when a run is started (`automation`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dagster as dg

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness.staleness import Present
from qaq_pipeline.orchestration import conditions, liveness
from qaq_pipeline.orchestration.assets import build_assets, made_under
from qaq_pipeline.orchestration.checks import build_checks
from qaq_pipeline.orchestration.executors import build_executor, check_op_tags, run_tags
from qaq_pipeline.orchestration.io_manager import TableIOManager
from qaq_pipeline.pipeline import PIPELINE, Pipeline, Purpose
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline.trial.trial import TrialProgress, TrialRuntime

CURATING = (Purpose.CURATION, Purpose.PAGE, Purpose.PUBLICATION)
"""The purposes of the jobs that curate and publish a batch. Calibration follows, and its failure stops nothing."""


def build_job_defs(
    settings: Settings,
    *,
    pipeline: Pipeline = PIPELINE,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_training: Callable[[TrialProgress], None] = lambda _: None,
    resource_overrides: dict[str, object] | None = None,
) -> dg.Definitions:
    """Fresh definitions.

    Args:
        settings: everything that can be configured.
        pipeline: the assets and their jobs.
        on_progress: called after every scored batch, where steps run in this process.
        on_training: called after every logged training step, where steps run in this process.
        resource_overrides: resources to use instead, by name.
    """
    check_op_tags(settings.runtime, [asset.name for asset in pipeline.assets])
    made = made_under(settings, pipeline)
    storage = open_storage(settings, pipeline)
    resources: dict[str, object] = {
        "storage": storage,
        "io_manager": TableIOManager(storage, settings.runtime),
        "model_runtime": _model_runtime(settings, on_progress),
        "trial_runtime": TrialRuntime(settings, on_training),
    }
    return dg.Definitions(
        assets=conditions.automate(build_assets(settings, pipeline), made),
        asset_checks=build_checks(settings),
        jobs=[
            dg.define_asset_job(name, selection=dg.AssetSelection.assets(*assets), run_tags=run_tags(settings.runtime))
            for name, assets in made.jobs().items()
        ],
        resources=resources | (resource_overrides or {}),
        executor=liveness.in_living_process(
            build_executor(settings.runtime), liveness.run_locks(settings), settings_hash(settings)
        ),
    )


def _model_runtime(settings: Settings, on_progress: Callable[[Progress], None]) -> dg.ResourceDefinition:
    """The resource of the models. Between the steps of a run in one process, a model stays loaded."""
    runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir, on_progress)

    def keep(_: dg.InitResourceContext) -> Iterator[ModelRuntime]:
        with runtime.keeping_loaded():
            yield runtime

    return dg.ResourceDefinition(contextmanager(keep))


def present(settings: Settings, storage: Storage, pipeline: Pipeline = PIPELINE) -> Present:
    """How the tables would be made now, for a review of what is stored."""
    assets = build_assets(settings, pipeline)
    versions = {asset.key.to_user_string(): asset.code_versions_by_key[asset.key] for asset in assets}
    shared_inputs = {}
    if settings.ranking.pool == "reference":
        reference = Partition(stored_reference.named(settings.ranking).name)
        for table in pipeline.tables(Purpose.REFERENCE):
            if version := storage.tables.version(table, reference):
                shared_inputs[table] = version
    benchmarks = {one.name: one.path for one in settings.screening.contamination.benchmarks}
    imported = {one.name: one.path for one in settings.tables_read}
    return Present(versions, sorted(settings.models), shared_inputs, benchmarks, imported)
