"""The console script `qaq`: its commands, and the errors that end them.

Belongs here: the list of commands. Does not belong here: a command (`run`, `inspection`, `explain`, `lineage`,
`maintenance`), what it prints (`render`), and the work itself.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from qaq_pipeline.cli import doctor, explain, inspection, lineage, maintenance, rows, run, trial
from qaq_pipeline.cli.terminal import expected, fail
from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.locks import PartitionBusyError

_RENAMED = {"recurate": "refresh"}


class _Commands(TyperGroup):
    """The commands by name. The error of a renamed command gives its new name.

    An error that the user can fix is one line, never a traceback.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name."""
        if args[0] in _RENAMED:
            fail(f"{args[0]} is now `qaq {_RENAMED[args[0]]}`", code=2)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with expected(SettingsError, StorageError, PartitionBusyError, OSError):  # The text of an OSError has its path.
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Select synthetic code-instruction data worth training on (QAQ).",
)
for command in (
    run.run,
    inspection.status,
    maintenance.refresh,
    maintenance.withdraw,
    maintenance.publish,
    explain.explain,
    rows.rows,
    lineage.lineage,
    inspection.report,
    inspection.table,
    inspection.calibration,
    trial.trial,
    run.estimate,
    maintenance.cache,
    doctor.doctor,
    run.ui,
):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    app()
