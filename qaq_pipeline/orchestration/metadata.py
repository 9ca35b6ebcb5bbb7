"""Metadata that the UI shows about an asset: definition, columns and their lineage, plots.

Does not belong here: numbers about one table (`reports.table_numbers`).
"""

import base64
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import dataframely as dy

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.failures import guarded
from qaq_pipeline.orchestration.partitions import of_all_batches, partitions_of
from qaq_pipeline.pipeline import PIPELINE, Partitioning
from qaq_pipeline.reports import plots
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.schema import column_lineage
from qaq_pipeline.schema.partition import Input
from qaq_pipeline.screening.gates import Gate

_HOLDS_TEXT = {"qaq/holds": "text"}
_HOLDS_NUMBERS = {"qaq/holds": "numbers"}
"""Tags of an asset: its readers see text of delivered rows, or only numbers and hashes."""

_TEXT_COLUMNS = {"query", "answer", "reasoning", "evidence"}


def asset(
    settings: Settings, code: str, reads: Sequence[object] = (), **options: Any
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """Turn a function into the asset of its name, defined as `pipeline` declares it.

    The schema of a table describes it; the docstring of the function describes another asset. `deps` are the inputs
    that the asset reads itself: all of an asset of no batch, and the reference where ranks are taken against one.
    Refused inputs fail it without a retry, and faults of servers are retried.

    Args:
        settings: settings of its partitions and inputs.
        code: version of its code.
        reads: exactly the settings that it reads; its code version contains their hash.
        options: arguments of `dg.asset`, which take precedence.
    """

    def define(function: Callable[..., Any]) -> dg.AssetsDefinition:
        declared = PIPELINE[function.__name__]
        defined: dict[str, Any] = {
            "group_name": declared.group,
            "partitions_def": partitions_of(declared, settings),
            "code_version": f"{code}-{settings_hash(*reads)}",
            "owners": ["team:data-curation"],
            "tags": _HOLDS_TEXT,
        }
        others = [
            *(declared.optional_inputs if settings.ranking.pool == "reference" else ()),
            *(declared.calibrated_inputs if settings.is_calibrated else ()),
        ]
        if declared.partitioning is Partitioning.NONE:
            defined["deps"] = declared.inputs
        elif declared.partitioning is Partitioning.VERSION:
            defined["deps"] = of_all_batches([*declared.inputs, *others])
        else:
            defined["deps"] = others
        if declared.schema is not None:
            defined |= _of_schema(declared.schema)
        op_tags = _merged(options.pop("op_tags", {}), settings.runtime.op_tags.get(function.__name__, {}))
        return dg.asset(**defined | options, op_tags=op_tags)(guarded(function, settings.runtime))

    return define


def _merged(tags: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Tags with more of them; where both have a mapping, theirs are merged too."""
    both = {
        name: _merged(tags[name], more[name])
        for name in tags.keys() & more.keys()
        if isinstance(tags[name], Mapping) and isinstance(more[name], Mapping)
    }
    return {**tags, **more, **both}


def version_of(context: dg.AssetExecutionContext) -> str | None:
    """Code version of the asset that runs."""
    return context.assets_def.code_versions_by_key[context.asset_key]


def _of_schema(table: type[dy.Schema]) -> dict[str, Any]:
    return {
        "description": inspect.getdoc(table),
        "kinds": {"polars", "parquet"},
        "tags": _HOLDS_NUMBERS if _TEXT_COLUMNS.isdisjoint(table.columns()) else _HOLDS_TEXT,
        "metadata": {"dagster/column_schema": dg.TableSchema([_column(*item) for item in table.columns().items()])},
    }


def _column(name: str, column: dy.Column) -> dg.TableColumn:
    """A column as the UI shows it: type, description, unit, constraints; fields of records by name."""
    record = column.inner if isinstance(column, dy.List) and isinstance(column.inner, dy.Struct) else None
    fields = "" if record is None else f" Fields: {', '.join(record.inner)}."
    unit = (column.metadata or {}).get("unit")
    return dg.TableColumn(
        name=name,
        type=str(column.dtype) if record is None else "List(Struct)",  # The UI would cut the fields off.
        # In Markdown, a placeholder such as <name> would vanish as a tag.
        description=column.description and (column.description + fields).replace("<", r"\<"),
        constraints=dg.TableColumnConstraints(nullable=column.nullable),
        tags=({"unit": unit} if unit else {}) | ({"key": ""} if column.primary_key else {}),
    )


def readable(number: Any) -> Any:
    """A fraction with four significant digits; other values unchanged."""
    return float(f"{number:.4g}") if isinstance(number, float) else number


def lineage_of_columns(table: str, inputs: Collection[str]) -> dict[str, dg.MetadataValue]:
    """The columns of the inputs from which each column of a table is derived.

    Twice: in Dagster's own form, which its open UI does not draw, and as a table for people.

    Args:
        table: name of the table.
        inputs: its inputs, as its provenance names them.
    """
    found = column_lineage.sources_in(PIPELINE.column_sources, table, {Input.parse(name).table for name in inputs})
    stored = dg.TableColumnLineage(
        deps_by_column={
            column: [dg.TableColumnDep(asset_key=dg.AssetKey(name), column_name=source) for name, source in sources]
            for column, sources in found.items()
        }
    )
    rows = [
        f"| `{column}` | {', '.join(f'`{name}.{source}`' for name, source in sources) or 'no column'} |"
        for column, sources in found.items()
    ]
    return {
        "columns_made_of": dg.MetadataValue.md("\n".join(["| column | made of |", "|---|---|", *rows])),
        "dagster/column_lineage": dg.MetadataValue.column_lineage(stored),
    }


def made_by(context: dg.AssetExecutionContext) -> Made:
    """The run, code version and time that an audit page names."""
    return Made(datetime.now(UTC).isoformat(timespec="seconds"), context.run.run_id, version_of(context) or "")


def gate_metadata(gate: Gate | None) -> dict[str, str]:
    """The verdict in a materialisation's metadata."""
    return {"gate": "passed" if gate is None else f"{gate.reason.value}: {gate.sentence}"}


def pictures(
    context: dg.AssetExecutionContext, settings: Settings, draw: Callable[[], Sequence[plots.Plot]]
) -> dict[str, dg.MetadataValue]:
    """Plots for the UI, as `plot_<name>`; none where the settings want none.

    A plot that cannot be drawn fails nothing: the log says why.
    """
    if not settings.reports.plots:
        return {}
    shown: dict[str, dg.MetadataValue] = {}
    try:
        for plot in draw():
            data = base64.b64encode(plots.png(plot)).decode()
            if data:
                text = f"**{plot.title}**\n\n![{plot.title}](data:image/png;base64,{data})\n\n{plot.caption}"
                shown[f"plot_{plot.name}"] = dg.MetadataValue.md(text)
    except ValueError as error:  # What vl-convert raises.
        context.log.warning("%s: not every plot could be drawn: %s", context.asset_key.path[-1], error)
    return shown
