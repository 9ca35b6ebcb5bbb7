"""unchanged: nothing runs where every result would be the same, and everything runs where one may not be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import registration, run_batch, unchanged
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import Events, RunError
from qaq_pipeline.runs.summary import BatchSummary
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.storage.storage import open_storage

SettingsFor = Callable[..., Settings]
Run = Callable[[Settings], tuple[BatchSummary, list[str]]]


@pytest.fixture
def run(instance: dg.DagsterInstance) -> Run:
    """Run batch b1; its summary, and the stages that ran."""

    def curate(settings: Settings) -> tuple[BatchSummary, list[str]]:
        stages: list[str] = []
        events = Events(on_stage=lambda job, _: stages.append(job))
        return run_batch.run_batch(Deployment(settings, instance), "b1", events), stages

    return curate


@pytest.fixture
def curated(settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, run: Run) -> Settings:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    assert len(run(settings)[1]) == 5
    return settings


def test_a_batch_in_which_nothing_changed_runs_no_stage_and_has_the_same_summary(curated: Settings, run: Run) -> None:
    again, stages = run(curated)
    assert stages == []
    assert (again.scored, again.cached, again.is_new_version) == (0, 2 * 5 * 18, False)
    assert {model.tokens for model in again.models} == {0}
    assert again.rows_by_decision["selected"] == 5


def test_other_limits_of_a_check_are_applied_and_recorded(
    settings_for: SettingsFor, instance: dg.DagsterInstance, curated: Settings, run: Run
) -> None:
    strict = settings_for(checks={"min_mean_rmi": 10})
    summary, stages = run(strict)
    assert len(stages) == 5
    assert [warning for warning in summary.warnings if "answers_explain_queries of rmi_scores of b1|weak" in warning]
    key = dg.AssetCheckKey(dg.AssetKey("rmi_scores"), "answers_explain_queries")
    newest = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    assert newest.evaluation is not None
    assert not newest.evaluation.passed
    again, stages = run(strict)
    assert stages == []
    assert again.warnings == summary.warnings


@pytest.mark.parametrize("table", ["raw_data/b1", "logprobs/b1/weak", "decisions/b1"])
def test_a_damaged_table_is_made_again(curated: Settings, run: Run, table: str) -> None:
    path = Path(curated.storage_root) / table / "table.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    summary, stages = run(curated)
    assert len(stages) == 5
    assert summary.rows_by_decision["selected"] == 5
    assert run(curated)[1] == []


def test_a_version_that_is_gone_is_published_again(curated: Settings, run: Run) -> None:
    storage = open_storage(curated)
    newest = versions.latest(storage)
    assert newest is not None
    shutil.rmtree(storage.files.path(*versions.place(newest.version)))
    assert len(run(curated)[1]) == 5
    assert versions.is_kept(storage, newest.version)


@pytest.mark.slow
def test_a_model_whose_files_were_restored_after_they_changed_scores_again(
    settings_for: SettingsFor,
    instance: dg.DagsterInstance,
    delivered: Path,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    run: Run,
) -> None:
    weak = Path(shutil.copytree(tiny_model_dir(seed=1), tmp_path / "weak"))
    settings = settings_for(weak={"directory": str(weak)}, runtime={"shard_seconds": 0.0, "batch_tokens": 400})

    def replace_weights(progress: Progress) -> None:
        if progress.model == "weak" and progress.done_sequences > progress.total_sequences / 2:
            shutil.copy(tiny_model_dir(seed=2) / "model.safetensors", weak)

    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    with pytest.raises(RunError, match="model_changed"):
        run_batch.run_batch(Deployment(settings, instance), "b1", Events(on_progress=replace_weights))
    shutil.copy(tiny_model_dir(seed=1) / "model.safetensors", weak)
    assert run(settings)[0].rows_by_decision["selected"] == 5


def test_a_score_that_memory_prevented_is_tried_again() -> None:
    assert unchanged._may_succeed({"null_reasons": {"q": {"out_of_memory": 1}}})
    assert not unchanged._may_succeed({"null_reasons": {"q_given_a": {"answer_too_long": 3}}})
    assert not unchanged._may_succeed({"rows": 3})
