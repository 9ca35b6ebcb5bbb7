"""Screening of rows before any GPU time is spent: which rows are scored, and why the others are not.

Belongs here: the order of the verdicts, and which rows may represent duplicates. Does not belong here: detection
of duplicates (`duplicates`) and of benchmark text (`contamination`), held-out rows (`held_out`), parsing of records, or
scores.

Verdicts have this priority: rejected, withdrawn, contaminated, duplicate, held out or between. Duplicates are searched
for among the remaining rows, so that a representative can itself be selected, unless it is held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import dtypes
from qaq_pipeline.schema.vocabularies import Status, WithdrawalReason
from qaq_pipeline.screening import duplicates, forbidden, held_out, shingles
from qaq_pipeline.screening.clusters import clusters, linked
from qaq_pipeline.screening.duplicates import Texts
from qaq_pipeline.screening.held_out import NOTHING_HELD_OUT, HoldOut


def screen(
    raw: pl.DataFrame,
    signatures: pl.DataFrame,
    contamination: pl.DataFrame,
    older: Sequence[pl.DataFrame],
    texts: Texts,
    settings: ScreeningSettings,
    withdrawn: Mapping[str, str],
    hold_out: HoldOut = NOTHING_HELD_OUT,
) -> pl.DataFrame:
    """Build the ScreenedData of a batch, in key order; `batch_gate` is null.

    Args:
        raw: RawData.
        signatures: Signatures of its accepted rows.
        contamination: its rows that contain benchmark tasks.
        older: Signatures of older batches' distinct rows, with their status and cluster, oldest first.
        texts: returns the texts of rows of all these batches.
        settings: which checks run, and what happens to contaminated rows.
        withdrawn: content hashes of rows that must not be published, each with the reason.
        hold_out: which rows are held out.
    """
    gone = pl.concat([_withdrawn(signatures, withdrawn), forbidden.find(raw, settings)]).unique(
        ROW_KEY, keep="first", maintain_order=True
    )
    held = _held(contamination).join(gone, on=ROW_KEY, how="anti")
    is_dropped = settings.contamination.action == "drop"
    own = signatures.join(gone, on=ROW_KEY, how="anti")
    own = own.join(held, on=ROW_KEY, how="anti") if is_dropped else own
    limits = settings.duplicates
    found = duplicates.find(own, older, texts, limits.near_threshold, limits.cluster_threshold)
    own_clusters = clusters(found, older)
    newer = linked(own_clusters, found, hold_out.newer, texts, limits.cluster_threshold)
    sides = held_out.sides(own_clusters, newer, hold_out)
    not_trained = sides.filter(pl.col("status") != Status.ACCEPTED.value).drop("cluster")
    by_priority = (
        (gone, Status.WITHDRAWN),
        (_with_flag(found.duplicates, held), Status.DUPLICATE),
        (_with_flag(not_trained, held), None),
        (held, Status.CONTAMINATED if is_dropped else Status.ACCEPTED),
        (raw.select(*ROW_KEY, "status", "reason", evidence="detail"), None),
    )
    verdicts = pl.concat(
        [frame if status is None else frame.with_columns(status=pl.lit(status.value)) for frame, status in by_priority],
        how="diagonal",
    ).unique(ROW_KEY, keep="first", maintain_order=True)
    rows = raw.select(*ROW_KEY, "pair_id", batch_gate=pl.lit(None, pl.String))
    screened = rows.join(verdicts, on=ROW_KEY, validate="1:1").join(
        sides.select(*ROW_KEY, "cluster"), on=ROW_KEY, how="left", validate="1:1"
    )
    return screened.sort(ROW_KEY).select(list(dtypes(tables.ScreenedData)))


def _with_flag(verdicts: pl.DataFrame, contaminated: pl.DataFrame) -> pl.DataFrame:
    """Add to the evidence what a row contains of a benchmark."""
    flagged = contaminated.select(*ROW_KEY, flagged="evidence")
    flag = pl.format("flagged: it contains {}", "flagged")
    return verdicts.join(flagged, on=ROW_KEY, how="left", validate="1:1").with_columns(
        evidence=pl.concat_str("evidence", flag, separator="; ", ignore_nulls=True)
    )


def screen_alone(raw: pl.DataFrame, settings: ScreeningSettings) -> pl.DataFrame:
    """Build the ScreenedData of a batch alone, without older batches and benchmarks."""
    nothing = pl.DataFrame(schema=dtypes(tables.Contamination))
    return screen(raw, duplicates.signatures(raw), nothing, [], texts_of([raw]), settings, {})


def texts_of(raws: Iterable[pl.DataFrame]) -> Texts:
    """Return a function that looks up texts in these batches' RawData."""
    texts = pl.concat([raw.select(*ROW_KEY, shingles.pair_text().alias("text"), "answer", "language") for raw in raws])

    def of_rows(rows: pl.DataFrame) -> pl.DataFrame:
        found = rows.join(texts, on=ROW_KEY, how="left", maintain_order="left", validate="1:1")
        if missing := found["text"].null_count():
            raise ValueError(f"{missing} rows to compare are not in raw_data; screen the batch again")
        return found

    return of_rows


def _withdrawn(signatures: pl.DataFrame, withdrawn: Mapping[str, str]) -> pl.DataFrame:
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
