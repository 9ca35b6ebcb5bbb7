"""Withdraw a batch or a row from the published dataset, or restore it.

Belongs here: what a person withdraws, and the screening and publication that follow. Does not belong here: the record
of withdrawals (`screening.withdrawals`), and the refresh itself (`refresh`).
"""

from __future__ import annotations

from dataclasses import dataclass

from qaq_pipeline.reports import page_store
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import SILENT, Events, RunError, driving
from qaq_pipeline.runs.refresh import Refreshed, publish, refresh_stale
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.schema.vocabularies import DuplicateReason
from qaq_pipeline.screening import withdrawals
from qaq_pipeline.storage import row_lookup
from qaq_pipeline.storage.storage import Storage


@dataclass(frozen=True)
class Withdrawal:
    """A batch or a row that a person withdraws, and the reason."""

    batch: str
    row: str | None
    """`file:row`, `file:row.turn`, a row's number, or the first digits of a pair_id; None: the batch."""
    reason: str
    is_withdrawn: bool = True
    """False: the withdrawal is revoked."""


def withdraw(deployment: Deployment, what: Withdrawal, events: Events = SILENT) -> Refreshed:
    """Withdraw a batch, or the text of a row in every batch, and publish without it; or revoke a withdrawal.

    Asked again, it does what is left of it: the process that was asked first may have ended in between.

    Raises:
        RunError: there is no such row, or a stage that follows failed.
        ValueError: there is no such batch, or its name cannot be used.
    """
    storage = deployment.storage
    deployment.require_batch(what.batch)
    rows = {} if what.row is None else _contents(storage, what.batch, what.row)
    if not what.is_withdrawn and not withdrawals.were_withdrawn(storage, what.batch, rows):
        raise RunError(f"{what.batch}{'/' + what.row if what.row else ''} is not withdrawn: nothing to take back")
    withdrawals.add(storage, what.batch, rows, what.reason, is_withdrawn=what.is_withdrawn)
    with driving(deployment, events) as driver:
        done = refresh_stale(driver, only_screening=True)
        page_store.forget(storage, done.batches)
        return publish(driver, done, done.batches)


def _contents(storage: Storage, batch: str, row: str) -> dict[str, str]:
    """The content hash of the row, and its place."""
    if not storage.tables.has("signatures", Partition(batch)):
        raise RunError(f"batch {batch!r} is not screened yet, so its rows are unknown; withdraw the batch, or wait")
    signatures = storage.tables.read("signatures", Partition(batch)).select(*ROW_KEY, "pair_id", "content_hash")
    found = row_lookup.find_rows(signatures, row, batch)
    if found.is_empty():
        raise RunError(f"batch {batch!r} has no readable row {row!r}; give file:row, a number, or a pair_id")
    if found["content_hash"].n_unique() > 1:
        raise RunError(f"batch {batch!r} has {found.height} rows {row!r} of different text; name one: file:row.turn")
    return {found["content_hash"][0]: found.select(row_place()).item(0, 0)}


def near_rows(deployment: Deployment, batch: str, row: str) -> list[str]:
    """Rows that were removed as near duplicates of this row: they come back when it is withdrawn."""
    storage = deployment.storage
    place = next(iter(_contents(storage, batch, row).values()))
    found = []
    for name in deployment.batches:
        if storage.tables.has("screened_data", Partition(name)):
            for rows in storage.tables.read("screened_data", Partition(name)).parts(*ROW_KEY, "duplicate_of", "reason"):
                near = rows.filter(duplicate_of=place, reason=DuplicateReason.NEAR_DUPLICATE.value)
                found += near.select(row_place()).to_series().to_list()
    return found
