"""What every asset of a table shares: its partitions, its definition's metadata, and its result.

Belongs here: partitions definitions, columns and their lineage for the UI, and the step from a frame to a
materialisation.
Does not belong here: anything of one asset alone.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import AlertSettings
from qaq_pipeline.orchestration import alerts
from qaq_pipeline.orchestration.io_manager import partition_parts
from qaq_pipeline.orchestration.metadata import lineage_of_columns
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import Footer, StoredTable


def table_result(
    context: dg.AssetExecutionContext,
    frame: pl.DataFrame,
    inputs: Mapping[str, StoredTable],
    metadata: Mapping[str, Any],
    /,
    **provenance: Any,
) -> dg.MaterializeResult:
    """The materialisation of a table: the checked frame, its content version and its provenance.

    Raises:
        dg.Failure: the frame does not fit its schema, a fault of the code; nothing is written.
    """
    name = context.asset_key.path[-1]
    try:
        checked = tables.enforce(PIPELINE[name].table, frame)
    except tables.TableError as error:
        raise dg.Failure(f"{name}: {error}; nothing was written", allow_retries=False) from error
    table = StoredTable(checked, provenance_of(context, inputs, **provenance))
    return dg.MaterializeResult(
        value=table,
        data_version=dg.DataVersion(table.data_version),
        metadata={
            "dagster/row_count": checked.height,
            **metadata,
            **lineage_of_columns(name, inputs),
            "provenance": dg.JsonMetadataValue(table.provenance),
        },
    )


def provenance_of(
    context: dg.AssetExecutionContext, inputs: Mapping[str, StoredTable], /, **provenance: Any
) -> dict[str, Any]:
    """What makes a table what it is, run id and time apart: code, settings and the versions of its inputs."""
    name = context.asset_key.path[-1]
    return {
        "table": name,
        "partition": list(partition_parts(context.partition_key)),
        "code_version": context.assets_def.code_versions_by_key[context.asset_key],
        "inputs": {key: table.data_version for key, table in sorted(inputs.items())},
        **provenance,
    }


def require_inputs(
    name: str, table: StoredTable, current: Mapping[str, StoredTable], recorded: Mapping[str, str]
) -> None:
    """Refuse a table that was made from other data than that which now stands beside it.

    Args:
        name: what the table is called in the error.
        table: the table.
        current: the tables that it should have been made from, by the names in `recorded`.
        recorded: data versions of what it was made from.

    Raises:
        dg.Failure: a version differs; the text says what to materialise.
    """
    stale = [key for key, source in current.items() if recorded.get(key) != source.data_version]
    if stale:
        batch = table.provenance["partition"][0]
        raise dg.Failure(
            f"{name} of batch {batch} was made from another {', '.join(stale)} than the one stored now; "
            f"materialise {name.partition('|')[0]} of this batch first (or `qaq run` the batch again)",
            allow_retries=False,
        )


def stored_gate(gate: Gate | None) -> dict[str, Any]:
    """A gate's verdict as part of a table's provenance; nothing where the batch passed."""
    return {} if gate is None else {gates.PROVENANCE_KEY: gate.as_json()}


def footer_before(context: dg.AssetExecutionContext, storage: Storage) -> Footer | None:
    """What made the partition as it is stored, before it is made anew; None where it is not, or is torn."""
    try:
        return storage.tables.footer(context.asset_key.path[-1], Partition(context.partition_key))
    except StorageError:
        return None


def unless_same(
    context: dg.AssetExecutionContext, result: dg.MaterializeResult, before: Footer | None, tag: str, *ignored: str
) -> Iterator[dg.MaterializeResult]:
    """The materialisation; an observation instead where a run of that tag made what was there: then nothing follows.

    What was there counts only where its materialisation was recorded: a process may die between the two.

    Args:
        context: of the asset, which is one that may have no output (`output_required=False`).
        result: what was made.
        before: of `footer_before`.
        tag: runs with it ask whether something changed.
        ignored: parts of the provenance that may differ.
    """
    made = result.value
    assert isinstance(made, StoredTable)
    is_same = before is not None and (made.data_version, _without(made.provenance, ignored)) == (
        before.data_version,
        _without(before.provenance, ignored),
    )
    if tag not in context.run.tags or not is_same or _recorded_version(context) != made.data_version:
        yield result
        return
    context.log.info("%s of %s is as it was: nothing follows", context.asset_key.path[-1], context.partition_key)
    context.log_event(
        dg.AssetObservation(
            context.asset_key,
            partition=context.partition_key,
            description="Made anew, with the same result.",
            metadata=dict(result.metadata or {}),
        )
    )


def _recorded_version(context: dg.AssetExecutionContext) -> str | None:
    """Data version of the partition's newest materialisation."""
    wanted = dg.AssetRecordsFilter(context.asset_key, asset_partitions=[context.partition_key])
    records = context.instance.fetch_materializations(wanted, limit=1).records
    event = records[0].asset_materialization if records else None
    return None if event is None else (event.tags or {}).get("dagster/data_version")


def _without(provenance: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in provenance.items() if key not in ignored}


def is_new_verdict(gate: Gate | None, before: Footer | None) -> bool:
    """Whether a batch is gated otherwise than the partition says that was stored before."""
    return gate is not None and (before is None or gate != gates.of_provenance(before.provenance))


def report_gate(context: dg.AssetExecutionContext, settings: AlertSettings, gate: Gate | None, *, is_new: bool) -> None:
    """Log the verdict of a batch that goes no further, and alert of a new one."""
    if gate is None:
        return
    context.log.warning("batch %s is gated: %s", context.partition_key, gate.sentence)
    if is_new:
        alert = alerts.gated(context.partition_key, gate, context.run.run_id)
        for failure in alerts.send(alert, settings):
            context.log.error(failure)


def by_model(name: str, tables: Mapping[str, StoredTable]) -> dict[str, StoredTable]:
    """Tables of several models under names of their own, as provenance lists them."""
    return {f"{name}|{model}": table for model, table in tables.items()}
