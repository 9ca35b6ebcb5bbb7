"""`qaq trial`: an estimate, then a table and a verdict; what cannot be tried says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from qaq_pipeline_tests.cli.conftest import Home, Qaq, write_settings
from qaq_pipeline_tests.conftest import delivered_rows, write_jsonl
from qaq_pipeline_tests.support.sentences import Check


@pytest.mark.slow
def test_a_trial_ends_in_a_table_and_a_verdict(
    empty_home: Home, qaq: Qaq, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    write_settings(
        empty_home.config,
        tiny_models,
        held_out={"share": 0.3},
        trial={"seeds": 1, "curve_points": 1, "amount": 300},
        reports={"pages": True, "plots": False},
    )
    rows = write_jsonl(tmp_path / "rows.jsonl", delivered_rows())
    assert qaq(empty_home, "run", rows, "--batch", "b1").code == 0
    estimate = qaq(empty_home, "trial", "latest", "--estimate")
    assert "5 of 5 trainings to run" in estimate.out
    shown = qaq(empty_home, "trial", "latest")
    assert shown.code == 0
    assert "│ control_random │ 1 │" in shown.out
    assert "a verdict needs 5 seeds" in shown.out
    page = Path(shown.lines.replace("\n", "").split("With plots: ")[1].strip())
    assert page.exists()
    assert "0 of 5 trainings to run" in qaq(empty_home, "trial", "latest", "--estimate").out


def test_a_version_without_held_out_rows_is_one_line(home: Home, qaq: Qaq, check_sentence: Check) -> None:
    check_sentence(qaq(home, "trial", "latest").error())


def test_an_unknown_version_is_one_line(home: Home, qaq: Qaq, check_sentence: Check) -> None:
    check_sentence(qaq(home, "trial", "17").error())
