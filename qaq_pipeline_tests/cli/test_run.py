"""The commands that run the pipeline: run, estimate, ui."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from qaq_pipeline_tests.cli.conftest import Home, Qaq, write_settings
from qaq_pipeline_tests.conftest import LockHolder, delivered_rows, write_jsonl
from qaq_pipeline_tests.support.sentences import Check


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
    assert re.search(r"from the cache │ 90 │ 90 │", shown.out)
    assert not re.search(r"^(ingest|score|select|publish|report|calibrate)_", shown.lines, re.MULTILINE)


def test_other_files_do_not_replace_a_batch_unless_they_are_told_to(
    home: Home, qaq: Qaq, tmp_path: Path, check_sentence: Check
) -> None:
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows()[:3])
    before = qaq(home, "table", "decisions", "--batch", "b1", "--to", tmp_path / "before.jsonl")
    check_sentence(qaq(home, "run", delivery, "--batch", "b1").error())
    whole = write_jsonl(tmp_path / "whole" / "rows.jsonl", delivered_rows())
    assert "has another delivery (rows.jsonl)" in qaq(home, "run", whole, "--batch", "b1", "--limit", 3).error()
    assert qaq(home, "table", "decisions", "--batch", "b1", "--to", tmp_path / "after.jsonl").code == before.code == 0
    assert (tmp_path / "before.jsonl").read_bytes() == (tmp_path / "after.jsonl").read_bytes()


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
    refused = qaq(empty_home, "run", delivery, "--batch", "odd")
    assert "batch odd has another delivery (odd.json)" in refused.error()
    shown = qaq(empty_home, "run", delivery, "--batch", "odd", "--replace")
    assert shown.code == 0
    assert "sum │ 1 │" in shown.out
    assert "note: this replaces the earlier delivery of batch odd, which had other content" in shown.out
    assert "is left out" not in qaq(empty_home, "status").out
    repeated = qaq(empty_home, "run", delivery, "--batch", "again")
    assert repeated.code == 0
    assert "duplicate │ 1 │ exact_duplicate 1" in repeated.out
    assert "Nothing was scored: no pair was left to score." in repeated.out
    assert "note:" not in repeated.out


def test_an_estimate_counts_what_the_cache_lacks_and_registers_nothing(
    home: Home, empty_home: Home, qaq: Qaq, tmp_path: Path
) -> None:
    new = {"query": "Name a prime.", "response": "Seven is one."}
    delivery = write_jsonl(tmp_path / "rows.jsonl", [*delivered_rows(), new])
    for place, counts in ((home, "4 │ 4"), (empty_home, "76 │ 76")):
        shown = qaq(place, "estimate", delivery)
        assert shown.code == 0, shown
        assert "pairs, planted ones too │ 19 │ 19" in shown.out
        assert f"sequences │ {counts}" in shown.out
        assert re.search(r"matmul peak │ 0\.\d\d TFLOP/s, cpu", shown.out)
        assert "In all about 0 s" in shown.out
    assert "No batch yet" in qaq(empty_home, "status").out


def test_an_estimate_of_a_file_that_cannot_be_read_is_one_line(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("")
    assert "empty.json" in qaq(empty_home, "estimate", tmp_path / "empty.json").error()
    assert "missing.json" in qaq(empty_home, "estimate", tmp_path / "missing.json").error()


def test_an_estimate_of_rows_that_would_be_held_back_says_so(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    delivery = write_jsonl(tmp_path / "rows.jsonl", [{"ask": "q", "reply": "a"}, {"query": "q", "response": "a"}])
    shown = qaq(empty_home, "estimate", delivery)
    assert "Rows: 2, of which 1 cannot be read" in shown.out
    assert (shown.code, "more than 20% of its rows cannot be read" in shown.err) == (1, True)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"rows\.jsonl: no such file or folder; check the path"),
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


def test_a_folder_without_files_is_no_delivery(
    empty_home: Home, qaq: Qaq, tmp_path: Path, check_sentence: Check
) -> None:
    (tmp_path / "nothing").mkdir()
    check_sentence(qaq(empty_home, "run", tmp_path / "nothing", "--batch", "b1").error())


def test_an_estimate_says_what_is_not_read(empty_home: Home, qaq: Qaq, tmp_path: Path) -> None:
    rows = [{**row, "unit_tests": "assert f"} for row in delivered_rows()[:3]]
    folder = tmp_path / "rows"
    write_jsonl(folder / "data.jsonl", [*rows, {"ask": "?", "answer": "a"}])
    (folder / "README.md").write_text("Rows.")
    shown = qaq(empty_home, "estimate", folder)
    assert "Rows: 4, of which 1 cannot be read" in shown.out
    for said in ("missing_query (1): ", "fields not read: unit_tests (3 of 4 records)", "files left aside: README.md"):
        assert said in shown.out + shown.err


def test_a_batch_that_another_process_runs_is_left_to_it(
    empty_home: Home,
    qaq: Qaq,
    tmp_path: Path,
    tiny_models: dict[str, Path],
    lock_holder: LockHolder,
    check_sentence: Check,
) -> None:
    write_settings(empty_home.config, tiny_models, runtime={"lock_timeout_seconds": 0.1})
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    lock_holder(empty_home.folder / "locks", "batch", "b1")
    error = qaq(empty_home, "run", delivery, "--batch", "b1").error()
    check_sentence(error)
    check_sentence(error)
    assert not (empty_home.folder / "storage").exists()


def test_two_files_of_one_name_are_refused(empty_home: Home, qaq: Qaq, tmp_path: Path, check_sentence: Check) -> None:
    one = write_jsonl(tmp_path / "a" / "rows.jsonl", delivered_rows())
    other = write_jsonl(tmp_path / "b" / "rows.jsonl", delivered_rows())
    shown = qaq(empty_home, "run", one, other, "--batch", "b1")
    check_sentence(shown.error())


@pytest.mark.parametrize(
    ("place", "setting"),
    [("nowhere", "directory"), ("html.gguf", "gguf"), ("no_tokenizer", "directory"), ("torn_config", "directory")],
)
def test_a_model_that_cannot_be_used_is_named_before_anything_is_registered(
    empty_home: Home,
    qaq: Qaq,
    tmp_path: Path,
    tiny_models: dict[str, Path],
    place: str,
    setting: str,
    check_sentence: Check,
) -> None:
    (tmp_path / "html.gguf").write_text("<!doctype html><title>404</title>")
    for name, file in (("no_tokenizer", "tokenizer.json"), ("torn_config", "config.json")):
        shutil.copytree(tiny_models["strong"], tmp_path / name)
        (tmp_path / name / file).write_text("{")
    values = yaml.safe_load(empty_home.config.read_text())
    values["models"]["strong"] = {setting: str(tmp_path / place), "device": "cpu"}
    empty_home.config.write_text(yaml.safe_dump(values))
    error = qaq(empty_home, "run", write_jsonl(tmp_path / "rows.jsonl", delivered_rows()), "--batch", "b1").error()
    assert str(tmp_path / place) in error
    check_sentence(error)
    assert not (empty_home.folder / "storage" / "deliveries").exists()
    assert qaq(empty_home, "status").out.endswith("No batch yet: register one with `qaq run FILE --batch NAME`.")


def test_a_model_that_goes_missing_fails_its_stage_in_its_own_words(
    empty_home: Home, qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path], check_sentence: Check
) -> None:
    shutil.copytree(tiny_models["strong"], tmp_path / "moved")
    write_settings(empty_home.config, tiny_models | {"strong": tmp_path / "moved"})
    delivery = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    assert qaq(empty_home, "run", delivery, "--batch", "b1").code == 0
    shutil.rmtree(tmp_path / "moved")
    write_settings(empty_home.config, tiny_models | {"strong": tmp_path / "moved"}, scoring={"max_tokens": 500})
    error = qaq(empty_home, "refresh").error(lines=3)
    assert "ModelNotFoundError" not in error
    check_sentence(error)


def test_the_ui_needs_its_workspace(empty_home: Home, qaq: Qaq, tmp_path: Path, check_sentence: Check) -> None:
    error = qaq(empty_home, "ui", "--workspace", tmp_path / "none.yaml").error(code=2)
    check_sentence(error)
