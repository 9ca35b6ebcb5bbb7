"""Which partitions are stale, and why, judged by the provenance of the stored tables alone. No Dagster.

Belongs here: which stage of a batch has to run again. Does not belong here: who runs it (`runs`), and when
(`automation`).

A table is fresh if the current code and settings (its code version) made it from exactly the inputs that are stored
now. Scores are cached by what determines them, so a stage that runs again scores only what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qaq_pipeline.freshness import eligibility
from qaq_pipeline.ingest import landing
from qaq_pipeline.pipeline import PIPELINE, Pipeline, Purpose
from qaq_pipeline.schema.partition import Input, Partition
from qaq_pipeline.screening import batch_order, withdrawals
from qaq_pipeline.selection.scored_batch import TABLES_KEY
from qaq_pipeline.storage.files import StorageError, hash_json, read_url
from qaq_pipeline.storage.storage import Storage


@dataclass(frozen=True, slots=True)
class Stale:
    """A partition of a stage that has to run again."""

    job: str
    batch: str
    model: str | None
    """None: the stage has one partition for all models."""
    table: str
    """The first table of the stage that is stale."""
    reason: str

    @property
    def partition(self) -> Partition:
        """The partition of its table."""
        return Partition(self.batch, self.model)


@dataclass(frozen=True)
class Present:
    """Code, models and inputs with which tables would be made now."""

    code_versions: Mapping[str, str | None]
    """By table."""
    roles: Sequence[str]
    """Roles of the models."""
    shared_inputs: Mapping[str, str]
    """Data versions by name of the inputs that belong to no single batch."""
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    """Address of the file of each benchmark, by name."""
    imported: Mapping[str, str] = field(default_factory=dict)
    """The same of the imported tables that selections name."""


def changed_inputs(storage: Storage, table: str, batch: str, pipeline: Pipeline = PIPELINE) -> list[str]:
    """The inputs of a batch's stored table that have changed since it was made.

    Inputs that belong to no single batch are ignored.

    Raises:
        StorageError: the table is not stored.
    """
    found = []
    for name, version in storage.tables.footer(table, Partition(batch)).provenance["inputs"].items():
        source = Input.parse(name)
        is_of_batch = source.table in pipeline.tables_of_batch()
        of_batch = source.batch or batch
        if is_of_batch and storage.tables.version(source.table, Partition(of_batch, source.model)) != version:
            found.append(name)
    return found


@dataclass(frozen=True)
class Freshness:
    """The freshness of all batches, as they are stored now."""

    storage: Storage
    registered: Collection[str]
    """The batches."""
    present: Present
    pipeline: Pipeline = PIPELINE
    hashes: dict[str, str | None] = field(default_factory=dict)
    """sha256 of files by address, as far as they were read; None: one could not be."""

    def has_unreadable_benchmark(self) -> bool:
        """Whether a benchmark cannot be read: a screening would fail."""
        return any(self._hash(address) is None for address in self.present.benchmarks.values())

    def batches(self) -> list[str]:
        """Every delivered batch: in the order of their first screening, then the new ones by name."""
        known = [batch for batch in self._order if batch in self.registered]
        ordered = [*known, *sorted(set(self.registered).difference(known))]
        return [batch for batch in ordered if self._is_delivered(batch)]

    def stale(self, batch: str) -> list[Stale]:
        """The stale partitions of the first stage of a batch that has any; later stages are judged after they ran.

        Tables that are not made under the current settings are skipped.
        """
        for job, declared in self.pipeline.jobs(Purpose.CURATION, Purpose.CALIBRATION).items():
            tables = [table for table in declared if table in self.present.code_versions]
            if not tables:
                continue
            models = sorted(self.present.roles) if self.pipeline[tables[0]].has_models else [None]
            causes = {model: self._cause(Partition(batch, model), tables) for model in models}
            found = [Stale(job, batch, model, *cause) for model, cause in causes.items() if cause is not None]
            if found:
                return found
        return []

    def stale_screening(self, batch: str) -> str | None:
        """Reason why a batch has to be screened again: older batches or withdrawals have changed."""
        made_of = self._provenance("screened_data", Partition(batch))
        if made_of is None:
            return None
        return eligibility.stale_screening(
            batch, made_of, self._order, self._comparable
        ) or eligibility.changed_withdrawals(self.storage, batch, made_of, self._withdrawn)

    def is_screened_anew(self, batch: str) -> bool:
        """Whether a batch has to be screened again, or was, and the stages that follow did not run: they were killed.

        A batch that was never decided is not meant: its first run is not over.
        """
        return self.stale_screening(batch) is not None or any(
            self._provenance(table, Partition(batch)) is not None
            and changed_inputs(self.storage, table, batch, self.pipeline)
            for table in ("decisions", "selected_subset")
        )

    def wanted_screening(self, batch: str) -> str | None:
        """Hash of what a batch has to be screened against; None: its screening is not stale."""
        if self.stale_screening(batch) is None:
            return None
        comparable = eligibility.comparable_before(batch, self._order, self._comparable)
        return hash_json([comparable, self._withdrawn.batches, self._withdrawn.contents])

    def _is_delivered(self, batch: str) -> bool:
        try:
            return landing.is_announced(self.storage, batch) or self.storage.deliveries.has(batch)
        except ValueError:  # A name that the UI let pass.
            return False

    def _cause(self, partition: Partition, tables: Sequence[str]) -> tuple[str, str] | None:
        """The first stale table, and why."""
        for table in tables:
            if (reason := self._table_reason(table, partition)) is not None:
                return table, reason
        if "screened_data" in tables and (reason := self.stale_screening(partition.batch)) is not None:
            return "screened_data", reason
        return None

    def _table_reason(self, table: str, partition: Partition) -> str | None:
        made_of = self._provenance(table, partition)
        if made_of is None:
            return f"{table} is not stored, or cannot be read"
        if made_of["code_version"] != self.present.code_versions[table]:
            return f"{table} was made by other code, or under other settings"
        if table == "raw_data":
            return self._delivery_reason(partition.batch, made_of)
        for name, version in made_of["inputs"].items():
            if version != self._input_version(name, partition):
                return f"{table} was made from another {name}"
        files = (
            ("benchmark", "benchmarks", self.present.benchmarks),
            ("imported table", TABLES_KEY, self.present.imported),
        )
        for kind, key, addresses in files:
            for name, sha256 in made_of.get(key, {}).items():
                now = self._hash(addresses.get(name))
                if now is None and kind == "benchmark":
                    continue  # What was found holds until the file can be read again.
                if now != sha256:
                    return f"{table} was made from another file of the {kind} {name}"
        return None

    def _delivery_reason(self, batch: str, made_of: Mapping[str, Any]) -> str | None:
        if landing.is_announced(self.storage, batch):
            return "a delivery has landed"
        if made_of["delivery"] != self.storage.deliveries.current(batch).content_hash:
            return "it was delivered again"
        return None

    def _input_version(self, name: str, partition: Partition) -> str | None:
        """Data version of an input: `table`, `table|model`, or the name of an input that belongs to no single batch."""
        source = Input.parse(name)
        if source.table not in self.pipeline.tables_of_batch():
            return self.present.shared_inputs.get(name)
        model = source.model or (partition.model if self.pipeline[source.table].has_models else None)
        return self.storage.tables.version(source.table, Partition(source.batch or partition.batch, model))

    def _provenance(self, table: str, partition: Partition) -> dict[str, Any] | None:
        footer = self.storage.tables.readable_footer(table, partition)
        return None if footer is None else footer.provenance

    def _hash(self, address: str | None) -> str | None:
        """sha256 of a user's file, as it is now; None: there is none, or it cannot be read."""
        if address is not None and address not in self.hashes:
            try:
                self.hashes[address] = hashlib.sha256(read_url(address)).hexdigest()
            except StorageError:
                self.hashes[address] = None
        return None if address is None else self.hashes[address]

    @cached_property
    def _order(self) -> list[str]:
        return batch_order.batches_in_order(self.storage)

    @cached_property
    def _comparable(self) -> dict[str, str]:
        whole = set(self.registered) - set(eligibility.damaged(self.storage, self.registered, self.pipeline))
        return eligibility.comparable_batches(self.storage, self._order, whole)

    @cached_property
    def _withdrawn(self) -> withdrawals.Withdrawals:
        return withdrawals.read(self.storage)
