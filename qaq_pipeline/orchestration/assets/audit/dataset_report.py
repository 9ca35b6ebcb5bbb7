"""The asset dataset_report: the audit page of the newest version."""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import asset, made_by, pictures
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.curated_dataset import NothingToPublishError
from qaq_pipeline.reports import page_store, pages
from qaq_pipeline.storage.storage import Storage

VERSION = "5"


def build_dataset_report(settings: Settings) -> dg.AssetsDefinition:
    """dataset_report: unpartitioned; one HTML page a version, outside the version's hash."""

    @asset(settings, VERSION, reads=[settings.ranking.reference], kinds={"html"})
    def dataset_report(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        """The audit page of the newest published version, one file that needs no network: its batches and those left
        out, what entered and left, the selection and its controls, plots, its files with their sha256, and what each
        column of them is made of.
        """
        newest = versions.latest(storage)
        if newest is None:
            raise NothingToPublishError("dataset_report: nothing is published yet; materialise curated_dataset")
        version = newest.version
        flat = page_store.write_version_page(storage, version, settings, made_by(context))

        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "version": version,
                "page": dg.MetadataValue.path(storage.files.url(*versions.page_place(version))),
                **pictures(context, settings, lambda: pages.dataset_overview(flat)),
            },
        )

    return dataset_report
