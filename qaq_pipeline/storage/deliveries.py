"""Deliveries: immutable copies of what was delivered, and a pointer to the current one.

deliveries/<batch>/<hash>/<file>       the copy, written once
deliveries/<batch>/current.json        the current delivery; written last
deliveries/<batch>/<note>.json         notes of the landing zone
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.storage.files import Files, StorageError, hash_json

_FOLDER = "deliveries"
_COPY = re.compile(r"^[0-9a-f]{32}$")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One delivery of a batch: its files with their sha256, and how many rows of them are read."""

    batch: str
    files: dict[str, str]
    """sha256 of each file, by its name in the delivery."""
    limit: int | None = None

    @property
    def content_hash(self) -> str:
        """Hash of files, names and limit (32 hex digits): the folder of the copy."""
        return hash_json({"files": self.files, "limit": self.limit})


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 of each file, by its name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


class Deliveries:
    """The deliveries of all batches."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def store(self, batch: str, files: Mapping[str, bytes], limit: int | None = None) -> Delivery:
        """Keep an immutable copy of a delivery; the same content is stored once."""
        delivery = Delivery(batch, hashes(files), limit)
        for name, data in files.items():
            copy = self.place(batch, delivery.content_hash, name)
            if not (self._files.exists(*copy) and self._files.read_bytes(*copy) == data):  # Replace a damaged copy.
                self._files.write_bytes(data, *copy)
        self._files.write_json({"files": delivery.files, "limit": limit}, *self.place(batch, "current.json"))
        return delivery

    def has(self, batch: str) -> bool:
        """Whether the batch was ever delivered."""
        return self._files.exists(*self.place(batch, "current.json"))

    def current(self, batch: str) -> Delivery:
        """The newest delivery of a batch. Raises `StorageError` where there is none."""
        if not self.has(batch):
            raise StorageError(f"batch {batch!r} was never delivered; register it with `qaq run FILE --batch {batch}`")
        pointer = self._files.read_json(*self.place(batch, "current.json"))
        return Delivery(batch, pointer["files"], pointer["limit"])

    def sizes(self, delivery: Delivery) -> dict[str, int]:
        """The bytes of each file, by its name. Raises `StorageError` where a copy is missing."""
        places = {name: self.place(delivery.batch, delivery.content_hash, name) for name in delivery.files}
        return {name: self._files.size(*place) for name, place in places.items()}

    def read(self, delivery: Delivery, name: str) -> bytes:
        """The content of a delivered file. Raises `StorageError` where the copy was changed."""
        place = self.place(delivery.batch, delivery.content_hash, name)
        return self._files.read_unchanged(delivery.files[name], "deliver the batch again", *place)

    def copies(self, batch: str) -> list[str]:
        """Names of the folders with copies of a batch's deliveries."""
        return [name for name in self._files.names(*self.place(batch)) if _COPY.match(name)]

    def place(self, batch: str, *inside: str) -> tuple[str, ...]:
        """Parts of the path of a batch's deliveries, or of something in them. Raises ValueError for no batch's name."""
        return (_FOLDER, check_batch_name(batch), *inside)
