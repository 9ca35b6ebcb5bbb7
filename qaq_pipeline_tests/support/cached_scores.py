"""What the score cache holds, file by file."""

from __future__ import annotations

import polars as pl

from qaq_pipeline.storage.storage import Storage


def quantities_in(storage: Storage) -> pl.DataFrame:
    """A row for each score in a file of the cache: pair_id, quantity, model (digest of the identity)."""
    found = [
        storage.files.read_frame(
            *storage.scores.place(digest, *name.split("/")), columns=["pair_id", "quantity"]
        ).with_columns(model=pl.lit(digest))
        for digest in storage.files.names("score_cache")
        for name in storage.scores.names(digest)
    ]
    return pl.concat(found)
