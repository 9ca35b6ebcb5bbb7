"""executors: definitions load and validate under each, without a cluster; a step asks for the GPUs that it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.orchestration.executors import build_executor
from qaq_pipeline_tests.support.sentences import Check

SettingsFor = Callable[..., Settings]


@pytest.mark.parametrize(
    ("executor", "pool"),
    [("in_process", "in_process"), ("multiprocess", "processes"), ("k8s", "processes"), ("k8s", "ray"), ("ray", "ray")],
)
def test_definitions_load_and_validate_without_a_cluster(executor: str, pool: str, settings_for: SettingsFor) -> None:
    defs = build_defs(settings_for(runtime={"executor": executor, "pool": {"kind": pool}}))
    dg.Definitions.validate_loadable(defs)
    assert defs.executor is not None
    assert isinstance(defs.executor, dg.ExecutorDefinition)
    assert defs.executor.name == executor
    assert defs.resolve_job_def("score_batch").executor_def.name == executor


def test_no_package_of_a_cluster_is_imported_for_a_laptop(settings_for: SettingsFor, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings_for().model_dump(mode="json")))
    variables = {"QAQ_CONFIG": str(tmp_path / "settings.yaml"), "QAQ_HOME": str(tmp_path)}
    code = "import sys; from qaq_pipeline.definitions import defs; defs(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.decode().split()}
    assert "dagster" in imported
    assert imported.isdisjoint({"dagster_k8s", "dagster_ray", "kubernetes", "ray"})


@pytest.mark.parametrize("executor", ["k8s", "ray"])
def test_a_package_that_is_not_installed_is_named(
    executor: str, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    found = util.find_spec
    monkeypatch.setattr(
        "qaq_pipeline.orchestration.executors.find_spec",
        lambda name: None if name.startswith("dagster_") else found(name),
    )
    with pytest.raises(SettingsError) as error:
        build_executor(settings_for(runtime={"executor": executor}).runtime)
    check_sentence(error.value)


def test_a_pool_on_ray_without_ray_is_named(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    monkeypatch.setattr("qaq_pipeline.scoring.pools.find_spec", lambda _: None)
    with pytest.raises(SettingsError) as error:
        build_defs(settings_for(runtime={"pool": {"kind": "ray"}}))
    check_sentence(error.value)


@pytest.mark.parametrize(
    ("executor", "config"),
    [("k8s", {"job_namespace": "qaq", "max_concurrent": 4}), ("ray", {"ray": {"address": "http://127.0.0.1:8265"}})],
)
def test_the_configuration_of_an_executor_is_that_of_its_package(
    executor: str, config: dict[str, Any], settings_for: SettingsFor, check_sentence: Check
) -> None:
    build_executor(settings_for(runtime={"executor": executor, "executor_config": config}).runtime)
    with pytest.raises(SettingsError) as error:
        build_executor(settings_for(runtime={"executor": executor, "executor_config": {"nodes": 3}}).runtime)
    check_sentence(error.value)


def test_only_the_executors_of_clusters_have_a_configuration(settings_for: SettingsFor) -> None:
    with pytest.raises(SettingsError, match="executor_config"):
        settings_for(runtime={"executor_config": {"max_concurrent": 2}})


def tags_of(settings: Settings, asset: str) -> dict[str, Any]:
    node = build_defs(settings).resolve_assets_def(asset).node_def
    return {name: json.loads(value) for name, value in node.tags.items() if name.endswith("/config")}


GPU = {"device": "cuda:0"}


@pytest.mark.parametrize(
    ("executor", "pool", "tags"),
    [
        ("k8s", {}, {"dagster-k8s/config": {"container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}}),
        ("ray", {"size": 4}, {"dagster-ray/config": {"num_gpus": 4}}),
        ("k8s", {"kind": "ray", "size": 4}, {}),
        ("multiprocess", {}, {}),
    ],
)
def test_a_step_that_scores_asks_its_cluster_for_gpus_and_other_steps_for_none(
    executor: str, pool: dict[str, Any], tags: dict[str, Any], settings_for: SettingsFor
) -> None:
    settings = settings_for(strong=GPU, runtime={"executor": executor, "pool": pool})
    assert tags_of(settings, "logprobs") == tags
    assert tags_of(settings, "rmi_scores") == {}
    trained = settings_for(weak=GPU, runtime={"executor": executor, "pool": pool})
    assert ("num_gpus" in str(tags_of(trained, "training_trial"))) == (executor == "ray")
    assert ("nvidia.com/gpu': '1'" in str(tags_of(trained, "training_trial"))) == (executor == "k8s")
    assert tags_of(settings_for(runtime={"executor": executor, "pool": pool}), "logprobs") == {}
