"""Files that a person delivers: estimate their cost, or keep a copy of them and add the partition of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qaq_pipeline.calibration import planting
from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest import landing, records, sources
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.scoring.pairs import TEXTS, Pairs, accepted_parts
from qaq_pipeline.scoring.runtime import ScoringCost
from qaq_pipeline.screening import gates, screen
from qaq_pipeline.storage.deliveries import Delivery, hashes
from qaq_pipeline.storage.stored_table import StoredTable


def register(
    deployment: Deployment, batch: str, files: Sequence[str | Path], limit: int | None, *, replaces: bool = False
) -> bool:
    """Keep a copy of the files as the batch's delivery, and add its partition; True if it had other content before.

    Args:
        deployment: where they are kept.
        batch: name of the batch.
        files: paths or URLs of its files, folders or patterns.
        limit: number of rows that are read of each; None: all.
        replaces: whether they may replace other files of the batch.

    Raises:
        RunError: the batch has other files, or more rows, that may not be replaced.
        ValueError: the name of the batch cannot be used, a file is missing, has the name of another one, or cannot be
            read at all, or a model cannot be used.
    """
    check_batch_name(batch)
    contents = _read(files, deployment.settings.records)
    storage = deployment.storage
    previous = storage.deliveries.current(batch) if storage.deliveries.has(batch) else None
    if previous is not None and not replaces and not _extends(previous, contents, limit):
        rows = "" if previous.limit is None else f", the first {previous.limit:,} rows"
        raise RunError(
            f"batch {batch} has another delivery ({', '.join(previous.files)}{rows}); give these files a batch of "
            "their own, or add --replace to take them in its place"
        )
    for role in deployment.settings.models:
        deployment.model_runtime.identity(role)  # One that cannot be used is refused before anything is stored.
    delivery = storage.deliveries.store(batch, contents, limit)
    landing.settle(storage, batch)
    deployment.instance.add_dynamic_partitions("batch", [batch])
    return previous is not None and previous.content_hash != delivery.content_hash


def _extends(previous: Delivery, contents: Mapping[str, bytes], limit: int | None) -> bool:
    """Whether a delivery has the same files as the one before it, and no fewer of their rows."""
    has_all = limit is None or (previous.limit is not None and limit >= previous.limit)
    return has_all and previous.files == hashes(contents)


def _read(files: Sequence[str | Path], settings: RecordSettings) -> dict[str, bytes]:
    """The bytes of the files, by name, of which each that has rows can be split into them. Raises ValueError."""
    contents = sources.read(files)
    records.check_delivery(contents, settings)
    return contents


@dataclass(frozen=True)
class Estimate:
    """What a run of files would read and score."""

    rows: int
    rejected: int
    faults: str
    """The commonest reasons of rejected rows; empty: there are none."""
    not_read: list[str]
    """Fields and files that are not read, in words."""
    costs: list[ScoringCost]
    """The cost of scoring, model by model."""


def estimate(deployment: Deployment, files: Sequence[str | Path]) -> Estimate:
    """Read the files, and estimate the cost of scoring them and the rows planted in them.

    The cost is an upper bound: rows that older batches or benchmarks contain are counted.

    Raises:
        ValueError: a file is missing or cannot be read at all, a model's files cannot be found, or it cannot be scored.
    """
    settings = deployment.settings
    contents = _read(files, settings.records)
    reading = records.read_delivery(contents, "b", settings.records)
    raw = reading.frame
    accepted = partial(accepted_parts, StoredTable(raw), StoredTable(screen.screen_alone(raw, settings.screening)))
    pairs = Pairs(accepted)
    if settings.is_calibrated:
        planted = StoredTable(planting.plant(accepted(*TEXTS, "language"), settings.calibration))
        pairs = pairs.and_then(Pairs(partial(planted.parts, "pair_id")))
    runtime = deployment.model_runtime
    return Estimate(
        rows=raw.height,
        rejected=raw.filter(status=Status.REJECTED.value).height,
        faults=gates.commonest_faults(raw),
        not_read=records.not_read(reading.facts),
        costs=[runtime.estimate(role, pairs, deployment.storage) for role in settings.models],
    )
