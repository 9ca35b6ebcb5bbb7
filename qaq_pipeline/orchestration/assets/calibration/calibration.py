"""The asset calibration[batch]: whether the scores tell good from bad on this batch."""

from typing import Any

import dagster as dg
import polars as pl

from qaq_pipeline.calibration import calibration as pure
from qaq_pipeline.calibration import planting
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.assets.audit.batch_report import made_by
from qaq_pipeline.orchestration.assets.selection.rank_reference import NAME, read_reference, scored_by
from qaq_pipeline.orchestration.metadata import code_version, definition, gate_metadata, pictures
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.results import by_model, require_inputs, stored_gate, table_result
from qaq_pipeline.reports import calibration_page, check_metrics, page_store
from qaq_pipeline.schema.tables import Calibration
from qaq_pipeline.screening import gates
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable, empty

VERSION = "3"


def build_calibration(settings: Settings) -> dg.AssetsDefinition:
    """calibration[batch]: AUROCs, kept shares and cuts, each with its interval. Nothing of a gated batch."""
    ranking = settings.ranking
    is_against_reference = ranking.pool == "reference"
    read = settings.calibration.model_dump(exclude={"enabled", "rows_per_defect", "max_share"})
    ranks_by = ranking if is_against_reference else ranking.model_dump(exclude={"reference"})

    @dg.asset(
        **definition("calibration"),
        group_name="calibration",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        deps=[NAME] if is_against_reference else [],
        code_version=code_version(VERSION, read, ranks_by, settings.selections, settings.scoring.quantities),
    )
    def calibration(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        planted_rows: StoredTable,
        planted_scores: dict[str, StoredTable],
        rmi_scores: dict[str, StoredTable],
        disagreement_scores: StoredTable,
    ) -> dg.MaterializeResult:
        inputs = {
            "planted_rows": planted_rows,
            "disagreement_scores": disagreement_scores,
            **by_model("planted_scores", planted_scores),
            **by_model("rmi_scores", rmi_scores),
        }
        _require_one_origin(planted_rows, planted_scores, rmi_scores, disagreement_scores)
        gate = gates.of_provenance(planted_rows.provenance)
        frozen = read_reference(storage, settings) if is_against_reference and not gate else None
        if frozen is not None:
            _require_pool(disagreement_scores, settings, frozen)
            inputs[NAME] = frozen
        judged = None
        if not planted_rows.frame.is_empty():
            judged = pure.judge(
                planted_rows.frame,
                {role: table.frame for role, table in planted_scores.items()},
                {role: table.frame for role, table in rmi_scores.items()},
                disagreement_scores.frame,
                settings,
                None if frozen is None else frozen.frame,
            )
        frame = empty(Calibration) if gate else pure.calibrate(judged, settings)
        finding = check_metrics.discrimination(frame, settings.calibration.min_auc, planting.ENOUGH)
        if not gate and not finding.passed:
            context.log.warning(finding.sentence)
        metadata = {**_metadata(frame, settings), "finding": finding.sentence, **finding.numbers, **gate_metadata(gate)}
        metadata |= pictures(context, settings, lambda: [calibration_page.told_apart(frame)])
        if settings.reports.pages:
            batch, made = context.partition_key, made_by(context)
            place = page_store.calibration_page(batch)
            storage.files.write_bytes(
                calibration_page.page(batch, frame, judged, planted_rows.frame, settings, finding, gate, made), *place
            )
            metadata["page"] = dg.MetadataValue.path(storage.files.url(*place))
        return table_result(context, frame, inputs, metadata, **stored_gate(gate))

    return calibration


def _require_one_origin(
    planted_rows: StoredTable,
    planted_scores: dict[str, StoredTable],
    rmi_scores: dict[str, StoredTable],
    disagreement_scores: StoredTable,
) -> None:
    """The planted rows are of these ranks, and were scored as the batch was.

    Raises:
        dg.Failure: they are not; the text says what to materialise.
    """
    batch = {"disagreement_scores": disagreement_scores, **by_model("rmi_scores", rmi_scores)}
    require_inputs("planted_rows", planted_rows, batch, planted_rows.provenance["inputs"])
    for name, table in by_model("planted_scores", planted_scores).items():
        require_inputs(name, table, {"planted_rows": planted_rows}, table.provenance["inputs"])
    ours, theirs = scored_by(planted_scores), scored_by(rmi_scores)
    differing = [role for role in ours if ours[role] != theirs.get(role)]
    if differing:
        raise dg.Failure(
            f"planted_scores of batch {planted_rows.provenance['partition'][0]} were made by other models than its "
            f"rmi_scores, or asked differently, as {differing}; materialise logprobs and rmi_scores of the batch, then "
            "planted_rows and planted_scores",
            allow_retries=False,
        )


def _require_pool(disagreement_scores: StoredTable, settings: Settings, frozen: StoredTable) -> None:
    batch, pool = disagreement_scores.provenance["partition"][0], disagreement_scores.provenance["pool_id"]
    wanted = rank_reference.pool_of(batch, settings.ranking, frozen.data_version)
    if pool != wanted:
        raise dg.Failure(
            f"disagreement_scores of batch {batch} are ranks in the pool {pool}, the settings ask for {wanted}; "
            "materialise disagreement_scores, then planted_rows and planted_scores of this batch",
            allow_retries=False,
        )


def _metadata(frame: pl.DataFrame, settings: Settings) -> dict[str, Any]:
    offered = pure.offered_yaml(frame, settings.published)
    return {
        "offered_selection": dg.MetadataValue.md("no cut" if offered is None else f"```yaml\n{offered}```"),
        "table": dg.MetadataValue.md(calibration_page.as_markdown(frame)),
    }
