"""The asset rmi_scores[batch and model], where the gate after scoring is judged."""

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import table_result
from qaq_pipeline.orchestration.metadata import asset, gate_metadata, pictures
from qaq_pipeline.reports import pages
from qaq_pipeline.reports.table_numbers import of_rmi_scores
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import RmiScores
from qaq_pipeline.scoring import rmi_scores as formulas
from qaq_pipeline.screening import gates
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty

VERSION = "2"


def build_rmi_scores(settings: Settings) -> dg.AssetsDefinition:
    """rmi_scores[batch and model]: rank-free scores from sums and counts."""
    eligibility, limits = settings.eligibility, settings.gates

    @asset(settings, VERSION, reads=[eligibility, limits.min_scorable_share])
    def rmi_scores(context: dg.AssetExecutionContext, logprobs: StoredTable) -> dg.MaterializeResult:
        role = str(Partition.parse(context.partition_key).model)
        parts = (formulas.rmi_scores(part, eligibility) for part in logprobs.parts())
        frame = pl.concat([empty(RmiScores), *parts])
        gate = gates.after_scoring(role, frame, logprobs.provenance, limits)
        facts = {**formulas.facts(logprobs.provenance, eligibility), **gates.as_provenance(gate)}
        facts[gates.LIMIT_KEY] = limits.min_scorable_share
        metadata = {**of_rmi_scores(frame), **gate_metadata(gate)}
        metadata |= pictures(context, settings, lambda: [pages.density_without_strata(frame, role)])
        return table_result(context, frame, {"logprobs": logprobs}, metadata, **facts)

    return rmi_scores
