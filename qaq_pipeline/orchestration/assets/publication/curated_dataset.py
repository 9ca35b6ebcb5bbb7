"""The asset curated_dataset: all batches' selections, published as one version."""

from datetime import timedelta
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import HOLDS_TEXT, OWNERS, code_version
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.publication import exports, versions
from qaq_pipeline.publication.curated_dataset import Publication, publish, read_batches
from qaq_pipeline.publication.withdrawn import withdrawn_batches
from qaq_pipeline.storage.storage import Storage

VERSION = "3"


def build_curated_dataset(settings: Settings) -> dg.AssetsDefinition:
    """curated_dataset: unpartitioned; publishing the same content twice is a no-op."""
    exports.check_installed(settings.export.formats)

    @dg.asset(
        description=(
            "The published selection of every complete batch, and random controls of its size, as files for "
            "training, under the hash of their manifest. A version is never overwritten; publications.json lists "
            "them in order, each with the batches left out."
        ),
        deps=["raw_data", "screened_data", "decisions", "selected_subset"],
        owners=OWNERS,
        tags=HOLDS_TEXT,
        group_name="publication",
        kinds={"json", "parquet"},
        code_version=code_version(VERSION, settings.published, settings.export, settings.publication),
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=timedelta(hours=settings.automation.stale_after_hours)
        ),
    )
    def curated_dataset(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        registered = context.instance.get_dynamic_partitions(str(BATCHES.name))
        with versions.lock(storage):
            batches, excluded = read_batches(storage, registered, settings)
            # Withdrawn content has to go even if nothing is left.
            if not batches and not withdrawn_batches(storage, versions.latest(storage)):
                why = "; ".join(f"{batch}: {reason}" for batch, reason in excluded.items()) or "none is registered"
                raise dg.Failure(f"curated_dataset: no batch can be published; {why}", allow_retries=False)
            published = publish(storage, settings, batches, excluded, context.run.run_id)
        return _result(context, published, excluded)

    return curated_dataset


def _result(
    context: dg.AssetExecutionContext, published: Publication, excluded: dict[str, str]
) -> dg.MaterializeResult:
    if not published.is_new:
        context.log.info("version %s was published before; no file is written", published.version)
    for version in published.retired:
        context.log.info("version %s: its files were removed; its manifest is kept in retired/", version)
    entries = published.manifest["batches"]
    return dg.MaterializeResult(
        data_version=dg.DataVersion(published.version),
        metadata={
            "version": published.version,
            "is_new_version": published.is_new,
            "path": dg.MetadataValue.path(published.url),
            "dagster/row_count": sum(entry["rows_selected"] for entry in entries),
            "rows_in": sum(entry["rows_in"] for entry in entries),
            "batches": [entry["batch"] for entry in entries],
            "excluded_batches": excluded,
            **_difference_metadata(published),
            "made_from": _made_from(published),
            "lineage": f"qaq lineage {published.version} --verify",
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


def _difference_metadata(published: Publication) -> dict[str, Any]:
    """Numbers of rows that entered and left since the previous version, by cause."""
    found = published.difference
    if found is None:
        return {}
    counts = found.group_by("is_added", "change").len().sort("is_added", "change", descending=[True, False])
    return {
        "previous_version": published.previous,
        "rows_entered": int(found["is_added"].sum()),
        "rows_left": int((~found["is_added"]).sum()),
        "changes": {f"{'entered' if added else 'left'}: {why}": n for added, why, n in counts.iter_rows()},
    }
