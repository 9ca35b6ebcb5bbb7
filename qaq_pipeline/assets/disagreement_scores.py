"""The asset disagreement_scores[batch]."""

import dagster as dg
import polars as pl

from qaq_pipeline import strata
from qaq_pipeline.assets.shared import BATCHES, by_model, code_version, definition, table_result
from qaq_pipeline.config import Settings
from qaq_pipeline.storage import StoredTable

VERSION = "1"


def build_disagreement_scores(settings: Settings) -> dg.AssetsDefinition:
    """disagreement_scores[batch]: strata, ranks and the gap, in the pool of the batch."""

    @dg.asset(
        **definition("disagreement_scores"),
        group_name="selection",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        code_version=code_version(VERSION, settings.ranking),
    )
    def disagreement_scores(
        context: dg.AssetExecutionContext, rmi_scores: dict[str, StoredTable]
    ) -> dg.MaterializeResult:
        pool_id = f"batch:{context.partition_key}"
        require_same_scoring(rmi_scores)
        frames = {role: table.frame for role, table in rmi_scores.items()}
        frame, warnings = strata.disagreement_scores(frames, settings.ranking, pool_id)
        warnings += frame_warnings(rmi_scores)
        for warning in warnings:
            context.log.warning(warning)
        inputs = by_model("rmi_scores", rmi_scores)
        models = {role: table.provenance["identity"] for role, table in rmi_scores.items()}
        return table_result(context, frame, inputs, _metadata(frame, warnings), pool_id=pool_id, models=models)

    return disagreement_scores


def require_same_scoring(tables: dict[str, StoredTable]) -> None:
    """Ranks of models that were asked under other settings cannot be compared.

    Raises:
        dg.Failure: the models' prior, window, truncation or instruction differ.
    """
    scoring = {role: table.provenance["scoring"] for role, table in tables.items()}
    first, *others = scoring
    for other in others:
        if scoring[other] != scoring[first]:
            raise dg.Failure(
                f"disagreement_scores: {first} was scored with {scoring[first]}, {other} with {scoring[other]}; "
                "materialise logprobs and rmi_scores of both models",
                allow_retries=False,
            )


def frame_warnings(tables: dict[str, StoredTable]) -> list[str]:
    """A warning where the models are asked in different frames: the gap then measures the frame too."""
    frames = {role: table.provenance["frame"] for role, table in tables.items()}
    if len(set(frames.values())) < 2:
        return []
    said = ", ".join(f"{role}: {frame}" for role, frame in sorted(frames.items()))
    return [f"the models' frames differ ({said}): the gap measures the frame too"]


def _metadata(frame: pl.DataFrame, warnings: list[str]) -> dict[str, object]:
    correlation = frame.select(pl.corr("rank_strong", "rank_weak", method="spearman")).item()
    finite = {} if correlation is None or correlation != correlation else {"spearman_of_ranks": correlation}  # noqa: PLR0124
    return {
        "ranked_by_both": frame.height - frame["gap"].null_count(),
        "num_strata": int(frame["num_strata"].max() or 0),  # type: ignore[arg-type]
        "warnings": warnings,
        **finite,
    }
