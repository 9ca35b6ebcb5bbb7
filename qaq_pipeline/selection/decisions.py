"""The ledger: for every input row its decision, the reason, a sentence, and the numbers behind it. Polars only.

Belongs here: joining what screening, scoring and selection said of a row, and saying it in words.
Does not belong here: the selection itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from qaq_pipeline.config.selections import (
    Selection,
)
from qaq_pipeline.schema import tables, vocabularies
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Decision, NullReason, SelectionReason, Status
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection.explanations import explain


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
        screened.join(raw.select(*ROW_KEY, "detail"), on=ROW_KEY, validate="1:1")
        .join(pairs, on="pair_id", how="left", validate="m:1")
        .sort(ROW_KEY)
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
    told = decided.drop("verdicts", "provenance_id", *ROW_KEY)
    sentences = [explain(row, published) for row in told.iter_rows(named=True)]
    explained = decided.with_columns(explanation=pl.Series(sentences, dtype=pl.String))
    return explained.select(list(tables.dtypes(tables.Decisions)))


def _gated(decided: pl.DataFrame, gate: Gate) -> pl.DataFrame:
    """The Decisions of a batch that goes no further; what more was found of a row itself is said after that."""
    fault = pl.coalesce("evidence", "detail").str.strip_chars_end(" .")
    is_said = pl.lit(gate.sentence).str.contains(fault, literal=True)
    own = pl.when(is_said | fault.is_null()).then(pl.lit("")).otherwise(pl.format(" Of the row itself: {}.", fault))
    return decided.with_columns(
        decision=pl.lit(Decision.BATCH_GATED.value),
        reason=pl.lit(gate.reason.value),
        explanation=pl.lit(f"No row of the batch is published: {gate.sentence}.") + own,
        verdicts=pl.col("verdicts").list.head(0),
    ).select(list(tables.dtypes(tables.Decisions)))


def selected_rows(selection: str, raw: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """The rows that a named selection or control takes, best first, as SelectedSubset."""
    verdicts = (
        decisions.select(*ROW_KEY, "verdicts")
        .explode("verdicts", empty_as_null=False)
        .unnest("verdicts")
        .filter(pl.col("selection") == selection, "is_selected")
    )
    rows = raw.join(verdicts.select(*ROW_KEY, "position"), on=ROW_KEY, validate="1:1")
    return rows.sort("position").select(list(tables.dtypes(tables.SelectedSubset)))


def _is(decision: Decision) -> pl.Expr:
    return pl.col("decision") == decision.value


def _decision() -> pl.Expr:
    selected = [reason.value for reason in vocabularies.SELECTED_REASONS]
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
        .select("pair_id", pl.struct(list(tables.MODEL_SCORE.inner)).alias("scores"))
        for role, frame in sorted(scores.items())
    ]
    return pl.concat(frames).group_by("pair_id", maintain_order=True).agg("scores")


def _fault(score: str) -> pl.Expr:
    """Why a wanted score is null; that it was not wanted is no fault."""
    reason = pl.col(f"null_reason_{score}")
    return pl.when(reason != NullReason.NOT_WANTED.value).then(reason)


def _verdict_lists(verdicts: pl.DataFrame) -> pl.DataFrame:
    lists = verdicts.group_by("pair_id", maintain_order=True)
    return lists.agg(pl.struct(list(tables.VERDICT.inner)).alias("verdicts"))


def _published_verdict(verdicts: pl.DataFrame, published: Selection) -> pl.DataFrame:
    of_published = verdicts.filter(pl.col("selection") == published.name)
    columns = ("is_selected", "reason", "score", "position", "cut", "pool_size")
    return of_published.select("pair_id", *(pl.col(name).alias(f"verdict_{name}") for name in columns))
