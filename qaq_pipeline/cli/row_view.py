"""A dossier of a row in a terminal, as `qaq explain` prints it.

Belongs here: the order, the words and the tables in a terminal. Does not belong here: what is known of a row
(`lineage.dossier`), and finding it (`lineage.row_history`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from qaq_pipeline.lineage import dossier
from qaq_pipeline.lineage.dossier import Dossier, Grid
from qaq_pipeline.reports.summaries import visible
from qaq_pipeline.schema.row_place import RowPlace
from qaq_pipeline.selection import explanations

_SHOWN_CHARACTERS = 160


def show(console: Console, of_row: Dossier, *, with_template: bool, is_full: bool = False) -> None:
    """Print a dossier, the decision first.

    Args:
        console: where it is printed.
        of_row: the dossier.
        with_template: whether each model's prompts are printed too.
        is_full: whether the texts are printed whole, line by line, and not their beginnings.
    """
    row = of_row.row
    now = "" if of_row.found_in is None else f" in {of_row.found_in.name}"
    _line(console, f"{RowPlace.of(row)}: {row['decision']} ({row['reason']}){now}", style="bold")
    _line(console, row.get("explanation") or "This version has no explanation of the row; its numbers follow.")
    if row["duplicate_of"] is not None:
        _line(console, dossier.said_of(of_row.representative))
    for line in dossier.history(of_row):
        _line(console, line)
    _print_texts(console, of_row, is_full=is_full)
    if row["scores"]:
        _print_grid(console, dossier.scores(row))
    if of_row.signals is None:
        _line(console, dossier.JUDGED_AGAIN)
    if of_row.signals:
        _print_grid(console, dossier.signals(of_row.signals))
    if row["verdicts"]:
        _print_grid(console, dossier.verdicts(row))
    pair = "no pair" if row["pair_id"] is None else f"pair_id {row['pair_id']}"
    _line(console, f"{pair}, provenance {row['provenance_id']}", style="dim")
    for line in dossier.origin(of_row, with_template=with_template):
        _line(console, f"  {line}", style="dim")


def _beginning(text: str | None) -> str:
    return explanations.shorten(text or "", _SHOWN_CHARACTERS)


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _print_texts(console: Console, of_row: Dossier, *, is_full: bool) -> None:
    for label, text in _texts(of_row):
        if is_full and text is not None:
            _line(console, f"  {label}, {len(text):,} characters:", style="dim")
            for line in text.split("\n"):
                _line(console, f"    {line}")
        else:
            _line(console, f"  {label}: {_beginning(text)}", style="dim")


def _texts(of_row: Dossier) -> list[tuple[str, str | None]]:
    if not of_row.text:
        return [("text", "withdrawn, or not in the current delivery of the batch")]
    if of_row.text["query"] is None and of_row.text["answer"] is None:
        return [("record", of_row.text.get("record"))]
    return [(label, of_row.text[label]) for label in ("query", "answer")]


def _print_grid(console: Console, grid: Grid) -> None:
    """Print the rows; long words are folded, never cut."""
    shown = Table(*(Column(head, overflow="fold") for head in grid.head))
    for row in grid.rows:
        shown.add_row(*map(dossier.cell, row))
    console.print(shown)


def matches(console: Console, rows: Sequence[Mapping[str, Any]], number: int) -> None:
    """Print the first of the rows that contain a text, one per line, and the command that explains one."""
    for row in rows:
        _line(console, f"{RowPlace.of(row)}: {_beginning(row['query'])}")
    if number > len(rows):
        _line(console, f"… and {number - len(rows):,} more")
    _line(console, f"{number:,} rows contain that text; explain one: `qaq explain {RowPlace.of(rows[0])}`")
