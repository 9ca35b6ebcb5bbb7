"""Options that several commands share, and what a command prepares with them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from qaq_pipeline.config.load import dagster_home, load_settings
from qaq_pipeline.config.settings import Settings

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file or packaged profile (demo, paper). Default: QAQ_CONFIG, else demo."),
]


def read_settings(config_file: Path | None) -> Settings:
    """Load the settings. Processes that steps start find the named file in QAQ_CONFIG."""
    if config_file is not None:
        os.environ["QAQ_CONFIG"] = str(config_file)
    settings = load_settings()
    os.environ.setdefault("DAGSTER_HOME", str(dagster_home()))
    return settings


def quiet_logs() -> None:
    """Keep progress bars and debug lines of other libraries out of the display; Dagster's event log has them."""
    import logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("dagster").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="dagster.*")
