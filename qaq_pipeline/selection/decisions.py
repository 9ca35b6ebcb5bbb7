"""decisions: for every delivered row its decision, the reason, a sentence, and the numbers behind it.

Belongs here: joining the results of screening, scoring and selection for each row, and the rows that a selection takes.
Does not belong here: the selection itself (`strategies`), and the words (`explanations`).
"""

from __future__ import annotations

import polars as pl

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.schema import tables, vocabularies
from qaq_pipeline.schema.long_form import to_lists, to_long
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Decision, GateReason, NullReason, SelectionReason, Status
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection.explanations import explain
from qaq_pipeline.selection.grammar.composition import with_grounds


def decide(
    raw: pl.DataFrame,
    screened: pl.DataFrame,
    candidates: pl.DataFrame,
    verdicts: pl.DataFrame,
    published: Selection,
    provenance_id: str,
    gate: Gate | None = None,
    why_invalid: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The Decisions of a batch: one row for every row of RawData.

    Args:
        raw: RawData.
        screened: ScreenedData of the same rows.
        candidates: the scores and ranks of every distinct pair, with the columns that the published selection names.
        verdicts: of `strategies.select_all`, of the same pairs.
        published: the selection that decides.
        provenance_id: of the table that is made.
        gate: why the batch is held back; every row then has its reason and no verdict. None: it is not.
        why_invalid: pair_id and `why_invalid` of the invalid pairs; None: no pair is judged.

    Raises:
        TableError: a row is lost or doubled.
    """
    pairs = (
        _scores(candidates)
        .join(to_lists(verdicts, tables.VERDICT, "verdicts"), on="pair_id", how="left", validate="1:1")
        .join(_published_verdict(verdicts, candidates, published), on="pair_id", how="left", validate="1:1")
    )
    if why_invalid is not None:
        pairs = pairs.join(why_invalid, on="pair_id", how="left", validate="1:1")
    rows = (
        screened.join(raw.select(*ROW_KEY, "detail"), on=ROW_KEY, validate="1:1")
        .join(pairs, on="pair_id", how="left", validate="m:1")
        .sort(ROW_KEY)
        .with_columns(decision=_decision())
    )
    if rows.height != raw.height:
        raise tables.TableError(f"decisions: {rows.height} rows for {raw.height} of raw_data; nothing was written")
    decided = rows.with_columns(
        reason=pl.when(pl.col("decision") == Decision.UNSCORABLE.value)
        .then(_null_reason())
        .when(pl.col("status") == Status.ACCEPTED.value)
        .then("verdict_reason")
        .otherwise("reason"),
        scores=pl.col("scores").fill_null([]),
        verdicts=pl.when(pl.col("status") == Status.ACCEPTED.value).then("verdicts").fill_null([]),
        provenance_id=pl.lit(provenance_id),
    )
    if gate is not None:
        return _gated(decided, gate)
    explained_by = decided.drop("verdicts", "provenance_id", *ROW_KEY)
    sentences = [explain(row, published) for row in explained_by.iter_rows(named=True)]
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


def selected_rows(selection: str, raw: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """The rows that a named selection or control takes, best first, as SelectedSubset."""
    verdicts = to_long(decisions, "verdicts", *ROW_KEY).filter(pl.col("selection") == selection, "is_selected")
    rows = raw.join(verdicts.select(*ROW_KEY, "position"), on=ROW_KEY, validate="1:1")
    return rows.sort("position").select(list(tables.dtypes(tables.SelectedSubset)))


def by_reason(decisions: pl.DataFrame) -> pl.DataFrame:
    """Count rows as decision, reason, rows: decisions in their order, the most frequent reason first."""
    order = {decision.value: place for place, decision in enumerate(Decision)}
    counts = decisions.group_by("decision", "reason").agg(rows=pl.len().cast(pl.Int64))
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
    of_pair = candidates.filter(pl.col("model") == "strong").select("pair_id", "pool_id", "gap", "rank_sum")
    with_reasons = candidates.with_columns(
        null_reason=pl.coalesce(_fault("rmi"), _fault("ifd")), null_reason_end=_fault("end")
    )
    return of_pair.join(to_lists(with_reasons, tables.MODEL_SCORE, "scores"), on="pair_id", validate="1:1")


def _fault(score: str) -> pl.Expr:
    """Why a wanted score is null. A score that was not wanted is no fault."""
    reason = pl.col(f"null_reason_{score}")
    return pl.when(reason != NullReason.NOT_WANTED.value).then(reason)


def _published_verdict(verdicts: pl.DataFrame, candidates: pl.DataFrame, published: Selection) -> pl.DataFrame:
    """pair_id, and the published verdict with its grounds as `verdict_<column>`."""
    of_published = verdicts.filter(pl.col("selection") == published.name).drop("selection")
    grounds = with_grounds(of_published, candidates, published)
    return grounds.select("pair_id", pl.exclude("pair_id").name.prefix("verdict_"))
