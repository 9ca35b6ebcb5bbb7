"""The asset calibration[batch]: a validation that shows whether the scores tell good rows from bad ones."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
import polars as pl

from qaq_pipeline.calibration import calibration as pure
from qaq_pipeline.calibration.planted_batch import PlantedBatch
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, gate_metadata, made_by, pictures, readable
from qaq_pipeline.reports import calibration_page, check_metrics, page_store
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.schema.tables import Calibration
from qaq_pipeline.screening import gates
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.selection.scored_batch import read_judged
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline.validity.planted_sample import PlantedSample

VERSION = "5"


def build_calibration(settings: Settings) -> dg.AssetsDefinition:
    """calibration[batch]: AUROCs, kept and dropped shares, each with its interval. Nothing of a gated batch."""
    ranking, selections, wanted = settings.ranking, settings.selections, settings.scoring.quantities
    read = settings.calibration.model_dump(exclude={"enabled", "mismatches", "rows_per_defect"})
    limits, checks = settings.gates, settings.checks
    ranks_by = ranking if ranking.pool == "reference" else ranking.model_dump(exclude={"reference"})

    judged_by = [settings.validity, limits.min_scorable_share, checks.min_auc, checks.max_kept_share]

    @asset(settings, VERSION, reads=[read, ranks_by, selections, wanted, *judged_by])
    def calibration(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        screened_data: StoredTable,
        planted_rows: StoredTable,
        rmi_scores: dict[str, StoredTable],
        planted_scores: dict[str, StoredTable],
        disagreement_scores: StoredTable,
    ) -> dg.MaterializeResult:
        sample = PlantedSample(raw_data, screened_data, rmi_scores, planted_rows, planted_scores)
        batch = PlantedBatch(sample, disagreement_scores, read_judged(storage, context.partition_key))
        gate = batch.gate(limits)
        frozen = None if gate else stored_reference.read_pool(storage, ranking)
        judged = None if gate else batch.judge(ranking, selections, settings.validity, frozen)
        frame = empty(Calibration)
        if not gate:
            frame = pure.calibrate(judged, settings.models, wanted, selections, settings.calibration)
        findings = check_metrics.of_calibration(frame, settings.published.name, checks)
        for finding in () if gate else findings:
            if not finding.passed:
                context.log.warning(finding.sentence)
        metadata = _metadata(frame, findings) | gate_metadata(gate)
        metadata |= pictures(context, settings, lambda: [calibration_page.told_apart(frame)])
        if settings.reports.pages:
            shown, made = calibration_page.Shown.of(batch), made_by(context)
            page = calibration_page.page(shown, gate, judged, frame, findings, settings, made)
            place = page_store.calibration_page(context.partition_key)
            storage.files.write_bytes(page, *place)
            metadata["page"] = dg.MetadataValue.path(storage.files.url(*place))
        inputs = batch.inputs | stored_reference.as_input(frozen)
        return table_result(context, frame, inputs, metadata, **gates.as_provenance(gate))

    return calibration


def _metadata(frame: pl.DataFrame, findings: Sequence[Finding]) -> dict[str, Any]:
    numbers = {name: readable(number) for finding in findings for name, number in finding.numbers.items()}
    return {
        "findings": [finding.sentence for finding in findings],
        "table": dg.MetadataValue.md(calibration_page.as_markdown(frame)),
        **numbers,
    }
