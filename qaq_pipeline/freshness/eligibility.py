"""Which batches a publication takes now, and why it leaves out the others. No Dagster.

Belongs here: consistency of a batch's stored tables with each other, with the settings and with the withdrawals. Does
not belong here: what is published of a batch (`publication`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import ExportSettings, RankingSettings
from qaq_pipeline.pipeline import PIPELINE, Pipeline
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import batch_order, gates, withdrawals
from qaq_pipeline.screening.withdrawals import Withdrawals
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import Footer, empty

_SCREENED_FROM = ("raw_data", "signatures")
"""The tables that a screening reads of each batch."""


def split_by_eligibility(
    storage: Storage,
    registered: Collection[str],
    ranking: RankingSettings,
    selections: Sequence[Selection],
    export: ExportSettings,
    pipeline: Pipeline = PIPELINE,
    *,
    refuses_damage: bool = False,
) -> tuple[dict[str, dict[str, Footer]], dict[str, str]]:
    """Footers of the published tables of each eligible batch, and for every other registered batch the reason.

    Eligible batches are complete, consistent and current. Rows are read only to look for withdrawn texts.

    Raises:
        StorageError: with `refuses_damage`, a table of a batch cannot be read. Without, the batch is not eligible.
    """
    included, excluded = {}, {}
    broken = damaged(storage, registered, pipeline)
    whole = sorted(set(registered) - broken.keys())
    order = batch_order.batches_in_order(storage)
    comparable = comparable_batches(storage, order, whole)
    withdrawn = withdrawals.read(storage)
    named = ranking.reference
    reference_version = None if named is None else storage.tables.version("rank_reference", Partition(named.name))
    for batch in whole:
        if (missing := _missing(storage, batch, pipeline.published)) is not None:
            excluded[batch] = missing
            continue
        try:
            footers = {name: storage.tables.footer(name, Partition(batch)) for name in pipeline.published}
            screening = footers["screened_data"].provenance
            fault = (
                _inconsistency(footers)
                or _changed_selections(footers, selections, export)
                or _changed_ranking(footers, ranking, rank_reference.pool_of(batch, ranking, reference_version))
                or stale_screening(batch, screening, order, comparable)
                or changed_withdrawals(storage, batch, screening, withdrawn)
            )
        except StorageError as error:
            broken[batch] = str(error)
            continue
        if fault:
            excluded[batch] = fault
        else:
            included[batch] = footers
    if refuses_damage and broken:
        raise StorageError("; ".join(f"batch {batch}: {why}" for batch, why in broken.items()))
    return included, excluded | broken


def damaged(storage: Storage, registered: Collection[str], pipeline: Pipeline = PIPELINE) -> dict[str, str]:
    """The batches with a table that cannot be read, of those that a screening or a publication reads, and why.

    Changed bytes of rows are found when the rows are read.
    """
    found = {}
    names = dict.fromkeys((*_SCREENED_FROM, *pipeline.published))
    for batch in sorted(registered):
        stored = [name for name in names if _missing(storage, batch, [name]) is None]
        try:
            for name in stored:
                storage.tables.footer(name, Partition(batch))
        except StorageError as error:
            found[batch] = str(error)
    return found


def _missing(storage: Storage, batch: str, tables: Sequence[str]) -> str | None:
    """Why a batch has not all of these tables; None: it has."""
    try:
        partition = Partition(batch)
    except ValueError as error:  # A name that the UI let pass.
        return str(error)
    missing = [name for name in tables if not storage.tables.has(name, partition)]
    return f"not materialised: {', '.join(missing)}" if missing else None


def _inconsistency(footers: Mapping[str, Footer]) -> str | None:
    """The gate that a batch does not pass, or the first table that was made from another version of a stored one."""
    gate = gates.of_provenance(footers["decisions"].provenance)
    if gate is not None:
        return f"gated ({gate.reason.value}): {gate.sentence}"
    for name, footer in footers.items():
        inputs = footer.provenance.get("inputs", {})
        for source, stored in footers.items():
            if inputs.get(source, stored.data_version) != stored.data_version:
                return f"{name} is older than {source}; `qaq refresh` makes it again"
    return None


def _changed_selections(
    footers: Mapping[str, Footer], selections: Sequence[Selection], export: ExportSettings
) -> str | None:
    """The selection that has changed since the rows of a batch were decided."""
    decided, selection = footers["decisions"].provenance, footers["selected_subset"].provenance["selection"]
    published = selections[0]
    if selection != published.name:
        return f"selected by {selection}, not by {published.name}; `qaq refresh` selects again"
    if decided["published_hash"] != settings_hash(published):
        return f"decided under other settings of {published.name}; `qaq refresh` decides again"
    if export.selections != "published" and decided["settings_hash"] != settings_hash(selections):
        return "decided under other settings of the exported selections; `qaq refresh` decides again"
    return None


def _changed_ranking(footers: Mapping[str, Footer], ranking: RankingSettings, pool: str) -> str | None:
    """The pool, or the setting of ranks, that has changed since the rows of a batch were decided."""
    decided = footers["decisions"].provenance
    if decided["pool_id"] != pool:
        return f"ranked in the pool {decided['pool_id']}, not in {pool}; `qaq refresh` ranks it again"
    if decided["ranking_hash"] != settings_hash(ranking.without_pool()):
        return "ranked under other settings of ranking; `qaq refresh` ranks it again"
    return None


def comparable_batches(storage: Storage, batches: Sequence[str], registered: Collection[str]) -> dict[str, str]:
    """Data version of screened_data for each of these batches that newer batches are screened against.

    Such a batch is registered, its tables up to the screening are consistent, and no gate of screening or scoring
    stopped it.

    Raises:
        StorageError: a table of a batch cannot be read: without the batch, its rows would be accepted a second time.
    """
    found = {}
    for batch in batches:
        if batch not in registered:
            continue
        partition, stored = Partition(batch), storage.tables
        if not stored.has("screened_data", partition):
            continue
        screened = stored.footer("screened_data", partition)
        decided = stored.footer("decisions", partition).provenance if stored.has("decisions", partition) else None
        made_of = {name: stored.footer(name, partition).data_version for name in _SCREENED_FROM}
        gated = [gates.of_provenance(screened.provenance)]
        if decided is not None and decided["inputs"]["screened_data"] == screened.data_version:
            gated.append(gates.of_provenance(decided))
        if screened.provenance["inputs"] == made_of and not any(gated):
            found[batch] = screened.data_version
    return found


def stale_screening(
    batch: str, made_of: Mapping[str, Any], order: Sequence[str], comparable: Mapping[str, str]
) -> str | None:
    """Reason why a batch has to be screened again: the older batches with which it was compared have changed.

    If it stayed, rows could be published twice, or never: the row whose duplicates they were is gone.
    """
    if not made_of["across_batches"] or batch not in order:
        return None
    now = comparable_before(batch, order, comparable)
    differing = sorted(set(now.items()) ^ set(made_of["compared_with"].items()))
    if not differing:
        return None
    names = ", ".join(sorted({batch for batch, _ in differing}))
    return f"screened against another state of batch {names}; `qaq refresh` screens it again"


def comparable_before(batch: str, order: Sequence[str], comparable: Mapping[str, str]) -> dict[str, str]:
    """The comparable batches before a batch in the order; all of them if it has no place yet."""
    older = itertools.takewhile(lambda other: other != batch, order)
    return {other: comparable[other] for other in older if other in comparable}


def changed_withdrawals(storage: Storage, batch: str, made_of: Mapping[str, Any], withdrawn: Withdrawals) -> str | None:
    """Reason why a batch has to be screened again: its withdrawals, or those of its rows, have changed."""
    if withdrawn.of_batch(batch, signatures_if_withdrawn(storage, batch, withdrawn)) == made_of["withdrawn"]:
        return None
    return "withdrawals changed since it was screened; `qaq refresh` screens it again"


def signatures_if_withdrawn(storage: Storage, batch: str, withdrawn: Withdrawals) -> pl.DataFrame:
    """The hashes of a batch's rows if any row of any batch is withdrawn; else none: there is nothing to look for."""
    if not withdrawn.contents:
        return empty(tables.Signatures).select("content_hash")
    return storage.tables.read("signatures", Partition(batch)).select("content_hash")
