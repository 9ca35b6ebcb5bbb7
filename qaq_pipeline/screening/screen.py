"""Screening of rows before any GPU time is spent: which rows are scored, and why the others are not.

Belongs here: the order of the verdicts, and which rows may represent duplicates. Does not belong here: detection
of duplicates (`duplicates`) and of benchmark text (`contamination`), held-out rows (`held_out`), parsing of records, or
scores.

Verdicts have this priority: rejected, withdrawn, contaminated, duplicate, held out or between. Duplicates are searched
for among the remaining rows, so that a representative can itself be selected, unless it is held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl

from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY, by_key, may_be_in
from qaq_pipeline.schema.tables import dtypes
from qaq_pipeline.schema.vocabularies import Status, WithdrawalReason
from qaq_pipeline.screening import duplicates, forbidden, held_out, shingles
from qaq_pipeline.screening.clusters import clusters, linked
from qaq_pipeline.screening.duplicates import Texts
from qaq_pipeline.screening.held_out import NOTHING_HELD_OUT, HoldOut
from qaq_pipeline.storage.stored_table import StoredTable, with_own_bytes


def screen(
    raw: pl.DataFrame,
    signatures: StoredTable,
    contamination: pl.DataFrame,
    gone: pl.DataFrame,
    older: Sequence[pl.DataFrame],
    texts: Texts,
    settings: ScreeningSettings,
    hold_out: HoldOut = NOTHING_HELD_OUT,
) -> pl.DataFrame:
    """Build the ScreenedData of a batch, in key order; `batch_gate` is null.

    Args:
        raw: key, pair_id, status, reason and detail of RawData.
        signatures: Signatures of its accepted rows.
        contamination: its rows that contain benchmark tasks.
        gone: its rows that must not be published, each with the reason: the first one of a row counts.
        older: Signatures of older batches' distinct rows, with their status and cluster, oldest first.
        texts: returns the texts of rows of all these batches.
        settings: which checks run, and what happens to contaminated rows.
        hold_out: which rows are held out.
    """
    gone = gone.unique(ROW_KEY, keep="first", maintain_order=True)
    held = _held(contamination).join(gone, on=ROW_KEY, how="anti")
    is_dropped = settings.contamination.action == "drop"
    left_out = pl.concat([frame.select(ROW_KEY) for frame in ((gone, held) if is_dropped else (gone,))])
    limits = settings.duplicates
    own = _without(signatures, left_out)
    found = duplicates.find(own, older, texts, limits.near_threshold, limits.cluster_threshold)
    del own  # The bands of all rows, which nobody reads any more unless newer batches are compared.
    own_clusters = clusters(found, older)
    newer = own_clusters.older.clear()
    if hold_out.newer:
        own = _without(signatures, left_out)
        newer = linked(own_clusters, found, own, hold_out.newer, texts, limits.cluster_threshold)
    sides = held_out.sides(own_clusters, newer, hold_out)
    not_trained = sides.filter(pl.col("status") != Status.ACCEPTED.value).drop("cluster")
    by_priority = (
        (gone, Status.WITHDRAWN),
        (_with_flag(found.duplicates, held), Status.DUPLICATE),
        (_with_flag(not_trained, held), None),
        (held, Status.CONTAMINATED if is_dropped else Status.ACCEPTED),
    )
    verdicts = pl.concat(
        [frame if status is None else frame.with_columns(status=pl.lit(status.value)) for frame, status in by_priority],
        how="diagonal",
    ).unique(ROW_KEY, keep="first", maintain_order=True)
    has_verdict = pl.col("status_found").is_not_null()
    screened = (
        raw.select(*ROW_KEY, "pair_id", "status", "reason", evidence="detail")
        .join(verdicts, on=ROW_KEY, how="left", maintain_order="left", validate="1:1", suffix="_found")
        .with_columns(
            pl.when(has_verdict).then(f"{name}_found").otherwise(name).alias(name)
            for name in ("status", "reason", "evidence")
        )
        .join(sides.select(*ROW_KEY, "cluster"), on=ROW_KEY, how="left", maintain_order="left", validate="1:1")
        .with_columns(batch_gate=pl.lit(None, pl.String))
    )
    return by_key(screened.select(list(dtypes(tables.ScreenedData))))


def _without(signatures: StoredTable, left_out: pl.DataFrame) -> pl.DataFrame:
    """What is compared of the rows, without those that are left out."""
    parts = signatures.parts(*duplicates.COMPARED)
    kept = [part.join(may_be_in(left_out, part), on=ROW_KEY, how="anti", maintain_order="left") for part in parts]
    return pl.concat(kept) if kept else signatures.select(*duplicates.COMPARED)


def _with_flag(verdicts: pl.DataFrame, contaminated: pl.DataFrame) -> pl.DataFrame:
    """Add to the evidence what a row contains of a benchmark."""
    flagged = contaminated.select(*ROW_KEY, flagged="evidence")
    flag = pl.format("flagged: it contains {}", "flagged")
    return verdicts.join(flagged, on=ROW_KEY, how="left", validate="1:1").with_columns(
        evidence=pl.concat_str("evidence", flag, separator="; ", ignore_nulls=True)
    )


def screen_alone(raw: pl.DataFrame, settings: ScreeningSettings, hold_out: HoldOut = NOTHING_HELD_OUT) -> pl.DataFrame:
    """Build the ScreenedData of a batch alone, without older batches and benchmarks.

    Args:
        raw: RawData.
        settings: which checks run.
        hold_out: which rows are held out.
    """
    signatures, nothing = StoredTable(duplicates.signatures(raw)), pl.DataFrame(schema=dtypes(tables.Contamination))
    texts, gone = texts_of([StoredTable(raw)]), forbidden.find(raw, settings)
    return screen(raw, signatures, nothing, gone, [], texts, settings, hold_out)


def texts_of(raws: Iterable[StoredTable]) -> Texts:
    """Return a function that looks up texts in these batches' raw_data. It reads each table once."""
    tables_of_texts = list(raws)

    def of_rows(rows: pl.DataFrame) -> Iterator[pl.DataFrame]:
        num_found = 0
        for table in tables_of_texts:
            for part in table.parts(*ROW_KEY, "query", "answer", "language"):
                found = part.join(may_be_in(rows, part), on=ROW_KEY, validate="1:1")
                num_found += found.height
                compared = found.select("order", "query", "answer", "language", text=shingles.pair_text())
                yield with_own_bytes(compared)
        if num_found < rows.height:
            raise ValueError(f"{rows.height - num_found} rows to compare are not in raw_data; screen the batch again")

    return of_rows


def withdrawn_rows(signatures: pl.DataFrame, withdrawn: Mapping[str, str]) -> pl.DataFrame:
    """Key, evidence and reason of the rows whose content hash is withdrawn."""
    why = pl.col("content_hash").replace_strict(withdrawn, default=None, return_dtype=pl.String)
    rows = signatures.select(*ROW_KEY, evidence=why)
    return rows.drop_nulls("evidence").with_columns(reason=pl.lit(WithdrawalReason.ROW_WITHDRAWN.value))


def _held(contamination: pl.DataFrame) -> pl.DataFrame:
    """Describe, for each contaminated row, the benchmark with the highest share."""
    most = contamination.sort(*ROW_KEY, "share", "benchmark", descending=[False] * 4 + [True, False])
    what = pl.col("reason").str.strip_prefix("benchmark_")
    return most.unique(ROW_KEY, keep="first", maintain_order=True).select(
        *ROW_KEY,
        "reason",
        similarity="share",
        evidence=pl.format(
            "{} of the word sequences of the {} of task {} of {}, including: {}",
            (pl.col("share") * 100).round(0).cast(pl.Int64).cast(pl.String) + "%",
            what,
            "task",
            "benchmark",
            "matched_text",
        ),
    )
