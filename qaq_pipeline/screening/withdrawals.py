"""Withdrawals from publication: whole batches, and rows by their content. Kept permanently, with the reason.

Belongs here: the record of withdrawals and which of them affect a batch. Does not belong here: their effect on a row
or batch (`screen`, `gates`), and the publication without it.

A row is withdrawn by its content hash. This withdraws the same text in every earlier and later batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypedDict

import polars as pl

from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.storage.storage import Storage

_RECORD = ("withdrawals.json",)


class _Entry(TypedDict):
    at: str
    batch: str
    content_hash: str | None
    """None: the batch itself."""
    row: str | None
    reason: str
    is_withdrawn: bool


@dataclass(frozen=True)
class Withdrawals:
    """Current withdrawals, each with the reason."""

    batches: dict[str, str] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    """By content hash, as in signatures."""

    def of_batch(self, batch: str, signatures: pl.DataFrame) -> dict[str, str]:
        """Return what affects a batch, each with the reason: the batch's own key, and its content hashes."""
        found = {key_of_batch(batch): self.batches[batch]} if batch in self.batches else {}
        if self.contents:
            held = signatures.filter(pl.col("content_hash").is_in(list(self.contents)))["content_hash"]
            found |= {content: self.contents[content] for content in sorted(set(held))}
        return found


def key_of_batch(batch: str) -> str:
    """Return the key of a batch in `of_batch`; it never equals a content hash."""
    return f"batch {batch}"


def read(storage: Storage, since: str | None = None) -> Withdrawals:
    """Return the current withdrawals; given an ISO 8601 time, only those recorded from then on."""
    found = Withdrawals()
    for entry in _record(storage):
        if since is not None and datetime.fromisoformat(entry["at"]) < datetime.fromisoformat(since):
            continue
        content = entry["content_hash"]
        known, key = (found.batches, entry["batch"]) if content is None else (found.contents, content)
        if entry["is_withdrawn"]:
            known[key] = entry["reason"]
        else:
            known.pop(key, None)
    return found


def were_withdrawn(storage: Storage, batch: str, contents: Iterable[str]) -> bool:
    """Whether any of these texts, or without texts the batch, was ever withdrawn."""
    known = {_key(entry) for entry in _record(storage) if entry["is_withdrawn"]}
    return not known.isdisjoint(list(contents) or [key_of_batch(batch)])


def add(storage: Storage, batch: str, rows: Mapping[str, str], reason: str, *, is_withdrawn: bool) -> None:
    """Withdraw a batch or rows of it, or undo that. What the record says already is not said again.

    Args:
        storage: contains the record.
        batch: the batch.
        rows: content hashes of its rows, with their places for the record; empty: the batch itself.
        reason: why, in words.
        is_withdrawn: False undoes an earlier withdrawal.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    meant: list[tuple[str | None, str | None]] = [*sorted(rows.items())] or [(None, None)]
    said = {"batch": check_batch_name(batch), "reason": reason, "is_withdrawn": is_withdrawn}

    def added(record: list[_Entry]) -> list[_Entry]:
        for content, row in meant:
            entry = _Entry(at=now, content_hash=content, row=row, **said)
            of_same = [one for one in record if _key(one) == _key(entry)]
            if not of_same or {**of_same[-1], "at": now} != entry:
                record = [*record, entry]
        return record

    with storage.locks.hold("withdrawals"):
        storage.files.update_json(added, *_RECORD, at_first=[])


def _key(entry: _Entry) -> str:
    """What an entry is about: a text, or a batch."""
    return entry["content_hash"] or key_of_batch(entry["batch"])


def _record(storage: Storage) -> list[_Entry]:
    return storage.files.read_json(*_RECORD) if storage.files.exists(*_RECORD) else []
