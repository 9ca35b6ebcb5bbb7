"""The asset decisions[batch]."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.assets.selection.rank_reference import NAME, read_reference
from qaq_pipeline.orchestration.metadata import code_version, definition, gate_metadata, pictures
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.results import (
    by_model,
    footer_before,
    is_new_verdict,
    provenance_of,
    report_gate,
    require_inputs,
    stored_gate,
    table_result,
)
from qaq_pipeline.reports import plots, summaries
from qaq_pipeline.reports.check_metrics import count_by
from qaq_pipeline.screening import gates
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.decisions import decide
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable

VERSION = "3"


def build_decisions(settings: Settings) -> dg.AssetsDefinition:
    """decisions[batch]: every input row under every named selection, with its reason."""
    roles = sorted(settings.models)
    ranking = settings.ranking
    cut_by = [ranking.reference] if ranking.pool == "reference" else []

    @dg.asset(
        **definition("decisions"),
        group_name="selection",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        deps=[NAME] if cut_by else [],
        code_version=code_version(VERSION, settings.selections, settings.gates.min_scorable_share, *cut_by),
    )
    def decisions(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        screened_data: StoredTable,
        rmi_scores: dict[str, StoredTable],
        disagreement_scores: StoredTable,
    ) -> dg.MaterializeResult:
        require_one_origin(raw_data, screened_data, rmi_scores, disagreement_scores)
        scores = {role: table.frame for role, table in rmi_scores.items()}
        scored_by = {role: table.provenance for role, table in rmi_scores.items()}
        frozen = read_reference(storage, settings) if cut_by else None
        pool = rank_reference.pool_of(context.partition_key, ranking, None if frozen is None else frozen.data_version)
        _require_pool(disagreement_scores, pool)
        pairs = candidates(disagreement_scores.frame, scores)
        of_reference = None if frozen is None else rank_reference.reference_candidates(frozen.frame, roles)
        verdicts = select_all(pairs, settings.selections, of_reference)
        before_scoring = gates.of_provenance(screened_data.provenance)
        gate = before_scoring or gates.after_scoring(scores, scored_by, settings.gates)
        is_new = before_scoring is None and is_new_verdict(gate, footer_before(context, storage))
        report_gate(context, settings.alerts, gate, is_new=is_new)
        inputs = {
            "raw_data": raw_data,
            "screened_data": screened_data,
            "disagreement_scores": disagreement_scores,
            **by_model("rmi_scores", rmi_scores),
            **({} if frozen is None else {NAME: frozen}),
        }
        facts = {
            "settings_hash": settings_hash(settings.selections),
            "published_hash": settings_hash(settings.published),
            "pool_id": disagreement_scores.provenance["pool_id"],
            "ranking_hash": disagreement_scores.provenance["ranking_hash"],
            **stored_gate(gate),
            "files": raw_data.provenance["files"],
            "models": {role: table.provenance["identity"] for role, table in rmi_scores.items()},
            "scored_by": {role: _scored_by(table.provenance) for role, table in rmi_scores.items()},
        }
        frame = decide(
            raw_data.frame,
            screened_data.frame,
            pairs,
            verdicts,
            settings.published,
            storage.provenance.write(provenance_of(context, inputs, **facts), context.run.run_id),
            gate,
        )
        _require_every_row(raw_data, frame.height)
        metadata = {
            "published_selection": settings.published.name,
            "pool_size": _pool_size(verdicts, settings.published.name),
            "rows_by_decision": count_by(frame["decision"]),
            "rows_by_reason": count_by(frame["reason"]),
            "selected_by_selection": {} if gate else count_by(verdicts.filter("is_selected")["selection"]),
            **gate_metadata(gate),
            **pictures(context, settings, lambda: [plots.by_reason(summaries.by_reason(frame))]),
        }
        return table_result(context, frame, inputs, metadata, **facts)

    return decisions


def _scored_by(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was asked, and with which libraries and devices it answered."""
    return {
        "frame": made_of["frame"],
        "template": made_of["template"],
        "scored_with": made_of["scored_with"],
    }


def require_one_origin(
    raw_data: StoredTable,
    screened_data: StoredTable,
    rmi_scores: dict[str, StoredTable],
    disagreement_scores: StoredTable,
) -> None:
    """Every input goes back to this raw_data, and the ranks are of these scores."""
    rows = {"raw_data": raw_data, "screened_data": screened_data}
    require_inputs("screened_data", screened_data, {"raw_data": raw_data}, screened_data.provenance["inputs"])
    ranked = by_model("rmi_scores", rmi_scores)
    for name, table in ranked.items():
        require_inputs(name, table, rows, table.provenance["scored_from"])
    require_inputs("disagreement_scores", disagreement_scores, ranked, disagreement_scores.provenance["inputs"])


def _require_pool(disagreement_scores: StoredTable, wanted: str) -> None:
    """The ranks are of the pool that the settings name, whose cuts decide."""
    pool = disagreement_scores.provenance["pool_id"]
    if pool != wanted:
        batch = disagreement_scores.provenance["partition"][0]
        raise dg.Failure(
            f"disagreement_scores of batch {batch} are ranks in the pool {pool}, the settings ask for {wanted}; "
            "materialise disagreement_scores of this batch first (or `qaq run` the batch again)",
            allow_retries=False,
        )


def _pool_size(verdicts: pl.DataFrame, selection_name: str) -> int:
    sizes = verdicts.filter(pl.col("selection") == selection_name)["pool_size"]
    return 0 if sizes.is_empty() else int(sizes[0])


def _require_every_row(raw_data: StoredTable, num_rows: int) -> None:
    if num_rows != raw_data.frame.height:
        raise dg.Failure(
            f"decisions: {num_rows} rows for {raw_data.frame.height} of raw_data; nothing was written",
            allow_retries=False,
        )
