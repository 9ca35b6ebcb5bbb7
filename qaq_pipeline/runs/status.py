"""How every batch stands: stored tables, what is stale, what is left out of the dataset. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness import eligibility, staleness
from qaq_pipeline.ingest import landing
from qaq_pipeline.orchestration.jobs import present
from qaq_pipeline.pipeline import PIPELINE, Purpose
from qaq_pipeline.publication import versions
from qaq_pipeline.schema.partition import Partition, check_batch_name
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage, open_storage


@dataclass(frozen=True, slots=True)
class TableStatus:
    """What is stored of a table of a batch."""

    num_rows: int | None
    """None: nothing is stored, or it cannot be read."""
    num_stored: int
    """Partitions that are stored: of some tables one for each model."""
    num_wanted: int
    is_readable: bool = True

    @property
    def sentence(self) -> str:
        """The same in words."""
        if not self.is_readable:
            return "unreadable"
        if self.num_rows is None:
            return "-"
        return f"{self.num_rows:,} rows{'' if self.is_whole else f' ({self.of_models})'}"

    @property
    def is_whole(self) -> bool:
        """Whether every partition is stored, and can be read."""
        return self.is_readable and self.num_stored == self.num_wanted

    @property
    def of_models(self) -> str:
        """Of how many models it is stored."""
        return f"{self.num_stored} of {self.num_wanted} models"


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """How a batch stands."""

    batch: str
    tables: Mapping[str, TableStatus]
    """In the order in which they are made."""
    left_out: str | None
    """Why a publication would leave it out now."""
    outdated: staleness.Outdated | None
    """The first of its tables that is out of date, and why."""

    @property
    def state(self) -> str:
        """In a few words, the first table that is not as it should be: those before it stand."""
        for name, table in self.tables.items():
            if not table.is_readable:
                return f"{name} unreadable"
            if not table.num_stored:
                return f"no {name} yet"
            if not table.is_whole:
                return f"{name}: {table.of_models}"
        if self.left_out is not None and self.left_out.startswith("gated"):
            return "gated"
        if self.outdated is not None:
            return f"{self.outdated.table} out of date"
        return "up to date" if self.left_out is None else "left out"


def collect_table(settings: Settings, instance: dg.DagsterInstance, name: str, batch: str | None) -> pl.DataFrame:
    """A stored table of one batch, or of all, with the columns that say which: `batch`, and `model` where it has one.

    Raises:
        StorageError: the batch, or every one, lacks the table.
    """
    batches = [check_batch_name(batch)] if batch else sorted(instance.get_dynamic_partitions("batch"))
    storage = open_storage(settings)
    partitions = [parts for name_of in batches for parts in table_partitions(settings, name, name_of)]
    frames = [
        storage.tables.read(name, Partition(*parts)).frame.select(*_labels(parts), pl.all().exclude("batch"))
        for parts in partitions
        if batch or storage.tables.has(name, Partition(*parts))
    ]
    if not frames:
        raise StorageError(f"no batch has {name} yet; run one with `qaq run FILE --batch NAME`")
    return pl.concat(frames)


def _labels(partition: tuple[str, ...]) -> list[pl.Expr]:
    return [pl.lit(value).alias(label) for label, value in zip(("batch", "model"), partition, strict=False)]


def table_partitions(settings: Settings, name: str, batch: str) -> list[tuple[str, ...]]:
    """The partitions of a table that belong to a batch."""
    return [partition.parts for partition in PIPELINE[name].partitions(batch, list(settings.models))]


def batch_status(settings: Settings, instance: dg.DagsterInstance) -> list[BatchStatus]:
    """Every registered batch with its tables, and how it stands."""
    storage = open_storage(settings)
    registered = instance.get_dynamic_partitions("batch")
    review = staleness.Review(storage, registered, present(settings, storage))
    outdated = {one.batch: one for batch in review.batches() for one in review.outdated(batch)[:1]}
    left_out = eligibility.sort_out(storage, registered, settings)[1]
    names = [*PIPELINE.tables_of_batch(Purpose.CURATION), *(["calibration"] if settings.is_calibrated else [])]
    return [
        BatchStatus(
            batch,
            {name: _table_status(settings, storage, name, batch) for name in names},
            left_out.get(batch),
            outdated.get(batch),
        )
        for batch in sorted(registered)
    ]


def batches_left_out(settings: Settings, instance: dg.DagsterInstance) -> dict[str, str]:
    """The registered batches that a publication would leave out now, and why."""
    registered = instance.get_dynamic_partitions("batch")
    return eligibility.sort_out(open_storage(settings), registered, settings)[1]


def refused_deliveries(settings: Settings) -> dict[str, str]:
    """What lies in the landing zone and was refused at the last look, and why."""
    return landing.read_refused(open_storage(settings))


def published_withdrawn(settings: Settings) -> list[str]:
    """Batches of the newest version of which something was withdrawn since they entered it."""
    return versions.published_withdrawn(open_storage(settings))


def kept_versions(settings: Settings) -> list[str]:
    """The versions of the dataset whose files are kept, the newest last."""
    return versions.kept_versions(open_storage(settings))


def dataset_folder(settings: Settings) -> str:
    """Where the versions of the dataset lie."""
    return open_storage(settings).files.url(versions.FOLDER)


def _table_status(settings: Settings, storage: Storage, name: str, batch: str) -> TableStatus:
    num_wanted = len(settings.models) if PIPELINE[name].has_models else 1
    try:
        partitions = table_partitions(settings, name, batch)
        rows = [
            storage.tables.read(name, Partition(*p)).frame.height
            for p in partitions
            if storage.tables.has(name, Partition(*p))
        ]
    except ValueError:  # A StorageError, or a name that the UI let pass.
        return TableStatus(None, 0, num_wanted, is_readable=False)
    return TableStatus(rows[0] if rows else None, len(rows), num_wanted)
