"""The asset disagreement_scores[batch]."""

import dagster as dg
import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import RankingSettings, Settings
from qaq_pipeline.orchestration.assets.selection.rank_reference import NAME, Scores, differently_scored, read_reference
from qaq_pipeline.orchestration.metadata import code_version, definition, pictures
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.orchestration.results import by_model, table_result
from qaq_pipeline.reports import check_metrics, plots, summaries
from qaq_pipeline.schema.long_form import to_columns, to_long
from qaq_pipeline.selection import disagreement_scores, rank_reference
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable

VERSION = "2"


def build_disagreement_scores(settings: Settings) -> dg.AssetsDefinition:
    """disagreement_scores[batch]: strata, ranks and the gap, in the pool of the batch or against the reference."""
    ranking = settings.ranking
    is_against_reference = ranking.pool == "reference"

    @dg.asset(
        **definition("disagreement_scores"),
        group_name="selection",
        kinds={"polars", "parquet"},
        partitions_def=BATCHES,
        deps=[NAME] if is_against_reference else [],
        # What drift alone is measured against does not change a rank.
        code_version=code_version(
            VERSION, ranking if is_against_reference else ranking.model_dump(exclude={"reference"})
        ),
    )
    def disagreement_scores(
        context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage], rmi_scores: dict[str, StoredTable]
    ) -> dg.MaterializeResult:
        require_same_scoring(rmi_scores)
        frozen = read_reference(storage, settings) if is_against_reference else None
        pool_id = rank_reference.pool_of(
            context.partition_key, ranking, None if frozen is None else frozen.data_version
        )
        frame, warnings = _rank(rmi_scores, ranking, pool_id, frozen)
        warnings += frame_warnings(rmi_scores)
        for warning in warnings:
            context.log.warning(warning)
        inputs = by_model("rmi_scores", rmi_scores) | ({} if frozen is None else {NAME: frozen})
        models = {role: table.provenance["identity"] for role, table in rmi_scores.items()}
        return table_result(
            context,
            frame,
            inputs,
            _metadata(frame, warnings, settings) | pictures(context, settings, lambda: _plots(frame)),
            pool_id=pool_id,
            ranking_hash=settings_hash(ranking.without_pool()),
            models=models,
        )

    return disagreement_scores


def _rank(
    tables: Scores, ranking: RankingSettings, pool_id: str, frozen: StoredTable | None
) -> tuple[pl.DataFrame, list[str]]:
    frames = {role: table.frame for role, table in tables.items()}
    if frozen is None:
        return disagreement_scores.disagreement_scores(frames, ranking, pool_id)
    differing = differently_scored(frozen, tables)
    if differing:
        raise dg.Failure(
            f"disagreement_scores: the models {differing} of batch {tables['strong'].provenance['partition'][0]} are "
            f"not those of the reference {frozen.provenance['partition'][0]}, or were asked differently; materialise "
            "logprobs and rmi_scores of the batch, or make a new reference of batches that were scored as this one",
            allow_retries=False,
        )
    return rank_reference.disagreement_scores(frames, frozen.frame, ranking, pool_id), []


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


def _metadata(frame: pl.DataFrame, warnings: list[str], settings: Settings) -> dict[str, object]:
    both = check_metrics.rank_correlation(frame, settings.checks.max_rank_correlation).numbers
    num_strata = to_long(frame, "ranks").filter(pl.col("model") == "strong")["num_strata"]
    return {
        "ranked_by_both": both["pairs_ranked_by_both"],
        "num_strata": 0 if num_strata.is_empty() else num_strata[0],
        "warnings": warnings,
        **({"spearman_of_ranks": round(both["spearman"], 4)} if "spearman" in both else {}),
    }


def _plots(frame: pl.DataFrame) -> list[plots.Plot]:
    return [plots.ranks(summaries.rank_grid(to_columns(frame, "ranks", fields=["rank"])))]
