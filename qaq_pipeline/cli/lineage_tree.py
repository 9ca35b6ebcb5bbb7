"""Draw lineage as trees for the terminal.

Belongs here: words and branches. Does not belong here: the walk (`lineage.lineage`), and the sources of columns
(`schema.column_lineage`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.text import Text
from rich.tree import Tree

from qaq_pipeline.lineage.lineage import Batch, DeliveredFiles, File, Lineage, State, Table
from qaq_pipeline.lineage.trace import RowPath
from qaq_pipeline.reports.summaries import visible
from qaq_pipeline.schema.column_lineage import UNDERIVED, Column, Derivation, by_table

_MOST_WORDS = 100


def of_version(lineage: Lineage) -> Tree:
    """A version: its files, then each batch back to its delivery."""
    tree = Tree(_line(f"version {lineage.version}", lineage.manifest))
    kept = "" if lineage.is_kept else " (not kept: the manifest alone is)"
    files = tree.add(_line(f"files{kept}"))
    for file in lineage.files:
        files.add(_file(file))
    for batch in lineage.batches:
        _add_batch(tree, batch)
    return tree


def _add_batch(tree: Tree, batch: Batch) -> None:
    of_batch = tree.add(_line(f"batch {batch.name}: {batch.rows_selected:,} of {batch.rows_in:,} rows"))
    tables = of_batch.add(_line("tables, back from the publication"))
    for table in batch.tables:
        tables.add(_table(table))
    for shards in batch.scores:
        number = f"{len(shards.names):,} shards" if shards.names else "no shard: its scores were removed from the cache"
        of_batch.add(_line(f"score cache of {shards.model}: {number}", shards.path))
    _add_delivery(of_batch, batch.delivery)


def _add_delivery(tree: Tree, delivery: DeliveredFiles) -> None:
    branch = tree.add(_line("delivered files", delivery.path or "their copy is gone"))
    for file in delivery.files:
        branch.add(_file(file))


def of_row(path: RowPath) -> Tree:
    """A row: its place in the version, then back to the delivered line."""
    tree = Tree(_line(path.row, "no pair" if path.pair_id is None else f"pair_id {path.pair_id}"))
    exported = tree.add(_line("exported as" if path.exported else "in no exported file"))
    for name, number in sorted(path.exported.items()):
        exported.add(_line(f"line {number:,} of {name}"))
    tables = tree.add(_line("its rows, back from the publication"))
    for row in path.tables:
        tables.add(_line(f"{_partition(row.table)} row {row.number:,}: {_facts(row.facts)}", row.table.path))
    shards = tree.add(_line("scores cached in" if path.shards else "no cached scores"))
    for shard in path.shards:
        shards.add(_line(shard))
    tree.add(_line(f"delivered as row {path.source_row:,} of")).add(_file(path.delivered))
    return tree


def of_columns(rows: Iterable[Derivation]) -> Tree:
    """A column back to raw_data, with the sources under each column. A repeated column is only named."""
    derivations = list(rows)
    first = derivations[0]
    sources = {(row.table, row.column): row.sources for row in derivations}
    tree = Tree(_column((first.table, first.column)))
    _add_sources(tree, (first.table, first.column), sources, set())
    return tree


def of_table(table: str, rows: Iterable[Derivation]) -> Tree:
    """The columns of a table, each with its direct sources."""
    tree = Tree(_line(table))
    for row in rows:
        branch = tree.add(_line(row.column, "" if row.sources else UNDERIVED))
        for name, columns in by_table(row.sources).items():
            branch.add(_line(f"{name}: {', '.join(columns)}"))
    return tree


def _add_sources(tree: Tree, column: Column, sources: Mapping[Column, tuple[Column, ...]], shown: set[Column]) -> None:
    for source in sources[column]:
        is_new = source not in shown
        shown.add(source)
        branch = tree.add(_column(source, "" if is_new or not sources[source] else "see above"))
        if is_new:
            _add_sources(branch, source, sources, shown)


def _column(column: Column, note: str = "") -> Text:
    return _line(".".join(column), note or ("of the delivery" if column[0] == "raw_data" else ""))


def _table(table: Table) -> Text:
    version = table.entered or "unknown version"
    now = f", by {table.stored}" if table.state is State.REPLACED else ""
    said = "" if table.state is State.AS_PUBLISHED else f" ({table.state.value}{now})"
    return _line(f"{_partition(table)}: {version}{said}", table.path)


def _partition(table: Table) -> str:
    return f"{table.name}[{table.partition}]"


def _file(file: File) -> Text:
    return _line(f"{file.name}: sha256 {file.sha256}", file.path)


def _facts(facts: Mapping[str, object]) -> str:
    said = (f"{name} {_value(value)}" for name, value in facts.items() if value is not None)
    return ", ".join(said) or "valid"  # Only of validity can every value be null.


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    words = visible(" ".join(str(value).split()))
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}…"


def _line(text: str, note: str = "") -> Text:
    """A line of a tree, with a dim note; never read as markup."""
    return Text(text) if not note else Text.assemble(text, "  ", (note, "dim"))
