"""The Dagster home: its folder, its instance settings, its instance."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import dagster as dg

from qaq_pipeline.config.load import dagster_home, home_directory


def prepare_home() -> Path:
    """Create DAGSTER_HOME and the landing zone, with the packaged instance settings unless it has its own."""
    home = dagster_home()
    home.mkdir(parents=True, exist_ok=True)
    (home_directory() / "landing").mkdir(parents=True, exist_ok=True)
    target = home / "dagster.yaml"
    if not target.exists():
        template = importlib.resources.files("qaq_pipeline") / "dagster.yaml"
        target.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    return home


def open_instance() -> dg.DagsterInstance:
    """The Dagster instance in DAGSTER_HOME."""
    return dg.DagsterInstance.from_config(str(prepare_home()))
