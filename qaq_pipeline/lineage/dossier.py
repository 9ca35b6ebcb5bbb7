"""Everything that is known about a row: decision, scores, signals, versions, provenance.

Belongs here: the parts of a dossier, and the sentences that every view of it shares. Does not belong here: finding the
row (`row_history`), the sentences of the decision (`selection.explanations`), and a view of it (`cli.row_view`,
`row_browser`). No Dagster: importing it takes longer than the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qaq_pipeline.lineage import row_history
from qaq_pipeline.lineage.row_history import Fate
from qaq_pipeline.publication.versions import Published
from qaq_pipeline.schema.row_place import RowPlace
from qaq_pipeline.selection import explanations
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.provenance import Provenance
from qaq_pipeline.storage.storage import Storage

JUDGED_AGAIN = "The evidence of the signals was judged again since this decision, so it is not shown."


class Grid(NamedTuple):
    """A table of numbers and words."""

    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]


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


# --- sentences ------------------------------------------------------------------------------------------------------


def said_of(representative: Mapping[str, Any] | None) -> str:
    """What is said of the row that is kept instead of a duplicate."""
    if representative is None:
        return "That row is no longer in the decisions."
    own = representative.get("explanation")
    said = f" Its explanation: {own}" if own else ""
    return f"That row is {representative['decision'].replace('_', ' ')}.{said}"


def history(dossier: Dossier) -> Iterator[str]:
    """One line per version; consecutive versions with the same fate share one."""
    for said, group in itertools.groupby(dossier.fates, key=lambda fate: _fate(dossier, fate)):
        versions = [fate.published for fate in group]
        first, last = versions[0], versions[-1]
        several = f"versions {first.number} to {last.number} ({first.version[:8]} to {last.version[:8]})"
        yield f"{first.name if first is last else several}: {said}"


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


def origin(dossier: Dossier, *, with_template: bool) -> Iterator[str]:
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


# --- numbers ---------------------------------------------------------------------------------------------------------


def scores(row: Mapping[str, Any]) -> Grid:
    """One column per model and one row per number."""
    fields = [field for field in row["scores"][0] if field != "model"] if row["scores"] else []
    head = ("", *(of_model["model"] for of_model in row["scores"]))
    return Grid(head, [(field, *(of_model[field] for of_model in row["scores"])) for field in fields])


def signals(found: Sequence[Mapping[str, Any]]) -> Grid:
    """One row per signal of `Dossier.signals`. Evidence at or below the cut raises the signal."""
    rows, has_reason = [], False
    for signal in found:
        result = _result(signal, is_before=not has_reason)
        rows.append((signal["signal"], signal["evidence"], signal["cut"], result))
        has_reason = has_reason or signal["is_reason"]
    return Grid(("signal", "evidence", "cut", "result"), rows)


def _result(signal: Mapping[str, Any], *, is_before: bool) -> str:
    """What a signal says of the pair. A raised signal before the reason, or without one, only flags the pair."""
    if signal["cut"] is None:
        return f"no cut ({signal['null_reason']})"
    if not signal["is_raised"]:
        return "not raised"
    if signal["is_reason"]:
        return "raised: the pair is invalid"
    return "flagged" if is_before else "raised"


def verdicts(row: Mapping[str, Any]) -> Grid:
    """One row per selection."""
    head = ("selection", "selected", "reason", "score", "place", "cut")
    return Grid(head, [_verdict(verdict) for verdict in row["verdicts"]])


def _verdict(verdict: Mapping[str, Any]) -> tuple[Any, ...]:
    place = " of ".join(cell(verdict[name]) for name in ("position", "pool_size") if name in verdict)
    numbers = (verdict["score"], place, cut_of(verdict))
    return (verdict["selection"], verdict["is_selected"], verdict["reason"], *numbers)


def cut_of(verdict: Mapping[str, Any]) -> str:
    """The cut, and the side that is taken if the pair's own place shows it: a draw takes the lowest."""
    score, cut = verdict["score"], verdict.get("cut")
    if score is None or cut is None or score == cut or verdict.get("position") is None:
        return cell(cut)
    takes_low = (score < cut) == verdict["is_selected"]
    return f"{'≤' if takes_low else '≥'} {cell(cut)}"


def cell(value: object) -> str:
    """A value of a `Grid` as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
