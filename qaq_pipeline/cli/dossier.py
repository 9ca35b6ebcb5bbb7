"""Everything that is known about a row, as `qaq explain` prints it: decision, scores, versions, provenance.

Belongs here: the parts of a dossier, and its words and tables in a terminal. Does not belong here: finding the row
(`lineage.row_history`), and the sentences of the decision (`selection.explanations`). No Dagster: importing it takes
longer than the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from qaq_pipeline.lineage import row_history
from qaq_pipeline.lineage.row_history import Fate
from qaq_pipeline.publication.versions import Published
from qaq_pipeline.reports.summaries import visible
from qaq_pipeline.schema.row_place import RowPlace
from qaq_pipeline.selection import explanations
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.provenance import Provenance
from qaq_pipeline.storage.storage import Storage

_SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Dossier:
    """Everything known about one row."""

    row: dict[str, Any]
    """As in decisions."""
    found_in: Published | None
    """The version with that decision; None: the current decisions."""
    text: dict[str, str | None]
    """Query, answer, record; empty if the current delivery has no such row."""
    representative: dict[str, Any] | None
    """The row that is kept instead of a duplicate."""
    signals: list[dict[str, Any]] | None
    """As `row_history.validity_of`."""
    fates: list[Fate]
    provenance: Provenance


def gather(storage: Storage, row: dict[str, Any], found_in: Published | None, *, with_versions: bool) -> Dossier:
    """Collect everything about a row that was found.

    Args:
        storage: the storage of the pipeline.
        row: the row of decisions.
        found_in: the version it was found in; None: the current decisions.
        with_versions: collect the row's fate in every version.
    """
    provenance = storage.provenance.read(row["provenance_id"])
    inputs = {} if provenance.made_of is None else provenance.made_of["inputs"]
    return Dossier(
        row,
        found_in,
        row_history.text_of(storage, row),
        _representative(storage, row, found_in),
        row_history.validity_of(storage, row, inputs),
        row_history.fates(storage, row) if with_versions else [],
        provenance,
    )


def _representative(storage: Storage, row: dict[str, Any], found_in: Published | None) -> dict[str, Any] | None:
    if row["duplicate_of"] is None:
        return None
    place = RowPlace.parse(row["duplicate_of"])
    try:
        rows = row_history.find_row(storage, place.batch, place.in_batch, found_in).rows
    except StorageError:
        return None
    return rows[0] if rows else None


# --- in a terminal ---------------------------------------------------------------------------------------------------


def show(console: Console, dossier: Dossier, *, with_template: bool) -> None:
    """Print a dossier, the decision first."""
    row = dossier.row
    now = "" if dossier.found_in is None else f" in {_version(dossier.found_in)}"
    _line(console, f"{RowPlace.of(row)}: {row['decision']} ({row['reason']}){now}", style="bold")
    _line(console, row.get("explanation") or "This version has no explanation of the row; its numbers follow.")
    if row["duplicate_of"] is not None:
        _line(console, _said_of(dossier.representative))
    for line in _history(dossier):
        _line(console, line)
    for label, text in _texts(dossier):
        _line(console, f"  {label}: {text}", style="dim")
    if row["scores"]:
        _print_scores(console, row["scores"])
    if dossier.signals is None:
        _line(console, "The evidence of the signals was judged again since this decision, so it is not shown.")
    if dossier.signals:
        _print_signals(console, dossier.signals)
    if row["verdicts"]:
        _print_verdicts(console, row["verdicts"])
    pair = "no pair" if row["pair_id"] is None else f"pair_id {row['pair_id']}"
    _line(console, f"{pair}, provenance {row['provenance_id']}", style="dim")
    for line in _origin(dossier, with_template=with_template):
        _line(console, f"  {line}", style="dim")


def _beginning(text: str | None) -> str:
    return explanations.shorten(text or "", _SHOWN_CHARACTERS)


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _said_of(representative: Mapping[str, Any] | None) -> str:
    if representative is None:
        return "That row is no longer in the decisions."
    own = representative.get("explanation")
    said = f" Its explanation: {own}" if own else ""
    return f"That row is {representative['decision'].replace('_', ' ')}.{said}"


def _version(published: Published) -> str:
    day = "" if published.published_at is None else f", {published.published_at[:10]}"
    return f"version {published.number} ({published.version[:8]}{day})"


def _history(dossier: Dossier) -> Iterator[str]:
    """One line per version; consecutive versions with the same fate share one."""
    for said, group in itertools.groupby(dossier.fates, key=lambda fate: _fate(dossier, fate)):
        versions = [fate.published for fate in group]
        first, last = versions[0], versions[-1]
        several = f"versions {first.number} to {last.number} ({first.version[:8]} to {last.version[:8]})"
        yield f"{_version(first) if first is last else several}: {said}"


def _fate(dossier: Dossier, fate: Fate) -> str:
    if fate.fault is not None:
        return f"the row's fate is unknown: {fate.fault}"
    if fate.row is not None and fate.row["pair_id"] != dossier.row["pair_id"]:
        other = f"this file and row number had another text (pair_id {fate.row['pair_id']})"
        return f"{other}: {fate.row['decision']}"
    before = dossier.fates[dossier.fates.index(fate) - 1] if dossier.fates[0] is not fate else None
    is_same = before is not None and before.row is not None and before.row["pair_id"] == dossier.row["pair_id"]
    was_in = before.published.number if before is not None and before.is_published and is_same else None
    told = dossier.row.get("explanation")
    return explanations.explain_in_version(
        fate.row, has_batch=fate.has_batch, left_out=fate.left_out, was_in=was_in, told=told
    )


def _texts(dossier: Dossier) -> list[tuple[str, str]]:
    if not dossier.text:
        return [("text", "not in the current delivery of the batch")]
    if dossier.text["query"] is None and dossier.text["answer"] is None:
        return [("record", _beginning(dossier.text["record"]))]
    return [(label, _beginning(dossier.text[label])) for label in ("query", "answer")]


def _origin(dossier: Dossier, *, with_template: bool) -> Iterator[str]:
    """The provenance of the row's decision, line by line."""
    made_of, row = dossier.provenance.made_of, dossier.row
    if made_of is None:
        yield "its provenance record is missing; restore it from a backup"
        return
    yield f"input: {row['source_file']}, row {row['source_row']}, sha256 {made_of['files'].get(row['source_file'])}"
    scored_by = made_of.get("scored_by", {})
    is_scored = bool(row["scores"]) or with_template
    for role, identity in sorted(made_of["models"].items()) if is_scored else ():
        asked = scored_by.get(role, {})
        yield (
            f"{role}: {identity['model']} ({identity['revision']}), {identity['dtype']}, "
            f"{asked.get('frame', 'unknown')} frame, prior {identity['prior']}, template {identity['template_hash']}"
        )
        for scorer in asked.get("scored_with", []):
            yield f"  scored with {_libraries(scorer['libraries'])}, on {scorer['device']}"
        if with_template:
            yield f"  template: {asked.get('template', 'unknown')}"
            yield f"  end tokens: {asked.get('end_ids', 'unknown')}"
    yield f"pool {made_of['pool_id']}, settings {made_of['settings_hash']}, code {made_of['code_version']}"
    for run in dossier.provenance.runs:
        yield f"decided by run {run['run_id']} at {run['time']}"


def _libraries(libraries: Mapping[str, str] | str) -> str:
    if isinstance(libraries, str):
        return f"{libraries} libraries"
    return ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()))


def _print_scores(console: Console, scores: Sequence[Mapping[str, Any]]) -> None:
    """Print one column per model and one row per number."""
    shown = Table("", *(of_model["model"] for of_model in scores))
    for field in scores[0]:
        if field != "model":
            shown.add_row(field, *(_cell(of_model[field]) for of_model in scores))
    console.print(shown)


def _print_signals(console: Console, signals: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per signal. Evidence at or below the cut raises the signal."""
    shown = Table("signal", "evidence", "cut", "result")
    has_reason = False
    for signal in signals:
        result = _result(signal, is_before=not has_reason)
        shown.add_row(signal["signal"], _cell(signal["evidence"]), _cell(signal["cut"]), result)
        has_reason = has_reason or signal["is_reason"]
    console.print(shown)


def _result(signal: Mapping[str, Any], *, is_before: bool) -> str:
    """What a signal says of the pair. A raised signal before the reason, or without one, only flags the pair."""
    if signal["cut"] is None:
        return f"no cut ({signal['null_reason']})"
    if not signal["is_raised"]:
        return "not raised"
    if signal["is_reason"]:
        return "raised: the pair is invalid"
    return "flagged" if is_before else "raised"


def _print_verdicts(console: Console, verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per selection; long names are folded, never cut."""
    shown = Table(
        *(Column(head, overflow="fold") for head in ("selection", "selected", "reason", "score", "place", "cut"))
    )
    for verdict in verdicts:
        place = " of ".join(_cell(verdict[name]) for name in ("position", "pool_size") if name in verdict)
        numbers = [_cell(verdict["score"]), place, _cut(verdict)]
        shown.add_row(verdict["selection"], _cell(verdict["is_selected"]), verdict["reason"], *numbers)
    console.print(shown)


def _cut(verdict: Mapping[str, Any]) -> str:
    """The cut, and the side that is taken if the pair's own place shows it: a draw takes the lowest."""
    score, cut = verdict["score"], verdict.get("cut")
    if score is None or cut is None or score == cut or verdict.get("position") is None:
        return _cell(cut)
    takes_low = (score < cut) == verdict["is_selected"]
    return f"{'≤' if takes_low else '≥'} {_cell(cut)}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def matches(console: Console, rows: Sequence[Mapping[str, Any]], number: int) -> None:
    """Print the first of the rows that contain a text, one per line, and the command that explains one."""
    for row in rows:
        _line(console, f"{RowPlace.of(row)}: {_beginning(row['query'])}")
    if number > len(rows):
        _line(console, f"… and {number - len(rows):,} more")
    _line(console, f"{number:,} rows contain that text; explain one: `qaq explain {RowPlace.of(rows[0])}`")
