"""The asset batch_report[batch]: the audit page of a batch."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import HOLDS_TEXT, OWNERS, code_version, pictures
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.results import require_inputs
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.reports import page_store, pages, plots, summaries
from qaq_pipeline.reports.pages import Made, Scoring
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable

VERSION = "3"
_MOST_MATERIALISATIONS = 20


def build_batch_report(settings: Settings) -> dg.AssetsDefinition:
    """batch_report[batch]: one HTML page; nothing is made of it."""

    @dg.asset(
        description=(
            "The audit page of a batch, one file that needs no network: what became of every row, what made the "
            "scores, the selection and its controls, plots, examples of both tails and of each reason, and what each "
            "column is made of."
        ),
        owners=OWNERS,
        tags=HOLDS_TEXT,
        group_name="audit",
        kinds={"html"},
        partitions_def=BATCHES,
        code_version=code_version(
            VERSION,
            settings.published,
            settings.ranking.reference,
            settings.reports.examples,
            settings.is_calibrated,
        ),
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
        rows = {"raw_data": raw_data, "screened_data": screened_data}
        require_inputs("decisions", decisions, rows, decisions.provenance["inputs"])
        require_inputs(
            "selected_subset", selected_subset, {"decisions": decisions}, selected_subset.provenance["inputs"]
        )
        if decisions.provenance["published_hash"] != settings_hash(settings.published):
            raise dg.Failure(
                f"batch {context.partition_key} was decided by another published selection than the settings name; run "
                "`qaq refresh`",
                allow_retries=False,
            )
        batch = context.partition_key
        tables = BatchTables(batch, rows | {"decisions": decisions, "selected_subset": selected_subset})
        scorings = [
            Scoring(role, table.provenance, table.frame, _cost(context, f"{batch}|{role}", table))
            for role, table in sorted(rmi_scores.items())
        ]
        version = page_store.write_batch_page(storage, settings, tables, scorings, made_by(context))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "page": dg.MetadataValue.path(storage.files.url(*page_store.batch_page(batch))),
                **pictures(context, settings, lambda: _drawn(tables)),
            },
        )

    return batch_report


def made_by(context: dg.AssetExecutionContext) -> Made:
    """Who makes a page, and when."""
    version = context.assets_def.code_versions_by_key[context.asset_key]
    return Made(datetime.now(UTC).isoformat(timespec="seconds"), context.run.run_id, version or "")


def _drawn(tables: BatchTables) -> list[plots.Plot]:
    flat = pages.with_origin(flat_scores(tables["decisions"].frame), tables["raw_data"].frame)
    pairs = summaries.pairs(flat)
    return [
        plots.flow(summaries.flow(flat)),
        plots.overlap(summaries.overlap(flat)),
        plots.ranks(summaries.rank_grid(pairs), is_selected=True),
        *pages.length_plots(pairs),
    ]


def _cost(context: dg.AssetExecutionContext, partition: str, scores: StoredTable) -> Mapping[str, Any] | None:
    """What the newest scoring took that scored something under the same identity: a later one may find all cached."""
    wanted = dg.AssetRecordsFilter(dg.AssetKey("logprobs"), asset_partitions=[partition])
    for record in context.instance.fetch_materializations(wanted, limit=_MOST_MATERIALISATIONS).records:
        event = record.asset_materialization
        found = {} if event is None else {name: value.value for name, value in event.metadata.items()}
        is_same = found.get("identity_hash") == scores.provenance.get("identity_hash")
        if is_same and found.get("quantities_scored"):
            return found
    return None
