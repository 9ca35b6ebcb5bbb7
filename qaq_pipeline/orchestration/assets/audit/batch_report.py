"""The asset batch_report[batch]: the audit page of a batch."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import asset, made_by, pictures
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.reports import page_store, pages
from qaq_pipeline.reports.pages import Scoring
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable

VERSION = "5"
_MOST_MATERIALISATIONS = 20


def build_batch_report(settings: Settings) -> dg.AssetsDefinition:
    """batch_report[batch]: one HTML page; nothing is made from it."""

    @asset(
        settings,
        VERSION,
        reads=[settings.published, settings.ranking.reference, settings.reports.examples, settings.is_calibrated],
        kinds={"html"},
    )
    def batch_report(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        screened_data: StoredTable,
        rmi_scores: dict[str, StoredTable],
        decisions: StoredTable,
        selected_subset: StoredTable,
    ) -> dg.MaterializeResult:
        """The audit page of a batch, one file that needs no network: what became of every row, what made the scores,
        the selection and its controls, plots, examples of both tails and of each reason, and what each column is made
        of.
        """
        batch = context.partition_key
        rows = {"raw_data": raw_data, "screened_data": screened_data}
        tables = BatchTables(batch, rows | {"decisions": decisions, "selected_subset": selected_subset})
        page_store.require_one_decision(tables, settings.published)
        scorings = [
            Scoring(role, table, _cost(context, Partition(batch, role), table))
            for role, table in sorted(rmi_scores.items())
        ]
        version, flat = page_store.write_batch_page(
            storage,
            tables,
            scorings,
            settings.published,
            settings.ranking.reference,
            settings.reports,
            made_by(context),
            is_calibrated=settings.is_calibrated,
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "page": dg.MetadataValue.path(storage.files.url(*page_store.batch_page(batch))),
                **pictures(context, settings, lambda: pages.batch_overview(flat)),
            },
        )

    return batch_report


def _cost(context: dg.AssetExecutionContext, partition: Partition, scores: StoredTable) -> Mapping[str, Any] | None:
    """Metadata of the newest scoring under the same identity that scored something: a later one may find all cached."""
    wanted = dg.AssetRecordsFilter(dg.AssetKey("logprobs"), asset_partitions=[partition.key])
    for record in context.instance.fetch_materializations(wanted, limit=_MOST_MATERIALISATIONS).records:
        event = record.asset_materialization
        found = {} if event is None else {name: value.value for name, value in event.metadata.items()}
        is_same = found.get("identity_hash") == scores.provenance.get("identity_hash")
        if is_same and found.get("quantities_scored"):
            return found
    return None
