"""The files of a delivery, as they were stored."""

from __future__ import annotations

from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.storage import Storage


def delivered(storage: Storage, delivery: Delivery) -> dict[str, bytes]:
    """The delivered bytes by file name."""
    return {name: storage.deliveries.read(delivery, name) for name in delivery.files}
