"""The declaration of the pipeline: consistent in itself, and equal to the graph that Dagster sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness.eligibility import split_by_eligibility
from qaq_pipeline.freshness.staleness import Freshness
from qaq_pipeline.lineage.lineage import State, walk
from qaq_pipeline.orchestration.jobs import build_job_defs, made_under, present
from qaq_pipeline.pipeline import PIPELINE, Asset, Partitioning, Pipeline, Purpose
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.curated_dataset import publish, read_batches
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.column_lineage import SOURCES
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.support.answer_lengths import SOURCES_OF_LENGTHS, with_answer_lengths
from qaq_pipeline_tests.support.uncalibrated import UNCALIBRATED

REFERENCE = {"pool": "reference", "reference": {"name": "frozen", "batches": ["b1"]}}


@pytest.mark.parametrize("ranking", [{}, REFERENCE])
def test_the_graph_has_the_declared_inputs_partitions_and_groups(
    settings_for: Callable[..., Settings], ranking: dict[str, object]
) -> None:
    graph = build_job_defs(
        settings_for(ranking=ranking, reports={"pages": True}, calibration={"enabled": True})
    ).resolve_asset_graph()
    dimensions = {Partitioning.BATCH: 1, Partitioning.BATCH_AND_MODEL: 2, Partitioning.VERSION: 1}
    seen = set()
    for key in graph.get_all_asset_keys():
        node, asset = graph.get(key), PIPELINE[key.to_user_string()]
        seen.add(asset.name)
        optional = set(asset.optional_inputs) if ranking else set()
        inputs = {*asset.inputs, *asset.calibrated_inputs} | optional
        assert {parent.to_user_string() for parent in node.parent_keys} == inputs, asset.name
        assert node.group_name == asset.group
        number = 0 if node.partitions_def is None else len(getattr(node.partitions_def, "partitions_defs", [0]))
        assert number == dimensions.get(asset.partitioning, 0), asset.name
    assert seen == {asset.name for asset in PIPELINE} - (set() if ranking else {"rank_reference", "reference_cuts"})


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
    torn = Pipeline((PIPELINE["raw_data"], Asset("t", "g", "j", schema=entry.schema, sources=SOURCES["raw_data"])))
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
    assert PIPELINE.last_input("disagreement_scores") == "rmi_scores"
    assert PIPELINE.last_input("decisions") == "validity"
    assert UNCALIBRATED.last_input("decisions") == "disagreement_scores"
    assert PIPELINE.last_input("calibration") == "validity"


def test_a_page_is_no_table() -> None:
    with pytest.raises(ValueError, match="batch_report is no table"):
        _ = PIPELINE["batch_report"].table


def test_nothing_that_is_published_is_made_from_a_page_or_a_calibration() -> None:
    for asset in PIPELINE.of(Purpose.CURATION, Purpose.REFERENCE, Purpose.PUBLICATION):
        purposes = {PIPELINE[name].purpose for name in asset.all_inputs}
        assert purposes <= {Purpose.CURATION, Purpose.REFERENCE}, asset.name


def test_a_version_is_made_from_the_inputs_of_its_tables_and_no_other_table() -> None:
    assert [asset.name for asset in PIPELINE.sources_of_published] == [
        "raw_data",
        "signatures",
        "screened_data",
        "planted_rows",
        "logprobs",
        "rmi_scores",
        "planted_scores",
        "reference_cuts",
        "rank_reference",
        "disagreement_scores",
        "validity_cuts",
        "validity",
        "decisions",
        "selected_subset",
    ]
    assert [asset.name for asset in UNCALIBRATED.sources_of_published] == [
        "raw_data",
        "signatures",
        "screened_data",
        "logprobs",
        "rmi_scores",
        "rank_reference",
        "disagreement_scores",
        "decisions",
        "selected_subset",
    ]


def test_without_calibration_its_assets_are_not_made_and_the_rest_is_the_same(
    settings_for: Callable[..., Settings],
) -> None:
    made = made_under(settings_for(reports={"pages": True}))
    assert {asset.name for asset in PIPELINE} - {asset.name for asset in made} == {
        "planted_rows",
        "planted_scores",
        "validity_cuts",
        "validity",
        "calibration",
        "reference_cuts",
        "rank_reference",
    }
    assert made["decisions"].optional_inputs == made["decisions"].calibrated_inputs == ()
    assert made.jobs()["ingest_batch"] == ["raw_data", "signatures", "screened_data"]
    assert "calibrate_batch" not in made.jobs()


# --- another table --------------------------------------------------------------------------------------------------


def test_one_entry_adds_a_table_to_jobs_conditions_staleness_publication_and_lineage(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings, pipeline = settings_for(), with_answer_lengths()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    run_batch.run_batch(Deployment(settings, instance), "b1")
    storage = open_storage(settings, pipeline)

    def stale() -> list[str]:
        freshness = Freshness(storage, ["b1"], present(settings, storage, pipeline), pipeline)
        return [f"{one.job}: {one.table}" for one in freshness.stale("b1")]

    assert stale() == ["select_from_batch: answer_lengths"]
    sections = settings.ranking, settings.selections, settings.export
    excluded = split_by_eligibility(storage, ["b1"], *sections, pipeline)[1]
    assert excluded == {"b1": "not materialised: answer_lengths"}

    defs = build_job_defs(settings, pipeline=pipeline)
    asset = defs.resolve_asset_graph().get(dg.AssetKey("answer_lengths"))
    assert asset.automation_condition is not None
    assert asset.automation_condition.get_label() == "after raw_data"
    job = defs.resolve_job_def("select_from_batch")
    assert job.execute_in_process(instance=instance, partition_key="b1").success
    assert stale() == []

    batches, excluded = read_batches(storage, ["b1"], settings, pipeline)
    with versions.lock(storage):
        published = publish(storage, settings, batches, excluded)
    stored = storage.tables.read("answer_lengths", Partition("b1"))
    assert stored.frame.height > 0
    assert published.manifest["batches"][0]["data_versions"]["answer_lengths"] == stored.data_version
    [batch] = walk(storage, published.version, pipeline).batches
    [table] = [table for table in batch.tables if table.name == "answer_lengths"]
    assert (table.state, table.stored) == (State.AS_PUBLISHED, stored.data_version)
    assert pipeline.column_sources["answer_lengths"] == SOURCES_OF_LENGTHS
