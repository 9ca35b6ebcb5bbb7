"""Withdrawn content in published versions. No Dagster.

Belongs here: which batches of a version hold something that was withdrawn after it was published. Does not belong here:
the record of withdrawals (`screening.withdrawals`).
"""

from __future__ import annotations

from qaq_pipeline.freshness.eligibility import signatures_if_withdrawn
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.versions import Published
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import withdrawals
from qaq_pipeline.storage.storage import Storage


def withdrawn_batches(storage: Storage, published: Published | None) -> list[str]:
    """Batches of a version of which something was withdrawn since they entered it; none if no files of it are kept.

    The former rows of a batch that was delivered or screened again are unknown: it is listed as soon as any text was
    withdrawn after the version was published.
    """
    if published is None or not versions.is_kept(storage, published.version):
        return []
    withdrawn, since = withdrawals.read(storage), withdrawals.read(storage, published.published_at)
    found = []
    for entry in versions.read_manifest(storage, published.version)["batches"]:
        batch = entry["batch"]
        concerned = withdrawn.of_batch(batch, signatures_if_withdrawn(storage, batch, withdrawn))
        screened = storage.tables.footer("screened_data", Partition(batch))
        is_same = screened.data_version == entry["data_versions"]["screened_data"]
        if is_same and screened.provenance.get("withdrawn", {}) == concerned:
            continue
        if concerned or (not is_same and since.contents):
            found.append(batch)
    return found
