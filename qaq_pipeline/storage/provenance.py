"""Records of what made the rows of decisions, by the id that stands in each row, and of the runs that made them.

provenance/<id>.json                   written once; its hash is the id
provenance/runs/<id>/<run id>.json     run and time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from qaq_pipeline.storage.files import Files, StorageError, hash_json

_FOLDER = "provenance"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made some rows, and the runs that made them."""

    provenance_id: str
    made_of: dict[str, Any] | None
    """None: there is no record."""
    runs: list[dict[str, str]] = field(default_factory=list)
    """run_id and time of each, oldest first."""


class ProvenanceRecords:
    """The records of all decisions."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def write(self, made_of: Mapping[str, Any], run_id: str) -> str:
        """Keep a record under its hash, once, and the run beside it; return the hash.

        So the id in a row can be resolved after the row was made again.
        """
        provenance_id = hash_json(made_of)
        record = self.place(provenance_id)
        if not self._files.exists(*record):
            self._files.write_json(made_of, *record)
        run = {"run_id": run_id, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        self._files.write_json(run, _FOLDER, "runs", provenance_id, f"{run_id}.json")
        return provenance_id

    def read(self, provenance_id: str) -> Provenance:
        """The record with that id.

        Raises:
            StorageError: the record was changed since it was written: its hash is not the id.
        """
        record, runs = self.place(provenance_id), (_FOLDER, "runs", provenance_id)
        made_of = self._files.read_json(*record) if self._files.exists(*record) else None
        if made_of is not None and hash_json(made_of) != provenance_id:
            raise StorageError(
                f"{self._files.url(*record)}: it was changed since it was written, and nothing it says can be trusted; "
                "restore it from a backup, or remove it: `qaq refresh` writes what stands now"
            )
        made_by = [self._files.read_json(*runs, name) for name in self._files.names(*runs) if name.endswith(".json")]
        return Provenance(provenance_id, made_of, sorted(made_by, key=lambda run: run["time"]))

    def place(self, provenance_id: str) -> tuple[str, ...]:
        """Parts of the path of a record."""
        return (_FOLDER, f"{provenance_id}.json")
