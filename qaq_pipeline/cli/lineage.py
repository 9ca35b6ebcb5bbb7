"""The command that traces a version, a row or a column back to the delivered files."""

from __future__ import annotations

from typing import Annotated

import typer

from qaq_pipeline.cli import lineage_tree, render
from qaq_pipeline.cli.terminal import ConfigOption, complain, expected, fail, open_stored, say
from qaq_pipeline.lineage import lineage as walks
from qaq_pipeline.lineage import trace
from qaq_pipeline.lineage import verify as verification
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication.versions import find_version
from qaq_pipeline.schema import column_lineage


def lineage(
    version: Annotated[
        str, typer.Argument(help="A published version: number, first digits of its hash, or `latest`.")
    ] = "latest",
    file: Annotated[
        str | None, typer.Option("--file", help="Only this file of the version, for example qaq/alpaca.json.")
    ] = None,
    row: Annotated[str | None, typer.Option("--row", help="Trace one row: BATCH/FILE:ROW[.TURN].")] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            help="Show from which columns a table (TABLE) or a column (TABLE.COLUMN) is computed. The answer does not "
            "depend on the version.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its hash; exit 1 if one differs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Trace a published version back to the delivered files, with the hash of every file."""
    if columns is not None:
        _print_columns(columns, as_json=as_json)
        return
    storage = open_stored(config_file)
    with expected(walks.LineageError):
        found = walks.walk(storage, find_version(storage, version).version)
        found = found if file is None else walks.only(found, file)
        findings = list(verification.verify(storage, found)) if verify else []
        paths = [] if row is None or findings else trace.trace(storage, found, row)
    if as_json:
        shown = {"paths": paths} if row is not None else {"lineage": found}
        render.print_json(shown | ({"findings": findings} if verify else {}))
    else:
        for tree in map(lineage_tree.of_row, paths) if row is not None else [lineage_tree.of_version(found)]:
            render.print_tree(tree)
        for finding in findings:
            complain(finding.sentence)
        if verify and not findings:
            whole = "every file" if found.is_kept else "what is left (its own files were not kept)"
            say(f"Verified: {whole} of {found.version} is unchanged.{_replaced(found)}")
    if findings:
        raise typer.Exit(1)


def _replaced(found: walks.Lineage) -> str:
    """What cannot be compared any more, as a sentence; empty: nothing."""
    tables = {table.path for batch in found.batches for table in batch.tables if table.state is walks.State.REPLACED}
    return (
        f" {len(tables)} tables that it was made from were replaced since: they cannot be compared." if tables else ""
    )


def _print_columns(named: str, *, as_json: bool) -> None:
    table, _, column = named.partition(".")
    derived = PIPELINE.column_sources
    try:
        rows = column_lineage.ancestry(derived, table, column) if column else column_lineage.of_table(derived, table)
    except ValueError as error:
        fail(str(error), code=2)
    if as_json:
        render.print_json(rows)
    else:
        render.print_tree(lineage_tree.of_columns(rows) if column else lineage_tree.of_table(table, rows))
