"""Checks that stored tables were made from each other, by the data versions in their provenance.

Does not belong here: which tables an asset reads (`pipeline`), and stale tables (`freshness`).
"""

from __future__ import annotations

from collections.abc import Mapping

from qaq_pipeline.schema.partition import Input
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import Footer


class OriginError(ValueError):
    """Stored tables do not belong together. The text names them and what to materialise."""


def by_model(name: str, tables: Mapping[str, StoredTable]) -> dict[str, StoredTable]:
    """The tables of several models under the names that provenance gives to inputs."""
    return {str(Input(name, model)): table for model, table in tables.items()}


def require_inputs(
    name: str,
    table: StoredTable,
    current: Mapping[str, StoredTable | Footer],
    recorded: Mapping[str, str] | None = None,
) -> None:
    """Refuse a table that was made from other data than what is stored now.

    Args:
        name: name of the table in the error.
        table: the table.
        current: the tables that it should have been made from, or their footers.
        recorded: data versions of what it was made from; by default the inputs in its provenance.

    Raises:
        OriginError: a version differs.
    """
    recorded = table.provenance["inputs"] if recorded is None else recorded
    stale = [key for key, source in current.items() if recorded.get(key) != source.data_version]
    if stale:
        raise OriginError(
            f"{name} of batch {batch_of(table)} was made from another {', '.join(stale)} than is stored now; "
            f"materialise {Input.parse(name).table} of this batch first (or `qaq run` the batch again)"
        )


def batch_of(table: StoredTable) -> str:
    """Name of the batch whose table this is."""
    return table.provenance["partition"][0]
