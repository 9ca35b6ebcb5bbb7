"""The step from a frame to the materialisation of a stored table, with its provenance.

Belongs here: the result of an asset, the repeat of a result that changed nothing, and the tags of runs that ask for it.
Does not belong here: how a table is written (`io_manager`), and metadata for people (`metadata`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
import polars as pl

from qaq_pipeline.orchestration.metadata import lineage_of_columns, version_of
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable, TableWriter
from qaq_pipeline.storage.tables import Footer

LANDED_TAG = "qaq/delivery"
"""Tag of the runs that the landing zone's sensor asks for; its value is the delivery's name there."""

RESCREENING_TAG = "qaq/rescreening"
"""Tag of runs that screen a batch again because an older one has changed."""


def table_result(
    context: dg.AssetExecutionContext,
    rows: pl.DataFrame | TableWriter,
    inputs: Mapping[str, StoredTable],
    metadata: Mapping[str, Any],
    /,
    **provenance: Any,
) -> dg.MaterializeResult:
    """The materialisation of a table: the checked rows, their content version and their provenance.

    Raises:
        TableError: the rows do not fit their schema, a fault of the code; nothing is written.
    """
    name, made_of = context.asset_key.path[-1], provenance_of(context, inputs, **provenance)
    if isinstance(rows, TableWriter):
        table = rows.finish(made_of)
    else:
        try:
            table = StoredTable(tables.enforce(PIPELINE[name].table, rows), made_of)
        except tables.TableError as error:
            raise tables.TableError(f"{name}: {error}; nothing was written") from error
    described = describe(name, table, metadata)
    return dg.MaterializeResult(value=table, data_version=dg.DataVersion(table.data_version), metadata=described)


def describe(name: str, table: StoredTable, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a table's materialisation: these, its rows, the lineage of its columns, and its provenance."""
    return {
        "dagster/row_count": table.num_rows,
        **metadata,
        **lineage_of_columns(name, table.provenance["inputs"]),
        "provenance": dg.JsonMetadataValue(table.provenance),
    }


def provenance_of(
    context: dg.AssetExecutionContext, inputs: Mapping[str, StoredTable], /, **provenance: Any
) -> dict[str, Any]:
    """The code version, partition and input versions of a table, with these facts; no run id and no time."""
    return {
        "table": context.asset_key.path[-1],
        "partition": list(Partition.parse(context.partition_key).parts),
        "code_version": version_of(context),
        "inputs": {key: table.data_version for key, table in sorted(inputs.items())},
        **provenance,
    }


def footer_before(context: dg.AssetExecutionContext, storage: Storage) -> Footer | None:
    """The footer of the partition before it is made again; None where it is not stored, or is torn."""
    return storage.tables.readable_footer(context.asset_key.path[-1], Partition.parse(context.partition_key))


def unless_same(
    context: dg.AssetExecutionContext, result: dg.MaterializeResult, before: Footer | None, tag: str, *ignored: str
) -> Iterator[dg.MaterializeResult]:
    """The materialisation; an observation instead where a run with the tag made what was stored: then nothing follows.

    What was stored counts only where its materialisation was recorded: a process may die between the two.

    Args:
        context: of an asset that may have no output (`output_required=False`).
        result: the new materialisation.
        before: from `footer_before`.
        tag: runs with it ask whether something changed.
        ignored: parts of the provenance that may differ.
    """
    made = result.value
    assert isinstance(made, StoredTable)
    is_same = before is not None and _differing(made, before) <= set(ignored)
    if tag not in context.run.tags or not is_same or _recorded_version(context) != made.data_version:
        yield result
        return
    context.log.info("%s of %s is unchanged: nothing follows", context.asset_key.path[-1], context.partition_key)
    context.log_event(
        dg.AssetObservation(
            context.asset_key,
            partition=context.partition_key,
            description="Made again, with the same result.",
            metadata=dict(result.metadata or {}),
        )
    )


def _recorded_version(context: dg.AssetExecutionContext) -> str | None:
    """Data version of the partition's newest materialisation."""
    newest = newest_materialisation(context.instance, context.asset_key, context.partition_key)
    return None if newest is None else newest.data_version


@dataclass(frozen=True, slots=True)
class Recorded:
    """A materialisation in Dagster's event log."""

    data_version: str | None
    code_version: str | None
    metadata: dict[str, Any]


def newest_materialisation(instance: dg.DagsterInstance, asset: dg.AssetKey, partition: str | None) -> Recorded | None:
    """The newest materialisation of an asset, or of a partition of it; None: there is none."""
    wanted = dg.AssetRecordsFilter(asset, asset_partitions=None if partition is None else [partition])
    for record in instance.fetch_materializations(wanted, limit=1).records:
        if (event := record.asset_materialization) is not None:
            metadata = {name: value.value for name, value in event.metadata.items()}
            tags = event.tags or {}
            return Recorded(tags.get("dagster/data_version"), tags.get("dagster/code_version"), metadata)
    return None


def _differing(made: StoredTable, before: Footer) -> set[str]:
    """The parts of the provenance that differ, and the data version where it does."""
    new = {**made.provenance, "data_version": made.data_version}
    old = {**before.provenance, "data_version": before.data_version}
    return {key for key in new | old if new.get(key) != old.get(key)}
