"""Files that a person delivers: estimate their cost, or keep a copy of them and add the partition of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import landing, records
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.scoring.logprobs import accepted_pairs
from qaq_pipeline.scoring.runtime import ModelRuntime, ScoringCost
from qaq_pipeline.screening import screen
from qaq_pipeline.storage.deliveries import Delivery
from qaq_pipeline.storage.storage import open_storage


@dataclass(frozen=True)
class Registration:
    """A delivery, and the previous delivery of the batch."""

    delivery: Delivery
    previous: Delivery | None

    @property
    def replaces_other_content(self) -> bool:
        """True if the batch was delivered before with other content."""
        return self.previous is not None and self.previous.content_hash != self.delivery.content_hash


def register(
    settings: Settings, instance: dg.DagsterInstance, batch: str, files: Sequence[Path], limit: int | None
) -> Registration:
    """Keep a copy of the files as the batch's delivery, and add its partition.

    Raises:
        RunError: a file is missing, cannot be read at all, or two files have one name.
        ValueError: the name of the batch cannot be used.
    """
    check_batch_name(batch)
    contents = read_files(files)
    for name, data in contents.items():
        try:
            records.check_file(data, name)
        except records.UnreadableFileError as error:
            raise RunError(str(error)) from error
    storage = open_storage(settings)
    previous = storage.deliveries.current(batch) if storage.deliveries.has(batch) else None
    delivery = storage.deliveries.store(batch, contents, limit)
    landing.settle(storage, batch)
    instance.add_dynamic_partitions("batch", [batch])
    return Registration(delivery, previous)


def read_files(files: Sequence[Path]) -> dict[str, bytes]:
    """The bytes of each file, by name. Raises `RunError`."""
    contents: dict[str, bytes] = {}
    for path in files:
        if path.name in contents:
            raise RunError(f"{path}: two files of the delivery are named {path.name!r}; rename one")
        try:
            contents[path.name] = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return contents


def batch_lock(settings: Settings, batch: str) -> AbstractContextManager[None]:
    """Lock a batch from its registration to its publication, so that two drivers cannot mix their deliveries.

    Raises:
        PartitionBusyError: another driver holds it.
        ValueError: the name cannot be used.
    """
    return open_storage(settings).locks.hold("batch", check_batch_name(batch))


def estimate(settings: Settings, files: Sequence[Path]) -> list[ScoringCost]:
    """The cost of scoring the files, model by model.

    It is an upper bound: rows that older batches or benchmarks contain are counted.

    Raises:
        RunError: a file is missing or cannot be read at all.
        ValueError: a model's files cannot be found, or it cannot be scored.
    """
    try:
        frames = [records.read_file(data, name, "b", settings.records) for name, data in read_files(files).items()]
    except records.UnreadableFileError as error:
        raise RunError(str(error)) from error
    raw = pl.concat(frames)
    pairs = accepted_pairs(raw, screen.screen_alone(raw, settings.screening))
    storage = open_storage(settings)
    runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)
    return [runtime.estimate(role, pairs, storage) for role in settings.models]
