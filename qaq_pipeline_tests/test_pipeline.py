"""The declaration of the pipeline: consistent in itself, and equal to the graph that Dagster sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.jobs import build_job_defs
from qaq_pipeline.pipeline import PIPELINE, Asset, Partitioning, Pipeline, Purpose
from qaq_pipeline.schema.partition import Partition

REFERENCE = {"pool": "reference", "reference": {"name": "frozen", "batches": ["b1"]}}


@pytest.mark.parametrize("ranking", [{}, REFERENCE])
def test_the_graph_has_the_declared_inputs_partitions_and_groups(
    settings_for: Callable[..., Settings], ranking: dict[str, object]
) -> None:
    graph = build_job_defs(
        settings_for(ranking=ranking, reports={"pages": True}, calibration={"enabled": True})
    ).resolve_asset_graph()
    dimensions = {Partitioning.BATCH: 1, Partitioning.BATCH_AND_MODEL: 2}
    seen = set()
    for key in graph.get_all_asset_keys():
        node, asset = graph.get(key), PIPELINE[key.to_user_string()]
        seen.add(asset.name)
        optional = set(asset.optional_inputs) if ranking else set()
        assert {parent.to_user_string() for parent in node.parent_keys} == set(asset.inputs) | optional, asset.name
        assert node.group_name == asset.group
        number = 0 if node.partitions_def is None else len(getattr(node.partitions_def, "partitions_defs", [0]))
        assert number == dimensions.get(asset.partitioning, 0), asset.name
    assert seen == {asset.name for asset in PIPELINE} - (set() if ranking else {"rank_reference"})


def test_jobs_have_one_partitioning_each() -> None:
    """Dagster refuses a job that mixes partitions definitions."""
    for job, names in PIPELINE.jobs().items():
        assert len({PIPELINE[name].partitioning for name in names}) == 1, job


def test_an_input_is_declared_before_the_asset_that_needs_it() -> None:
    with pytest.raises(ValueError, match=r"asset 'b': declare its inputs \['c'\] before it"):
        Pipeline((Asset("b", "g", "j", inputs=("c",)), Asset("c", "g", "j")))


def test_a_name_is_declared_once() -> None:
    with pytest.raises(ValueError, match="asset 'a' is declared twice"):
        Pipeline((Asset("a", "g", "j"), Asset("a", "g", "j")))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'nosuch' is no table; known: raw_data, signatures"):
        PIPELINE["nosuch"]


def test_every_column_has_declared_sources() -> None:
    entry = PIPELINE["signatures"]
    torn = Pipeline(
        (PIPELINE["raw_data"], Asset("t", "g", "j", schema=entry.schema, sources=PIPELINE["raw_data"].sources))
    )
    with pytest.raises(ValueError, match=r"t: its columns and their declared sources differ in \['answer', 'bands'"):
        _ = torn.column_sources


def test_a_table_of_each_model_has_a_partition_of_each() -> None:
    assert PIPELINE["logprobs"].partitions("b1", ["weak", "strong"]) == [
        Partition("b1", "strong"),
        Partition("b1", "weak"),
    ]
    assert PIPELINE["decisions"].partitions("b1", ["weak", "strong"]) == [Partition("b1")]


def test_the_last_input_is_the_one_declared_last() -> None:
    assert PIPELINE.last_input("raw_data") is None
    assert PIPELINE.last_input("decisions") == "disagreement_scores"
    assert PIPELINE.last_input("calibration") == "planted_scores"


def test_a_page_is_no_table() -> None:
    with pytest.raises(ValueError, match="batch_report is no table"):
        _ = PIPELINE["batch_report"].table


def test_nothing_that_is_published_is_made_from_a_page_or_a_calibration() -> None:
    for asset in PIPELINE.of(Purpose.CURATION, Purpose.REFERENCE, Purpose.PUBLICATION):
        purposes = {PIPELINE[name].purpose for name in (*asset.inputs, *asset.optional_inputs)}
        assert purposes <= {Purpose.CURATION, Purpose.REFERENCE}, asset.name
