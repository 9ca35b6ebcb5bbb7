"""Read a stored table of several batches as one frame, and write a frame to a file."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.partition import Partition, check_batch_name
from qaq_pipeline.storage.files import StorageError


def collect_table(deployment: Deployment, name: str, batch: str | None) -> pl.DataFrame:
    """A stored table of one batch, or of all, with the columns `batch` and, for a per-model table, `model`.

    Raises:
        StorageError: the batch lacks the table, or every batch does.
    """
    batches = [check_batch_name(batch)] if batch else sorted(deployment.batches)
    tables = deployment.storage.tables
    frames = [
        tables.read(name, partition).frame.select(*_labels(partition), pl.all().exclude("batch"))
        for one in batches
        for partition in deployment.partitions(name, one)
        if batch or tables.has(name, partition)
    ]
    if not frames:
        raise StorageError(f"no batch has {name} yet; run one with `qaq run FILE --batch NAME`")
    return pl.concat(frames)


def _labels(partition: Partition) -> list[pl.Expr]:
    return [pl.lit(value).alias(label) for label, value in zip(("batch", "model"), partition.parts, strict=False)]


def write_frame(frame: pl.DataFrame, to: Path) -> None:
    """Write a frame in the format that the file name ends with; CSV gets nested values as JSON.

    Raises:
        ValueError: the ending names no known format.
    """
    writers = {".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}
    if to.suffix in writers:
        writers[to.suffix](to)
    elif to.suffix == ".csv":
        nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
        as_json = [
            pl.Series(name, [json.dumps(value, default=list) for value in frame[name].to_list()], dtype=pl.String)
            for name in nested
        ]
        frame.with_columns(as_json).write_csv(to)
    else:
        raise ValueError(f"{to}: the ending says the format: .parquet, .csv or .jsonl")
