"""The order in which batches were first screened: a batch is compared with the batches before it.

batch_order.json     names of the batches
"""

from __future__ import annotations

from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.storage.storage import Storage

_PLACE = "batch_order.json"


def batches_in_order(storage: Storage) -> list[str]:
    """Return all batches ever screened, oldest first; a batch keeps its place."""
    return storage.files.read_json(_PLACE) if storage.files.exists(_PLACE) else []


def batches_before(storage: Storage, batch: str) -> list[str]:
    """Return the batches screened before this one; all of them if it has no place yet."""
    known = batches_in_order(storage)
    return known[: known.index(batch)] if batch in known else known


def batches_after(storage: Storage, batch: str) -> list[str]:
    """Return the batches screened after this one; none if it has no place yet."""
    known = batches_in_order(storage)
    return known[known.index(batch) + 1 :] if batch in known else []


def take_place(storage: Storage, batch: str) -> None:
    """Give a screened batch its permanent place in the order. Call it under a lock."""
    check_batch_name(batch)
    storage.files.update_json(lambda known: known if batch in known else [*known, batch], _PLACE, at_first=[])
