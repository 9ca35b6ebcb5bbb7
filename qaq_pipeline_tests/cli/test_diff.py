"""`qaq diff`: two versions are compared, in a table and in a file."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.publication.curated_dataset import publish, read_batches
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.cli.conftest import Home, Qaq
from qaq_pipeline_tests.support.frames import store_batch


def test_two_versions_are_compared_by_reason_and_row(
    empty_home: Home, qaq: Qaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in empty_home.environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    storage = open_storage(settings)
    for batch in ("b1", "b2"):
        store_batch(storage, settings, batch, ("a", "b", "c", "d"))
        publish(storage, settings, *read_batches(storage, ["b1", batch], settings))
    shown = qaq(empty_home, "diff", "1", "2", "--to", tmp_path / "rows.csv")
    rows = pl.read_csv(tmp_path / "rows.csv")
    assert shown.code == 0
    assert "entered" in shown.out
    assert "batch_entered" in shown.out
    assert f"{rows.height} rows written to" in shown.out
    assert rows.height >= 1
    assert rows["batch"].unique().to_list() == ["b2"]
    assert "are the same" in qaq(empty_home, "diff", "2").out
    assert "no version, or more than one, matches '9'" in qaq(empty_home, "diff", "9").error()
    assert "the ending says the format" in qaq(empty_home, "diff", "1", "2", "--to", tmp_path / "rows.txt").error()
