"""The ledger: for every input row its decision, the reason, a sentence, and the numbers behind it. Polars only.

Belongs here: joining what screening, scoring and selection said of a row, and saying it in words.
Does not belong here: the selection itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from qaq_pipeline import reference, schema
from qaq_pipeline.config import IfdSelection, PplSelection, RandomSelection, RmiBandSelection, Selection
from qaq_pipeline.gates import Gate
from qaq_pipeline.schema import Decision, NullReason, SelectionReason, Status

_SHORTEST_KEY = 6
"""Digits of a pair_id."""

_ORDERED_BY = {
    "diff_high": "gap",
    "diff_low": "gap",
    "sum_high": "rank sum",
    "sum_low": "rank sum",
    "rmi_band": "rank",
    "rmi_top": "rank",
    "length": "answer length in tokens",
    "random": "random draw",
    "stratified_random": "place in the stratified draw",
}


def decide(
    raw: pl.DataFrame,
    screened: pl.DataFrame,
    scores: Mapping[str, pl.DataFrame],
    disagreement: pl.DataFrame,
    verdicts: pl.DataFrame,
    published: Selection,
    provenance_id: str,
    gate: Gate | None = None,
) -> pl.DataFrame:
    """The Decisions of a batch: one row for every row of RawData.

    Args:
        raw: RawData.
        screened: ScreenedData of the same rows.
        scores: RmiScores by role.
        disagreement: DisagreementScores of the same pairs.
        verdicts: of `selection.select_all`, every selection of every pair.
        published: the selection that decides.
        provenance_id: of the table that is made.
        gate: why the batch goes no further, where it does not: every row is decided by it, and none has a verdict.
    """
    pairs = (
        _model_scores(scores, disagreement)
        .join(disagreement.select("pair_id", "pool_id", "gap", "rank_sum"), on="pair_id", validate="1:1")
        .join(_verdict_lists(verdicts), on="pair_id", how="left", validate="1:1")
        .join(_published_verdict(verdicts, published), on="pair_id", how="left", validate="1:1")
    )
    rows = (
        screened.join(raw.select(*schema.ROW_KEY, "detail"), on=schema.ROW_KEY, validate="1:1")
        .join(pairs, on="pair_id", how="left", validate="m:1")
        .sort(schema.ROW_KEY)
        .with_columns(_decision())
    )
    decided = rows.with_columns(
        reason=pl.when(_is(Decision.UNSCORABLE))
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
    sentences = [explain(row, published) for row in decided.iter_rows(named=True)]
    explained = decided.with_columns(explanation=pl.Series(sentences, dtype=pl.String))
    return explained.select(list(schema.dtypes(schema.Decisions)))


def _gated(decided: pl.DataFrame, gate: Gate) -> pl.DataFrame:
    """The Decisions of a batch that goes no further; what was found of a row itself is said after that."""
    own = pl.coalesce(pl.format(" Of the row itself: {}.", pl.coalesce("evidence", "detail")), pl.lit(""))
    return decided.with_columns(
        decision=pl.lit(Decision.BATCH_GATED.value),
        reason=pl.lit(gate.reason.value),
        explanation=pl.lit(f"The batch was not published: {gate.sentence}.") + own,
        verdicts=pl.col("verdicts").list.head(0),
    ).select(list(schema.dtypes(schema.Decisions)))


def selected_rows(selection: str, raw: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """The rows that a named selection or control takes, best first, as SelectedSubset."""
    verdicts = (
        decisions.select(*schema.ROW_KEY, "verdicts")
        .explode("verdicts", empty_as_null=False)
        .unnest("verdicts")
        .filter(pl.col("selection") == selection, "is_selected")
    )
    rows = raw.join(verdicts.select(*schema.ROW_KEY, "position"), on=schema.ROW_KEY, validate="1:1")
    return rows.sort("position").select(list(schema.dtypes(schema.SelectedSubset)))


def _is(decision: Decision) -> pl.Expr:
    return pl.col("decision") == decision.value


def _decision() -> pl.Expr:
    selected = [reason.value for reason in schema.SELECTED_REASONS]
    fate = (
        pl.when(pl.col("status") != Status.ACCEPTED.value)
        .then("status")
        .when(pl.col("verdict_reason") == SelectionReason.NOT_IN_POOL.value)
        .then(pl.lit(Decision.UNSCORABLE.value))
        .when(pl.col("verdict_reason").is_in(selected))
        .then(pl.lit(Decision.SELECTED.value))
        .otherwise(pl.lit(Decision.NOT_SELECTED.value))
    )
    return fate.alias("decision")


def _null_reason() -> pl.Expr:
    """The first model's reason, models in the order of their roles."""
    return pl.col("scores").list.eval(pl.element().struct.field("null_reason").drop_nulls()).list.first()


def _model_scores(scores: Mapping[str, pl.DataFrame], disagreement: pl.DataFrame) -> pl.DataFrame:
    ranks = disagreement.select("pair_id", "ranks").explode("ranks").unnest("ranks")
    frames = [
        frame.with_columns(model=pl.lit(role), null_reason=pl.coalesce(_fault("rmi"), _fault("ifd")))
        .join(ranks, on=["pair_id", "model"], validate="1:1")
        .select("pair_id", pl.struct(list(schema.MODEL_SCORE.inner)).alias("scores"))
        for role, frame in sorted(scores.items())
    ]
    return pl.concat(frames).group_by("pair_id", maintain_order=True).agg("scores")


def _fault(score: str) -> pl.Expr:
    """Why a wanted score is null; that it was not wanted is no fault."""
    reason = pl.col(f"null_reason_{score}")
    return pl.when(reason != NullReason.NOT_WANTED.value).then(reason)


def _verdict_lists(verdicts: pl.DataFrame) -> pl.DataFrame:
    lists = verdicts.group_by("pair_id", maintain_order=True)
    return lists.agg(pl.struct(list(schema.VERDICT.inner)).alias("verdicts"))


def _published_verdict(verdicts: pl.DataFrame, published: Selection) -> pl.DataFrame:
    of_published = verdicts.filter(pl.col("selection") == published.name)
    columns = ("is_selected", "reason", "score", "position", "cut", "pool_size")
    return of_published.select("pair_id", *(pl.col(name).alias(f"verdict_{name}") for name in columns))


def find_rows(rows: pl.DataFrame, row: str) -> pl.DataFrame:
    """The rows that a person means: by number, file:row, file:row.turn, or the first digits of a pair_id."""
    if row.isdecimal():
        found = rows.filter(pl.col("source_row") == int(row))
        if not found.is_empty():
            return found
    file, _, position = row.rpartition(":")
    number, _, turn = position.partition(".")
    if file and number.isdecimal():
        of_row = (pl.col("source_file") == file) & (pl.col("source_row") == int(number))
        return rows.filter(of_row & ((pl.col("turn_index") == int(turn)) if turn.isdecimal() else True))
    is_key = len(row) >= _SHORTEST_KEY
    return rows.filter(pl.col("pair_id").str.starts_with(row)) if is_key else rows.clear()


# --- words ------------------------------------------------------------------------------------------------------


def explain(row: Mapping[str, Any], published: Selection) -> str:
    """The decision of a row as sentences. `row` has the columns of Decisions and the published verdict's."""
    decision = Decision(row["decision"])
    if decision is Decision.REJECTED:
        return f"Rejected when it was read: {row['detail']}"
    if decision is Decision.WITHDRAWN:
        return f"Withdrawn: {row['evidence']}."
    if decision is Decision.CONTAMINATED:
        return f"Contaminated: it holds {row['evidence']}."
    if decision is Decision.DUPLICATE:
        return f"Duplicate of {row['duplicate_of']}, which stands for this pair: {row['evidence']}."
    flag = f" Flagged: it holds {row['evidence']}." if row["evidence"] else ""
    if decision is Decision.UNSCORABLE:
        return f"Not scorable: {_why_unscorable(row)}. It is in no stratum and cannot be selected.{flag}"
    return f"{_ranks(row)} {_verdict(row, published)}{flag}"


def _why_unscorable(row: Mapping[str, Any]) -> str:
    reasons = [f"{s['model']} model: {s['null_reason']}" for s in row["scores"] if s["null_reason"]]
    return "; ".join(reasons)


def _ranks(row: Mapping[str, Any]) -> str:
    said = [
        f"{score['model']} {score['rank']:.3f} in stratum {score['stratum']} of {score['num_strata']}"
        for score in row["scores"]
        if score["rank"] is not None
    ]
    if not said:
        return "No model ranks it."
    cut_tail = [score["model"] for score in row["scores"] if score["is_truncated"]]
    note = f" The tail of its answer was cut for: {', '.join(cut_tail)}." if cut_tail else ""
    return f"Rank of RMI among pairs of like query perplexity{_of_reference(row)}: {', '.join(said)}.{note}"


def _of_reference(row: Mapping[str, Any]) -> str:
    """Words for whose pairs those are, where they are not the batch's own."""
    name = reference.name_in(row["pool_id"])
    return "" if name is None else f" of the reference {name}"


def _verdict(row: Mapping[str, Any], published: Selection) -> str:
    reason = SelectionReason(row["verdict_reason"])
    fate = "Selected" if reason in schema.SELECTED_REASONS else "Not selected"
    return f"{fate} by {published.name}: {_grounds(row, published, reason)}."


def _grounds(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    measure = _measure(published)
    value = "" if row["verdict_score"] is None else f"{measure} {row['verdict_score']:.3f}"
    place = f"{value} is number {row['verdict_position']} of {row['verdict_pool_size']} in the pool"
    if isinstance(published, RmiBandSelection):
        inside = "in" if reason is SelectionReason.IN_BAND else "outside"
        return f"{value} is {inside} the band ({published.band[0]:g}, {published.band[1]:g}]"
    if reason in (SelectionReason.WITHIN_BUDGET, SelectionReason.BELOW_CUT):
        return f"{place}; {_cut(row, published, reason)}"
    if reason is SelectionReason.GAP_BELOW_MINIMUM:
        return f"{value} is below the minimum gap or equal to it ({getattr(published, 'min_gap', None)})"
    if reason is SelectionReason.RANK_STRONG_OUT_OF_RANGE:
        return f"its rank under the strong model is not in the range {getattr(published, 'rank_strong', None)}"
    return f"{value} is above the maximum {getattr(published, 'maximum', None)}"


def _cut(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    """What was taken last; a random selection draws from the batch, whatever the pool of the ranks."""
    if row["verdict_cut"] is None:
        return "nothing was taken" if reason is SelectionReason.BELOW_CUT else "all that could be taken were"
    of_reference = "" if isinstance(published, RandomSelection) else _of_reference(row)
    return f"the last pair taken{of_reference} has {row['verdict_cut']:.3f}"


def _measure(published: Selection) -> str:
    if isinstance(published, IfdSelection | PplSelection):
        return f"{published.measure} of the {published.model} model"
    return _ORDERED_BY[published.strategy]
