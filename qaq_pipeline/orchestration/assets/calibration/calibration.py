"""The asset calibration[batch]: a validation that shows whether the scores tell good rows from bad ones."""

from typing import Any

import dagster as dg
import polars as pl

from qaq_pipeline.calibration import calibration as pure
from qaq_pipeline.calibration.planted_batch import PlantedBatch
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, gate_metadata, made_by, pictures
from qaq_pipeline.reports import calibration_page, check_metrics, page_store
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.schema.tables import Calibration
from qaq_pipeline.screening import gates
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable, empty

VERSION = "4"


def build_calibration(settings: Settings) -> dg.AssetsDefinition:
    """calibration[batch]: AUROCs, kept shares and cuts, each with its interval. Nothing of a gated batch."""
    ranking, selections, wanted = settings.ranking, settings.selections, settings.scoring.quantities
    read = settings.calibration.model_dump(exclude={"enabled", "mismatches", "rows_per_defect"})
    limits, min_auc = settings.gates, settings.checks.min_auc
    ranks_by = ranking if ranking.pool == "reference" else ranking.model_dump(exclude={"reference"})

    @asset(settings, VERSION, reads=[read, ranks_by, selections, wanted, min_auc, limits.min_scorable_share])
    def calibration(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        planted_rows: StoredTable,
        planted_scores: dict[str, StoredTable],
        rmi_scores: dict[str, StoredTable],
        disagreement_scores: StoredTable,
    ) -> dg.MaterializeResult:
        batch = PlantedBatch(planted_rows, planted_scores, rmi_scores, disagreement_scores)
        gate = batch.gate(limits)
        frozen = None if gate else stored_reference.read_pool(storage, ranking)
        judged = None if gate else batch.judge(ranking, selections, frozen)
        frame = empty(Calibration)
        if not gate:
            frame = pure.calibrate(judged, settings.models, wanted, selections, settings.calibration)
        finding = check_metrics.discrimination(frame, min_auc)
        if not gate and not finding.passed:
            context.log.warning(finding.sentence)
        metadata = _metadata(frame, settings, finding) | gate_metadata(gate)
        metadata |= pictures(context, settings, lambda: [calibration_page.told_apart(frame)])
        if settings.reports.pages:
            defects, made = settings.calibration.defects, made_by(context)
            page = calibration_page.page(planted_rows, gate, judged, frame, finding, defects, settings.published, made)
            place = page_store.calibration_page(context.partition_key)
            storage.files.write_bytes(page, *place)
            metadata["page"] = dg.MetadataValue.path(storage.files.url(*place))
        inputs = batch.inputs | stored_reference.as_input(frozen)
        return table_result(context, frame, inputs, metadata, **gates.as_provenance(gate))

    return calibration


def _metadata(frame: pl.DataFrame, settings: Settings, finding: Finding) -> dict[str, Any]:
    offered = pure.offered_yaml(frame, settings.published)
    return {
        "offered_selection": dg.MetadataValue.md("no cut" if offered is None else f"```yaml\n{offered}```"),
        "table": dg.MetadataValue.md(calibration_page.as_markdown(frame)),
        "finding": finding.sentence,
        **finding.numbers,
    }
