"""The asset curated_dataset: all batches' selections, published as one version."""

from datetime import timedelta

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.orchestration.partitions import BATCHES, VERSIONS
from qaq_pipeline.publication import exports, versions
from qaq_pipeline.publication.curated_dataset import Publication, publish, read_batches, require_batches
from qaq_pipeline.reports.table_numbers import of_publication
from qaq_pipeline.storage.storage import Storage

VERSION = "3"


def build_curated_dataset(settings: Settings) -> dg.AssetsDefinition:
    """curated_dataset: unpartitioned; publishing the same content twice is a no-op."""
    exports.check_installed(settings.export.written)

    @asset(
        settings,
        VERSION,
        reads=[settings.published, settings.export, settings.publication],
        kinds={"json", "parquet"},
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=timedelta(hours=settings.automation.stale_after_hours)
        ),
    )
    def curated_dataset(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        """The published selection of every complete batch, and random controls of its size, as files for training,
        under the hash of their manifest. A version is never overwritten; publications.json lists them in order, each
        with the batches left out.
        """
        registered = context.instance.get_dynamic_partitions(str(BATCHES.name))
        with versions.lock(storage):
            batches, excluded = read_batches(storage, registered, settings)
            require_batches(storage, batches, excluded)
            published = publish(storage, settings, batches, excluded, context.run.run_id)
        context.instance.add_dynamic_partitions(str(VERSIONS.name), [published.version])
        return _result(context, published, excluded, settings.reports.rows_of_version(published.version))

    return curated_dataset


def _result(
    context: dg.AssetExecutionContext, published: Publication, excluded: dict[str, str], rows: str
) -> dg.MaterializeResult:
    if not published.is_new:
        context.log.info("version %s was published before; no file is written", published.version)
    for version in published.retired:
        context.log.info("version %s: its files were removed; its manifest is kept in retired/", version)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(published.version),
        metadata={
            **of_publication(published, excluded),
            "path": dg.MetadataValue.path(published.url),
            "rows": dg.MetadataValue.url(rows),
            "made_from": _made_from(published),
            "manifest": dg.JsonMetadataValue(published.manifest),
        },
    )


def _made_from(published: Publication) -> dg.TableMetadataValue:
    """Data versions of the tables behind each batch, as their materialisations show them."""
    records = [
        dg.TableRecord({"batch": entry["batch"], "table": table, "data_version": version})
        for entry in published.manifest["batches"]
        for table, version in sorted(entry["data_versions"].items())
    ]
    columns = [dg.TableColumn(name) for name in ("batch", "table", "data_version")]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns))
