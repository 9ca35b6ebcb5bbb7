"""Print to the terminal, and end a command with an exit code.

Exit codes: 0 the command succeeded, 1 the work failed, 2 the command or the settings cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console

from qaq_pipeline.config.base import SettingsError

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


def fail_with(error: Exception) -> NoReturn:
    """Print the text of an error and exit: 2 for the settings, else 1."""
    fail(str(error), code=2 if isinstance(error, SettingsError) else 1)


@contextmanager
def expected(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with the text of an error of these kinds, without a traceback."""
    try:
        yield
    except kinds as error:
        fail_with(error)
