"""The command that explains the decision on a row.

Belongs here: finding the row that is meant. Does not belong here: what is known of it, and how that is printed
(`lineage.dossier`, `row_view`).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.progress import Progress

from qaq_pipeline.cli import render, row_view
from qaq_pipeline.cli.terminal import ConfigOption, console, errors, fail, open_stored, warn
from qaq_pipeline.lineage import dossier, row_history
from qaq_pipeline.publication.versions import Published, find_version
from qaq_pipeline.schema.partition import Partition, check_batch_name
from qaq_pipeline.schema.row_place import RowPlace
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.storage import Storage


def explain(
    what: Annotated[
        str | None, typer.Argument(metavar="BATCH", help="The batch. Without ROW: a pair_id, or BATCH/FILE:ROW.")
    ] = None,
    row: Annotated[
        str | None,
        typer.Argument(metavar="ROW", help="Row number, file:row, file:row.turn, or a pair_id (or its first digits)."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Find the rows that contain this text.")] = None,
    *,
    batch: Annotated[str | None, typer.Option("--batch", help="With --text: only in this batch.")] = None,
    version: Annotated[
        str | None,
        typer.Option(
            "--version",
            help="Explain the row in a published version, by number or hash. Default: in the current decisions.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Print the whole query and answer.")] = False,
    provenance: Annotated[bool, typer.Option("--provenance", help="Print each model's prompts too.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Explain the decision on a row: its reason, its scores, its fate in every version, and its provenance."""
    is_row_named = what is not None and (row is not None or "/" in what or row_lookup.is_pair(what))
    if (what is None) == (text is None) or (text is None and not is_row_named):
        raise typer.BadParameter("give BATCH ROW, a pair_id, BATCH/FILE:ROW, or --text")
    storage = open_stored(config_file)
    try:
        published = None if version is None else find_version(storage, version)
        if text is not None:
            found, number = _rows_with_text(storage, text, batch)
            if number > 1:
                _print_matches(found, number, as_json=as_json)
                return
            place = RowPlace.of(found[0])
            what, row = place.batch, place.in_batch
            if published is not None and found[0]["pair_id"] is not None:  # Another text may have stood there then.
                row = found[0]["pair_id"]
        assert what is not None
        answer, found_in = _find(storage, what, row, published)
        gathered = [dossier.gather(storage, one, found_in, with_versions=published is None) for one in answer.rows]
    except ValueError as error:
        fail(str(error))
    if as_json:
        render.print_json(gathered)
        return
    for unindexed in answer.unindexed:
        warn(f"{unindexed}: its index is missing or stale, so the whole table was read; `qaq refresh` rebuilds it")
    if len(gathered) == row_history.MOST_ROWS:
        warn(f"There may be more: the first {row_history.MOST_ROWS} rows follow.")
    for one in gathered:
        row_view.show(console, one, with_template=provenance, is_full=full)


def _print_matches(rows: list[dict[str, Any]], number: int, *, as_json: bool) -> None:
    if as_json:
        render.print_json({"rows": rows, "number": number})
    else:
        row_view.matches(console, rows, number)


def _find(
    storage: Storage, what: str, row: str | None, version: Published | None
) -> tuple[row_history.Answer, Published | None]:
    """Find the rows in the version; by default in the decisions, else in the newest version that has them."""
    batch, slash, place = (what, "/", row) if row is not None else what.partition("/")
    if slash:
        check_batch_name(batch)

    def find(version: Published | None) -> row_history.Answer:
        if not slash:
            return row_history.find_pair(storage, what, version)
        return row_history.find_row(storage, batch, place, version)

    found = (find(version), version) if version is not None else row_history.find_anywhere(storage, find)
    if not found[0].rows:
        where = " in the decisions of any batch or a version" if version is None else f" in version {version.number}"
        fail(_no_such_row(storage, batch, place) if slash and version is None else f"no row {row or what!r}{where}")
    return found


def _no_such_row(storage: Storage, batch: str, row: str) -> str:
    footer = storage.tables.footer("raw_data", Partition(batch))
    if not footer.num_rows:
        return f"batch {batch!r} has no rows"
    first = next(iter(storage.tables.scan("raw_data", Partition(batch), columns=["source_file"])))["source_file"][0]
    return f"batch {batch!r} has no row {row!r}; it has {footer.num_rows} rows, the first of file {first!r}"


def _rows_with_text(storage: Storage, text: str, batch: str | None) -> tuple[list[dict[str, Any]], int]:
    """The first rows that contain the text, and the number of all; a progress bar is shown meanwhile."""
    batches = storage.tables.batches_with("raw_data") if batch is None else [check_batch_name(batch)]
    found: list[dict[str, Any]] = []
    number = 0
    with Progress(console=errors, transient=True) as bars:
        task = bars.add_task("reading raw_data", total=len(batches))
        for matches in row_history.find_text(storage, text, batches):
            found += matches.rows[: row_history.MOST_ROWS - len(found)]
            number += matches.number
            bars.update(task, advance=1, description=f"read {matches.batch}: {number:,} found")
    if not found:
        fail(f"no row in the current delivery of {batch or 'any batch'} contains {text!r}")
    return found, number
