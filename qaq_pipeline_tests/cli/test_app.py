"""cli: what a person types, what they are shown, and that every mistake of theirs is one line."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from qaq_pipeline.cli import app, render
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness.staleness import Outdated
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.runs.home import open_instance
from qaq_pipeline.runs.status import BatchStatus, TableStatus
from qaq_pipeline.runs.summary import BatchSummary, ModelSummary
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import Calibration, dtypes
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline.storage.tables import StoredTable
from qaq_pipeline_tests.conftest import NO_REPORTS, REJECTED_ROW, REPEATED_ROW, LockHolder, delivered_rows, write_jsonl
from qaq_pipeline_tests.support.frames import HOSTILE_NAMES, pair_name, store_batch

TABLES = PIPELINE.tables_of_batch(Purpose.CURATION)

QAQ = Path(sys.executable).with_name("qaq")
BRACKETS = "a[bold]b.jsonl"


@dataclass(frozen=True)
class Shown:
    """What a command left on the terminal, spaces and line breaks made one."""

    code: int
    out: str
    err: str
    lines: str
    """`out` as it was printed."""

    def error(self, code: int = 1, lines: int = 1) -> str:
        """The error message; fails where there is none, or more than that."""
        assert self.code == code, self
        assert self.err.startswith("error: ")
        assert "Traceback" not in self.err + self.out
        assert len(self.err.strip().splitlines()) == lines, self.err
        return self.err


Qaq = Callable[..., Shown]


@dataclass(frozen=True)
class Home:
    """A QAQ_HOME, and the settings file that goes with it."""

    folder: Path
    config: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "QAQ_HOME": str(self.folder),
            "DAGSTER_HOME": str(self.folder / "dagster"),
            "QAQ_CONFIG": str(self.config),
        }


def write_settings(path: Path, models: dict[str, Path], **sections: Any) -> Path:
    values = {
        "models": {
            role: {"directory": str(folder), "device": "cpu", "dtype": "float32"} for role, folder in models.items()
        },
        "scoring": {"max_tokens": 512},
        "ranking": {"num_strata": 2, "min_rows_per_stratum": 2},
        "calibration": {"enabled": False},
        "reports": NO_REPORTS,
    }
    path.write_text(yaml.safe_dump(values | sections), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_models(tiny_model_dir: Callable[..., Path]) -> dict[str, Path]:
    return {"strong": tiny_model_dir(seed=0), "weak": tiny_model_dir(seed=1)}


@pytest.fixture(scope="module")
def curated(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Home, subprocess.CompletedProcess[str]]:
    """A home in which the console script curated the twenty rows as batch b1, and what it printed."""
    folder = tmp_path_factory.mktemp("curated")
    home = Home(folder / "home", write_settings(folder / "settings.yaml", tiny_models))
    delivery = write_jsonl(folder / "rows.jsonl", delivered_rows())
    # DAGSTER_HOME is left to its default, and the settings are named on the command line.
    environment = {name: value for name, value in os.environ.items() if name not in ("DAGSTER_HOME", "QAQ_CONFIG")}
    environment |= {"QAQ_HOME": str(home.folder), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [str(QAQ), "run", str(delivery), "--batch", "b1", "--config", str(home.config)]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return home, run


@pytest.fixture
def home(curated: tuple[Home, subprocess.CompletedProcess[str]]) -> Home:
    return curated[0]


@pytest.fixture(scope="module")
def dagster_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dagster home whose databases are set up, to be copied: setting them up takes a second."""
    folder = tmp_path_factory.mktemp("template") / "dagster"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(folder))
        with open_instance() as instance:
            instance.get_dynamic_partitions("batch")
            instance.get_runs()
    return folder


@pytest.fixture
def empty_home(tiny_models: dict[str, Path], dagster_home: Path, tmp_path: Path) -> Home:
    """A home in which nothing was run yet."""
    shutil.copytree(dagster_home, tmp_path / "home" / "dagster")
    return Home(tmp_path / "home", write_settings(tmp_path / "settings.yaml", tiny_models))


@pytest.fixture
def qaq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Qaq]:
    """Factory: a `qaq` command in this process, in a home."""
    dagster_level = logging.getLogger("dagster").level
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(home: Home, *arguments: object) -> Shown:
        for name, value in home.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["qaq", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            app.main()
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return Shown(code, " ".join(shown.out.split()), shown.err, shown.out)

    yield run
    logging.getLogger("dagster").setLevel(dagster_level)


# --- run ------------------------------------------------------------------------------------------------------------


def test_the_console_script_curates_a_delivery_and_its_summary_adds_up(
    curated: tuple[Home, subprocess.CompletedProcess[str]],
) -> None:
    home, run = curated
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    counts = dict(re.findall(r"(selected|not_selected|rejected|duplicate|unscorable|in|sum) +│ +(\d+) ", run.stdout))
    assert counts == {
        "in": "20",
        "selected": "5",
        "not_selected": "13",
        "rejected": "1",
        "duplicate": "1",
        "unscorable": "0",
        "sum": "20",
    }
    assert "below_cut 13" in run.stdout
    assert "empty_query 1" in run.stdout
    for stage in ("ingest_batch b1", "score_batch b1|strong", "score_batch b1|weak", "select_from_batch b1"):
        assert stage in run.stdout
    assert "Published selection diff_high: 5 of 18 pairs in its pool, 25.0% of all rows" in run.stdout
    assert "control_random 5" in run.stdout
    (dataset,) = re.findall(r"^Dataset: (.*)$", run.stdout, re.MULTILINE)
    assert (Path(dataset) / "diff_high" / "messages.jsonl").exists()
    assert (home.folder / "dagster" / "dagster.yaml").exists()


def test_a_second_run_says_that_nothing_was_scored(home: Home, qaq: Qaq, tmp_path: Path) -> None:
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    shown = qaq(home, "run", delivery, "--batch", "b1")
    assert (shown.code, shown.err) == (0, "")
    assert "Nothing was scored: every score was in the cache." in shown.out
    assert "Dataset (unchanged): " in shown.out


@pytest.mark.slow
def test_odd_batches_have_a_summary_and_a_new_delivery_is_noted(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    delivery = tmp_path / "odd.json"
    delivery.write_text("[]")
    gated = qaq(empty_home, "run", delivery, "--batch", "odd")
    assert gated.code == 1
    assert "no batch can be published; odd: gated (empty_batch): it has no row; deliver it again" in gated.err
    status = qaq(empty_home, "status")
    assert "odd is left out: gated (empty_batch): it has no row; deliver it again with some" in status.out
    delivery.write_text(json.dumps(delivered_rows()[:1]))
    shown = qaq(empty_home, "run", delivery, "--batch", "odd")
    assert shown.code == 0
    assert "sum │ 1 │" in shown.out
    assert "note: this replaces the earlier delivery of batch odd, which had other content" in shown.out
    assert "is left out" not in qaq(empty_home, "status").out
    repeated = qaq(empty_home, "run", delivery, "--batch", "again")
    assert repeated.code == 0
    assert "duplicate │ 1 │ exact_duplicate 1" in repeated.out
    assert "Nothing was scored: no pair was left to score." in repeated.out
    assert "note:" not in repeated.out


def test_a_summary_shows_what_a_model_lacks_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    def model(role: str, seconds: float, **medians: float) -> ModelSummary:
        return ModelSummary(role, "tiny", "float32", "chat", 4, 0, 0, 5, seconds, medians)

    for models in (
        [model("strong", 0.0, rmi=0.5), model("weak", 2.0)],
        [model("strong", 2.0), model("weak", 0.0, rmi=0.5)],
    ):
        render.print_summary(
            BatchSummary(
                "b1",
                0,
                {"selected": 0},
                {},
                "diff_high",
                0,
                {},
                models,
                ["mind: [b]this[/b]"],
                "/a/[b]/c",
                True,
                {},
                {},
            )
        )
        shown = " ".join(capsys.readouterr().out.split())
        assert "median rmi" in shown
        assert "0.500" in shown
        assert "mind: [b]this[/b]" in shown
        assert "Dataset: /a/[b]/c" in shown


# --- estimate, cache ------------------------------------------------------------------------------------------------


def test_an_estimate_counts_what_the_cache_lacks_and_registers_nothing(
    home: Home, empty_home: Home, qaq: Qaq, tmp_path: Path
) -> None:
    new = {"query": "Name a prime.", "response": "Seven is one."}
    delivery = write_jsonl(tmp_path / "rows.jsonl", [*delivered_rows(), new])
    for place, counts in ((home, "4 │ 4"), (empty_home, "76 │ 76")):
        shown = qaq(place, "estimate", delivery)
        assert shown.code == 0, shown
        assert "distinct pairs │ 19 │ 19" in shown.out
        assert f"sequences │ {counts}" in shown.out
        assert re.search(r"matmul peak │ 0\.\d\d TFLOP/s, cpu", shown.out)
        assert "In all about 0 s" in shown.out
    assert "No batch yet" in qaq(empty_home, "status").out


def test_an_estimate_of_a_file_that_cannot_be_read_is_one_line(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("")
    assert "empty.json" in qaq(empty_home, "estimate", tmp_path / "empty.json").error()
    assert "missing.json" in qaq(empty_home, "estimate", tmp_path / "missing.json").error()


@pytest.mark.slow
def test_the_cache_is_shown_by_model_and_pruned_by_name(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    assert qaq(empty_home, "cache").out == "The score cache is empty."
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    for _ in range(2):
        assert qaq(empty_home, "run", delivery, "--batch", "b1").code == 0
    shown = qaq(empty_home, "cache")
    assert "scores │ 72 │ 72" in shown.out
    assert "hits │ 72 │ 72" in shown.out
    assert "set aside │ 0 │ 0" in shown.out
    (strong, weak) = open_storage(parse_settings(empty_home.config.read_text(), "s")).scores.models()
    assert (
        qaq(empty_home, "cache", "--prune", "nobody").error().startswith("error: the cache holds nothing of 'nobody'")
    )
    removed = qaq(empty_home, "cache", "--prune", strong.digest[:8])
    assert f"removed 72 scores of {strong.identity['model']}" in removed.out
    assert weak.digest[:8] in qaq(empty_home, "cache").out
    assert strong.digest[:8] not in qaq(empty_home, "cache").out


# --- calibration ----------------------------------------------------------------------------------------------------


def test_a_calibration_is_shown_with_a_selection_to_paste(home: Home, qaq: Qaq) -> None:
    row = {"statistic": "low_cut", "defect": "other_answer", "model": "strong", "measure": "rmi", "value": 0.25}
    rows = [
        row | {"num_clean": 18, "num_planted": 20, "num_kept": 12},
        row
        | {"statistic": "auroc", "lower": 0.875, "upper": 0.99, "value": 0.9375, "num_clean": 20, "num_planted": 20},
        row
        | {"statistic": "paired_share", "value": None, "num_clean": 0, "num_planted": 0, "null_reason": "not_scored"},
        row | {"statistic": "kept_share", "value": 0.1, "measure": "diff_high", "num_clean": 0, "num_planted": 20},
    ]
    frame = pl.DataFrame(rows, schema=dtypes(Calibration))
    storage = open_storage_of(home)
    scores = storage.tables.version("rmi_scores", Partition("b1", "strong"))
    storage.tables.write(StoredTable(frame, {"inputs": {"rmi_scores|strong": scores}}), "calibration", Partition("b1"))
    shown = qaq(home, "calibration", "b1")
    assert shown.code == 0
    assert "used older scores" not in shown.out
    assert "│ RMI │ other_answer │ 0.938 [0.88, 0.99] │" in shown.out
    assert "│ low cut │ strong │ 0.250 │ 12 of 18 │" in shown.out
    offered = yaml.safe_load(shown.lines[shown.lines.index("- name: ") :])
    assert offered[0]["rmi_strong"] == [0.25, None]
    storage.tables.write(
        StoredTable(frame, {"inputs": {"rmi_scores|strong": "of before"}}), "calibration", Partition("b1")
    )
    assert "It used older scores: rmi_scores|strong changed since; `qaq refresh`" in qaq(home, "calibration", "b1").out
    storage.files.remove("calibration", "b1", "table.parquet")


def test_a_batch_without_a_calibration_is_one_line(home: Home, qaq: Qaq) -> None:
    said = qaq(home, "calibration", "b1").error()
    assert "not stored yet; materialise calibration first" in said
    assert "Calibration follows the publication of a batch" in said


# --- status, table, doctor ------------------------------------------------------------------------------------------


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


def status_of(changed: dict[str, TableStatus], left_out: str | None = None, outdated: Outdated | None = None) -> str:
    tables = dict.fromkeys(TABLES, TableStatus(5, 1, 1)) | changed
    return BatchStatus("b1", tables, left_out, outdated).state


def test_the_state_of_a_batch_names_the_first_table_that_is_not_as_it_should_be() -> None:
    nothing, torn = TableStatus(None, 0, 1), TableStatus(None, 0, 1, is_readable=False)
    assert status_of({}) == "up to date"
    assert status_of({"decisions": nothing, "selected_subset": nothing}) == "no decisions yet"
    assert status_of({"rmi_scores": torn, "decisions": nothing}) == "rmi_scores unreadable"
    assert status_of({"logprobs": TableStatus(5, 1, 2)}) == "logprobs: 1 of 2 models"
    renewed = Outdated("ingest_batch", "b1", None, "raw_data", "it was delivered anew")
    assert status_of({}, "decisions are older than raw_data", renewed) == "raw_data stale"
    assert status_of({}, "gated (empty_batch): it has no row", renewed) == "gated"
    assert status_of({}, "selected by another") == "left out"


def test_status_says_what_other_settings_make_out_of_date(home: Home, qaq: Qaq, tmp_path: Path) -> None:
    values = yaml.safe_load(home.config.read_text()) | {"eligibility": {"min_query_tokens": 2}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    shown = qaq(home, "status", "--config", tmp_path / "other.yaml")
    assert "b1 20 5 rmi_scores stale" in shown.out
    assert "b1, rmi_scores: rmi_scores was made by other code, or under other settings; `qaq refresh`" in shown.out


def test_status_without_a_batch_says_what_to_type(empty_home: Home, qaq: Qaq) -> None:
    shown = qaq(empty_home, "status")
    assert shown.code == 0
    assert "No daemon ever ran here: nothing is curated by itself. `qaq ui` starts one." in shown.out
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


def test_doctor_finds_a_home_that_works(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "doctor")
    assert shown.code == 0
    assert "│ no │" not in shown.out
    for check in ("versions", "model strong", "model weak", "storage", "exports", "Dagster home"):
        assert f"│ ok │ {check} │" in shown.out
    assert not list((home.folder / "storage").glob(".doctor*"))


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


# --- explain --------------------------------------------------------------------------------------------------------


def selected_row(home: Home) -> int:
    decisions = open_storage_of(home).tables.read("decisions", Partition("b1")).frame
    return int(decisions.filter(decision="selected")["source_row"][0])


def open_storage_of(home: Home) -> Any:
    values = yaml.safe_load(home.config.read_text())
    return open_storage(Settings.model_validate(values, context={"home": home.folder}))


def test_explain_says_why_a_row_was_selected_with_its_numbers(home: Home, qaq: Qaq) -> None:
    row = selected_row(home)
    shown = qaq(home, "explain", "b1", row)
    assert shown.code == 0
    assert shown.out.startswith(f"b1/rows.jsonl:{row}.0: selected (within_budget) ")
    assert re.search(r" by diff_high, .* 25% .* 0\.\d{3} and is number \d of 18; .* 0\.\d", shown.out)
    for word in ("query:", "answer:", "strong", "weak", "rmi", "control_stratified_random", "of 18", "provenance"):
        assert word in shown.out
    assert "strong: chatml-0 (files:" in shown.out
    assert re.search(r"version 1 \(\w{8}, \d{4}-\d\d-\d\d\): in it: as above", shown.out)
    assert re.search(r"scored with tokenizers \S+, torch \S+, transformers \S+, on cpu", shown.out)
    assert re.search(r"input: rows\.jsonl, row \d+, sha256 [0-9a-f]{64}", shown.out)
    assert "decided by run " in shown.out


def test_explain_says_why_a_row_was_rejected(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "explain", "b1", REJECTED_ROW)
    assert shown.out.startswith(
        f"b1/rows.jsonl:{REJECTED_ROW}.0: rejected (empty_query) Rejected when it was read, and never scored: shape "
    )
    assert "no pair, provenance" in shown.out


def test_explain_says_of_what_a_row_is_a_duplicate(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "explain", "b1", REPEATED_ROW)
    assert shown.out.startswith(
        f"b1/rows.jsonl:{REPEATED_ROW}.0: duplicate (exact_duplicate) Duplicate of b1/rows.jsonl:1.0, "
    )
    assert ": equal system text, query and answer. That row is " in shown.out
    assert "query: Reverse a string in Python." in shown.out


def test_a_row_can_be_named_in_several_ways(home: Home, qaq: Qaq) -> None:
    decisions = open_storage_of(home).tables.read("decisions", Partition("b1")).frame
    pair_id = decisions.filter(source_row=3)["pair_id"][0]
    first = qaq(home, "explain", "b1", 3)
    for name in ("rows.jsonl:3", "rows.jsonl:3.0", "b1/rows.jsonl:3.0", pair_id, pair_id[:8]):
        assert qaq(home, "explain", "b1", name) == first


def test_a_row_is_named_by_its_pair_or_its_place_alone_and_by_a_version(home: Home, qaq: Qaq) -> None:
    decisions = open_storage_of(home).tables.read("decisions", Partition("b1")).frame
    pair_id = decisions.filter(source_row=3)["pair_id"][0]
    first = qaq(home, "explain", "b1", 3)
    for name in (pair_id, pair_id[:8], "b1/rows.jsonl:3", "b1/rows.jsonl:3.0"):
        assert qaq(home, "explain", name) == first
    of_version = qaq(home, "explain", "b1", 3, "--version", "1")
    assert of_version.out.startswith("b1/rows.jsonl:3.0: ")
    assert " in version 1 (" in of_version.out
    assert decisions.filter(source_row=3)["explanation"][0] in of_version.out
    error = qaq(home, "explain", "b1", 3, "--version=7").error()
    assert "no one version '7' was published; published were: 1 (" in error
    assert "no row '99' in version 1" in qaq(home, "explain", "b1", 99, "--version", "1").error()
    assert "no row 'abcdef123'" in qaq(home, "explain", "abcdef123").error()


def test_a_row_is_found_by_its_text(home: Home, qaq: Qaq) -> None:
    shown = qaq(home, "explain", "--text", "Sum the squares", "--batch", "b1")
    assert shown.out == qaq(home, "explain", "b1", 2).out
    several = qaq(home, "explain", "--text", "def").out
    assert "b1/rows.jsonl:1.0: Reverse a string in Python." in several
    assert re.search(r"\d rows contain that text; explain one: `qaq explain b1/rows\.jsonl:1\.0`", several)
    missing = qaq(home, "explain", "--text", "nowhere").err
    assert "no row in the current delivery of any batch contains 'nowhere'" in missing


def test_explain_gives_all_of_it_as_json_and_the_templates_if_asked(home: Home, qaq: Qaq) -> None:
    (dossier,) = json.loads(qaq(home, "explain", "b1", REPEATED_ROW, "--json").out)
    assert dossier["row"]["duplicate_of"] == "b1/rows.jsonl:1.0"
    assert dossier["representative"]["source_row"] == 1
    assert dossier["fates"][0]["published"]["number"] == 1
    assert set(dossier["provenance"]["made_of"]["scored_by"]) == {"strong", "weak"}
    assert "TASK: Given an answer" in qaq(home, "explain", "b1", 1, "--provenance").out


def test_markup_in_names_and_texts_is_shown_as_it_is(empty_home: Home, qaq: Qaq) -> None:
    settings = parse_settings(empty_home.config.read_text())
    store_batch(open_storage_of(empty_home), settings, queries=("[red]q[/red]", "[/]"), source_file=BRACKETS)
    shown = qaq(empty_home, "explain", "b1", 1)
    assert shown.code == 0
    assert shown.out.startswith(f"b1/{BRACKETS}:1.0: ")
    assert "query: [red]q[/red]" in shown.out
    assert "query: [/]" in qaq(empty_home, "explain", "b1", pair_name(2)).out


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_the_error_of_a_renamed_command_gives_its_new_name(empty_home: Home, qaq: Qaq) -> None:
    for options in ([], ["--unknown"]):
        assert qaq(empty_home, "recurate", *options).error(code=2) == "error: recurate is now `qaq refresh`\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"rows\.jsonl: cannot be read \(No such file or directory\); check the path"),
        (b"", r"rows\.jsonl: is empty\. Write its rows into it, or `\[\]`"),
        (b"\x1f\x8b\x08\x00", r"rows\.jsonl: the compressed data are cut off or damaged"),
        (b"PAR1 torn", r"rows\.jsonl: is no complete Parquet file"),
        (b'[{"query": "q"', r"rows\.jsonl: line 1, column \d+: the JSON array cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    empty_home: Home, qaq: Qaq, tmp_path: Path, content: bytes | None, said: str
) -> None:
    delivery = tmp_path / "rows.jsonl"
    if content is not None:
        delivery.write_bytes(content)
    shown = qaq(empty_home, "run", delivery, "--batch", "b1")
    assert re.search(said, shown.error())
    assert not (empty_home.folder / "storage").exists()


def test_a_folder_is_no_delivery(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    assert "cannot be read (Is a directory)" in qaq(empty_home, "run", tmp_path, "--batch", "b1").error()


def test_a_batch_that_another_process_runs_is_left_to_it(
    empty_home: Home, qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path], lock_holder: LockHolder
) -> None:
    write_settings(empty_home.config, tiny_models, runtime={"lock_timeout_seconds": 0.1})
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    lock_holder(empty_home.folder / "locks", "batch", "b1")
    error = qaq(empty_home, "run", delivery, "--batch", "b1").error()
    assert "batch/b1 is being written by another process" in error
    assert "wait for it to end, then run again" in error
    assert not (empty_home.folder / "storage").exists()


def test_two_files_of_one_name_are_refused(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a" / "rows.jsonl", delivered_rows())
    other = write_jsonl(tmp_path / "b" / "rows.jsonl", delivered_rows())
    shown = qaq(empty_home, "run", one, other, "--batch", "b1")
    assert "two files of the delivery are named 'rows.jsonl'; rename one" in shown.error()


def test_a_hostile_batch_name_is_refused_and_nothing_is_written(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    for name in HOSTILE_NAMES:
        commands = [["run", delivery, f"--batch={name}"], ["explain", "--", name, "1"]]
        commands += [["table", "raw_data", f"--batch={name}", "--to", tmp_path / "out.csv"]] if name else []
        for command in commands:
            assert "cannot be used: give a letter or digit" in qaq(empty_home, *command).error()
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "settings.yaml", "home"}
    assert {path.name for path in empty_home.folder.iterdir()} == {"dagster", "landing"}
    assert list((empty_home.folder / "landing").iterdir()) == []
    assert "No batch yet" in qaq(empty_home, "status").out


@pytest.mark.parametrize(
    "row", ["99", "rows.jsonl:99", "other.jsonl:1", "rows.jsonl:1.7", "abcdef", "x", "²", "9" * 30, "a:²"]
)
def test_a_row_that_is_not_there_is_named_with_those_that_are(home: Home, qaq: Qaq, row: str) -> None:
    error = qaq(home, "explain", "b1", row).error()
    assert f"batch 'b1' has no row {row!r}; it has 20 rows, the first of file 'rows.jsonl'" in error


def test_a_batch_that_is_not_there_is_named_with_where_to_look(home: Home, qaq: Qaq, tmp_path: Path) -> None:
    assert "decisions/b9/table.parquet: not stored yet" in (error := qaq(home, "explain", "b9", "1").error())
    assert "Known batches: `qaq status`" in error
    asked = qaq(home, "table", "decisions", "--batch", "b9", "--to", tmp_path / "out.csv")
    assert "decisions/b9/table.parquet: not stored yet; materialise decisions first" in asked.error()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["surprise", "--to", "out.csv"],
            2,
            "'surprise' is no table; known: raw_data, signatures, screened_data, logprobs",
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


def test_a_table_that_no_batch_has_says_what_to_type(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    shown = qaq(empty_home, "table", "decisions", "--to", tmp_path / "out.csv")
    assert "no batch has decisions yet; run one with `qaq run FILE --batch NAME`" in shown.error()


@pytest.mark.parametrize("command", [["status"], ["doctor"], ["explain", "b1", "1"], ["run", "x", "--batch", "b1"]])
def test_settings_that_cannot_be_used_name_the_field(
    qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path], command: list[str]
) -> None:
    config = write_settings(tmp_path / "settings.yaml", tiny_models, scoring={"max_tokens": 3, "prio": "user"})
    error = qaq(Home(tmp_path / "home", config), *command).error(code=2, lines=3)
    assert f"{config}: 2 setting(s) cannot be used" in error
    assert "scoring.max_tokens: Input should be greater than or equal to 16 (got 3)" in error
    assert "scoring.prio: Extra inputs are not permitted (got 'user')" in error
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("content", [None, "[1, 2]"])
def test_a_settings_file_that_is_none_is_named(qaq: Qaq, tmp_path: Path, content: str | None) -> None:
    config = tmp_path / "settings.yaml"
    if content is not None:
        config.write_text(content)
    home = Home(tmp_path / "home", tmp_path / "other.yaml")
    error = qaq(home, "status", "--config", config).error(code=2)
    assert f"{config}: " in error
    assert ("cannot be read" if content is None else "a mapping of settings is expected, not list") in error


def test_a_missing_model_fails_its_stage_and_says_what_stays(
    empty_home: Home, qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    write_settings(empty_home.config, tiny_models | {"strong": tmp_path / "nowhere"})
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    error = qaq(empty_home, "run", delivery, "--batch", "b1").error(lines=2)
    assert "score_batch of b1|strong failed: step logprobs: " in error
    assert "nowhere: has no config.json" in error
    assert "earlier results are kept. Fix the cause and run again." in error


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


def test_the_ui_needs_its_workspace(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    error = qaq(empty_home, "ui", "--workspace", tmp_path / "none.yaml").error(code=2)
    assert "none.yaml: no such file; without --workspace the packaged one is used" in error
