"""The commands that show what is stored: status, table, calibration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pytest
import yaml

from qaq_pipeline.runs.deployment import open_instance
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import BOTH_MODELS, Calibration, dtypes
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.cli.conftest import Home, Qaq, open_storage_of, write_settings
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.uncalibrated import TABLES


def test_status_shows_a_line_for_each_batch_and_the_rows_of_every_table_in_full(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "status")
    assert shown.code == 0
    assert "batch rows selected state b1 20 5 up to date" in shown.out
    rows = dict(zip(TABLES, (20, 19, 20, 18, 18, 18, 20, 5), strict=True))
    tables = " ".join(f"{name} {number} rows" for name, number in rows.items())
    assert f"b1: up to date {tables}" in qaq(home, "status", "--tables").out


def test_status_is_a_line_for_each_batch_in_80_columns(
    empty_home: Home, qaq: Qaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", empty_home.environment["DAGSTER_HOME"])
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"{number}-{'a-long-name-' * 5}"[:58] + f"-{number}" for number in range(10)]
    assert {len(name) for name in names} == {60}
    with open_instance() as instance:
        instance.add_dynamic_partitions("batch", names)
    printed = qaq(empty_home, "status").lines.splitlines()
    [head] = [number for number, line in enumerate(printed) if line.startswith("batch ")]
    for number, line in enumerate(printed[head + 1 : head + 11]):
        assert re.fullmatch(rf"{number}-a-long-name-.*…[a-z-]*-{number} +- +- +no raw_data yet *", line)
        assert len(line) <= 80
    full = qaq(empty_home, "status", "--tables").lines.splitlines()
    for name in names:
        start = full.index(f"{name}: no raw_data yet")
        assert [line.split() for line in full[start + 1 : start + 9]] == [[table, "-"] for table in TABLES]


def test_status_says_what_other_settings_make_out_of_date(home: Home, qaq: Qaq, tmp_path: Path) -> None:
    values = yaml.safe_load(home.config.read_text()) | {"eligibility": {"min_query_tokens": 2}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    shown = qaq(home, "status", "--config", tmp_path / "other.yaml")
    assert "b1 20 5 rmi_scores stale" in shown.out
    assert "b1, rmi_scores: rmi_scores was made by other code, or under other settings; `qaq refresh`" in shown.out


def test_status_without_a_batch_says_what_to_type(empty_home: Home, qaq: Qaq) -> None:
    shown = qaq(empty_home, "status")
    assert shown.code == 0
    assert "No daemon has run here: nothing is curated automatically. `qaq ui` starts one." in shown.out
    assert shown.out.endswith("No batch yet: register one with `qaq run FILE --batch NAME`.")


def test_status_names_what_cannot_be_read_and_what_is_missing(
    empty_home: Home, qaq: Qaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", empty_home.environment["DAGSTER_HOME"])
    with open_instance() as instance:
        instance.add_dynamic_partitions("batch", ["../evil", "[x]", "b1"])
    torn = empty_home.folder / "storage" / "raw_data" / "b1" / "table.parquet"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    shown = qaq(empty_home, "status")
    assert shown.code == 0
    for batch in ("b1", "../evil", "[x]"):
        assert f"{batch} - - raw_data unreadable" in shown.out
    full = qaq(empty_home, "status", "--tables").out
    assert "b1: raw_data unreadable raw_data unreadable signatures -" in full


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(("name", "height"), [("decisions", 20), ("logprobs", 36), ("selected_subset", 5)])
def test_a_table_is_written_as_a_file(
    home: Home, qaq: Qaq, tmp_path: Path, suffix: str, name: str, height: int
) -> None:
    to = tmp_path / f"out.{suffix}"
    shown = qaq(home, "table", name, "--to", to)
    assert shown.code == 0
    assert f"{height} rows of {name} written to" in shown.out
    read = {"parquet": pl.read_parquet, "csv": pl.read_csv, "jsonl": pl.read_ndjson}
    frame = read[suffix](to)
    assert frame.height == height
    assert frame["batch"].unique().to_list() == ["b1"]
    expected = [column for column in dtypes(TABLES[name]) if column != "batch"]
    assert frame.columns == ["batch", *(["model"] if name == "logprobs" else []), *expected]
    if suffix == "csv" and name == "decisions":
        assert [score["model"] for score in json.loads(frame["scores"][0])] == ["strong", "weak"]


def test_a_table_of_one_batch_is_that_batchs(home: Home, qaq: Qaq, tmp_path: Path) -> None:
    assert qaq(home, "table", "raw_data", "--to", tmp_path / "a.parquet", "--batch", "b1").code == 0
    assert pl.read_parquet(tmp_path / "a.parquet").height == 20


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["surprise", "--to", "out.csv"],
            2,
            "'surprise' is no table; known: raw_data, signatures, screened_data, planted_rows",
        ),
        (["decisions", "--to", "out.xlsx"], 1, "out.xlsx: the ending says the format: .parquet, .csv or .jsonl"),
        (["decisions", "--to", "no/such/folder/out.csv"], 1, "No such file or directory"),
        (["decisions", "--to", "no/such/folder/out.parquet"], 1, "No such file or directory"),
    ],
)
def test_a_table_that_cannot_be_written_says_why(
    home: Home, qaq: Qaq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in qaq(home, "table", *arguments).error(code)


def test_a_table_that_no_batch_has_says_what_to_type(
    empty_home: Home, qaq: Qaq, tmp_path: Path, check_sentence: Check
) -> None:
    shown = qaq(empty_home, "table", "decisions", "--to", tmp_path / "out.csv")
    check_sentence(shown.error())


# --- calibration ------------------------------------------------------------------------------------------------------


def test_a_calibration_is_shown_with_what_selections_keep_and_signals_drop(home: Home, qaq: Qaq) -> None:
    row = {"defect": "other_answer", "model": "strong", "measure": "rmi"}
    dropped = row | {"statistic": "dropped_share", "model": BOTH_MODELS, "num_clean": 0, "num_planted": 20}
    rows = [
        dropped | {"measure": "mismatch", "value": 0.85, "num_kept": 17},
        dropped | {"measure": "echo", "null_reason": "no_cut"},
        row
        | {"statistic": "auroc", "lower": 0.875, "upper": 0.99, "value": 0.9375, "num_clean": 20, "num_planted": 20},
        row
        | {"statistic": "paired_share", "value": None, "num_clean": 0, "num_planted": 0, "null_reason": "not_scored"},
        row
        | {"statistic": "kept_share", "value": 0.4, "measure": "diff_high", "num_clean": 0, "num_planted": 20}
        | {"num_kept": 8},
    ]
    frame = pl.DataFrame(rows, schema=dtypes(Calibration))
    storage = open_storage_of(home)
    scores = storage.tables.version("rmi_scores", Partition("b1", "strong"))
    storage.tables.write(StoredTable(frame, {"inputs": {"rmi_scores|strong": scores}}), "calibration", Partition("b1"))
    shown = qaq(home, "calibration", "b1")
    assert shown.code == 0
    assert "used older scores" not in shown.out
    assert "│ RMI │ other_answer │ 0.938 [0.88, 0.99] │" in shown.out
    assert shown.out.startswith(
        "The selection diff_high keeps too many planted rows: 40.0% of other_answer (limit 0.35, checks.max_kept_share)"
    )
    assert "│ diff_high │ other_answer │ 8 of 20 │ 0.400 │" in shown.out
    assert re.search("┃ rows ┃ mismatch ┃ echo ┃.*│ other_answer │ 0.850 │ no cut │", shown.out)
    storage.tables.write(
        StoredTable(frame, {"inputs": {"rmi_scores|strong": "of before"}}), "calibration", Partition("b1")
    )
    assert "It used older scores: rmi_scores|strong changed since; `qaq refresh`" in qaq(home, "calibration", "b1").out
    storage.files.remove("calibration", "b1", "table.parquet")


def test_a_batch_without_a_calibration_is_one_line(home: Home, qaq: Qaq, check_sentence: Check) -> None:
    said = qaq(home, "calibration", "b1").error()
    check_sentence(said)
    check_sentence(said)


@pytest.mark.parametrize("command", [["status"], ["report", "b1"], ["table", "decisions", "--to", "out.csv"]])
def test_a_command_that_shows_makes_no_home(
    qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path], command: list[str], check_sentence: Check
) -> None:
    config = write_settings(tmp_path / "settings.yaml", tiny_models)
    check_sentence(qaq(Home(tmp_path / "home", config), *command).error())
    assert not (tmp_path / "home").exists()
