"""The whole command line: every mistake of a person is one line, whichever command they type."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from qaq_pipeline.cli import app
from qaq_pipeline_tests.cli.conftest import Home, Qaq, write_settings
from qaq_pipeline_tests.conftest import delivered_rows, write_jsonl
from qaq_pipeline_tests.support.frames import HOSTILE_NAMES
from qaq_pipeline_tests.support.sentences import Check


def test_the_version_is_printed_and_the_help_has_every_command_in_a_group(empty_home: Home, qaq: Qaq) -> None:
    assert qaq(empty_home, "--version").out.strip() == f"qaq-pipeline {importlib.metadata.version('qaq-pipeline')}"
    short, long = qaq(empty_home, "-h"), qaq(empty_home, "--help")
    assert (short.code, short.out) == (0, long.out)
    for group, commands in app.COMMANDS.items():
        assert group in short.out
        assert all(command.__name__ in short.out for command in commands)


def test_a_hostile_batch_name_is_refused_and_nothing_is_written(
    empty_home: Home, qaq: Qaq, tmp_path: Path, check_sentence: Check
) -> None:
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    for name in HOSTILE_NAMES:
        commands = [["run", delivery, f"--batch={name}"], ["explain", "--", name, "1"]]
        commands += [["table", "raw_data", f"--batch={name}", "--to", tmp_path / "out.csv"]] if name else []
        for command in commands:
            check_sentence(qaq(empty_home, *command).error())
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "settings.yaml", "home"}
    assert {path.name for path in empty_home.folder.iterdir()} == {"dagster", "landing"}
    assert list((empty_home.folder / "landing").iterdir()) == []
    assert "No batch yet" in qaq(empty_home, "status").out


def test_a_batch_that_is_not_there_is_named_with_where_to_look(
    home: Home, qaq: Qaq, tmp_path: Path, check_sentence: Check
) -> None:
    check_sentence(qaq(home, "explain", "b9", "1").error())
    asked = qaq(home, "table", "decisions", "--batch", "b9", "--to", tmp_path / "out.csv")
    check_sentence(asked.error())


@pytest.mark.parametrize("command", [["status"], ["doctor"], ["explain", "b1", "1"], ["run", "x", "--batch", "b1"]])
def test_settings_that_cannot_be_used_name_the_field(
    qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path], command: list[str], check_sentence: Check
) -> None:
    config = write_settings(tmp_path / "settings.yaml", tiny_models, scoring={"max_tokens": 3, "prio": "user"})
    error = qaq(Home(tmp_path / "home", config), *command).error(code=2, lines=3)
    check_sentence(error)
    check_sentence(error)
    check_sentence(error)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("content", [None, "[1, 2]"])
def test_a_settings_file_that_is_none_is_named(qaq: Qaq, tmp_path: Path, content: str | None) -> None:
    config = tmp_path / "settings.yaml"
    if content is not None:
        config.write_text(content)
    home = Home(tmp_path / "home", tmp_path / "other.yaml")
    error = qaq(home, "status", "--config", config).error(code=2)
    assert f"{config}: " in error
    assert ("cannot be read" if content is None else "must be a mapping of settings, not list") in error


@pytest.mark.parametrize("root", ["nosuch://bucket/qaq", "oci://bucket/qaq"])
def test_a_storage_of_an_unknown_or_missing_kind_is_a_fault_of_the_settings(
    empty_home: Home, qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path], root: str
) -> None:
    write_settings(empty_home.config, tiny_models, storage={"root": root})
    for arguments in storage_commands(tmp_path):
        assert f"storage.root: {root!r} cannot be used" in qaq(empty_home, *arguments).error(code=2)


def test_a_storage_that_cannot_be_written_is_one_line(
    empty_home: Home, qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    (tmp_path / "file").write_text("no folder")
    write_settings(empty_home.config, tiny_models, storage={"root": str(tmp_path / "file" / "storage")})
    for arguments in storage_commands(tmp_path):
        shown = qaq(empty_home, *arguments)
        assert arguments == ["status"] or "file/storage" in shown.error()


def storage_commands(folder: Path) -> list[list[Any]]:
    """A command line of each kind that opens the storage."""
    delivery = write_jsonl(folder / "rows.jsonl", delivered_rows())
    return [
        ["run", delivery, "--batch", "b1"],
        ["status"],
        ["explain", "b1", "1"],
        ["table", "raw_data", "--to", folder / "out.csv", "--batch", "b1"],
    ]


def test_a_home_that_cannot_be_made_is_one_line(qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    (tmp_path / "file").write_text("no folder")
    config = write_settings(tmp_path / "settings.yaml", tiny_models)
    shown = qaq(Home(tmp_path / "file" / "home", config), "status")
    assert "file/home" in shown.error()


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "rows.jsonl"], ["run", "x", "--batch", "b1", "--limit", "0"], ["explain", "b1"], ["nonsense"]],
)
def test_a_command_that_is_not_one_is_explained_by_its_usage(empty_home: Home, qaq: Qaq, arguments: list[str]) -> None:
    shown = qaq(empty_home, *arguments)
    assert shown.code == 2
    assert "Usage: " in shown.err
    assert "Traceback" not in shown.err
