"""render: what a summary shows where a number is missing."""

from __future__ import annotations

import pytest

from qaq_pipeline.cli import render
from qaq_pipeline.runs.summary import BatchSummary, ModelSummary


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
                {"selected": {}},
                "diff_high",
                0,
                {},
                ["[b]RMI[/b] tells nothing"],
                {"echo": 2, "mismatch": 1_000},
                3_000,
                models,
                ["mind: [b]this[/b]"],
                "/a/[b]/c",
                True,
                {},
                {},
            )
        )
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.startswith("WARNING: [b]RMI[/b] tells nothing.")
        assert "Valid pairs: 3,000; declared invalid by echo 2, mismatch 1,000" in shown
        assert "median rmi" in shown
        assert "0.500" in shown
        assert "mind: [b]this[/b]" in shown
        assert "Dataset: /a/[b]/c" in shown
