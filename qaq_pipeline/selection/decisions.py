"""decisions: for every delivered row its decision, the reason, a sentence, and the numbers behind it.

Belongs here: joining the results of screening, scoring and selection for each row, and the rows that a selection takes.
Does not belong here: the selection itself (`strategies`), and the words (`explanations`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.schema import tables, vocabularies
from qaq_pipeline.schema.long_form import find_pairs, rows_of_pairs, to_lists, to_long
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Decision, GateReason, NullReason, SelectionReason, Status
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection.explanations import explain
from qaq_pipeline.selection.grammar.composition import with_grounds
from qaq_pipeline.storage.stored_table import StoredTable, parts_of_both, with_own_bytes

_STORED = pl.Schema({name: column.dtype for name, column in tables.VERDICT.inner.items()})
_REASON = pl.Schema({"reason": _STORED["reason"]})


@dataclass(frozen=True)
class DecidedPairs:
    """The distinct pairs of a batch, from which its rows are decided some thousand at a time.

    Numbers of all pairs are in memory; the lists and texts of decisions are those of the pairs of some rows alone.
    """

    candidates: pl.DataFrame
    """Scores and ranks of every pair, with the columns that the published selection names, sorted by model and pair."""
    verdicts: pl.DataFrame
    """Of `strategies.select_all`, of the same pairs."""
    published: Selection
    """The selection that decides."""

    def of(self, pair_ids: pl.Series) -> pl.DataFrame:
        """pair_id, pool_id, gap, rank_sum, scores, verdicts, and the published verdict as `verdict_<column>`, of pairs.

        Args:
            pair_ids: in any order; those that were not scored have no row.
        """
        places = self._places(pair_ids)
        verdicts = rows_of_pairs(self.verdicts, self._pair_ids.len(), places).cast(_STORED)
        lists = to_lists(verdicts, tables.VERDICT, "verdicts").drop("pair_id")
        grounds = self._grounds[places].cast(_REASON).select(pl.exclude("pair_id").name.prefix("verdict_"))
        return pl.concat([_scores(self._candidates_at(places)), lists, grounds], how="horizontal")

    def candidates_of(self, pair_ids: pl.Series) -> pl.DataFrame:
        """The candidates of some pairs, sorted by model and pair_id."""
        return self._candidates_at(self._places(pair_ids))

    def _places(self, pair_ids: pl.Series) -> pl.Series:
        return find_pairs(self._pair_ids, pair_ids.drop_nulls().unique().sort())

    def _candidates_at(self, places: pl.Series) -> pl.DataFrame:
        return rows_of_pairs(self.candidates, self._pair_ids.len(), places)

    @cached_property
    def _pair_ids(self) -> pl.Series:
        return self._grounds["pair_id"]

    @cached_property
    def _grounds(self) -> pl.DataFrame:
        """The published verdict with its grounds, of every pair in their order."""
        of_published = self.verdicts.filter(pl.col("selection") == self.published.name).drop("selection")
        return with_grounds(of_published, self.candidates, self.published)


def decide(
    rows: pl.DataFrame,
    pairs: DecidedPairs,
    provenance_id: str,
    gate: Gate | None = None,
    why_invalid: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The Decisions about some rows of a batch, one for each.

    Args:
        rows: ScreenedData, with `detail` of RawData.
        pairs: the distinct pairs of the batch.
        provenance_id: of the table that is made.
        gate: why the batch is held back; every row then has its reason and no verdict. None: it is not.
        why_invalid: pair_id and `why_invalid` of the invalid pairs of these rows; None: no pair is judged.
    """
    of_pairs = pairs.of(rows["pair_id"])
    if why_invalid is not None:
        of_pairs = of_pairs.join(why_invalid, on="pair_id", how="left", validate="1:1")
    decided = (
        rows.join(of_pairs, on="pair_id", how="left", validate="m:1")
        .sort(ROW_KEY)
        .with_columns(decision=_decision())
        .with_columns(
            reason=pl.when(pl.col("decision") == Decision.UNSCORABLE.value)
            .then(_null_reason())
            .when(pl.col("status") == Status.ACCEPTED.value)
            .then("verdict_reason")
            .otherwise("reason"),
            scores=pl.col("scores").fill_null([]),
            verdicts=pl.when(pl.col("status") == Status.ACCEPTED.value).then("verdicts").fill_null([]),
            provenance_id=pl.lit(provenance_id),
        )
    )
    if gate is not None:
        return _gated(decided, gate)
    explained_by = decided.drop("verdicts", "provenance_id", *ROW_KEY)
    sentences = [explain(row, pairs.published) for row in explained_by.iter_rows(named=True)]
    explained = decided.with_columns(explanation=pl.Series(sentences, dtype=pl.String))
    return explained.select(list(tables.dtypes(tables.Decisions)))


def _gated(decided: pl.DataFrame, gate: Gate) -> pl.DataFrame:
    """The Decisions of a batch that is held back. A fault of the row itself follows the gate's sentence."""
    fault = pl.coalesce("evidence", "detail").str.strip_chars_end(" .")
    is_said = gate.reason is GateReason.UNREADABLE_FILE  # The gate's sentence is the fault of that row.
    shown = pl.format(" Of the row itself: {}.", fault)
    own = pl.lit("") if is_said else pl.when(fault.is_null()).then(pl.lit("")).otherwise(shown)
    return decided.with_columns(
        decision=pl.lit(Decision.BATCH_GATED.value),
        reason=pl.lit(gate.reason.value),
        explanation=pl.lit(f"No row of the batch is published: {gate.sentence}.") + own,
        verdicts=pl.col("verdicts").list.head(0),
    ).select(list(tables.dtypes(tables.Decisions)))


def selected_rows(selection: str, raw_data: StoredTable, decisions: StoredTable) -> pl.DataFrame:
    """The rows that a named selection or control takes, best first, as SelectedSubset.

    Args:
        selection: its name.
        raw_data: of a batch.
        decisions: of the same rows, in the same order.
    """
    columns = tables.dtypes(tables.SelectedSubset)
    texts = [name for name in columns if name not in (*ROW_KEY, "position")]
    found = [pl.DataFrame(schema=columns)]
    for part in parts_of_both(raw_data, texts, decisions, ("verdicts",), ROW_KEY):
        verdicts = to_long(part, "verdicts", *ROW_KEY).filter(pl.col("selection") == selection, "is_selected")
        taken = part.join(verdicts.select(*ROW_KEY, "position"), on=ROW_KEY, validate="1:1", maintain_order="left")
        found.append(with_own_bytes(taken.select(list(columns))))
    return pl.concat(found).sort("position")


def by_reason(decisions: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Count rows as decision, reason, rows: decisions in their order, the most frequent reason first.

    Args:
        decisions: with the columns decision and reason, some rows at a time; one frame at least.
    """
    order = {decision.value: place for place, decision in enumerate(Decision)}
    of_parts = (part.group_by("decision", "reason").agg(rows=pl.len().cast(pl.Int64)) for part in decisions)
    counts = pl.concat(of_parts).group_by("decision", "reason").agg(pl.col("rows").sum())
    place = pl.col("decision").replace_strict(order, return_dtype=pl.Int64)
    return counts.sort(place, "rows", "reason", descending=[False, True, False])


def _decision() -> pl.Expr:
    selected = [reason.value for reason in vocabularies.SELECTED_REASONS]
    return (
        pl.when(pl.col("status") != Status.ACCEPTED.value)
        .then("status")
        .when(pl.col("verdict_reason") == SelectionReason.NOT_IN_POOL.value)
        .then(pl.lit(Decision.UNSCORABLE.value))
        .when(pl.col("verdict_reason").is_in(selected))
        .then(pl.lit(Decision.SELECTED.value))
        .otherwise(pl.lit(Decision.NOT_SELECTED.value))
    )


def _null_reason() -> pl.Expr:
    """The reason of the first model that has one."""
    return pl.col("scores").list.eval(pl.element().struct.field("null_reason").drop_nulls()).list.first()


def _scores(candidates: pl.DataFrame) -> pl.DataFrame:
    """pair_id, pool_id, gap, rank_sum and `scores` of each pair."""
    of_pair = candidates.filter(pl.col("model") == "strong").select(
        "pair_id", pl.col("pool_id").cast(pl.String), "gap", "rank_sum"
    )
    fields = candidates.select(
        "pair_id",
        pl.exclude("pair_id", "^null_reason_.*$"),
        null_reason=pl.coalesce(_fault("rmi"), _fault("ifd")),
        null_reason_end=_fault("end"),
    )
    stored = fields.select("pair_id", *(pl.col(name).cast(one.dtype) for name, one in tables.MODEL_SCORE.inner.items()))
    lists = to_lists(stored, tables.MODEL_SCORE, "scores")
    return pl.concat([of_pair, lists.drop("pair_id")], how="horizontal")


def _fault(score: str) -> pl.Expr:
    """Why a wanted score is null. A score that was not wanted is no fault."""
    reason = pl.col(f"null_reason_{score}")
    return pl.when(reason != NullReason.NOT_WANTED.value).then(reason)
