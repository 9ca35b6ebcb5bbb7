"""The asset validity[batch]: each distinct pair, and the signal that declares it invalid."""

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset
from qaq_pipeline.reports.table_numbers import of_validity
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import Validity
from qaq_pipeline.storage.origin import by_model, require_inputs
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline.validity.judgement import judge_in_parts
from qaq_pipeline.validity.planted_sample import pairs_of_batch

VERSION = "1"


def build_validity(settings: Settings) -> dg.AssetsDefinition:
    """validity[batch]: the evidence of every signal for every pair."""
    signals = settings.validity

    @asset(settings, VERSION, reads=[signals])
    def validity(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        screened_data: StoredTable,
        rmi_scores: dict[str, StoredTable],
        validity_cuts: StoredTable,
    ) -> dg.MaterializeResult:
        rows = {"raw_data": raw_data, "screened_data": screened_data}
        scores = by_model("rmi_scores", rmi_scores)
        require_inputs("validity_cuts", validity_cuts, rows | scores)
        pairs = pairs_of_batch(raw_data, screened_data, rmi_scores)
        inputs = rows | scores | {"validity_cuts": validity_cuts}
        with storage.tables.begin("validity", Partition.parse(context.partition_key)) as writer:
            counted = [empty(Validity).select("invalid_by")]
            for part in judge_in_parts(pairs, validity_cuts.frame, signals):
                writer.append(part)
                counted.append(part.select("invalid_by"))
            return table_result(context, writer, inputs, of_validity(pl.concat(counted)))

    return validity
