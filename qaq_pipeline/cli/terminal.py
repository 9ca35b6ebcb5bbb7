"""What every command shares: printing, exit codes, the option --config and the settings it names.

Exit codes: 0 the command succeeded, 1 the work failed, 2 the command or the settings cannot be used, 128 + n signal n
ended it (130: Ctrl-C).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import dagster_home, home_directory, load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.storage import disk_faults
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline.storage.storage import Storage, open_storage

if TYPE_CHECKING:
    from qaq_pipeline.runs.deployment import Deployment

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file or packaged profile (demo, paper). Default: QAQ_CONFIG, else demo."),
]

console = Console()
errors = Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """Print text as it is: no markup, no colours for numbers, no line breaks."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning."""
    say(text, style="yellow")


def complain(text: str, style: str = "red") -> None:
    """Print an error."""
    errors.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error and exit."""
    complain(f"error: {message}")
    raise SystemExit(code)


@contextmanager
def expected(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with the text of an error of these kinds, without a traceback: 2 for the settings, else 1."""
    try:
        yield
    except BrokenPipeError:
        raise  # The reader of the output left: click ends without a word.
    except kinds as error:
        fail(str(error), code=getattr(error, "exit_code", 2 if isinstance(error, SettingsError) else 1))


@contextmanager
def no_disk_fault() -> Iterator[None]:
    """Exit with the fault of a disk in one line, whichever layer noticed it."""
    try:
        yield
    except Exception as error:
        if (fault := disk_faults.fault_of(error, home_directory())) is None:
            raise
        fail(fault)


def read_settings(config_file: Path | None) -> Settings:
    """Load the settings. Processes that steps start find the named file in QAQ_CONFIG."""
    if config_file is not None:
        os.environ["QAQ_CONFIG"] = str(config_file)
    settings = load_settings()
    os.environ.setdefault("DAGSTER_HOME", str(dagster_home()))
    return settings


@contextmanager
def open_deployment(config_file: Path | None, *, makes_home: bool = True) -> Iterator[Deployment]:
    """Open the deployment that a command works on; exit with the text of an error that the user can fix.

    Args:
        config_file: of the option --config.
        makes_home: make the home if there is none; a command that only shows what is stored makes nothing.
    """
    from qaq_pipeline.runs.deployment import Deployment, open_instance
    from qaq_pipeline.runs.job_runs import RunError

    settings = read_settings(config_file)
    if not makes_home and not settings.home.exists():
        fail(f"there is no home at {settings.home}; set QAQ_HOME to one, or make one: `qaq run FILE --batch NAME`")
    _quiet_logs()
    with open_instance() as instance, expected(RunError, PartitionBusyError, ValueError):
        yield Deployment(settings, instance)


def open_stored(config_file: Path | None) -> Storage:
    """Open the storage alone, without Dagster: importing that takes longer than finding most answers."""
    settings = read_settings(config_file)
    _quiet_logs()
    return open_storage(settings)


def _quiet_logs() -> None:
    """Keep progress bars and debug lines of other libraries out of the display; Dagster's event log has them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("dagster").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="dagster.*")
