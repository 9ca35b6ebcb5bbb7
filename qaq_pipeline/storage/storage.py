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
from qaq_pipeline.storage.locks import Locks
from qaq_pipeline.storage.provenance import ProvenanceRecords
from qaq_pipeline.storage.score_cache import ScoreCache
from qaq_pipeline.storage.tables import Tables


class Storage:
    """Everything the pipeline keeps, under one root.

    Args:
        root: local path or any fsspec URL.
        lock_directory: local folder of the lock files; locks hold between processes of one machine.
        lock_timeout_seconds: how long a writer waits for another.
        pipeline: the tables that are stored.
    """

    def __init__(
        self, root: str, lock_directory: Path, lock_timeout_seconds: float = 10.0, pipeline: Pipeline = PIPELINE
    ) -> None:
        self.files = Files(root)
        self.locks = Locks(lock_directory, lock_timeout_seconds)
        self.tables = Tables(self.files, pipeline)
        self.scores = ScoreCache(self.files, self.locks)
        self.deliveries = Deliveries(self.files)
        self.provenance = ProvenanceRecords(self.files)


def open_storage(settings: Settings, pipeline: Pipeline = PIPELINE) -> Storage:
    """The storage that the settings name.

    Raises:
        SettingsError: its URL is of an unknown kind, or of one whose fsspec package is not installed.
    """
    try:
        timeout = settings.runtime.lock_timeout_seconds
        return Storage(settings.storage_root, settings.home / "locks", timeout, pipeline)
    except (ValueError, ImportError) as error:
        raise SettingsError(f"storage.root: {settings.storage_root!r} cannot be used ({error})") from error
