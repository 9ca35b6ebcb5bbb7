"""The storage: its stores under one root.

Belongs here: putting the stores together. Does not belong here: what each of them does.
"""

from __future__ import annotations

from pathlib import Path

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE, Pipeline
from qaq_pipeline.storage.deliveries import Deliveries
from qaq_pipeline.storage.files import Files
from qaq_pipeline.storage.locks import FileLocks, Locks, open_locks
from qaq_pipeline.storage.provenance import ProvenanceRecords
from qaq_pipeline.storage.score_cache import ScoreCache
from qaq_pipeline.storage.tables import Tables


class Storage:
    """Everything the pipeline keeps, under one root.

    Args:
        root: local path or any fsspec URL.
        locks: between its writers; or the local folder of lock files, if all are on one machine.
        pipeline: the tables that are stored.
    """

    def __init__(self, root: str, locks: Locks | Path, pipeline: Pipeline = PIPELINE) -> None:
        self.files = Files(root)
        self.locks = FileLocks(locks) if isinstance(locks, Path) else locks
        self.tables = Tables(self.files, pipeline)
        self.scores = ScoreCache(self.files, self.locks)
        self.deliveries = Deliveries(self.files)
        self.provenance = ProvenanceRecords(self.files)


def open_storage(settings: Settings, pipeline: Pipeline = PIPELINE) -> Storage:
    """The storage that the settings name.

    Raises:
        SettingsError: its URL is of an unknown kind, or of one whose fsspec package is not installed; as `open_locks`.
    """
    locks = open_locks(settings, settings.home / "locks")
    try:
        return Storage(settings.storage_root, locks, pipeline)
    except (ValueError, ImportError) as error:
        raise SettingsError(f"storage.root: {settings.storage_root!r} cannot be used ({error})") from error
