"""The rows of a batch or of a version as one frame that stays in memory: some 150 MB for 300,000 rows.

Belongs here: what the table shows of each row. Does not belong here: which rows are wanted (`question`), everything
about one row (`lineage.dossier`), and the pages (`server`).

    batch … turn_index, pair_id   the row
    decision, reason              of the current decisions, or of the version
    position                      batch: place in the order of the published selection
    line                          version: line in the training files; null: it is not published
    signals                       the signals that the pair raises, in one text; null: not judged, or judged again since
    language                      of the delivery
    gap, rmi_<model>, rank_<model>
    query, answer                 their beginnings; null: the row has none, was withdrawn, or has another text now
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import polars as pl

from qaq_pipeline.lineage.row_history import withdrawn_rows
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.flat_scores import lines
from qaq_pipeline.publication.versions import Published
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY, RowPlace
from qaq_pipeline.storage.storage import Storage

SHOWN_CHARACTERS = 160
"""Characters of a query or an answer in the table."""

SCORES = ("rmi", "rank")
"""Scores of each model in the table."""

SEPARATOR = ", "
"""Between the names of signals."""

_AT_ONCE = 4
"""Tables that are read at the same time."""
_SHOWN = ("query", "answer")
_ROW = (*ROW_KEY, "pair_id", "decision", "reason", "gap")


@dataclass(frozen=True)
class Listing:
    """The rows of a batch, or of a version."""

    rows: pl.DataFrame
    version: Published | None
    """None: the current decisions of a batch."""

    @property
    def batches(self) -> list[str]:
        """Names of the batches whose rows these are."""
        return self.rows["batch"].unique(maintain_order=True).to_list()

    def line_of(self, place: RowPlace) -> int | None:
        """Line of a row in the training files of the version; None: it is not published."""
        key = dict(zip(ROW_KEY, (place.batch, place.source_file, place.source_row, place.turn_index), strict=True))
        found = self.rows.filter(**key)
        return None if found.is_empty() else found["line"][0]

    @property
    def numbers(self) -> list[str]:
        """Names of the columns that hold numbers."""
        return [name for name, dtype in self.rows.schema.items() if dtype.is_numeric() and name not in ROW_KEY]


def of_batch(storage: Storage, batch: str) -> Listing:
    """The rows of a batch under its current decisions.

    Raises:
        StorageError: it has no decisions, or a table cannot be read.
    """

    def decided() -> pl.DataFrame:
        lists = [f"scores.list.element.{name}" for name in ("model", *SCORES)]
        position = pl.col("verdicts").list.first().struct.field("position")  # The first verdict is the published one.
        parts = storage.tables.scan("decisions", Partition(batch), [*_ROW, *lists, "verdicts.list.element.position"])
        return to_columns(pl.concat(part.with_columns(position=position).drop("verdicts") for part in parts), "scores")

    inputs = storage.tables.footer("decisions", Partition(batch)).provenance["inputs"]
    return Listing(_complete(storage, decided, {batch: inputs.get("validity")}), None)


def of_version(storage: Storage, version: Published) -> Listing:
    """The rows of a version as they were published.

    Raises:
        StorageError: its files were not kept, or a file cannot be read.
    """
    manifest = versions.read_manifest(storage, version.version)
    roles = sorted({role for entry in manifest["batches"] for role in entry["models"]})
    published = manifest["selection"]["name"]
    of_selection = [f"is_selected:{published}", f"position:{published}"]
    columns = [*_ROW, *of_selection, *(f"{score}_{role}" for role in roles for score in SCORES)]

    def decided() -> pl.DataFrame:
        scores = versions.find_rows(storage, version.version, [], columns)
        of_files = lines(scores, [entry["batch"] for entry in manifest["batches"]], published)
        return scores.drop(of_selection).join(of_files, on=ROW_KEY, how="left", validate="1:1")

    judged_by: dict[str, str | None] = dict.fromkeys(entry["batch"] for entry in manifest["batches"])
    for entry in manifest["batches"]:
        footer = storage.tables.readable_footer("decisions", Partition(entry["batch"]))
        if footer is not None and footer.data_version == entry["data_versions"]["decisions"]:
            judged_by[entry["batch"]] = footer.provenance["inputs"].get("validity")
    return Listing(_complete(storage, decided, judged_by), version)


def _complete(
    storage: Storage, decided: Callable[[], pl.DataFrame], judged_by: Mapping[str, str | None]
) -> pl.DataFrame:
    """The rows with their texts, languages and signals, all read at the same time.

    Args:
        storage: where these are stored.
        decided: reads the rows, with the columns of `_ROW`.
        judged_by: of each batch, the data version of the validity that decided it; None: unknown.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        texts = threads.map(functools.partial(_texts, storage), judged_by)
        signals = threads.map(functools.partial(_signals, storage), judged_by, judged_by.values())
        rows = decided()
        # A place may have another text now than when the version was published.
        found = rows.join(pl.concat(texts), on=[*ROW_KEY, "pair_id"], how="left", validate="1:1", nulls_equal=True)
        found = found.join(pl.concat(signals), on=["batch", "pair_id"], how="left", validate="m:1")
    return _arrange(found.sort(ROW_KEY))


def _texts(storage: Storage, batch: str) -> pl.DataFrame:
    """Language and beginnings of the texts of a batch's rows as delivered now; no text of a withdrawn row."""
    partition = Partition(batch)
    columns, begins = [*ROW_KEY, "pair_id", "language", *_SHOWN], dict.fromkeys(_SHOWN, SHOWN_CHARACTERS)
    texts = pl.concat(storage.tables.scan("raw_data", partition, columns, begins))
    withdrawn = withdrawn_rows(storage, batch)
    return texts if withdrawn.is_empty() else texts.join(withdrawn, on=ROW_KEY, how="anti")


def _signals(storage: Storage, batch: str, version: str | None) -> pl.DataFrame:
    """The signals that each pair of a batch raises; no row where validity has another data version."""
    empty = pl.DataFrame(schema={"batch": pl.String, "pair_id": pl.String, "signals": pl.String})
    if version is None or storage.tables.version("validity", Partition(batch)) != version:
        return empty
    columns = ["pair_id", "signals.list.element.signal", "signals.list.element.is_raised"]
    raised = pl.element().struct.field("signal").filter(pl.element().struct.field("is_raised"))
    judged = pl.concat(storage.tables.scan("validity", Partition(batch), columns))
    named = pl.col("signals").list.eval(raised).list.join(SEPARATOR)
    return judged.select(pl.lit(batch).alias("batch"), "pair_id", named)


def _arrange(rows: pl.DataFrame) -> pl.DataFrame:
    """The columns in the order in which they are shown."""
    scores = sorted(name for name in rows.columns if name.startswith(tuple(f"{score}_" for score in SCORES)))
    ahead = ["decision", "reason", "signals", "language"]
    place = "line" if "line" in rows.columns else "position"
    return rows.select(*ROW_KEY, "pair_id", *ahead, *_SHOWN, place, "gap", *scores)
