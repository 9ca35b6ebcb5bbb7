"""Which batches a publication takes now, and why it leaves out the others.

Belongs here: consistency of a batch's stored tables with each other, the settings and the withdrawals. Does not belong
here: what is published of a batch (`publication`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import batch_order, gates, withdrawals
from qaq_pipeline.screening.withdrawals import Withdrawals
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import Footer, empty


@dataclass(frozen=True)
class _Footers:
    """What made the tables of a batch that enter the dataset."""

    raw_data: Footer
    screened_data: Footer
    decisions: Footer
    selected_subset: Footer

    @property
    def versions(self) -> dict[str, str]:
        """Data versions by table, as a manifest's entry has them."""
        return {name: getattr(self, name).data_version for name in ENTERING}


ENTERING = PIPELINE.published


def sort_out(
    storage: Storage, registered: Sequence[str], settings: Settings
) -> tuple[dict[str, _Footers], dict[str, str]]:
    """The batches that are complete and consistent, and for every other registered one why it is left out.

    By the tables' footers alone: what a publication would do, without reading a row.
    """
    included, excluded = {}, {}
    order = batch_order.batches_in_order(storage)
    standing = standing_batches(storage, order, set(registered))
    withdrawn = withdrawals.read(storage)
    named = settings.ranking.reference
    reference_version = None if named is None else storage.tables.version("rank_reference", Partition(named.name))
    for batch in sorted(registered):
        try:
            footers = _read_footers(storage, batch)
            fault = (
                _inconsistency(footers, settings, rank_reference.pool_of(batch, settings.ranking, reference_version))
                or screened_otherwise(batch, footers.screened_data.provenance, order, standing)
                or not_withdrawn(storage, batch, footers.screened_data.provenance, withdrawn)
            )
        except ValueError as error:  # A name that the UI let pass, or a StorageError.
            excluded[batch] = str(error)
            continue
        if fault:
            excluded[batch] = fault
        else:
            included[batch] = footers
    return included, excluded


def _read_footers(storage: Storage, batch: str) -> _Footers:
    missing = [name for name in ENTERING if not storage.tables.has(name, Partition(batch))]
    if missing:
        raise StorageError(f"not materialised: {', '.join(missing)}")
    return _Footers(*(storage.tables.footer(name, Partition(batch)) for name in ENTERING))


def _inconsistency(tables: _Footers, settings: Settings, pool: str) -> str | None:
    decided, selected = tables.decisions.provenance, tables.selected_subset.provenance
    gate = gates.of_provenance(decided)
    if gate is not None:
        return f"gated ({gate.reason.value}): {gate.sentence}"
    if selected["inputs"]["decisions"] != tables.decisions.data_version:
        return "selected_subset is older than decisions; materialise it"
    for name, table in (("raw_data", tables.raw_data), ("screened_data", tables.screened_data)):
        if decided["inputs"][name] != table.data_version:
            return f"decisions are older than {name}; materialise the batch"
    return _decided_otherwise(decided, selected["selection"], settings, pool)


def _decided_otherwise(decided: Mapping[str, Any], selection: str, settings: Settings, pool: str) -> str | None:
    """Whether a batch was selected from or ranked under other settings, or in another pool, than are in force now."""
    if selection != settings.published.name:
        return f"selected by {selection}, not by {settings.published.name}; `qaq refresh` selects again"
    if decided["published_hash"] != settings_hash(settings.published):
        return f"decided under other settings of {settings.published.name}; `qaq refresh` decides again"
    if settings.export.selections != "published" and decided["settings_hash"] != settings_hash(settings.selections):
        return "decided under other settings of the exported selections; `qaq refresh` decides again"
    if decided.get("pool_id") != pool:
        return f"ranked in the pool {decided.get('pool_id')}, not in {pool}; `qaq refresh` ranks it again"
    if decided.get("ranking_hash") != settings_hash(settings.ranking.without_pool()):
        return "ranked under other settings of ranking; `qaq refresh` ranks it again"
    return None


def standing_batches(storage: Storage, batches: Sequence[str], registered: Set[str]) -> dict[str, str]:
    """Of these batches those whose rows may stand for others, with the data version of their screened_data.

    They are registered, their tables up to the screening go together, and neither screening nor scoring gated them.
    """
    found = {}
    for batch in batches:
        if batch not in registered:
            continue
        try:
            signed, screened = (
                storage.tables.footer(name, Partition(batch)) for name in ("signatures", "screened_data")
            )
            decisions = (
                storage.tables.footer("decisions", Partition(batch))
                if storage.tables.has("decisions", Partition(batch))
                else None
            )
        except StorageError:
            continue
        is_current = screened.provenance["inputs"] == {
            "raw_data": storage.tables.version("raw_data", Partition(batch)),
            "signatures": signed.data_version,
        }
        gated = [gates.of_provenance(screened.provenance)]
        if decisions is not None and decisions.provenance["inputs"]["screened_data"] == screened.data_version:
            gated.append(gates.of_provenance(decisions.provenance))
        if is_current and not any(gated):
            found[batch] = screened.data_version
    return found


def screened_otherwise(
    batch: str, made_of: Mapping[str, Any], order: Sequence[str], standing: Mapping[str, str]
) -> str | None:
    """Whether a batch's duplicates were looked for in other older batches than those that stand now.

    Otherwise rows could be published twice, or nowhere: the row that stood for them is gone.
    """
    if "compared_with" not in made_of:
        return "screened by an older version; `qaq refresh` screens it again"
    if not made_of["across_batches"] or batch not in order:
        return None
    before = order[: order.index(batch)]
    now = {batch: standing[batch] for batch in before if batch in standing}
    differing = sorted(set(now.items()) ^ set(made_of["compared_with"].items()))
    if not differing:
        return None
    names = ", ".join(sorted({batch for batch, _ in differing}))
    return f"screened against another state of batch {names}; `qaq refresh` screens it again"


def not_withdrawn(storage: Storage, batch: str, made_of: Mapping[str, Any], withdrawn: Withdrawals) -> str | None:
    """Whether something of a batch was withdrawn, or is so no longer, since it was screened."""
    if withdrawn.of_batch(batch, signatures_if_withdrawn(storage, batch, withdrawn)) == made_of.get("withdrawn", {}):
        return None
    return "withdrawals changed since it was screened; `qaq refresh` screens it again"


def signatures_if_withdrawn(storage: Storage, batch: str, withdrawn: Withdrawals) -> pl.DataFrame:
    """Of the batch, where a row of any batch was withdrawn; else there is nothing to look for."""
    return storage.tables.read("signatures", Partition(batch)).frame if withdrawn.contents else empty(tables.Signatures)
