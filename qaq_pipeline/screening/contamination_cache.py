"""Contamination found in a batch, cached by benchmark, so that a longer list checks only the new ones.

contamination/<batch>/<key>.parquet
"""

from __future__ import annotations

import logging

import polars as pl

from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.schema.tables import Contamination, TableError, enforce
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.storage import Storage

logger = logging.getLogger(__name__)

_FOLDER = "contamination"


def read_contamination(storage: Storage, batch: str, key: str) -> pl.DataFrame | None:
    """Read the contamination cached under a key; None if it is absent or unreadable."""
    parts = (_FOLDER, check_batch_name(batch), f"{key}.parquet")
    if not storage.files.exists(*parts):
        return None
    try:
        return enforce(Contamination, parquet_file.decode(storage.files.read_bytes(*parts)))
    except (*parquet_file.UNREADABLE, TableError) as error:
        logger.warning("%s: cannot be read (%s); the batch is checked again", storage.files.url(*parts), error)
        return None


def write_contamination(storage: Storage, found: pl.DataFrame, batch: str, key: str) -> None:
    """Cache the contamination found, under a key."""
    data = parquet_file.encode(enforce(Contamination, found), {})
    storage.files.write_bytes(data, _FOLDER, check_batch_name(batch), f"{key}.parquet")
