"""The asset rmi_scores[batch and model]."""

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.io_manager import partition_parts
from qaq_pipeline.orchestration.metadata import code_version, definition, pictures
from qaq_pipeline.orchestration.partitions import batch_by_model
from qaq_pipeline.orchestration.results import table_result
from qaq_pipeline.reports import plots, summaries
from qaq_pipeline.reports.check_metrics import count_by
from qaq_pipeline.scoring import rmi_scores as formulas
from qaq_pipeline.storage.tables import StoredTable

VERSION = "2"


def build_rmi_scores(settings: Settings) -> dg.AssetsDefinition:
    """rmi_scores[batch and model]: rank-free scores from sums and counts."""
    eligibility = settings.eligibility

    @dg.asset(
        **definition("rmi_scores"),
        group_name="scoring",
        kinds={"polars", "parquet"},
        partitions_def=batch_by_model(settings),
        code_version=code_version(VERSION, eligibility),
    )
    def rmi_scores(context: dg.AssetExecutionContext, logprobs: StoredTable) -> dg.MaterializeResult:
        frame = formulas.rmi_scores(
            logprobs.frame,
            min_query_tokens=eligibility.min_query_tokens,
            short_query_tokens=eligibility.short_query_tokens,
        )
        carried = ("identity", "identity_after", "identity_hash", "frame", "template", "scoring", "scored_with")
        provenance = {key: logprobs.provenance[key] for key in carried if key in logprobs.provenance}
        provenance |= {"scored_from": logprobs.provenance["inputs"], "eligibility": eligibility.model_dump(mode="json")}
        _, role = partition_parts(context.partition_key)
        metadata = _metadata(frame) | pictures(context, settings, lambda: [_density(frame, role)])
        return table_result(context, frame, {"logprobs": logprobs}, metadata, **provenance)

    return rmi_scores


def _density(frame: pl.DataFrame, role: str) -> plots.Plot:
    """Without strata: they are of a pool, which is known later."""
    named = frame.select(pl.col(name).alias(f"{name}_{role}") for name in ("log_ppl_q", "rmi"))
    return plots.density(summaries.density(named, role), pl.DataFrame(), role)


def _metadata(frame: pl.DataFrame) -> dict[str, object]:
    names = ("rmi", "log_ppl_q", "log_ppl_q_given_a", "ifd_ppl")
    medians = {f"median_{name}": frame.select(pl.col(name).median().round(4)).item() for name in names}
    return {
        "scorable": frame.height - frame["rmi"].null_count(),
        "short_queries": int(frame["is_short_query"].sum()),
        "null_reasons_rmi": count_by(frame["null_reason_rmi"]),
        "null_reasons_ifd": count_by(frame["null_reason_ifd"]),
        **{name: value for name, value in medians.items() if value is not None},
    }
