"""The asset planted_rows[batch]."""

import dagster as dg
import polars as pl

from qaq_pipeline.calibration import defects, planting
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.assets.selection.decisions import require_one_origin
from qaq_pipeline.orchestration.metadata import code_version, definition, gate_metadata
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.results import by_model, stored_gate, table_result
from qaq_pipeline.reports.check_metrics import count_by
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import PlantedRows
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening import gates
from qaq_pipeline.storage.tables import StoredTable, empty

VERSION = "1"


def build_planted_rows(settings: Settings) -> dg.AssetsDefinition:
    """planted_rows[batch]: some pairs of the batch, made bad on purpose. Nothing of a gated batch."""
    drawn_by = settings.calibration.model_dump(include={"defects", "rows_per_defect", "max_share", "seed"})

    @dg.asset(
        **definition("planted_rows"),
        group_name="calibration",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(VERSION, defects.VERSION, drawn_by, settings.gates.min_scorable_share),
    )
    def planted_rows(
        context: dg.AssetExecutionContext,
        raw_data: StoredTable,
        screened_data: StoredTable,
        rmi_scores: dict[str, StoredTable],
        disagreement_scores: StoredTable,
    ) -> dg.MaterializeResult:
        require_one_origin(raw_data, screened_data, rmi_scores, disagreement_scores)
        gate = gates.of_provenance(screened_data.provenance) or gates.after_scoring(
            {role: table.frame for role, table in rmi_scores.items()},
            {role: table.provenance for role, table in rmi_scores.items()},
            settings.gates,
        )
        pairs = scorable_pairs(raw_data.frame, screened_data.frame, disagreement_scores.frame)
        frame = empty(PlantedRows) if gate else planting.plant(pairs, settings.calibration)
        inputs = {
            "raw_data": raw_data,
            "screened_data": screened_data,
            "disagreement_scores": disagreement_scores,
            **by_model("rmi_scores", rmi_scores),
        }
        metadata = {
            "scorable_pairs": pairs.height,
            "planted_by_defect": count_by(frame["defect"]),
            **gate_metadata(gate),
        }
        return table_result(context, frame, inputs, metadata, **stored_gate(gate))

    return planted_rows


def scorable_pairs(raw: pl.DataFrame, screened: pl.DataFrame, disagreement: pl.DataFrame) -> pl.DataFrame:
    """The distinct pairs that both models rank, with their texts and the strong model's stratum."""
    accepted = screened.filter(pl.col("status") == Status.ACCEPTED.value).select(ROW_KEY)
    ranked = to_long(disagreement.drop_nulls("gap"), "ranks", "pair_id").filter(pl.col("model") == "strong")
    texts = raw.join(accepted, on=ROW_KEY, how="semi")
    return texts.join(ranked.select("pair_id", "stratum"), on="pair_id", validate="1:1").select(
        "pair_id", "system", "query", "answer", "language", "stratum"
    )
