"""trial: which rows each arm has, that held-out rows are in none, and that a trial goes on where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.publication import hub, versions
from qaq_pipeline.runs import registration, run_batch, trial_runs
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import SILENT, Events, FailedJobError
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import withdrawals
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.trial import training_run
from qaq_pipeline.trial.arms import CONTROLS, EVERYTHING, UNTRAINED, TrialError, read_arms
from qaq_pipeline.trial.trial import TrialProgress, TrialRuntime
from qaq_pipeline_tests.conftest import SAMPLES, write_jsonl
from qaq_pipeline_tests.support.sentences import Check

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "sigma")
HALF = [{"name": "mine", "strategy": "diff_high", "budget": {"fraction": 0.5}}, {"name": "top", "strategy": "rmi_top"}]


@pytest.fixture
def settings(settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(
        held_out={"share": 0.3},
        selections=HALF,
        screening={"duplicates": {"near_threshold": 1.0}},
        trial={"seeds": 2, "selections": ["top"], "learning_rate": 0.01, "curve_points": 1},
        reports={"pages": True, "plots": False},
    )


@pytest.fixture
def deployment(settings: Settings, instance: dg.DagsterInstance) -> Deployment:
    return Deployment(settings, instance)


def publish(deployment: Deployment, folder: Path, batch: str, rows: list[tuple[str, str]]) -> str:
    """Curate rows, and return the hash of the new version."""
    records = [{"instruction": query, "output": answer} for query, answer in rows]
    registration.register(deployment, batch, [write_jsonl(folder / batch / "rows.jsonl", records)], None, replaces=True)
    run_batch.run_batch(deployment, batch)
    return versions.find_version(deployment.storage, "latest").version


def twins(number: int) -> list[tuple[str, str]]:
    """Rows in clusters of three: near twins, and the same query with another answer."""
    rows = []
    for i in range(number):
        text = " ".join(WORDS[(i * 7 + k * (i + 1)) % len(WORDS)] + str(i) for k in range(12))
        rows += [
            (f"Write {text}", f"code of {text}"),
            (f"Write {text}", f"code of {text} now"),
            (f"Write {text}", f"{i}"),
        ]
    return rows


def table(deployment: Deployment, name: str, batch: str) -> pl.DataFrame:
    return deployment.storage.tables.read(name, Partition(batch)).frame


def test_no_arm_has_a_held_out_row_or_a_twin_of_one(deployment: Deployment, settings: Settings, tmp_path: Path) -> None:
    version = publish(deployment, tmp_path, "b1", twins(12))
    arms = read_arms(deployment.storage, settings, version)
    screened = table(deployment, "screened_data", "b1")
    held_out = screened.filter(status="held_out")
    assert 3 <= held_out.height < screened.height
    measured = [pair.pair_id for pair in arms.held_out(1000)]
    assert held_out.filter(pl.col("pair_id").is_in(measured))["cluster"].is_duplicated().sum() == 0
    assert len(measured) == held_out["cluster"].n_unique()
    assert arms.held_out(2) == arms.held_out(1000)[:2]
    of_arms = [arms.pairs(arm) for arm in ("mine", "top", EVERYTHING)]
    of_arms += [pairs for seed in range(3) for pairs in arms.controls(seed).values()]
    for pairs in of_arms:
        trained = screened.filter(pl.col("pair_id").is_in([pair.pair_id for pair in pairs]))
        assert trained.height > 0
        assert set(trained["cluster"]).isdisjoint(held_out["cluster"])
    queries = {pair.query for pair in arms.held_out(1000)}
    assert queries.isdisjoint(pair.query for pair in arms.pairs(EVERYTHING))


def test_a_cluster_on_both_sides_is_refused(deployment: Deployment, settings: Settings, tmp_path: Path) -> None:
    version = publish(deployment, tmp_path, "b1", twins(12))
    arms = read_arms(deployment.storage, settings, version)
    scored = arms.batches["b1"]
    frame = scored.screened_data.frame
    first = frame.filter(status="held_out")["cluster"][0]
    mixed = frame.with_columns(cluster=pl.when(status="accepted").then(pl.lit(first)).otherwise("cluster"))
    made = StoredTable(mixed, scored.screened_data.provenance, scored.screened_data.data_version)
    batches = {**arms.batches, "b1": dataclasses.replace(scored, screened_data=made)}
    with pytest.raises(TrialError, match="both trained on and held out"):
        type(arms)(version, arms.published, batches, arms.decisions)


def test_a_held_out_pair_in_an_arm_is_refused(deployment: Deployment, settings: Settings, tmp_path: Path) -> None:
    version = publish(deployment, tmp_path, "b1", twins(12))
    arms = read_arms(deployment.storage, settings, version)
    vars(arms)["_held_out_ids"] = {arms.pairs("mine")[0].pair_id}
    for attempt in (lambda: arms.pairs("mine"), lambda: arms.pairs(EVERYTHING)):
        with pytest.raises(TrialError, match="1 held-out pairs are trained on"):
            attempt()


@pytest.mark.slow
def test_the_rows_of_the_arms(deployment: Deployment, settings: Settings, tmp_path: Path) -> None:
    version = publish(deployment, tmp_path, "b1", SAMPLES)
    version = publish(deployment, tmp_path, "b2", twins(6))
    arms = read_arms(deployment.storage, settings, version)
    decided = pl.concat(table(deployment, "decisions", batch) for batch in ("b1", "b2"))
    selected = set(decided.filter(decision="selected")["pair_id"])
    accepted = set(decided.filter(pl.col("decision").is_in(["selected", "not_selected", "unscorable"]))["pair_id"])

    def ids(arm: str, seed: int = 0) -> set[str]:
        return {pair.pair_id for pair in (arms.controls(seed)[arm] if arm in CONTROLS else arms.pairs(arm))}

    assert ids("mine") == selected
    assert ids(EVERYTHING) == accepted
    assert ids(UNTRAINED) == set()
    for control in CONTROLS:
        assert len(ids(control)) == len(selected)
        assert ids(control) <= accepted
        assert len({frozenset(ids(control, seed)) for seed in range(5)}) == 5
        assert ids(control, 3) == ids(control, 3)
    assert ids(CONTROLS[0]) != ids(CONTROLS[1])


@pytest.mark.slow
def test_a_trial_ends_in_losses_of_every_arm_a_verdict_and_pages(
    deployment: Deployment, tmp_path: Path, check_sentence: Check
) -> None:
    version = publish(deployment, tmp_path, "b1", SAMPLES)
    before = trial_runs.estimate(deployment, "latest")
    assert (before.num_trainings, before.num_missing) == (11, 11)
    assert before.num_tokens > 0
    assert before.seconds > 0
    seen: list[TrialProgress] = []
    found = trial_runs.run_trial(deployment, "latest", Events(on_training=seen.append))
    after = trial_runs.estimate(deployment, "latest")
    assert (after.num_missing, after.num_tokens, after.flops, after.seconds) == (0, 0, 0, 0)
    arms = ["mine", *CONTROLS, "top", EVERYTHING]
    counts = dict(found.frame.group_by("arm").agg(pl.col("seed").n_unique()).iter_rows())
    assert counts == {UNTRAINED: 1} | dict.fromkeys(arms, 2)
    held_out = table(deployment, "screened_data", "b1").filter(status="held_out")["pair_id"]
    assert set(found.frame["item"]) == set(held_out)
    amount = found.provenance["amount"]["amount"]
    for run in found.provenance["runs"]:
        assert run["num_tokens"] == 0 if run["arm"] == UNTRAINED else amount <= run["num_tokens"] < amount + 512
    assert seen
    assert all(0 < one.step <= one.num_steps for one in seen)
    assert "training_trial" in {str(key.path[-1]) for key in deployment.instance.all_asset_keys()}
    storage = deployment.storage
    page = storage.files.read_bytes(*versions.trial_page_place(version)).decode()
    assert "too few seeds" in page
    assert "too few seeds" in storage.files.read_bytes(*versions.page_place(version)).decode()
    copy = tmp_path / "copy"
    assert hub.publish(storage, "latest", str(copy)).is_new
    assert "## Training trial" in (copy / "README.md").read_text(encoding="utf-8")
    assert not hub.publish(storage, "latest", str(copy)).is_new


@pytest.mark.slow
def test_a_card_that_was_copied_before_the_trial_gets_the_verdict(deployment: Deployment, tmp_path: Path) -> None:
    publish(deployment, tmp_path, "b1", SAMPLES)
    copy = tmp_path / "copy"
    hub.publish(deployment.storage, "latest", str(copy))
    assert "Training trial" not in (copy / "README.md").read_text(encoding="utf-8")
    trial_runs.run_trial(deployment, "latest", SILENT)
    assert hub.publish(deployment.storage, "latest", str(copy)).is_new
    card = (copy / "README.md").read_text(encoding="utf-8")
    assert card.count("## Training trial") == 1
    edited = card.replace("## Training trial", "## A word of ours\n\n## Training trial").replace("seeds", "SEEDS")
    (copy / "README.md").write_text(edited, encoding="utf-8")
    assert hub.publish(deployment.storage, "latest", str(copy)).is_new
    again = (copy / "README.md").read_text(encoding="utf-8")
    assert "A word of ours" in again
    assert again.count("## Training trial") == 1
    assert "SEEDS" not in again.partition("## Training trial")[2]
    assert not hub.publish(deployment.storage, "latest", str(copy)).is_new


@pytest.mark.slow
def test_an_interrupted_trial_loses_one_training_at_most(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(deployment, tmp_path, "b1", SAMPLES)
    whole, run = training_run.TrialModel.run, []

    def dies(model: training_run.TrialModel, *arguments: Any) -> training_run.RunResult:
        if len(run) == 4:
            raise KeyboardInterrupt
        run.append(arguments[2])
        return whole(model, *arguments)

    monkeypatch.setattr(training_run.TrialModel, "run", dies)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - Dagster decides which error an interrupt becomes.
        trial_runs.run_trial(deployment, "latest", SILENT)
    assert len(deployment.storage.files.names("training_runs")) == 4
    run.clear()
    monkeypatch.setattr(
        training_run.TrialModel, "run", lambda model, *arguments: run.append(1) or whole(model, *arguments)
    )
    first = trial_runs.run_trial(deployment, "latest", SILENT)
    assert len(run) == 11 - 4
    again = trial_runs.run_trial(deployment, "latest", SILENT)
    assert len(run) == 11 - 4
    assert again.frame.equals(first.frame)
    more = deployment.settings.trial.model_copy(update={"seeds": 3})
    more_seeds = Deployment(deployment.settings.model_copy(update={"trial": more}), deployment.instance)
    trial_runs.run_trial(more_seeds, "latest", SILENT)
    assert len(run) == 11 - 4 + 5


def test_a_version_that_cannot_be_tried_says_why(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, tmp_path: Path, check_sentence: Check
) -> None:
    nothing_held_out = Deployment(settings_for(selections=HALF), instance)
    publish(nothing_held_out, tmp_path, "b1", SAMPLES)
    with pytest.raises(TrialError) as no_rows:
        trial_runs.estimate(nothing_held_out, "latest")
    check_sentence(no_rows.value)
    with pytest.raises(FailedJobError, match="has no held-out pair to measure on"):
        trial_runs.run_trial(nothing_held_out, "latest", SILENT)


def test_a_version_with_withdrawn_rows_or_without_files_is_refused(
    deployment: Deployment, settings: Settings, tmp_path: Path, check_sentence: Check
) -> None:
    version = publish(deployment, tmp_path, "b1", SAMPLES)
    deployment.storage.files.remove(*versions.place(version, versions.MANIFEST))
    with pytest.raises(TrialError) as removed:
        read_arms(deployment.storage, settings, version)
    check_sentence(removed.value)


def test_rows_that_were_withdrawn_are_not_trained_on(
    deployment: Deployment, settings: Settings, tmp_path: Path, check_sentence: Check
) -> None:
    version = publish(deployment, tmp_path, "b1", SAMPLES)
    withdrawals.add(deployment.storage, "b1", {}, "a reason", is_withdrawn=True)
    with pytest.raises(TrialError) as withdrawn:
        read_arms(deployment.storage, settings, version)
    check_sentence(withdrawn.value)


@pytest.mark.slow
def test_decisions_of_other_tables_are_refused(deployment: Deployment, settings: Settings, tmp_path: Path) -> None:
    version = publish(deployment, tmp_path, "b1", SAMPLES)
    storage, partition = deployment.storage, Partition("b1")
    ranks = storage.tables.read("disagreement_scores", partition)
    changed = StoredTable(ranks.frame.with_columns(gap=pl.col("gap") / 2), ranks.provenance)
    storage.tables.write(changed, "disagreement_scores", partition)
    with pytest.raises(OriginError, match="decisions"):
        read_arms(storage, settings, version)


@pytest.mark.slow
def test_an_older_version_whose_batch_was_decided_again_is_refused(
    deployment: Deployment, tmp_path: Path, check_sentence: Check
) -> None:
    older = publish(deployment, tmp_path, "b1", SAMPLES)
    publish(deployment, tmp_path, "b1", SAMPLES[:15])
    with pytest.raises(TrialError) as changed:
        trial_runs.estimate(deployment, older)
    check_sentence(changed.value)


def test_a_selection_that_the_version_does_not_have_is_named(
    deployment: Deployment, settings: Settings, tmp_path: Path, check_sentence: Check
) -> None:
    version = publish(deployment, tmp_path, "b1", SAMPLES)
    with pytest.raises(TrialError) as unknown:
        read_arms(deployment.storage, settings, version).pairs("other")
    check_sentence(unknown.value)


def test_equal_rows(settings_for: Callable[..., Settings], instance: dg.DagsterInstance, tmp_path: Path) -> None:
    trial = {"seeds": 1, "equal": "rows", "amount": 9, "rows_per_step": 3}
    deployment = Deployment(settings_for(held_out={"share": 0.3}, selections=HALF, trial=trial), instance)
    version = publish(deployment, tmp_path, "b1", SAMPLES)
    work = TrialRuntime(deployment.settings).plan(deployment.storage, version).work
    assert (work.unit, work.amount, work.num_steps) == ("rows", 9, 3)


@pytest.mark.slow
def test_benchmarks_are_measured(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    tasks = [{"task_id": i, "text": f"Add {i}.", "code": f"def add(n):\n    return n + {i}"} for i in range(3)]
    path = write_jsonl(tmp_path / "mbpp.jsonl", tasks)
    trial = {"seeds": 1, "benchmarks": [{"name": "mbpp", "path": str(path)}]}
    deployment = Deployment(settings_for(held_out={"share": 0.3}, selections=HALF, trial=trial), instance)
    publish(deployment, tmp_path, "b1", SAMPLES)
    frame = trial_runs.run_trial(deployment, "latest", SILENT).frame
    of_benchmark = frame.filter(measure="mbpp", arm=UNTRAINED)
    assert of_benchmark["item"].to_list() == ["MBPP/0", "MBPP/1", "MBPP/2"]
