"""The stored tables of one batch from its scores to its decisions.

Belongs here: whether the tables belong together, and the calls that rank a batch and judge its pairs. Does not belong
here: strata, ranks, verdicts and decisions themselves, and how the result is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import GateSettings, RankingSettings
from qaq_pipeline.ingest.imported_tables import ImportedTable
from qaq_pipeline.schema.long_form import find_pairs
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import RmiScores, ScreenedData, Validity
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.scoring.stored_scores import Scores, identities
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection import disagreement_scores, rank_reference
from qaq_pipeline.selection.candidates import RANKS_READ, candidates, compact, with_validity
from qaq_pipeline.selection.decisions import DecidedPairs
from qaq_pipeline.selection.grammar.pair_columns import columns_read, needs_rows, with_pair_columns
from qaq_pipeline.selection.rank_reference import RANKED_BY
from qaq_pipeline.selection.ranks import SCORES_READ
from qaq_pipeline.selection.stored_reference import require_comparable
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.selection.verdicts import INVALID_BY
from qaq_pipeline.storage.origin import OriginError, batch_of, by_model, require_inputs
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable, parts_of_both
from qaq_pipeline.storage.tables import empty
from qaq_pipeline.validity import judgement, words
from qaq_pipeline.validity.judgement import judged_pairs

TABLES_KEY = "tables"
"""Key in the decisions' provenance: sha256 of the file of each imported table that was read, by name."""
VALIDITY_KEY = "validity"
"""Key in the decisions' provenance: what the signals tell of the batch, as `of_judged`; absent: no pair is judged."""
UNREACHED_KEY = "budget_not_reached"
"""Key in the decisions' provenance: the selections that take less than their budget, by name, as sentences."""


@dataclass(frozen=True)
class JudgedBatch:
    """The tables that say which pairs of a batch are valid."""

    cuts: StoredTable
    """validity_cuts."""
    validity: StoredTable

    @property
    def inputs(self) -> dict[str, StoredTable]:
        """The tables by the names that provenance gives to inputs."""
        return {"validity_cuts": self.cuts, "validity": self.validity}


def of_judged(cuts: pl.DataFrame, validity: pl.DataFrame) -> dict[str, Any]:
    """What the signals tell of a batch, for people: `warnings` and `signals` as sentences, `valid_pairs`, and
    `invalid_pairs` by signal.

    Args:
        cuts: ValidityCuts.
        validity: Validity, or its column invalid_by.
    """
    counts = judgement.count_invalid(validity)
    return {
        "warnings": words.warnings(cuts),
        "signals": words.of_cuts(cuts),
        "valid_pairs": counts.pop(None),
        "invalid_pairs": {str(signal): count for signal, count in counts.items()},
    }


def read_judged(storage: Storage, batch: str) -> JudgedBatch:
    """The stored validity of a batch. Raises StorageError where it is not stored, or damaged."""
    return JudgedBatch(*(storage.tables.read(name, Partition(batch)) for name in ("validity_cuts", "validity")))


@dataclass(frozen=True)
class ScoredBatch:
    """The tables from which the rows of a batch are decided.

    Raises:
        OriginError: the tables do not go back to one delivery, or the ranks to these scores.
    """

    raw_data: StoredTable
    screened_data: StoredTable
    rmi_scores: Scores
    disagreement_scores: StoredTable
    judged: JudgedBatch | None = None
    """None: batches are not calibrated, so no pair is judged."""

    def __post_init__(self) -> None:
        rows = {"raw_data": self.raw_data, "screened_data": self.screened_data}
        ranked = by_model("rmi_scores", self.rmi_scores)
        require_inputs("screened_data", self.screened_data, {"raw_data": self.raw_data})
        for name, table in ranked.items():
            require_inputs(name, table, rows, table.provenance["scored_from"])
        require_inputs("disagreement_scores", self.disagreement_scores, ranked)
        if self.judged is not None:
            require_inputs("validity", self.judged.validity, rows | ranked | {"validity_cuts": self.judged.cuts})

    @property
    def inputs(self) -> dict[str, StoredTable]:
        """The tables by the names that provenance gives to inputs."""
        return {
            "raw_data": self.raw_data,
            "screened_data": self.screened_data,
            "disagreement_scores": self.disagreement_scores,
            **by_model("rmi_scores", self.rmi_scores),
            **({} if self.judged is None else self.judged.inputs),
        }

    @property
    def candidates(self) -> pl.DataFrame:
        """Scores, ranks and validity of every distinct pair, as `candidates.candidates`."""
        scores = {role: read_scores(table) for role, table in self.rmi_scores.items()}
        found = candidates(self.disagreement_scores.select(*RANKS_READ), scores)
        return with_validity(found, None if self.judged is None else self.judged.validity.select("pair_id", INVALID_BY))

    def rows(self, *texts: str) -> Iterator[pl.DataFrame]:
        """The rows of ScreenedData with `detail` and some texts of RawData, some thousand at a time.

        Raises:
            StorageError: both tables do not have the same rows.
        """
        of_screening = [name for name in ScreenedData.columns() if name not in ROW_KEY]
        return parts_of_both(self.raw_data, ("detail", *texts), self.screened_data, of_screening, ROW_KEY)

    def why_invalid(self, rows: pl.DataFrame, pairs: DecidedPairs) -> pl.DataFrame | None:
        """The reason of each invalid pair of some rows, as `words.reasons`; None: no pair is judged.

        Args:
            rows: of `rows`, with query and answer.
            pairs: the distinct pairs of the batch.
        """
        if self.judged is None:
            return None
        accepted = (
            rows.filter(pl.col("status") == Status.ACCEPTED.value).select("pair_id", "query", "answer").sort("pair_id")
        )
        invalid = self._invalid[find_pairs(self._invalid["pair_id"], accepted["pair_id"])]
        texts = accepted.join(invalid, on="pair_id", how="semi")
        known = pairs.candidates_of(invalid["pair_id"])
        scores = {role: known.filter(pl.col("model") == role) for role in self.rmi_scores}
        return words.reasons(judged_pairs(scores, texts), invalid, self.judged.cuts.frame)

    @cached_property
    def _invalid(self) -> pl.DataFrame:
        """The rows of Validity of the invalid pairs, without the shares."""
        assert self.judged is not None
        columns = ("pair_id", INVALID_BY, "signals")
        nothing = empty(Validity).select(columns)
        parts = self.judged.validity.parts(*columns)
        return pl.concat([nothing, *(part.filter(pl.col(INVALID_BY).is_not_null()) for part in parts)])

    def gate(self, limits: GateSettings) -> Gate | None:
        """The stored verdict on the batch. Raises gates.StaleVerdictError."""
        made_of = {role: table.provenance for role, table in self.rmi_scores.items()}
        of_scores = gates.of_batch(batch_of(self.raw_data), self.screened_data.provenance, made_of, limits)
        if of_scores is not None or self.judged is None or not limits.must_tell:
            return of_scores
        cuts = self.judged.cuts.frame
        return gates.cannot_tell(words.untold(cuts)) if words.is_untold(cuts) else None

    def pairs(self, selections: Sequence[Selection], imported: Mapping[str, ImportedTable]) -> pl.DataFrame:
        """The candidates with the columns that selections name, of the rows and of imported tables."""
        if not needs_rows(selections):
            return self.candidates
        columns = ("pair_id", *columns_read(selections))
        parts = parts_of_both(self.raw_data, columns, self.screened_data, ("status", "cluster"), ROW_KEY)
        accepted = (part.filter(pl.col("status") == Status.ACCEPTED.value) for part in parts)
        return with_pair_columns(self.candidates, accepted, selections, imported)

    def facts(
        self, selections: Sequence[Selection], gate: Gate | None, imported: Mapping[str, ImportedTable]
    ) -> dict[str, Any]:
        """The part of the decisions' provenance that their inputs do not show."""
        hashes = {name: table.sha256 for name, table in imported.items()}
        ranked = self.disagreement_scores.provenance
        return {
            "settings_hash": settings_hash(selections),
            "published_hash": settings_hash(selections[0]),
            "pool_id": ranked["pool_id"],
            "ranking_hash": ranked["ranking_hash"],
            **gates.as_provenance(gate),
            **({TABLES_KEY: hashes} if hashes else {}),
            **self._judged_facts(),
            "files": self.raw_data.provenance["files"],
            "models": identities(self.rmi_scores),
            "scored_by": {
                role: {key: table.provenance[key] for key in ("frame", "template", "end_ids", "scored_with")}
                for role, table in self.rmi_scores.items()
            },
        }

    def _judged_facts(self) -> dict[str, Any]:
        judged = self.judged
        return (
            {} if judged is None else {VALIDITY_KEY: of_judged(judged.cuts.frame, judged.validity.select(INVALID_BY))}
        )

    def verdicts(
        self, pairs: pl.DataFrame, selections: Sequence[Selection], frozen: StoredTable | None
    ) -> pl.DataFrame:
        """The verdict of every named selection on each of `pairs`, by the cuts of the batch or of the reference."""
        roles = list(self.rmi_scores)
        of_reference = None if frozen is None else rank_reference.reference_candidates(frozen.frame, roles)
        return select_all(pairs, selections, of_reference)


def read_scores(table: StoredTable) -> pl.DataFrame:
    """RmiScores of a model as candidates have them: its words never are in memory as texts of all pairs."""
    return pl.concat([compact(empty(RmiScores)), *map(compact, table.parts())])


def rank(
    scores: Scores, ranking: RankingSettings, pool_id: str, frozen: StoredTable | None
) -> tuple[pl.DataFrame, list[str]]:
    """DisagreementScores of a batch, in its own pool or against a reference, and warnings as sentences.

    Raises:
        OriginError: the models were asked under different settings, or otherwise than those of the reference.
    """
    _require_same_scoring(scores)
    frames = {role: table.select(*SCORES_READ) for role, table in scores.items()}
    if frozen is None:
        frame, warnings = disagreement_scores.disagreement_scores(frames, ranking, pool_id)
    else:
        require_comparable(frozen, scores)
        frame, warnings = rank_reference.disagreement_scores(frames, frozen.select(*RANKED_BY), ranking, pool_id), []
    return frame, [*warnings, *_frame_warnings(scores), *_model_warnings(scores)]


def _require_same_scoring(scores: Scores) -> None:
    """Ranks of models that were asked under different settings cannot be compared."""
    scoring = {role: table.provenance["scoring"] for role, table in scores.items()}
    first, *others = scoring
    for other in others:
        if scoring[other] != scoring[first]:
            raise OriginError(
                f"disagreement_scores: {first} was scored with {scoring[first]}, {other} with {scoring[other]}; "
                "materialise logprobs and rmi_scores of both models"
            )


def _frame_warnings(scores: Scores) -> list[str]:
    """A warning where the models are asked in different frames: the gap then measures the frame too."""
    frames = {role: table.provenance["frame"] for role, table in scores.items()}
    if len(set(frames.values())) < 2:
        return []
    said = ", ".join(f"{role}: {frame}" for role, frame in sorted(frames.items()))
    return [f"the models' frames differ ({said}): the gap measures the frame too"]


def _model_warnings(scores: Scores) -> list[str]:
    """The warnings of each model's tokenizer and chat template."""
    said = {role: table.provenance["warnings"] for role, table in sorted(scores.items())}
    return [f"model {role!r}: {warning}" for role, warnings in said.items() for warning in warnings]
