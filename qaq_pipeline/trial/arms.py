"""The arms of a trial of a published version: the rows that each is trained on, and the held-out pairs.

Belongs here: rows. Does not belong here: how much an arm is trained (`trial`), and the training (`training_run`).

    <selection>              the rows that the selection takes
    control_random, …        random rows of the same number, under the same conditions, drawn anew for each seed
    everything               every distinct accepted row of the version's batches
    untrained                no row: the model as it is
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl
from pydantic import TypeAdapter

from qaq_pipeline.config.conditions import tables_named
from qaq_pipeline.config.selections import CONTROL_PREFIX, CONTROL_STRATEGIES, Selection
from qaq_pipeline.config.settings import EVERYTHING, UNTRAINED, Settings
from qaq_pipeline.ingest import imported_tables
from qaq_pipeline.ingest.imported_tables import ImportedTable
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.withdrawn import withdrawn_batches
from qaq_pipeline.schema.draws import draws
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import RawData
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.scoring.pairs import TEXTS, accepted_parts, pairs_of
from qaq_pipeline.selection import rank_reference, stored_reference
from qaq_pipeline.selection.decisions import selected_rows
from qaq_pipeline.selection.scored_batch import TABLES_KEY, ScoredBatch, read_judged
from qaq_pipeline.selection.strategies import draw_controls
from qaq_pipeline.storage.origin import require_inputs
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty

CONTROLS = tuple(CONTROL_PREFIX + strategy for strategy in CONTROL_STRATEGIES)

FIRST_SEED = 1_000_000
"""Seed of the first draw of a trial: far from the seeds that a person gives to a selection."""


class TrialError(ValueError):
    """A trial cannot be made. The text names the version, the batch or the setting, the cause and the remedy."""


@dataclass(frozen=True)
class Arms:
    """The rows of a version's batches, as stored.

    Raises:
        TrialError: rows of one near-duplicate cluster are accepted and held out.
    """

    version: str
    published: Selection
    batches: Mapping[str, ScoredBatch]
    decisions: Mapping[str, StoredTable]
    frozen: StoredTable | None = None
    """The reference that batches are ranked against; None: each batch is its own pool."""
    imported: Mapping[str, ImportedTable] = field(default_factory=dict)
    """Imported tables that the published selection names."""

    def __post_init__(self) -> None:
        accepted, held_out = (
            {cluster for one in self.batches.values() for cluster in _rows(one, status)["cluster"]}
            for status in (Status.ACCEPTED, Status.HELD_OUT)
        )
        if both := sorted(accepted & held_out):
            raise TrialError(
                f"version {self.version}: rows of {len(both)} near-duplicate clusters are both trained on and held "
                f"out, the first is that of {both[0]}; `qaq refresh` screens the batches again"
            )

    @property
    def made_of(self) -> dict[str, dict[str, StoredTable]]:
        """The tables of each batch that determine the rows, by name."""
        frozen = stored_reference.as_input(self.frozen)
        return {
            batch: {**one.inputs, **frozen, "decisions": self.decisions[batch]} for batch, one in self.batches.items()
        }

    def held_out(self, most: int) -> list[Pair]:
        """A held-out pair of each near-duplicate cluster of the version's batches, at most so many, by a keyed hash.

        Pairs of one cluster are no independent measurements.
        """
        rows = pl.concat(_rows(one, Status.HELD_OUT) for one in self.batches.values())
        ordered = rows.with_columns(draw=draws(rows["pair_id"], 0)).sort("draw", "pair_id")
        return pairs_of(ordered.unique("cluster", keep="first", maintain_order=True).head(most))

    def pairs(self, arm: str) -> list[Pair]:
        """The rows of an arm that is no control, sorted by pair_id.

        Raises:
            TrialError: the version has no such selection.
        """
        if arm == UNTRAINED:
            return []
        if arm == EVERYTHING:
            return self._pairs(_accepted(one) for one in self.batches.values())
        known = {name for table in self.decisions.values() for name in _selections(table.select("verdicts"))}
        if arm not in known:
            raise TrialError(
                f"trial.selections: version {self.version} has no selection {arm!r}; known: {', '.join(sorted(known))}"
            )
        decided = self.decisions.items()
        return self._pairs(selected_rows(arm, self.batches[one].raw_data, table) for one, table in decided)

    def controls(self, seed: int) -> dict[str, list[Pair]]:
        """The rows of each random control, drawn for this seed, sorted by pair_id."""
        drawn = {batch: self._draw(scored, seed) for batch, scored in self.batches.items()}

        def rows(control: str) -> Iterator[pl.DataFrame]:
            for batch, verdicts in drawn.items():
                taken = verdicts.filter(pl.col("selection") == control, "is_selected")
                yield _accepted(self.batches[batch]).join(taken, on="pair_id", how="semi")

        return {control: self._pairs(rows(control)) for control in CONTROLS}

    def _draw(self, scored: ScoredBatch, seed: int) -> pl.DataFrame:
        """Verdicts of the controls in a batch."""
        frozen, roles = self.frozen, list(scored.rmi_scores)
        reference = None if frozen is None else rank_reference.reference_candidates(frozen.frame, roles)
        pairs = scored.pairs([self.published], self.imported)
        return draw_controls(pairs, self.published, reference, FIRST_SEED + len(CONTROLS) * seed)

    def _pairs(self, frames: Iterable[pl.DataFrame]) -> list[Pair]:
        """The pairs of some rows.

        Raises:
            TrialError: one of them is held out.
        """
        columns = ["pair_id", *TEXTS]
        rows = pl.concat(frame.select(columns) for frame in frames).unique("pair_id").sort("pair_id")
        if held_out := sorted(set(rows["pair_id"]) & self._held_out_ids):
            raise TrialError(
                f"version {self.version}: {len(held_out)} held-out pairs are trained on, the first is {held_out[0]}; "
                "`qaq refresh` screens the batches again"
            )
        return pairs_of(rows)

    @cached_property
    def _held_out_ids(self) -> set[str]:
        return {pair_id for one in self.batches.values() for pair_id in _rows(one, Status.HELD_OUT)["pair_id"]}


def _accepted(batch: ScoredBatch) -> pl.DataFrame:
    """pair_id and texts of the rows that are scored."""
    nothing = empty(RawData).select("pair_id", *TEXTS)
    return pl.concat([nothing, *accepted_parts(batch.raw_data, batch.screened_data, *TEXTS)])


def _selections(decisions: pl.DataFrame) -> list[str]:
    """Names of the selections in the verdicts."""
    return decisions["verdicts"].explode().drop_nulls().struct.field("selection").unique().to_list()


def _rows(batch: ScoredBatch, status: Status) -> pl.DataFrame:
    """The rows of a status with their texts and clusters."""
    screened = batch.screened_data.select(*ROW_KEY, "pair_id", "status", "cluster").filter(status=status.value)
    texts = batch.raw_data.select(*ROW_KEY, *TEXTS)
    return screened.select(*ROW_KEY, "pair_id", "cluster").join(texts, on=ROW_KEY, validate="1:1")


def read_arms(storage: Storage, settings: Settings, version: str) -> Arms:
    """The arms of a version.

    Raises:
        TrialError: its files were removed, rows of it were withdrawn since, or a batch was decided again.
        OriginError: tables of a batch do not belong together, or its ranks are of another pool than the settings name.
        StorageError: a table is missing or damaged.
    """
    _require_unchanged(storage, version)
    manifest = versions.read_manifest(storage, version)
    published = TypeAdapter(Selection).validate_python(manifest["selection"])
    frozen = stored_reference.read_pool(storage, settings.ranking)
    imported = imported_tables.read_tables(settings.tables_read, tables_named([published]))
    batches, decisions = {}, {}
    for entry in manifest["batches"]:
        batch, stored = entry["batch"], storage.tables.read("decisions", Partition(entry["batch"]))
        if stored.data_version != entry["data_versions"]["decisions"]:
            raise TrialError(
                f"batch {batch} was decided again since version {version} was published, so the rows of its arms are "
                "gone; `qaq refresh` publishes what is stored now: try `latest`"
            )
        decisions[batch], batches[batch] = stored, _scored(storage, batch, stored, list(settings.models))
        require_inputs("decisions", stored, batches[batch].inputs | stored_reference.as_input(frozen))
        stored_reference.require_pool(batches[batch].disagreement_scores, settings.ranking, frozen)
        _require_same_tables(batch, stored, imported)
    return Arms(version, published, batches, decisions, frozen, imported)


def _require_unchanged(storage: Storage, version: str) -> None:
    if not versions.is_kept(storage, version):
        kept = ", ".join(versions.kept_versions(storage)) or "none"
        raise TrialError(f"the files of version {version} were removed; kept versions: {kept}")
    if batches := withdrawn_batches(storage, versions.find_version(storage, version)):
        raise TrialError(
            f"version {version} holds rows of {', '.join(batches)} that were withdrawn since; try a version without "
            "them: `qaq refresh` makes one"
        )


def _require_same_tables(batch: str, decided: StoredTable, imported: Mapping[str, ImportedTable]) -> None:
    """Refuse an imported table that has changed: the controls would be drawn under other conditions."""
    recorded = decided.provenance.get(TABLES_KEY, {})
    if changed := sorted(name for name, table in imported.items() if recorded.get(name) != table.sha256):
        raise TrialError(
            f"the imported table {changed[0]} has changed since batch {batch} was decided; `qaq refresh` decides again"
        )


def _scored(storage: Storage, batch: str, decided: StoredTable, roles: Sequence[str]) -> ScoredBatch:
    def read(name: str, model: str | None = None) -> StoredTable:
        return storage.tables.read(name, Partition(batch, model))

    judged = read_judged(storage, batch) if "validity" in decided.provenance["inputs"] else None
    return ScoredBatch(
        raw_data=read("raw_data"),
        screened_data=read("screened_data"),
        rmi_scores={role: read("rmi_scores", role) for role in roles},
        disagreement_scores=read("disagreement_scores"),
        judged=judged,
    )
