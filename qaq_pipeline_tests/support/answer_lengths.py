"""One more table of the pipeline: its schema, the sources of its columns, its asset, its entry."""

import dagster as dg
import dataframely as dy
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.materialisation import provenance_of
from qaq_pipeline.orchestration.partitions import BATCHES
from qaq_pipeline.pipeline import PIPELINE, Asset, Pipeline
from qaq_pipeline.schema.column_lineage import Sources
from qaq_pipeline.storage.stored_table import StoredTable


class AnswerLengths(dy.Schema):
    """Length of each accepted answer."""

    pair_id = dy.String(primary_key=True)
    num_characters = dy.Int64(min=0)


SOURCES_OF_LENGTHS: dict[str, Sources] = {
    "pair_id": (("raw_data", "pair_id"),),
    "num_characters": (("raw_data", "answer"),),
}


def build_answer_lengths(_settings: Settings) -> dg.AssetsDefinition:
    @dg.asset(name="answer_lengths", group_name="selection", partitions_def=BATCHES, code_version="1")
    def answer_lengths(context: dg.AssetExecutionContext, raw_data: StoredTable) -> dg.MaterializeResult:
        rows = raw_data.frame.filter(pl.col("status") == "accepted").unique("pair_id").sort("pair_id")
        frame = rows.select("pair_id", num_characters=pl.col("answer").str.len_chars().cast(pl.Int64))
        made = StoredTable(frame, provenance_of(context, {"raw_data": raw_data}))
        return dg.MaterializeResult(value=made, data_version=dg.DataVersion(made.data_version))

    return answer_lengths


def with_answer_lengths() -> Pipeline:
    """The pipeline with one more entry, after selected_subset."""
    entry = Asset(
        "answer_lengths",
        group="selection",
        job=PIPELINE["selected_subset"].job,
        inputs=("raw_data",),
        schema=AnswerLengths,
        sources=SOURCES_OF_LENGTHS,
        is_published=True,
        module=__name__,
    )
    place = [asset.name for asset in PIPELINE].index("selected_subset") + 1
    return Pipeline((*PIPELINE.assets[:place], entry, *PIPELINE.assets[place:]))
