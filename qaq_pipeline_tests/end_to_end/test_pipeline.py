"""The whole graph on tiny models: its shape, what comes out of a batch, a second run, and what may go wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal
from syrupy.assertion import SnapshotAssertion

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.lm import causal_lm
from qaq_pipeline.orchestration.assets import build_assets
from qaq_pipeline.orchestration.jobs import CURATING, build_job_defs
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import audit_pages, refresh, registration, run_batch, status
from qaq_pipeline.runs.deployment import Deployment, open_instance
from qaq_pipeline.runs.job_runs import Events, RunError
from qaq_pipeline.runs.summary import BatchSummary
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import Logprobs, dtypes
from qaq_pipeline.schema.vocabularies import NullReason, Quantity, Signal
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ScoredPairs
from qaq_pipeline.screening import contamination
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.conftest import REJECTED_ROW, REPEATED_ROW, SAMPLES, LockHolder, write_jsonl
from qaq_pipeline_tests.support.frames import IDENTITY, pair_name
from qaq_pipeline_tests.support.pairs import RowsInMemory, in_memory, report_of
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.uncalibrated import STAGES, TABLES

PAGES = PIPELINE.jobs(Purpose.PAGE)
STORED_TABLES = PIPELINE.tables()

SettingsFor = Callable[..., Settings]
Deliver = Callable[..., Path]

HUB_SETTINGS = {"models": {"strong": {"hub": "tiny/strong"}, "weak": {"hub": "tiny/weak"}}}
"""Settings that name no file: enough to build definitions, not to score."""

PARTITIONS_OF_TABLE = {name: 2 if name in ("logprobs", "rmi_scores") else 1 for name in TABLES}


@pytest.fixture
def deliver(tmp_path: Path) -> Deliver:
    """Factory: rows, as (query, answer), in a file of their own."""

    def write(*rows: tuple[str, str], name: str = "rows.jsonl") -> Path:
        records = [{"query": query, "response": answer} for query, answer in rows]
        return write_jsonl(tmp_path / "delivered" / name, records)

    return write


def curate(settings: Settings, instance: dg.DagsterInstance, *files: Path, batch: str = "b1") -> BatchSummary:
    """What `qaq run --replace` does."""
    registration.register(Deployment(settings, instance), batch, files, None, replaces=True)
    summary = run_batch.run_batch(Deployment(settings, instance), batch)
    assert sum(summary.rows_by_decision.values()) == summary.rows_in
    sizes = summary.selected_by_selection
    published = settings.published.name
    for control in ("control_random", "control_stratified_random"):
        assert sizes.get(control, 0) == sizes.get(published, 0) == summary.rows_by_decision["selected"]
    return summary


def table(settings: Settings, name: str, *partition: str) -> pl.DataFrame:
    return open_storage(settings).tables.read(name, Partition(*(partition or ("b1",)))).frame


def latest(settings: Settings) -> dict[str, Any]:
    """The newest version and the batches left out of it, whenever it was published."""
    newest = versions.find_version(open_storage(settings), "latest")
    return {"version": newest.version, "excluded_batches": newest.excluded_batches}


def stored_tables(settings: Settings) -> dict[str, bytes]:
    """Bytes of every stored table and of the newest version of the dataset, by path."""
    root = Path(settings.storage_root)
    tables = [path for name in TABLES for path in (root / name).rglob("*.parquet")]
    version = root.joinpath(*versions.place(latest(settings)["version"]))
    files = [*tables, *(path for path in version.rglob("*") if path.is_file())]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def exported_files(settings: Settings) -> dict[str, str]:
    """sha256 of every training file of the newest version, by name."""
    storage = open_storage(settings)
    files = versions.read_manifest(storage, latest(settings)["version"])["files"]
    return {name: sha256 for name, sha256 in files.items() if not name.startswith("scores/") and "/" in name}


# --- the graph ------------------------------------------------------------------------------------------------------


def test_the_asset_graph_is_as_designed(snapshot: SnapshotAssertion) -> None:
    assets = build_assets(parse_settings(yaml.safe_dump(HUB_SETTINGS)))
    assert {asset.key.to_user_string(): _describe(asset) for asset in assets} == snapshot


def _describe(asset: dg.AssetsDefinition) -> dict[str, Any]:
    (spec,) = asset.specs
    return {
        "group": spec.group_name,
        "partitions": _partitions(asset.partitions_def),
        "deps": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
        "pool": asset.op.pool,
        "kinds": sorted(spec.kinds),
    }


def _partitions(partitions_def: dg.PartitionsDefinition | None) -> Any:
    if isinstance(partitions_def, dg.MultiPartitionsDefinition):
        dimensions = partitions_def.partitions_defs
        return {dimension.name: _partitions(dimension.partitions_def) for dimension in dimensions}
    if isinstance(partitions_def, dg.DynamicPartitionsDefinition):
        return f"dynamic {partitions_def.name}"
    return None if partitions_def is None else list(partitions_def.get_partition_keys())


def test_the_definitions_load_and_have_every_job() -> None:
    defs = build_defs(parse_settings(yaml.safe_dump(HUB_SETTINGS)))
    dg.Definitions.validate_loadable(defs)
    stages, calibration = PIPELINE.jobs(*CURATING), PIPELINE.jobs(Purpose.CALIBRATION)
    assert [job.name for job in defs.jobs or []] == [*stages, *calibration, "try_version", "refresh"]
    pages = {"batch_report", "dataset_report"}
    made = [asset for assets in stages.values() for asset in assets]
    curated = [*PIPELINE.tables_of_batch(Purpose.CURATION), "curated_dataset"]
    assert [asset for asset in made if asset not in pages] == curated
    assert pages < set(made)
    assert calibration == {"calibrate_batch": ["calibration"]}


def test_only_the_scoring_waits_for_the_gpu_and_the_ui_shows_every_column() -> None:
    assets = build_assets(parse_settings(yaml.safe_dump(HUB_SETTINGS)))
    pools = {asset.key.to_user_string(): asset.op.pool for asset in assets}
    assert {name for name, pool in pools.items() if pool == "gpu"} == {"logprobs", "planted_scores", "training_trial"}
    for asset in assets:
        (spec,) = asset.specs
        name = spec.key.to_user_string()
        assert spec.description
        if name in STORED_TABLES:
            shown = spec.metadata["dagster/column_schema"]
            assert [column.name for column in shown.columns] == list(dtypes(STORED_TABLES[name]))


CHANGED_SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "records": ({"records": {"multi_turn": "every"}}, {"raw_data"}),
    "context": (
        {"records": {"context": "history"}, "export": {"formats": ["messages"]}},
        {"raw_data", "curated_dataset"},
    ),
    "model": ({"strong": {"dtype": "bfloat16"}}, {"logprobs"}),
    "system_prompt": ({"weak": {"system_prompt": "Write clean code."}}, {"logprobs", "training_trial"}),
    "trial": ({"trial": {"seeds": 7}}, {"training_trial"}),
    "device": ({"strong": {"device": "auto"}}, set()),
    "prior": ({"scoring": {"prior": "user"}}, {"logprobs"}),
    "window": ({"scoring": {"max_tokens": 256}}, {"logprobs", "training_trial"}),
    "eligibility": ({"eligibility": {"min_query_tokens": 3}}, {"rmi_scores"}),
    "ranking": ({"ranking": {"num_strata": 3}}, {"disagreement_scores"}),
    "reference": ({"ranking": {"reference": {"name": "r1", "batches": ["b1"]}}}, set()),
    "pool": (
        {"ranking": {"pool": "reference", "reference": {"name": "r1", "batches": ["b1"]}}},
        {"disagreement_scores", "decisions"},
    ),
    "budget": (
        {"selections": [{"name": "diff_high", "strategy": "diff_high", "budget": {"count": 3}}]},
        {"decisions", "curated_dataset"},
    ),
    "published": (
        {"selections": [{"name": "other", "strategy": "diff_high"}]},
        {"decisions", "selected_subset", "curated_dataset"},
    ),
    "max_per_cluster": (
        {"selections": [{"name": "diff_high", "strategy": "diff_high", "max_per_cluster": 1}]},
        {"decisions", "curated_dataset"},
    ),
    "second_selection": (
        {
            "selections": [
                {"name": "diff_high", "strategy": "diff_high"},
                {"name": "rmi_band", "strategy": "rmi_band"},
            ]
        },
        {"decisions"},
    ),
    "export": ({"export": {"formats": ["alpaca"]}}, {"curated_dataset"}),
    "keep_versions": ({"publication": {"keep_versions": 3}}, {"curated_dataset"}),
    "near_threshold": ({"screening": {"duplicates": {"near_threshold": 0.9}}}, {"screened_data"}),
    "contamination": ({"screening": {"contamination": {"action": "flag"}}}, {"screened_data"}),
    "cluster_threshold": ({"screening": {"duplicates": {"cluster_threshold": 0.6}}}, {"screened_data"}),
    "held_out": ({"held_out": {"share": 0.1}}, {"screened_data"}),
    "rejected_share": ({"gates": {"max_rejected_share": 0.5}}, {"screened_data"}),
    "scorable_share": ({"gates": {"min_scorable_share": 0.9}}, {"rmi_scores", "decisions"}),
    "alerts": ({"alerts": {"channels": []}}, set()),
    "plots": ({"reports": {"pages": False, "plots": True}}, set()),
    "runtime": ({"runtime": {"batch_tokens": 64, "executor": "multiprocess", "shard_seconds": 1.0}}, set()),
    "storage": ({"storage": {"root": "memory://elsewhere"}}, set()),
    "model_cache": ({"model_cache": "elsewhere"}, set()),
}


@pytest.mark.parametrize("changed", list(CHANGED_SETTINGS))
def test_a_changed_setting_makes_exactly_its_readers_stale(settings_for: SettingsFor, changed: str) -> None:
    sections, stale = CHANGED_SETTINGS[changed]
    before, after = code_versions(settings_for()), code_versions(settings_for(**sections))
    assert {name for name in before if before[name] != after[name]} == stale


def code_versions(settings: Settings) -> dict[str, str | None]:
    return {asset.key.to_user_string(): asset.code_versions_by_key[asset.key] for asset in build_assets(settings)}


def test_the_page_of_a_batch_is_stale_where_it_would_show_something_else(settings_for: SettingsFor) -> None:
    before = code_versions(settings_for(reports={"pages": True}))["batch_report"]
    assert code_versions(settings_for(reports={"pages": True, "examples": 3}))["batch_report"] != before
    assert code_versions(settings_for(reports={"pages": True, "plots": False}))["batch_report"] == before
    calibrated = settings_for(reports={"pages": True}, calibration={"enabled": True})
    assert code_versions(calibrated)["batch_report"] != before


# --- audit pages ----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # It draws each page twice; the fast tests of the night draw one.
@pytest.mark.timeout(600)
def test_a_run_makes_both_pages_and_one_that_fails_stops_no_publication(
    settings_for: SettingsFor,
    delivered: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    check_sentence: Check,
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    settings = settings_for(reports={"pages": True, "plots": True})
    summary = curate(settings, instance, delivered)
    assert len(summary.pages) == 2, summary.warnings
    of_batch, of_version = (Path(path) for path in summary.pages.values())
    assert "20</strong> rows delivered" in of_batch.read_text(encoding="utf-8")
    assert latest(settings)["version"] in of_version.read_text(encoding="utf-8")
    assert f"../../reports/b1/{of_batch.name}" in of_version.read_text(encoding="utf-8")
    tokens = summary.models[0].tokens
    assert f">{tokens:,}</td>" in of_batch.read_text(encoding="utf-8")  # What scoring took, from the event log.
    shown = {
        "decisions": "plot_by_reason",
        "disagreement_scores": "plot_ranks",
        "batch_report": "plot_overlap",
        "dataset_report": "plot_flow",
    }
    for asset, plot in shown.items():
        event = instance.get_latest_materialization_event(dg.AssetKey(asset))
        assert event is not None
        assert event.asset_materialization is not None
        picture = event.asset_materialization.metadata[plot].value
        assert "data:image/png;base64," in str(picture)
        assert len(str(picture)) < 100_000

    for file in of_batch.parent.iterdir():
        file.unlink()
    of_batch.mkdir()  # Nothing can be written there.
    again = curate(settings, instance, delivered)
    assert any("the audit page of batch b1 was not made" in warning for warning in again.warnings)
    with pytest.raises(RunError, match="audit page"):
        audit_pages.find_batch_page(Deployment(settings, instance), "b1")
    of_batch.rmdir()
    assert audit_pages.find_batch_page(Deployment(settings, instance), "b1") == str(of_batch)
    assert audit_pages.find_version_page(Deployment(settings, instance), "latest") == str(of_version)
    with pytest.raises(ValueError, match="there is no batch") as error:
        audit_pages.find_batch_page(Deployment(settings, instance), "b9")
    check_sentence(error.value)
    with pytest.raises(StorageError) as error:
        audit_pages.find_version_page(Deployment(settings, instance), "v9")
    check_sentence(error.value)


# --- one batch ------------------------------------------------------------------------------------------------------


def test_a_batch_runs_through_and_a_second_run_changes_nothing(
    settings_for: SettingsFor, delivered: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    settings = settings_for()
    with open_instance() as instance:
        first = curate(settings, instance, delivered)
    before = stored_tables(settings)
    published = latest(settings)

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded although every score was cached")

    monkeypatch.setattr(causal_lm, "load_model", load)
    with open_instance() as instance:
        second = curate(settings, instance, delivered)
        registered = instance.get_dynamic_partitions("batch")
        materialised = instance.get_materialized_partitions(dg.AssetKey("logprobs"))
        runs = {run.job_name: run.status.value for run in instance.get_runs()}

    assert (first.rows_in, first.pool_size, first.published) == (20, 18, "diff_high")
    assert first.rows_by_decision == {
        "selected": 5,
        "not_selected": 13,
        "rejected": 1,
        "withdrawn": 0,
        "held_out": 0,
        "between": 0,
        "contaminated": 0,
        "duplicate": 1,
        "unscorable": 0,
        "batch_gated": 0,
    }
    assert first.reasons_by_decision["rejected"] == {"empty_query": 1}
    fates = dict(table(settings, "decisions").select("source_row", "decision").iter_rows())
    assert list(fates) == list(range(1, 21))
    assert (fates[REPEATED_ROW], fates[REJECTED_ROW]) == ("duplicate", "rejected")
    assert table(settings, "logprobs", "b1", "strong").height == 18
    assert table(settings, "selected_subset")["position"].to_list() == [1, 2, 3, 4, 5]
    assert first.scored == 2 * 5 * 18
    assert [model.cached for model in first.models] == [0, 0]
    assert first.is_new_version
    assert (second.scored, [model.cached for model in second.models]) == (0, [5 * 18] * 2)
    assert not second.is_new_version
    assert second.rows_by_decision == first.rows_by_decision
    assert stored_tables(settings) == before
    assert latest(settings) == published
    assert registered == ["b1"]
    assert materialised == {"b1|strong", "b1|weak"}
    assert runs == dict.fromkeys((job for job in STAGES if job not in PAGES), "SUCCESS")


def test_every_table_of_a_batch_is_stored_and_says_what_made_it(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for()
    curate(settings, instance, delivered)
    storage = open_storage(settings)
    for name, partitions in PARTITIONS_OF_TABLE.items():
        models = sorted(settings.models) if partitions == 2 else [None]
        for model in models:
            stored = storage.tables.read(name, Partition(*(part for part in ("b1", model) if part)))
            assert stored.provenance["table"] == name
            assert stored.provenance["partition"] == [part for part in ("b1", model) if part]
            assert stored.provenance["code_version"] == code_versions(settings)[name]
    decisions = storage.tables.read("decisions", Partition("b1"))
    assert decisions.frame["provenance_id"].unique().to_list() == [decisions.provenance_id]
    raw_data = storage.tables.read("raw_data", Partition("b1"))
    assert decisions.provenance["inputs"]["raw_data"] == raw_data.data_version
    assert decisions.provenance["models"]["strong"]["revision"].startswith("files:")
    event = instance.get_latest_materialization_event(dg.AssetKey("decisions"))
    assert event is not None
    assert event.asset_materialization is not None
    assert (event.asset_materialization.tags or {})["dagster/data_version"] == decisions.data_version


def test_two_homes_hold_the_same_bytes_and_publish_the_same_version(
    settings_for: SettingsFor,
    instance: dg.DagsterInstance,
    delivered: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    here = settings_for()
    curate(here, instance, delivered)
    monkeypatch.setenv("QAQ_HOME", str(tmp_path / "elsewhere"))
    there = settings_for()
    with dg.DagsterInstance.ephemeral() as other:
        curate(there, other, delivered)
    assert here.storage_root != there.storage_root
    assert stored_tables(here) == stored_tables(there)
    assert latest(here) == latest(there)


def test_with_one_score_wanted_the_other_is_marked_as_not_wanted(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for(scoring={"quantities": ["rmi"]})
    summary = curate(settings, instance, delivered)
    assert summary.scored == 2 * 2 * 18
    assert summary.rows_by_decision["selected"] == 5
    scores = table(settings, "rmi_scores", "b1", "strong")
    assert scores["null_reason_ifd"].unique().to_list() == ["not_wanted"]
    assert scores["null_reason_rmi"].null_count() == 18


def test_conversations_are_scored_in_their_context_and_come_out_as_they_came(
    settings_for: SettingsFor, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    before = [("user", "Which list?"), ("assistant", "Any."), ("user", "Sort it."), ("assistant", "sorted(x)")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    lines = []
    for number in range(8):
        asked = [{"role": role, "content": text} for role, text in before[: 2 * (number % 3)]]
        pair = [{"role": "user", "content": f"Task {number}"}, {"role": "assistant", "content": f"answer {number}"}]
        lines.append(
            json.dumps({"messages": [*asked, *pair, {"role": "user", "content": "And now?"}, call], "n": number})
        )
    file = tmp_path / "delivered" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    calibration = {"mismatches": 4, "rows_per_defect": 2, "defects": ["other_answer", "cut_answer"]}
    settings = settings_for(records={"context": "history"}, export={"rows": "conversation"}, calibration=calibration)
    summary = curate(settings, instance, file)
    assert summary.rows_by_decision["selected"] == 2
    version = Path(open_storage(settings).files.url(*versions.place(latest(settings)["version"])))
    published, row = settings.published.name, table(settings, "selected_subset").row(0, named=True)
    written = (version / published / "conversations.jsonl").read_text("utf-8").splitlines()
    assert written == [lines[one - 1] for one in table(settings, "selected_subset")["source_row"]]
    assert not (version / published / "messages.jsonl").exists()
    assert (row["query"], len(row["history"] or ())) == (
        f"Task {row['source_row'] - 1}",
        2 * ((row["source_row"] - 1) % 3),
    )
    planted = table(settings, "planted_rows").join(
        table(settings, "raw_data"), left_on="original_pair_id", right_on="pair_id", suffix="_of_original"
    )
    assert planted["history"].equals(planted["history_of_original"], null_equal=True)
    scored = table(settings, "logprobs", "b1", "strong")
    alone = curate(settings_for(calibration=calibration), instance, file)
    assert alone.rows_by_decision["selected"] == 2
    assert not set(scored["sum_nll_q"]) <= set(table(settings, "logprobs", "b1", "strong")["sum_nll_q"])


def test_no_table_stays_in_memory_after_its_run(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    def tables() -> dict[int, StoredTable]:
        gc.collect()
        return {
            id(one): one for one in gc.get_objects() if type(one) is StoredTable and one.file is None and one.num_rows
        }

    before = tables()
    curate(settings_for(), instance, deliver(*SAMPLES))
    assert tables().keys() <= before.keys()


# --- calibration ----------------------------------------------------------------------------------------------------

CALIBRATED = {
    "calibration": {"enabled": True, "mismatches": 5, "rows_per_defect": 4},
    "selections": [{"name": "diff_high", "strategy": "diff_high"}, {"name": "band", "strategy": "rmi_band"}],
}


@pytest.mark.slow
def test_a_batch_is_calibrated_after_it_was_published_and_takes_the_same_rows_as_without(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for(selections=CALIBRATED["selections"])
    before = curate(settings, instance, delivered)
    tables = {path: data for path, data in stored_tables(settings).items() if not path.startswith("curated_dataset/")}
    decided, exported = table(settings, "decisions"), exported_files(settings)

    settings = settings_for(**CALIBRATED, reports={"pages": True, "plots": False})
    summary = curate(settings, instance, delivered)

    changed = {path for path, data in stored_tables(settings).items() if path in tables and data != tables[path]}
    assert {path.partition("/")[0] for path in changed} == {"decisions", "selected_subset"}
    # Decisions record the validity that they were made from, so the version is another one with the same rows.
    assert_frame_equal(table(settings, "decisions").drop("provenance_id"), decided.drop("provenance_id"))
    assert exported_files(settings) == exported
    assert summary.rows_by_decision == before.rows_by_decision
    assert summary.is_new_version
    assert (before.valid_pairs, before.invalid_pairs, before.untold) == (None, {}, [])
    assert set(summary.invalid_pairs) == set(Signal)
    assert summary.valid_pairs == table(settings, "validity")["invalid_by"].null_count()
    assert sum(summary.invalid_pairs.values(), summary.valid_pairs or 0) == table(settings, "validity").height
    (kept,) = [warning for warning in summary.warnings if "defects_are_kept_out" in warning]
    assert "Too few rows were planted to judge the selection diff_high" in kept
    planted = table(settings, "planted_rows")
    assert dict(planted["defect"].value_counts().sort("defect").iter_rows()) == {
        "cut_answer": 4,
        "cut_at_line": 1,  # One answer has three lines.
        "echo": 4,
        "filler": 4,
        "invented_terms": 4,
        "one_token_bug": 4,
        "other_answer": 5,
        "refusal": 4,
        "wrong_language": 4,
    }
    assert table(settings, "planted_scores", "b1", "weak")["pair_id"].equals(planted["pair_id"])
    found = table(settings, "calibration")
    known = found.filter(statistic="auroc", measure="rmi").drop_nulls("value")
    assert set(known.filter(pl.col("defect") != "other_answer")["num_planted"]) == {4}
    assert known.height == 2 * 8  # One row alone has no AUROC.
    assert set(found.filter(statistic="kept_share")["measure"]) == {"diff_high", "band"}
    page = Path(settings.storage_root) / "reports/b1/calibration.html"
    assert "Calibration of batch b1" in page.read_text()


def test_no_planted_row_is_in_a_decision_a_selection_or_a_file_of_the_dataset(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for(**CALIBRATED)
    curate(settings, instance, delivered)
    planted = set(table(settings, "planted_rows")["pair_id"])
    of_batch = set(table(settings, "raw_data")["pair_id"])
    assert len(planted) == 34
    assert planted.isdisjoint(of_batch)
    assert set(table(settings, "planted_rows")["original_pair_id"]) <= of_batch
    for name in ("logprobs", "rmi_scores"):
        assert planted.isdisjoint(table(settings, name, "b1", "strong")["pair_id"])
    for name in ("screened_data", "disagreement_scores", "decisions", "selected_subset"):
        assert planted.isdisjoint(table(settings, name)["pair_id"])
    refusals = table(settings, "planted_rows").filter(defect="refusal")["answer"].to_list()
    version = Path(settings.storage_root) / published_folder(settings)
    for path in version.rglob("*"):
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            assert not any(refusal in text for refusal in refusals), path
    assert planted.isdisjoint(pl.read_parquet(version / "scores" / "*.parquet")["pair_id"])


def test_a_calibration_that_fails_stops_no_publication_and_is_made_up_for(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    settings = settings_for(**CALIBRATED)
    blocked = Path(settings.storage_root) / "calibration"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no table can be written below a file")
    summary = curate(settings, instance, delivered)
    assert summary.is_new_version
    (said,) = [warning for warning in summary.warnings if "not calibrated" in warning]
    assert said.startswith("batch b1 was published but not calibrated: ")
    check_sentence(said)
    blocked.unlink()
    done = refresh.refresh_all(Deployment(settings, instance))
    assert [f"{job} {partition}" for job, partition in done.rebuilt] == ["calibrate_batch b1"]
    assert done.version is None


@pytest.mark.slow
def test_planted_rows_that_cannot_be_scored_fail_the_batch_as_its_own_rows_do(
    settings_for: SettingsFor,
    instance: dg.DagsterInstance,
    delivered: Path,
    lock_holder: LockHolder,
    check_sentence: Check,
) -> None:
    settings = settings_for(runtime={"lock_timeout_seconds": 0.1}, **CALIBRATED)
    holder = lock_holder(settings.home / "locks", "planted_scores", "b1", "strong")
    with pytest.raises(RunError) as error:
        curate(settings, instance, delivered)
    check_sentence(error.value)
    assert not open_storage(settings).tables.has("decisions", Partition("b1"))
    holder.kill()
    holder.wait()
    assert curate(settings, instance, delivered).is_new_version


@pytest.mark.slow
def test_a_gated_batch_is_not_calibrated_and_says_so(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, deliver: Deliver, check_sentence: Check
) -> None:
    settings = settings_for(**CALIBRATED)
    curate(settings, instance, delivered)
    curate(settings, instance, delivered, batch="b2")
    bad = deliver(*[("", "a")] * 3, ("q", "a"), name="bad.jsonl")
    with pytest.raises(RunError) as error:
        curate(settings, instance, bad, batch="b2")
    check_sentence(error.value)
    planted, calibration = (
        open_storage(settings).tables.read(name, Partition("b2")) for name in ("planted_rows", "calibration")
    )
    assert planted.frame.is_empty()
    assert calibration.frame.is_empty()
    for made in (planted, calibration):
        assert made.provenance["gate"]["reason"] == "too_many_rejected"


@pytest.mark.slow
def test_a_batch_that_is_gated_after_scoring_keeps_its_planted_rows_and_is_not_calibrated(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    alone = CALIBRATED | {"screening": {"duplicates": {"across_batches": False}}}
    curate(settings_for(**alone), instance, delivered)
    settings = settings_for(**alone, eligibility={"min_query_tokens": 500}, gates={"min_scorable_share": 0.5})
    with pytest.raises(RunError, match="gated"):
        curate(settings, instance, delivered, batch="b2")
    assert table(settings, "planted_rows", "b2").height == 34
    assert table(settings, "planted_scores", "b2", "strong").height == 34
    calibration = open_storage(settings).tables.read("calibration", Partition("b2"))
    assert calibration.frame.is_empty()
    assert calibration.provenance["gate"]["reason"] == "too_few_scorable"


@pytest.mark.slow
def test_ranks_against_a_reference_calibrate_against_it(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for(**CALIBRATED)
    curate(settings, instance, delivered)
    alone = table(settings, "calibration")
    ranking = {"pool": "reference", "reference": {"name": "r1", "batches": ["b1"]}}
    settings = settings_for(ranking=ranking, **CALIBRATED)
    curate(settings, instance, delivered)
    stored = open_storage(settings).tables.read("calibration", Partition("b1"))
    assert "rank_reference" in stored.provenance["inputs"]
    assert_frame_equal(stored.frame, alone)


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ({"calibration": {"seed": 1}}, {"planted_rows", "calibration"}),
        ({"calibration": {"mismatches": 5}}, {"planted_rows"}),
        ({"calibration": {"rows_per_defect": 5}}, {"planted_rows"}),
        ({"validity": {"max_false_share": 0.01}}, {"validity_cuts", "validity", "calibration"}),
        ({"validity": {"echo": "flag"}}, {"validity_cuts", "validity", "calibration"}),
        ({"gates": {"must_tell": True}}, {"decisions"}),
    ],
)
def test_a_changed_setting_of_calibration_or_validity_makes_nothing_else_stale(
    settings_for: SettingsFor, changed: dict[str, Any], stale: set[str]
) -> None:
    before = code_versions(settings_for(calibration={}))
    after = code_versions(settings_for(**{"calibration": {}} | changed))
    assert {name for name in before if before[name] != after[name]} == stale


# --- odd batches ----------------------------------------------------------------------------------------------------


def test_an_empty_delivery_is_gated_and_publishes_nothing(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, tmp_path: Path, check_sentence: Check
) -> None:
    settings = settings_for()
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(RunError) as error:
        curate(settings, instance, tmp_path / "none.json")
    check_sentence(error.value)
    assert table(settings, "decisions").is_empty()
    curate(settings, instance, delivered, batch="b2")
    with pytest.raises(RunError) as error:
        curate(settings, instance, tmp_path / "none.json")
    check_sentence(error.value)
    assert list(latest(settings)["excluded_batches"]) == ["b1"]


def published_folder(settings: Settings) -> str:
    return "/".join(versions.place(latest(settings)["version"]))


def test_a_batch_of_rejected_rows_is_decided_and_nothing_is_scored(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = settings_for(gates={"max_rejected_share": None})
    summary = curate(settings, instance, deliver(("", "a"), ("q", ""), (" ", " ")))
    assert summary.rows_by_decision["rejected"] == 3
    assert summary.scored == 0
    assert [model.medians for model in summary.models] == [{}, {}]


def test_a_single_row_is_its_own_stratum(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = settings_for(
        ranking={"num_strata": 10}, selections=[{"name": "all", "strategy": "diff_high", "budget": {"fraction": 1.0}}]
    )
    summary = curate(settings, instance, deliver(("Is 7 prime?", "Yes.")))
    assert summary.rows_by_decision["selected"] == 1
    strong, weak, check = summary.warnings
    assert "1 of 1 pairs can be ranked, so 1 stratum instead of 10" in strong
    assert weak.startswith("model 'weak': 1 of 1 pairs")
    undefined = "The correlation of the models' ranks over 1 pairs is undefined"
    assert check.startswith(f"check models_differ of disagreement_scores of b1: {undefined}")


def test_fewer_rows_than_strata_are_fewer_strata_with_a_warning(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = settings_for(ranking={"num_strata": 10, "min_rows_per_stratum": 2})
    rows = [(f"query {n}", f"answer {n}") for n in range(7)]
    summary = curate(settings, instance, deliver(*rows))
    scores = table(settings, "disagreement_scores")
    of_strong = to_long(scores, "ranks").filter(model="strong")
    assert of_strong["num_strata"].unique().to_list() == [3]
    assert of_strong["stratum"].value_counts(sort=True)["count"].to_list() in ([3, 2, 2], [3, 3, 1])
    assert any("7 of 7 pairs can be ranked, so 3 strata instead of 10" in warning for warning in summary.warnings)


def test_equal_pairs_are_scored_once_and_reported_as_often_as_they_came(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = settings_for()
    same = [("Is 7 prime?", "Yes.")] * 3
    summary = curate(settings, instance, deliver(*same, name="a.jsonl"), deliver(*same, name="b.jsonl"))
    assert summary.rows_by_decision == {
        "selected": 0,
        "not_selected": 1,
        "rejected": 0,
        "withdrawn": 0,
        "held_out": 0,
        "between": 0,
        "contaminated": 0,
        "duplicate": 5,
        "unscorable": 0,
        "batch_gated": 0,
    }
    assert summary.scored == 2 * len(Quantity)
    representatives = table(settings, "decisions")["duplicate_of"].drop_nulls().unique().to_list()
    assert representatives == ["b1/a.jsonl:1.0"]


@pytest.mark.parametrize("name", ["../evil", "a/b", "[x]"])
def test_a_hostile_partition_that_the_ui_registered_fails_and_writes_nothing(
    settings_for: SettingsFor, instance: dg.DagsterInstance, name: str, tmp_path: Path
) -> None:
    instance.add_dynamic_partitions("batch", [name])
    with pytest.raises(ValueError, match="batch name"):
        run_stages(settings_for(), instance, name, "ingest_batch")
    assert not list(tmp_path.rglob("*.parquet"))


# --- several batches ------------------------------------------------------------------------------------------------


def test_the_dataset_holds_every_batch_and_lists_the_one_that_was_never_made(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, deliver: Deliver
) -> None:
    settings = settings_for()
    only_first = curate(settings, instance, delivered)
    registration.register(Deployment(settings, instance), "b3", [delivered], None)
    rows = [(f"query {n}", f"answer {n}") for n in range(8)]
    both = curate(settings, instance, deliver(*rows), batch="b2")
    assert both.is_new_version
    assert Path(only_first.dataset_url).exists()
    manifest = json.loads((Path(both.dataset_url) / "manifest.json").read_text())
    assert [(entry["batch"], entry["rows_selected"]) for entry in manifest["batches"]] == [("b1", 5), ("b2", 2)]
    alpaca = json.loads((Path(both.dataset_url) / "diff_high" / "alpaca.json").read_text())
    assert len(alpaca) == 7
    left_out = "not materialised: raw_data, screened_data, decisions, selected_subset"
    assert latest(settings)["excluded_batches"] == {"b3": left_out}
    assert f"batch b3 is not in the published dataset: {left_out}" in both.warnings


def test_a_new_delivery_of_a_batch_replaces_its_rows(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, deliver: Deliver
) -> None:
    settings = settings_for()
    curate(settings, instance, delivered)
    again = curate(
        settings, instance, deliver(("Is 7 prime?", "Yes: no number from 2 to 6 divides it."), ("new", "row"))
    )
    assert (again.rows_in, again.scored) == (2, 2 * len(Quantity))
    assert table(settings, "raw_data")["source_row"].to_list() == [1, 2]


def test_tables_of_another_delivery_are_not_mixed(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, deliver: Deliver
) -> None:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    run_stages(settings, instance, "b1", model_runtime=HandMadeRuntime())
    before = table(settings, "decisions")
    registration.register(Deployment(settings, instance), "b1", [deliver(("Is 7 prime?", "Yes."))], None, replaces=True)
    run_stages(settings, instance, "b1", "ingest_batch")
    said = (
        r"rmi_scores\|strong of batch b1 was made from another raw_data, .*materialise rmi_scores of this batch first"
    )
    with pytest.raises(dg.Failure, match=said):
        run_stages(settings, instance, "b1", "select_from_batch")
    assert table(settings, "decisions").equals(before)
    run_stages(settings, instance, "b1", model_runtime=HandMadeRuntime())
    assert table(settings, "decisions").height == 1


def test_models_that_were_asked_differently_are_not_compared(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    run_stages(settings, instance, "b1", "ingest_batch")
    for role, prior in (("strong", "user"), ("weak", "bare")):
        run_stages(settings, instance, f"b1|{role}", "score_batch", model_runtime=HandMadeRuntime(prior))
    with pytest.raises(dg.Failure) as error:
        run_stages(settings, instance, "b1", "select_from_batch")
    check_sentence(error.value)


def test_publishing_without_any_batch_fails_with_the_reason(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    with pytest.raises(dg.Failure) as error:
        run_stages(settings, instance, "b1", "publish_dataset")
    check_sentence(error.value)


# --- faults ---------------------------------------------------------------------------------------------------------


class HandMadeRuntime:
    """A model runtime without a model: every sum from the place of the pair, with the given changes."""

    def __init__(self, prior: str = "null_answer", /, **changes: pl.Expr) -> None:
        self._scoring = {"prior": prior}
        self._changes = changes

    def score(self, role: str, pairs: Pairs, *_: object) -> ScoredPairs:
        rows = [self._row(number, pair.pair_id, role) for number, pair in enumerate(in_memory(pairs), start=1)]
        frame = pl.DataFrame(rows, schema=dtypes(Logprobs)).with_columns(**self._changes)
        provenance = {"identity": dataclasses.asdict(IDENTITY), "identity_hash": IDENTITY.digest()}
        provenance |= {"frame": "chat", "template": "chat", "end_ids": [7], "scoring": self._scoring}
        provenance |= {"scored_with": [], "warnings": []}
        return ScoredPairs(RowsInMemory(frame), report_of(len(rows)), provenance)

    def _row(self, number: int, pair_id: str, role: str) -> dict[str, Any]:
        sums = {f"sum_nll_{quantity}": float(number + index) for index, quantity in enumerate(Quantity)}
        sums["sum_nll_q_given_a"] += 0.5 if role == "strong" else 0.25 * number
        return {"pair_id": pair_id, **sums, "num_q_tokens": 5, "num_a_tokens": 5} | {
            "num_a_tokens_untruncated": 5,
            "is_truncated": False,
        }


def run_stages(settings: Settings, instance: dg.DagsterInstance, batch: str, *jobs: str, **resources: object) -> None:
    """Run jobs for a batch (or batch|model) with some resources replaced; what a step raises is raised."""
    defs = build_job_defs(settings, resource_overrides=resources)
    name, *models = batch.split("|")
    for job in jobs or [name for name in STAGES if name not in PAGES]:
        keys: dict[str, list[Any]] = {
            "publish_dataset": [None],
            "score_batch": [dg.MultiPartitionKey({"batch": name, "model": m}) for m in models or settings.models],
        }
        for key in keys.get(job, [batch]):
            defs.resolve_job_def(job).execute_in_process(instance=instance, partition_key=key)


def test_a_pair_that_the_model_fails_on_is_unscorable_and_never_selected(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    settings = settings_for(selections=[{"name": "all", "strategy": "diff_low", "budget": {"fraction": 1.0}}])
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    fails = pl.int_range(pl.len()) < 4
    runtime = HandMadeRuntime(
        sum_nll_q_given_a=pl.when(~fails).then("sum_nll_q_given_a"),
        null_reason_q_given_a=pl.when(fails).then(pl.lit(NullReason.NON_FINITE.value)),
    )
    run_stages(settings, instance, "b1", model_runtime=runtime)
    decisions = table(settings, "decisions")
    assert dict(decisions["decision"].value_counts().iter_rows()) == {
        "selected": 14,
        "unscorable": 4,
        "rejected": 1,
        "duplicate": 1,
    }
    failed = decisions.filter(decision="unscorable")
    assert failed["reason"].unique().to_list() == ["non_finite"]
    assert failed["gap"].null_count() == 4
    check_sentence(failed["explanation"][0])
    assert set(table(settings, "selected_subset")["pair_id"]).isdisjoint(failed["pair_id"])


def test_a_model_that_fails_on_every_pair_selects_none(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for(gates={"min_scorable_share": None})
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    nothing = {f"sum_nll_{quantity}": pl.lit(None, pl.Float64) for quantity in Quantity}
    reasons = {f"null_reason_{quantity}": pl.lit(NullReason.NON_FINITE.value) for quantity in Quantity}
    run_stages(settings, instance, "b1", model_runtime=HandMadeRuntime(**nothing, **reasons))
    assert table(settings, "decisions").filter(decision="unscorable").height == 18
    assert table(settings, "selected_subset").is_empty()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"sum_nll_q": pl.lit(-1.0)}, r"logprobs: Logprobs: rows break the rules sum_nll_q\|min \(18 rows\)"),
        ({"surprise": pl.lit(1)}, r"logprobs: Logprobs: columns missing \[\], columns not declared \['surprise'\]"),
        ({"num_q_tokens": pl.lit(1)}, "logprobs: Logprobs: columns of the wrong type"),
        ({"pair_id": pl.lit(pair_name(1))}, r"logprobs: Logprobs: .*primary_key \(18 rows\)"),
    ],
)
def test_a_fault_of_the_code_is_raised_before_the_write_and_the_old_file_stands(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, fault: dict[str, pl.Expr], said: str
) -> None:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    run_stages(settings, instance, "b1", "ingest_batch", "score_batch", model_runtime=HandMadeRuntime())
    file = Path(open_storage(settings).tables.url("logprobs", Partition("b1", "strong")))
    before = file.read_bytes()
    with pytest.raises(dg.Failure, match=said) as caught:
        run_stages(settings, instance, "b1", "score_batch", model_runtime=HandMadeRuntime(**fault))
    assert str(caught.value.description).endswith("nothing was written")
    assert not caught.value.allow_retries
    assert file.read_bytes() == before
    assert len(instance.fetch_materializations(dg.AssetKey("logprobs"), limit=10).records) == 2


def test_a_missing_partition_upstream_is_named_with_its_remedy(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    said = r"nothing of a batch 'b1' is stored .* \(in the UI, materialise raw_data first\)"
    with pytest.raises(dg.Failure, match=said):
        run_stages(settings, instance, "b1", "select_from_batch")


def test_a_batch_that_only_the_ui_registered_names_the_remedy(
    settings_for: SettingsFor, instance: dg.DagsterInstance, check_sentence: Check
) -> None:
    instance.add_dynamic_partitions("batch", ["b1"])
    with pytest.raises(RunError) as error:
        run_batch.run_batch(Deployment(settings_for(), instance), "b1")
    check_sentence(error.value)


def test_what_the_stages_before_a_failure_made_stays(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    registration.register(Deployment(settings_for(), instance), "b1", [delivered], None)
    settings = settings_for(strong={"directory": "no/such/model"})
    stages: list[str] = []
    with pytest.raises(RunError) as error:
        run_batch.run_batch(
            Deployment(settings, instance), "b1", Events(on_stage=lambda job, of: stages.append(f"{job} {of}"))
        )
    check_sentence(error.value)
    assert stages == ["ingest_batch b1", "score_batch b1|strong"]
    storage = open_storage(settings)
    assert storage.tables.has("screened_data", Partition("b1"))
    assert not storage.tables.has("logprobs", Partition("b1", "strong"))


def test_a_partition_that_another_process_writes_is_left_to_it(
    settings_for: SettingsFor,
    instance: dg.DagsterInstance,
    delivered: Path,
    lock_holder: LockHolder,
    check_sentence: Check,
) -> None:
    settings = settings_for(runtime={"lock_timeout_seconds": 0.1})
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    holder = lock_holder(settings.home / "locks", "logprobs", "b1", "strong")
    with pytest.raises(RunError) as error:
        run_batch.run_batch(Deployment(settings, instance), "b1")
    check_sentence(error.value)
    holder.kill()
    holder.wait()
    assert run_batch.run_batch(Deployment(settings, instance), "b1").rows_by_decision["selected"] == 5


def test_a_changed_setting_rescores_nothing_that_it_does_not_touch(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    curate(settings_for(), instance, delivered)
    ranked = curate(settings_for(ranking={"num_strata": 3}, eligibility={"min_query_tokens": 2}), instance, delivered)
    assert ranked.scored == 0
    assert ranked.rows_by_decision["unscorable"] == 1
    asked = curate(settings_for(weak={"system_prompt": "Write clean code."}), instance, delivered)
    assert [(model.role, model.scored) for model in asked.models] == [("strong", 0), ("weak", 18 * len(Quantity))]


def test_a_second_batch_that_shares_pairs_scores_only_the_rest_and_its_metadata_says_so(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    kept = {"screening": {"duplicates": {"across_batches": False}}}
    settings = settings_for(**kept)
    curate(settings, instance, deliver(*SAMPLES[:10], name="first.jsonl"))
    second = deliver(*SAMPLES[4:14], name="second.jsonl")
    curate(settings, instance, second, batch="b2")
    for role in settings.models:
        assert _counted(instance, "b2", role) == {
            "pairs": 10,
            "pairs_scored": 4,
            "quantities_scored": 5 * 4,
            "quantities_from_cache": 5 * 6,
        }
    changes: list[dict[str, Any]] = [
        {"tiny": {"seed": 7}},
        {"strong": {"dtype": "bfloat16"}},
        {"strong": {"system_prompt": "Write clean code."}},
    ]
    for change in changes:
        run_stages(settings_for(**kept, **change), instance, "b2|strong", "score_batch")
        assert _counted(instance, "b2", "strong")["pairs_scored"] == 10, change


def test_rows_that_an_older_batch_has_are_duplicates_of_its_rows_and_are_not_scored(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = settings_for()
    curate(settings, instance, deliver(*SAMPLES[:10], name="first.jsonl"))
    edited = (SAMPLES[9][0] + "  ", SAMPLES[9][1])
    delivered = deliver(*SAMPLES[4:9], edited, *SAMPLES[10:14], name="second.jsonl")
    summary = curate(settings, instance, delivered, batch="b2")
    assert summary.reasons_by_decision["duplicate"] == {"exact_duplicate": 6}
    assert [_counted(instance, "b2", role)["pairs"] for role in settings.models] == [4, 4]
    of = table(settings, "screened_data", "b2")["duplicate_of"].drop_nulls().to_list()
    assert of == [f"b1/first.jsonl:{row}.0" for row in range(5, 11)]
    stored = open_storage(settings)
    inputs = stored.tables.read("screened_data", Partition("b2")).provenance["compared_with"]
    assert inputs == {"b1": stored.tables.read("screened_data", Partition("b1")).data_version}
    # Materialised again, the older batch is not compared with the newer one, nor with itself.
    again = curate(settings, instance, deliver(*SAMPLES[:10], name="first.jsonl"))
    assert again.rows_by_decision["duplicate"] == 0
    assert again.scored == 0


def test_rows_that_hold_a_benchmarks_task_are_dropped_or_flagged_with_the_evidence(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, tmp_path: Path, check_sentence: Check
) -> None:
    prompt = "Return the longest word of a sentence; of two that are equally long, the one that comes first."
    task = {"task_id": "T/1", "prompt": prompt, "canonical_solution": "x", "test": "", "entry_point": "f"}
    benchmark = write_jsonl(tmp_path / "tasks.jsonl", [task])
    checked: dict[str, Any] = {"benchmarks": [{"name": "mine", "path": str(benchmark)}]}
    held = (prompt.upper(), "max(words, key=len)")
    rows = deliver(*SAMPLES[:5], held, held)
    dropped = curate(settings_for(screening={"contamination": checked}), instance, rows)
    assert dropped.reasons_by_decision["contaminated"] == {"benchmark_prompt": 2}
    decisions = table(settings_for(), "decisions")
    assert decisions["explanation"][5].endswith(
        " 100% of the word sequences of the prompt of task T/1 of mine, including: return the longest word of a "
        "sentence of two that are equally long the one that comes first."
    )
    assert decisions["scores"].list.len().to_list() == [2] * 5 + [0, 0]
    flagged = settings_for(screening={"contamination": checked | {"action": "flag"}})
    summary = curate(flagged, instance, rows)
    assert summary.rows_by_decision["contaminated"] == 0
    screened = table(flagged, "screened_data")
    assert screened["status"].to_list() == ["accepted"] * 6 + ["duplicate"]
    assert (screened["reason"][5], screened["similarity"][5]) == ("benchmark_prompt", 1.0)
    decisions = table(flagged, "decisions")
    assert set(decisions["reason"][:6]) <= {"within_budget", "below_cut"}
    check_sentence(decisions["explanation"][5])
    check_sentence(decisions["explanation"][6])
    assert not any("lagged" in sentence for sentence in decisions["explanation"][:5])
    assert Deployment(flagged, instance).freshness().stale("b1") == []
    write_jsonl(benchmark, [task, task | {"task_id": "T/2"}])
    (stale,) = Deployment(flagged, instance).freshness().stale("b1")
    assert (stale.table, stale.reason) == (
        "screened_data",
        "screened_data was made from another file of the benchmark mine",
    )
    benchmark.unlink()
    with pytest.raises(RunError) as error:
        curate(flagged, instance, rows)
    check_sentence(error.value)


def test_a_longer_list_of_benchmarks_is_checked_for_the_new_one_only(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, tmp_path: Path, monkeypatch: Any
) -> None:
    checked: list[str] = []
    find = contamination.find
    monkeypatch.setattr(
        contamination, "find", lambda rows, benchmark, how: checked.append(benchmark.name) or find(rows, benchmark, how)
    )
    record = {"task_id": 1, "text": "Swap two integers in place.", "code": "a, b = b, a"}
    sources = [
        {"name": name, "path": str(write_jsonl(tmp_path / f"{name}.jsonl", [record]))} for name in ("one", "two")
    ]
    registration.register(Deployment(settings_for(), instance), "b1", [deliver(*SAMPLES[:5])], None)
    for listed in (sources[:1], sources, sources):
        settings = settings_for(screening={"contamination": {"benchmarks": listed}})
        run_stages(settings, instance, "b1", "ingest_batch")
    assert checked == ["one", "two"]
    run_stages(
        settings_for(screening={"contamination": {"benchmarks": sources, "ngram_words": 5}}),
        instance,
        "b1",
        "ingest_batch",
    )
    assert checked == ["one", "two", "one", "two"]


def test_a_gated_batch_is_not_scored_nor_published_and_is_fixed_by_a_new_delivery(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, deliver: Deliver, check_sentence: Check
) -> None:
    settings = settings_for()
    curate(settings, instance, delivered)
    bad = deliver(*NEW, ("", "no query"), ("no answer", ""), name="bad.jsonl")
    with pytest.raises(RunError) as error:
        curate(settings, instance, bad, batch="b2")
    check_sentence(error.value)
    decisions = table(settings, "decisions", "b2")
    assert decisions["decision"].to_list() == ["batch_gated"] * 5
    assert decisions["explanation"][3].endswith("`query` is empty or only white space.")
    assert _counted(instance, "b2", "strong")["pairs"] == 0
    assert list(latest(settings)["excluded_batches"]) == ["b2"]
    # A newer batch's rows are no duplicates of rows that are not published.
    third = curate(settings, instance, deliver(*NEW, name="third.jsonl"), batch="b3")
    assert third.rows_by_decision["duplicate"] == 0
    corrected = curate(settings, instance, deliver(("new", "row"), name="bad.jsonl"), batch="b2")
    assert corrected.rows_by_decision["batch_gated"] == 0
    assert latest(settings)["excluded_batches"] == {}


NEW = [("What is a tuple?", "An immutable sequence."), ("And a set?", "No repetitions."), ("A dict?", "A map.")]


def published_pairs(settings: Settings) -> list[str]:
    version = latest(settings)["version"]
    return versions.read_scores(open_storage(settings), version)["pair_id"].drop_nulls().to_list()


def test_rows_that_an_older_gated_batch_held_are_published_once_when_it_is_corrected(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = settings_for()
    with pytest.raises(RunError, match="gated"):
        curate(settings, instance, deliver(*NEW, ("", "no query"), ("", "nor here")))
    assert curate(settings, instance, deliver(*NEW), batch="b2").rows_by_decision["duplicate"] == 0
    corrected = curate(settings, instance, deliver(*NEW))
    assert corrected.rows_by_decision["duplicate"] == 3, "the corrected batch is screened after the other"
    assert sorted(latest(settings)["excluded_batches"]) == []


@pytest.mark.slow
def test_a_batch_whose_duplicates_stood_in_a_batch_that_changed_is_screened_again_before_it_is_published(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver
) -> None:
    settings = settings_for()
    curate(settings, instance, deliver(*NEW, *SAMPLES[:3]))
    second = deliver(*NEW, *SAMPLES[4:7], name="second.jsonl")
    assert curate(settings, instance, second, batch="b2").rows_by_decision["duplicate"] == 3
    run_stages(settings, instance, "b1", "ingest_batch")
    registration.register(Deployment(settings, instance), "b1", [deliver(*SAMPLES[:3])], None, replaces=True)
    for stage in ("ingest_batch", "score_batch", "select_from_batch"):
        run_stages(settings, instance, "b1", stage)
    why = "screened against another state of batch b1; `qaq refresh` screens it again"
    assert status.batches_left_out(Deployment(settings, instance)) == {"b2": why}
    run_batch.run_batch(Deployment(settings, instance), "b1")
    assert latest(settings)["excluded_batches"] == {}
    assert table(settings, "decisions", "b2")["duplicate_of"].null_count() == 6
    pairs = published_pairs(settings)
    assert len(pairs) == len(set(pairs)) == 9


def test_rows_stay_when_the_batch_that_held_them_is_taken_out_of_the_ui(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    settings = settings_for()
    trial = deliver(*NEW)
    curate(settings, instance, trial, batch="trial")
    curate(settings, instance, trial)
    instance.delete_dynamic_partition("batch", "trial")
    with pytest.raises(dg.Failure) as error:
        run_stages(settings, instance, "b1", "publish_dataset")
    check_sentence(error.value)
    assert curate(settings, instance, trial).rows_by_decision["duplicate"] == 0


def test_a_gate_that_is_loosened_or_tightened_takes_effect_or_says_what_to_materialise(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, check_sentence: Check
) -> None:
    rows = deliver(*NEW, ("", "no query"), ("", "nor here"))
    loose = settings_for(gates={"max_rejected_share": None})
    curate(loose, instance, rows)
    strict = settings_for()
    run_stages(strict, instance, "b1", "ingest_batch")
    with pytest.raises(dg.Failure) as error:
        run_stages(strict, instance, "b1", "publish_dataset")
    check_sentence(error.value)
    with pytest.raises(RunError, match="gated"):
        curate(strict, instance, rows)
    run_stages(loose, instance, "b1", "ingest_batch")
    with pytest.raises(dg.Failure) as error:
        run_stages(loose, instance, "b1", "select_from_batch")
    check_sentence(error.value)
    assert curate(loose, instance, rows).rows_by_decision["batch_gated"] == 0


def test_a_screening_that_ended_before_its_write_takes_no_place(
    settings_for: SettingsFor, instance: dg.DagsterInstance, deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for()

    def fail(*_: object) -> None:
        raise MemoryError("no more")

    registration.register(Deployment(settings, instance), "b1", [deliver(*NEW)], None)
    with monkeypatch.context() as patch:
        patch.setattr("qaq_pipeline.screening.screen.screen", fail)
        with pytest.raises(RunError, match="no more"):
            run_batch.run_batch(Deployment(settings, instance), "b1")
    assert curate(settings, instance, deliver(*NEW, name="other.jsonl"), batch="b2").rows_by_decision["duplicate"] == 0
    assert run_batch.run_batch(Deployment(settings, instance), "b1").rows_by_decision["duplicate"] == 3
    assert latest(settings)["excluded_batches"] == {}


def test_a_batch_that_no_model_can_score_is_gated_after_scoring(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, check_sentence: Check
) -> None:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    nothing = {f"sum_nll_{quantity}": pl.lit(None, pl.Float64) for quantity in Quantity}
    reasons = {f"null_reason_{quantity}": pl.lit(NullReason.NON_FINITE.value) for quantity in Quantity}
    with pytest.raises(dg.Failure) as error:
        run_stages(settings, instance, "b1", model_runtime=HandMadeRuntime(**nothing, **reasons))
    check_sentence(error.value)
    assert set(table(settings, "decisions")["decision"]) == {"batch_gated"}
    assert set(table(settings, "decisions")["reason"]) == {"too_few_scorable"}


def test_a_model_that_changes_while_it_scores_gates_the_batch_and_leaves_no_score_of_another(
    settings_for: SettingsFor,
    instance: dg.DagsterInstance,
    delivered: Path,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    check_sentence: Check,
) -> None:
    weak = Path(shutil.copytree(tiny_model_dir(seed=1), tmp_path / "weak"))
    settings = settings_for(weak={"directory": str(weak)}, runtime={"shard_seconds": 0.0, "batch_tokens": 400})
    storage = open_storage(settings)
    cached_before: list[int] = []

    def replace_weights(progress: Progress) -> None:
        if progress.model == "weak" and progress.done_sequences > progress.total_sequences / 2 and not cached_before:
            cached_before.append(_num_cached(storage, "weak"))
            shutil.copy(tiny_model_dir(seed=2) / "model.safetensors", weak)

    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    with pytest.raises(RunError) as error:
        run_batch.run_batch(Deployment(settings, instance), "b1", Events(on_progress=replace_weights))
    check_sentence(error.value)
    assert set(table(settings, "decisions")["reason"]) == {"model_changed"}
    provenance = {role: storage.tables.read("rmi_scores", Partition("b1", role)).provenance for role in settings.models}
    assert "identity_after" not in provenance["strong"]
    before, after = provenance["weak"]["identity"], provenance["weak"]["identity_after"]
    assert {name for name in before if before[name] != after[name]} == {"revision"}
    assert 0 < cached_before[0] < 5 * 18
    assert _num_cached(storage, "weak") == cached_before[0]

    again = run_batch.run_batch(Deployment(settings, instance), "b1")
    assert {model.role: (model.scored, model.cached) for model in again.models} == {
        "strong": (0, 5 * 18),
        "weak": (5 * 18, 0),
    }
    assert again.rows_by_decision["selected"] == 5
    shutil.copy(tiny_model_dir(seed=1) / "model.safetensors", weak)
    assert run_batch.run_batch(Deployment(settings, instance), "b1").models[1].cached == cached_before[0]
    honest = settings_for(storage={"root": str(tmp_path / "elsewhere")})
    registration.register(Deployment(honest, instance), "b1", [delivered], None)
    run_batch.run_batch(Deployment(honest, instance), "b1")
    assert_frame_equal(table(settings, "logprobs", "b1", "weak"), table(honest, "logprobs", "b1", "weak"))


def _num_cached(storage: Storage, model: str) -> int:
    return sum(one.num_scores for one in storage.scores.models() if one.identity["model"] == model)


def _counted(instance: dg.DagsterInstance, batch: str, role: str) -> dict[str, Any]:
    """What the newest materialisation of logprobs says of pairs and quantities."""
    key = dg.AssetKey("logprobs")
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(key, asset_partitions=[f"{batch}|{role}"]), limit=1
    ).records[0]
    assert found.asset_materialization is not None
    metadata = found.asset_materialization.metadata
    return {
        name: metadata[name].value for name in ("pairs", "pairs_scored", "quantities_scored", "quantities_from_cache")
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_in_processes_of_their_own_give_the_same_dataset(
    settings_for: SettingsFor,
    settings_file: Callable[[Settings], Path],
    instance: dg.DagsterInstance,
    delivered: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    here = curate(settings_for(), instance, delivered)
    monkeypatch.setenv("QAQ_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = settings_for(runtime={"executor": "multiprocess"})
    monkeypatch.setenv("QAQ_CONFIG", str(settings_file(settings)))
    with open_instance() as home:
        there = curate(settings, home, delivered)
    assert there.rows_by_decision == here.rows_by_decision
    assert Path(there.dataset_url).name == Path(here.dataset_url).name
