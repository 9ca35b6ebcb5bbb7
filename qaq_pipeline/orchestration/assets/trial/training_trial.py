"""The asset training_trial[version]: does what is published train better than its random controls?"""

from dataclasses import replace
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.executors import gpus_to_train, on_gpu
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, made_by, pictures
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store, trial_page
from qaq_pipeline.schema.partition import Input, Partition
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.trial.trial import TrialPlan, TrialRuntime

VERSION = "1"


def build_training_trial(settings: Settings) -> dg.AssetsDefinition:
    """training_trial[version]: the losses of the trained models, with a page and the verdicts for the card."""
    model = settings.models[settings.trial.model].model_dump(exclude={"device", "gpus"})

    limits = settings.scoring.model_dump(include={"max_tokens", "too_long"})

    @asset(settings, VERSION, reads=[settings.trial, model, limits], **on_gpu(settings, gpus_to_train(settings)))
    def training_trial(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        trial_runtime: dg.ResourceParam[TrialRuntime],
    ) -> dg.MaterializeResult:
        version = context.partition_key
        plan = trial_runtime.plan(storage, version)
        trial = trial_runtime.run(plan, storage, context.log.info)
        shown = trial_page.Shown(version, plan.published, trial.frame, trial.runs, plan.facts)
        metadata: dict[str, Any] = {
            "verdict": shown.verdict,
            "comparisons": list(shown.sentences),
            "table": dg.MetadataValue.md(trial_page.as_markdown(shown)),
            "trainings": len(plan.trainings),
            "trainings_from_store": trial.num_stored,
            **pictures(context, settings, lambda: [trial_page.differences(shown)]),
        }
        page = versions.trial_page_place(version)
        if settings.reports.pages:
            metadata["page"] = dg.MetadataValue.path(storage.files.url(*page))
        result = table_result(context, trial.frame, _inputs(plan), metadata, runs=trial.runs, **plan.facts)
        assert result.value is not None
        storage.tables.write(result.value, "training_trial", Partition(version))  # Before what is derived from it.
        storage.files.write_bytes(trial_page.note(shown), *versions.trial_note_place(version))
        if settings.reports.pages:
            storage.files.write_bytes(trial_page.page(shown, made_by(context)), *page)
            page_store.write_version_page(storage, version, settings, made_by(context))
        return result

    return training_trial


def _inputs(plan: TrialPlan) -> dict[str, Any]:
    """The tables of the version's batches by the names that provenance gives to inputs."""
    return {
        str(replace(Input.parse(name), batch=batch)): table
        for batch, found in plan.made_of.items()
        for name, table in found.items()
    }
