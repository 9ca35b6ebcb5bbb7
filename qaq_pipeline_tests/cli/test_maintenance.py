"""The commands that keep what is stored in order: cache, doctor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.cli.conftest import Home, Qaq, write_settings
from qaq_pipeline_tests.conftest import delivered_rows, write_jsonl
from qaq_pipeline_tests.scoring.test_runtime import with_added_tokens


@pytest.mark.slow
def test_the_cache_is_shown_by_model_and_pruned_by_name(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    assert qaq(empty_home, "cache").out == "The score cache is empty."
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    assert qaq(empty_home, "run", delivery, "--batch", "b1").code == 0
    with empty_home.config.open("a") as config:
        config.write("\nchecks: {min_mean_rmi: 10}\n")  # Else nothing would have to run again.
    assert qaq(empty_home, "run", delivery, "--batch", "b1").code == 0
    shown = qaq(empty_home, "cache")
    assert "scores │ 90 │ 90" in shown.out
    assert "hits │ 90 │ 90" in shown.out
    assert "set aside │ 0 │ 0" in shown.out
    (strong, weak) = open_storage(parse_settings(empty_home.config.read_text(), "s")).scores.models()
    assert (
        qaq(empty_home, "cache", "--prune", "nobody").error().startswith("error: the cache holds nothing of 'nobody'")
    )
    removed = qaq(empty_home, "cache", "--prune", strong.digest[:8])
    assert f"removed 90 scores of {strong.identity['model']}" in removed.out
    assert weak.digest[:8] in qaq(empty_home, "cache").out
    assert strong.digest[:8] not in qaq(empty_home, "cache").out


def test_doctor_finds_a_home_that_works(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "doctor")
    assert shown.code == 0
    assert "│ no │" not in shown.out
    for check in ("versions", "model strong", "model weak", "storage", "locks", "exports", "Dagster home"):
        assert f"│ ok │ {check} │" in shown.out
    assert not list((home.folder / "storage").glob(".doctor*"))


def test_doctor_warns_of_a_template_of_another_family_and_of_tokens_without_embedding(
    qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    template = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    folder = with_added_tokens(tiny_models["strong"], tmp_path / "more")
    (folder / "chat_template.jinja").write_text(template)
    config = write_settings(tmp_path / "settings.yaml", tiny_models | {"weak": folder})
    shown = qaq(Home(tmp_path / "home", config), "doctor")
    assert shown.code == 0
    assert "│ ok │ model weak │" in shown.out
    assert "│ warn │ model strong │" not in shown.out
    for said in ("the tokenizer of more has 322 tokens", "uses <|user|>, <|end|>", "has no generation prompt"):
        assert said in shown.out
    assert shown.out.count("│ warn │ model weak │") == 3


def test_doctor_names_what_is_missing(qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    models = tiny_models | {"weak": tmp_path / "nowhere"}
    (tmp_path / "file").write_text("no folder")
    config = write_settings(tmp_path / "settings.yaml", models, storage={"root": str(tmp_path / "file" / "storage")})
    shown = qaq(Home(tmp_path / "home", config), "doctor")
    assert shown.code == 1
    assert "│ ok │ model strong │" in shown.out
    assert "│ no │ model weak │" in shown.out
    assert "has no config.json" in shown.out
    assert "│ no │ storage │" in shown.out
    assert "cannot be written" in shown.out


def test_doctor_warns_of_locks_that_other_machines_do_not_see_and_names_a_database_that_is_not_there(
    qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = {"root": f"memory://{tmp_path.name}"}
    shown = qaq(Home(tmp_path / "home", write_settings(tmp_path / "one.yaml", tiny_models, storage=remote)), "doctor")
    assert shown.code == 0
    assert "│ warn │ locks │ files: of this machine" in shown.out
    locked = remote | {"locks": {"kind": "postgres"}}
    config = write_settings(tmp_path / "other.yaml", tiny_models, storage=locked, runtime={"lock_timeout_seconds": 0})
    monkeypatch.setenv("QAQ_POSTGRES_URL", "postgresql://qaq:secret-8f3c1d@127.0.0.1:1/qaq")
    shown = qaq(Home(tmp_path / "home", config), "doctor")
    assert shown.code == 1
    assert "│ no │ locks │ postgres: the database of the locks cannot be reached" in shown.out
    assert "8f3c1d" not in shown.out
    assert "│ warn │ Dagster home │" in shown.out
    assert "known to this machine alone; name Postgres" in shown.out
    dagster = tmp_path / "home" / "dagster"
    (dagster / "dagster.yaml").write_text("storage: {postgres: {postgres_url: {env: QAQ_POSTGRES_URL}}}\n")
    assert "│ ok │ Dagster home │" in qaq(Home(tmp_path / "home", config), "doctor").out


def test_doctor_names_weights_that_are_not_those_of_the_config(
    qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = shutil.copytree(tiny_models["weak"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 323}
    (folder / "config.json").write_text(json.dumps(config))
    settings = write_settings(tmp_path / "settings.yaml", tiny_models | {"weak": folder})
    shown = qaq(Home(tmp_path / "home", settings), "doctor")
    assert shown.code == 1
    assert "│ no │ model weak │ other: its weights and its config.json are not of one model" in shown.out


def test_doctor_opens_each_benchmark(qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"task_id": 1, "text": "p", "code": "c"}\n')
    read, gone = ({"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("tasks", "gone"))
    excluded, of_trial = {"contamination": {"benchmarks": [read]}}, {"benchmarks": [read, gone]}
    config = write_settings(tmp_path / "settings.yaml", tiny_models, screening=excluded, trial=of_trial)
    shown = qaq(Home(tmp_path / "home", config), "doctor")
    assert shown.code == 1
    assert shown.out.count("│ ok │ benchmark tasks │") == 1
    assert "│ no │ benchmark gone │" in shown.out
    without = qaq(Home(tmp_path / "home", write_settings(tmp_path / "other.yaml", tiny_models)), "doctor")
    assert without.code == 0
    assert "│ warn │ benchmarks │" in without.out
