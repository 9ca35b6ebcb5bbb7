"""The asset dataset_report: the audit page of the newest version."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.assets.audit.batch_report import made_by
from qaq_pipeline.orchestration.metadata import HOLDS_TEXT, OWNERS, code_version, pictures
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store, plots, summaries
from qaq_pipeline.storage.storage import Storage

VERSION = "3"


def build_dataset_report(settings: Settings) -> dg.AssetsDefinition:
    """dataset_report: unpartitioned; one HTML page a version, outside the version's hash."""

    @dg.asset(
        description=(
            "The audit page of the newest published version, one file that needs no network: its batches and those "
            "left out, what entered and left, the selection and its controls, plots, its files with their sha256, and "
            "what each column of them is made of."
        ),
        deps=["curated_dataset"],
        owners=OWNERS,
        tags=HOLDS_TEXT,
        group_name="audit",
        kinds={"html"},
        code_version=code_version(VERSION, settings.ranking.reference),
    )
    def dataset_report(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        newest = versions.latest(storage)
        if newest is None:
            raise dg.Failure(
                "dataset_report: nothing is published yet; materialise curated_dataset", allow_retries=False
            )
        version = newest.version
        flat = page_store.write_version_page(storage, settings, version, made_by(context))

        def draw() -> list[plots.Plot]:
            by_batch = summaries.kept_by(flat, "batch")
            return [plots.flow(summaries.flow(flat)), plots.kept("kept_batch", by_batch, "batch")]

        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "version": version,
                "page": dg.MetadataValue.path(storage.files.url(*versions.page_place(version))),
                **pictures(context, settings, draw),
            },
        )

    return dataset_report
