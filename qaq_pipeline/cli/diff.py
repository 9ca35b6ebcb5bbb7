"""The command that compares two published versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qaq_pipeline.cli import render
from qaq_pipeline.cli.terminal import ConfigOption, expected, open_stored, say
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.difference import compare, count_changes


def diff(
    older: Annotated[str, typer.Argument(help="A version: number, first digits of its hash, or `latest`.")],
    newer: Annotated[str, typer.Argument(help="The version that it is compared with.")] = "latest",
    to: Annotated[
        Path | None, typer.Option("--to", help="Write the rows to this file, too: .parquet, .csv or .jsonl.")
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Show how many rows entered and left the published selection between two versions, and why."""
    from qaq_pipeline.reports.pages import Table

    storage = open_stored(config_file)
    compared = [versions.find_version(storage, name) for name in (older, newer)]
    found = compare(storage, *(one.version for one in compared))
    names = [f"version {one.number} ({one.version[:8]})" for one in compared]
    if found.is_empty():
        say(f"The published rows of {names[0]} and {names[1]} are the same.")
    else:
        rows = [(which, change, f"{number:,}") for which, change, number in count_changes(found)]
        render.print_page_tables([Table(f"From {names[0]} to {names[1]}", ("", "reason", "rows"), rows)])
    if to is not None:
        from qaq_pipeline.runs.tables import write_frame

        with expected(ValueError):
            write_frame(found, to)
        say(f"{found.height:,} rows written to {to}")
