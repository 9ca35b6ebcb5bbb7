"""The console script `qaq`: its commands, and the errors that end them.

Belongs here: the list of commands. Does not belong here: a command (`run`, `inspection`, `explain`, `lineage`,
`maintenance`), what it prints (`render`), and the work itself.
"""

from __future__ import annotations

import importlib.metadata
import signal
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qaq_pipeline.cli import diff, doctor, explain, inspection, lineage, maintenance, rows, run, trial
from qaq_pipeline.cli.terminal import expected, fail, no_disk_fault
from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.locks import PartitionBusyError


class _Commands(TyperGroup):
    """The commands by name. An error that the user can fix is one line, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            # The text of an OSError has its path.
            with expected(SettingsError, StorageError, PartitionBusyError, OSError), no_disk_fault():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", code=128 + signal.SIGINT)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Select synthetic code-instruction data worth training on (QAQ).",
    epilog="Begin with: qaq doctor, then qaq run FILE --batch NAME, then qaq explain NAME ROW.",
)

COMMANDS = {
    "Run": (doctor.doctor, run.estimate, run.run, run.ui, maintenance.refresh, inspection.status),
    "Look": (
        explain.explain,
        rows.rows,
        inspection.report,
        inspection.calibration,
        trial.trial,
        inspection.table,
        lineage.lineage,
        diff.diff,
    ),
    "Publish and maintain": (maintenance.publish, maintenance.withdraw, maintenance.cache),
}
"""The commands, in the groups of `qaq --help`."""

for group, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=group)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qaq-pipeline {importlib.metadata.version('qaq-pipeline')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Declare the options of `qaq` itself."""
