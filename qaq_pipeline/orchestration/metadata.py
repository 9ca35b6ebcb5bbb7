"""What the UI shows about an asset: definition, columns and their lineage, plots."""

import base64
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import dagster as dg
import dataframely as dy

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.reports import plots
from qaq_pipeline.schema import column_lineage
from qaq_pipeline.screening.gates import Gate

OWNERS = ["team:data-curation"]

HOLDS_TEXT = {"qaq/holds": "text"}
HOLDS_NUMBERS = {"qaq/holds": "numbers"}
"""Tags of an asset: whether who may read it reads text of delivered rows, or numbers and hashes only."""

_TEXT_COLUMNS = {"query", "answer", "evidence"}


def code_version(code: str, *settings: object) -> str:
    """Version of an asset: of its code, and of exactly the settings that it reads."""
    return f"{code}-{settings_hash(*settings)}"


def definition(name: str) -> dict[str, Any]:
    """Description, owners, tags and column schema of a table's asset, from the schema."""
    table = PIPELINE[name].table
    return {
        "name": name,
        "description": inspect.getdoc(table),
        "owners": OWNERS,
        "tags": HOLDS_NUMBERS if _TEXT_COLUMNS.isdisjoint(table.columns()) else HOLDS_TEXT,
        "metadata": {"dagster/column_schema": column_schema(table)},
    }


def column_schema(table: type[dy.Schema]) -> dg.TableSchema:
    """The table's columns as the UI shows them: type, description, unit, constraints; fields of records by name."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name=name,
                type=_type(column),
                description=_description(column),
                constraints=dg.TableColumnConstraints(nullable=column.nullable),
                tags=_tags(column),
            )
            for name, column in table.columns().items()
        ]
    )


def _type(column: dy.Column) -> str:
    """The dtype, without the fields of a record, which the UI would cut."""
    return str(column.dtype) if _record(column) is None else "List(Struct)"


def _description(column: dy.Column) -> str | None:
    """As Markdown, in which a placeholder such as <name> would be a tag, and vanish."""
    record = _record(column)
    text = column.description if record is None else f"{column.description} Fields: {', '.join(record.inner)}."
    return None if text is None else text.replace("<", r"\<")


def _record(column: dy.Column) -> dy.Struct | None:
    """Of a list of records, one of them."""
    return column.inner if isinstance(column, dy.List) and isinstance(column.inner, dy.Struct) else None


def _tags(column: dy.Column) -> dict[str, str]:
    unit = (column.metadata or {}).get("unit")
    return ({"unit": unit} if unit else {}) | ({"key": ""} if column.primary_key else {})


def lineage_of_columns(table: str, inputs: Collection[str]) -> dict[str, dg.MetadataValue]:
    """Of what each of a table's columns was made, of its inputs; by their names in the provenance (`table|model`).

    Twice: as Dagster stores it, whose own UI does not draw it, and as a table for people.
    """
    found = column_lineage.sources_in(PIPELINE.column_sources, table, {name.partition("|")[0] for name in inputs})
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


def gate_metadata(gate: Gate | None) -> dict[str, str]:
    """The verdict for people, in a materialisation's metadata."""
    return {"gate": "passed" if gate is None else f"{gate.reason.value}: {gate.sentence}"}


def pictures(
    context: dg.AssetExecutionContext, settings: Settings, draw: Callable[[], Sequence[plots.Plot]]
) -> dict[str, dg.MetadataValue]:
    """Plots for the UI, by `plot_` and their name; none where the settings want none.

    A plot that cannot be drawn takes nothing with it: the log says why.
    """
    if not settings.reports.pictures:
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
