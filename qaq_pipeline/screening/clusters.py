"""Near-duplicate clusters of a batch's rows, joined to those of older batches. No Dagster.

Belongs here: which rows are in one cluster, and its name. Does not belong here: which rows are similar (`duplicates`),
and what is held out (`held_out`).

A component is a set of the batch's rows that are linked to each other, directly or through others of the batch. Its
rows have one cluster: that of the oldest row of an older batch that is linked to any of them, or else a new one with
the place of their first row as its name. The clusters of older rows never change: where a component links two of them,
they stay two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.screening import duplicates
from qaq_pipeline.screening.duplicates import Found, Texts


@dataclass(frozen=True)
class Clusters:
    """The clusters of a batch's distinct rows."""

    rows: pl.DataFrame
    """Key, pair_id, component, cluster, place; in key order."""
    older: pl.DataFrame
    """component, place, status: the rows of older batches that are linked to a component, oldest first."""


def clusters(found: Found, older: Sequence[pl.DataFrame]) -> Clusters:
    """Find the cluster of each distinct row.

    Args:
        found: the distinct rows and their links.
        older: the older rows among them, with their status and cluster.
    """
    own = found.distinct.filter("is_own").select("order", *ROW_KEY, "pair_id", place=row_place())
    own = own.with_columns(component=_components(own["order"], found.links))
    linked = found.links.join(own.select("order", "component"), on="order").select("component", order="earlier")
    known = pl.concat([_KNOWN, *(frame.select(*ROW_KEY, "status", "cluster") for frame in older)])
    of_older = found.distinct.filter(~pl.col("is_own")).join(known, on=ROW_KEY, validate="1:1")
    joined = (
        linked.join(of_older.select("order", "status", "cluster", place=row_place()), on="order")
        .unique(["component", "order"])
        .sort("component", "order")
    )
    oldest = joined.unique("component", keep="first", maintain_order=True).select("component", "cluster")
    new = own.filter(pl.col("order") == pl.col("component")).select("component", new="place")
    rows = (
        own.join(oldest, on="component", how="left", maintain_order="left", validate="m:1")
        .join(new, on="component", maintain_order="left", validate="m:1")
        .select(*ROW_KEY, "pair_id", "component", "place", cluster=pl.coalesce("cluster", "new"))
    )
    return Clusters(rows, joined.select("component", "place", "status"))


def linked(
    own: Clusters,
    found: Found,
    signatures: pl.DataFrame,
    others: Sequence[pl.DataFrame],
    texts: Texts,
    threshold: float,
) -> pl.DataFrame:
    """Find the rows of other batches that are linked to each component, whichever came first: as `Clusters.older`.

    Args:
        own: the components of a batch.
        found: its distinct rows.
        signatures: of its rows.
        others: Signatures of other batches' distinct rows, with their status.
        texts: returns the texts of rows of all these batches.
        threshold: minimum Jaccard similarity of linked rows.
    """
    if not others:
        return own.older.clear()
    rows = signatures.join(found.distinct.filter("is_own"), on=ROW_KEY, how="semi")
    back = duplicates.find(rows, others, texts, None, threshold)
    places = back.distinct.select("order", "is_own", *ROW_KEY, place=row_place())
    ends = back.links.join(places, on="order").join(
        places.filter(~pl.col("is_own")).select(earlier="order", other="place"), on="earlier"
    )
    equal = back.duplicates.select(*ROW_KEY, other="duplicate_of")
    status = pl.concat(frame.select("status", other=row_place()) for frame in others)
    return (
        pl.concat([ends.select(*ROW_KEY, "other"), equal])
        .join(own.rows.select(*ROW_KEY, "component"), on=ROW_KEY)
        .join(status, on="other")
        .select("component", "status", place="other")
        .select(own.older.columns)
        .unique()
        .sort("component", "place")
    )


_KNOWN = pl.DataFrame(
    schema={
        "batch": pl.String,
        "source_file": pl.String,
        "source_row": pl.Int64,
        "turn_index": pl.Int64,
        "status": pl.String,
        "cluster": pl.String,
    }
)


def _components(own: pl.Series, links: pl.DataFrame) -> pl.Series:
    """Return, for each own row, the order of the first row of its component; links to older rows join nothing."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if own.is_empty():
        return own
    among_own = links.filter(pl.col("earlier") >= own[0])
    size = int(own[-1]) + 1
    places = (among_own["order"].to_numpy(), among_own["earlier"].to_numpy())
    graph = coo_array((np.ones(among_own.height, dtype=np.int8), places), shape=(size, size))
    labels = connected_components(graph, directed=False)[1]
    of_own = pl.DataFrame({"order": own, "label": labels[own.to_numpy()]})
    return of_own.select(pl.col("order").min().over("label")).to_series()
