"""The files of deploy/: settings load, Dagster accepts the instances, and pins are those of the project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._config import validate_config
from dagster._core.instance.config import dagster_instance_config_schema

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.orchestration.jobs import build_job_defs

DEPLOY = Path(__file__).parents[2] / "deploy"
CONSTRAINTS = (DEPLOY.parent / "constraints.txt").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["settings-box.yaml", "settings-cluster.yaml"])
def test_the_settings_make_definitions(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QAQ_HOME", str(tmp_path))
    monkeypatch.setenv("QAQ_POSTGRES_URL", "postgresql+psycopg2://qaq:none@127.0.0.1/qaq")
    definitions = build_job_defs(load_settings(str(DEPLOY / name)))
    job = definitions.resolve_job_def("score_batch")
    assert job.run_tags.get("dagster/max_runtime") in ("86400", "172800")
    if name == "settings-cluster.yaml":
        asset = definitions.resolve_assets_def("logprobs")
        assert isinstance(asset, dg.AssetsDefinition)
        container = asset.op.tags["dagster-k8s/config"]
        assert '"nvidia.com/gpu": "1"' in container
        assert '"memory": "48Gi"' in container


@pytest.mark.parametrize("name", ["dagster-laptop.yaml", "dagster-box.yaml", "dagster-cluster.yaml"])
def test_dagster_accepts_the_instance(name: str) -> None:
    found = validate_config(dagster_instance_config_schema(), read(name))
    assert found.success, found.errors


def test_the_image_has_the_pins_of_the_project() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    pins = re.findall(r"([a-z][a-z0-9-]*)==([0-9.]+)", text)
    assert ("torch", "2.13.0") in pins
    for name, version in pins:
        assert f"\n{name}=={version}\n" in CONSTRAINTS
    for name in ("dagster-aws", "boto3", "s3transfer"):
        assert f"\n{name}==" in CONSTRAINTS


def test_the_services_listen_on_loopback_and_have_their_secrets_from_the_environment() -> None:
    compose = read("compose.yaml")
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    environment = compose["services"]["code"]["environment"]
    for name in ("QAQ_POSTGRES_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        assert "${" in environment[name]
    variables = set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    assert variables <= set(re.findall(r"(?m)^([A-Z_]+)=", (DEPLOY / ".env.example").read_text(encoding="utf-8")))
