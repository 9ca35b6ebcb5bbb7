"""The rows that are held out for training trials: whole clusters, so that no held-out row has a twin in training.

Belongs here: the side of each row. Does not belong here: the clusters (`clusters`), and the reading of what was decided
before (`screen_batch`).

A row has one of three sides: it is trained on (accepted), it is held out, or it is between, in neither. The rows of a
component follow the rows of older batches that are linked to it; where these are on both sides, or one of them is
between, the component is between. Where none is, the draw of the cluster's name decides. A pair that was on a side when
its batch was screened before stays there, and the new rows of its component follow it like an older row. So they follow
the rows of newer batches that are on a side: an older batch may be delivered again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from qaq_pipeline.config.settings import HeldOutSettings
from qaq_pipeline.schema.draws import draws
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.schema.tables import DISTINCT
from qaq_pipeline.schema.vocabularies import HoldOutReason, Status
from qaq_pipeline.screening.clusters import Clusters

_ACCEPTED, _HELD_OUT, _BETWEEN = DISTINCT

_NOTHING_BEFORE = pl.DataFrame(schema={"pair_id": pl.String, "before": pl.String})


@dataclass(frozen=True)
class HoldOut:
    """The settings, and the sides of the batch's pairs when it was screened before."""

    settings: HeldOutSettings = field(default_factory=HeldOutSettings)
    before: pl.DataFrame | None = None
    """Of `sides_before`; None: it was not."""
    newer: Sequence[pl.DataFrame] = ()
    """Signatures of newer batches' rows that are on a side, with their status."""


NOTHING_HELD_OUT = HoldOut()


def sides_before(screened: pl.DataFrame) -> pl.DataFrame:
    """Return the sides of a batch's pairs in its ScreenedData: pair_id and `before`, accepted or held_out.

    A duplicate of a row of the batch has its side: it may have to stand for that row. Rows that were between have none.
    """
    kept = screened.filter(pl.col("status").is_in([_ACCEPTED, _HELD_OUT])).select(
        "pair_id", before="status", place=row_place()
    )
    duplicates = screened.filter(pl.col("status") == Status.DUPLICATE.value)
    followers = duplicates.join(kept.drop("pair_id"), left_on="duplicate_of", right_on="place")
    both = pl.concat([kept.select("pair_id", "before"), followers.select("pair_id", "before")])
    return both.sort("pair_id", "before").unique("pair_id", keep="first", maintain_order=True)


def sides(found: Clusters, newer: pl.DataFrame, hold_out: HoldOut) -> pl.DataFrame:
    """Decide the side of each distinct row: key, cluster, status, reason, evidence; the last two null if accepted.

    Args:
        found: the clusters.
        newer: the rows of newer batches that are linked to a component (`clusters.linked`).
        hold_out: the settings, and what was decided before.
    """
    before = _NOTHING_BEFORE if hold_out.before is None else hold_out.before
    rows = found.rows.join(before, on="pair_id", how="left", maintain_order="left", validate="m:1")
    settings, nothing = hold_out.settings, pl.lit(None, pl.String)
    if not settings.share:
        return rows.select(*ROW_KEY, "cluster", status=pl.lit(_ACCEPTED), reason=nothing, evidence=nothing)
    own = rows.drop_nulls("before").select("component", "place", status="before")
    return (
        rows.with_columns(
            is_drawn=draws(rows["cluster"], settings.seed) < settings.share,
            is_new=~pl.col("component").is_in(found.older["component"].unique().implode()),
        )
        .join(_first_of_each_side([found.older, newer, own]), on="component", how="left", validate="m:1")
        .with_columns(status=pl.coalesce("before", _side()))
        .with_columns(reason=_reason())
        .select(*ROW_KEY, "cluster", "status", "reason", evidence=_evidence(settings))
    )


def _first_of_each_side(known: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Find the first row of each component on each side: component, and `row_<status>`, its place."""
    of_component = pl.concat(known).group_by("component", maintain_order=True)
    return of_component.agg(
        pl.col("place").filter(pl.col("status") == side).first().alias(f"row_{side}") for side in DISTINCT
    )


def _side() -> pl.Expr:
    """The side of a component's rows: that of the known rows, between if these are on several, else by the draw."""
    has_accepted, has_held_out, has_between = (pl.col(f"row_{side}").is_not_null() for side in DISTINCT)
    return (
        pl.when(has_between | (has_accepted & has_held_out))
        .then(pl.lit(_BETWEEN))
        .when(has_held_out | (pl.col("is_drawn") & ~has_accepted))
        .then(pl.lit(_HELD_OUT))
        .otherwise(pl.lit(_ACCEPTED))
    )


def _reason() -> pl.Expr:
    """The draw is the reason wherever it holds out a new cluster, so that it stays the reason on the next screening."""
    return (
        pl.when(pl.col("status") == _BETWEEN)
        .then(pl.lit(HoldOutReason.SIMILAR_TO_BOTH.value))
        .when((pl.col("status") == _HELD_OUT) & pl.col("is_drawn") & pl.col("is_new"))
        .then(pl.lit(HoldOutReason.CLUSTER_DRAWN.value))
        .when(pl.col("status") == _HELD_OUT)
        .then(pl.lit(HoldOutReason.SIMILAR_TO_HELD_OUT.value))
    )


def _evidence(settings: HeldOutSettings) -> pl.Expr:
    """The evidence of each reason, in words."""
    accepted, held_out, between = (pl.col(f"row_{side}") for side in DISTINCT)
    drawn = f"its cluster {{}} is drawn (held_out.share {settings.share:g}, seed {settings.seed})"
    both = "its cluster contains the row {}, which is trained on, and the held-out row {}"
    reason = pl.col("reason")
    return (
        pl.when(reason == HoldOutReason.CLUSTER_DRAWN.value)
        .then(pl.format(drawn, "cluster"))
        .when((reason == HoldOutReason.SIMILAR_TO_HELD_OUT.value) & (held_out == pl.col("place")))
        .then(pl.lit("it was held out before"))
        .when(reason == HoldOutReason.SIMILAR_TO_HELD_OUT.value)
        .then(pl.format("its cluster contains the held-out row {}", held_out))
        .when((reason == HoldOutReason.SIMILAR_TO_BOTH.value) & between.is_not_null())
        .then(pl.format("its cluster contains the row {}, which is in neither", between))
        .when(reason == HoldOutReason.SIMILAR_TO_BOTH.value)
        .then(pl.format(both, accepted, held_out))
    )
