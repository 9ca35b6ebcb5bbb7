"""The strategies: what each named selection takes of the candidates, and the reason for every one.

Belongs here: the rule of each strategy, random selections, and the random controls of the published selection. Does
not belong here: candidates (`candidates`), what follows from a rule and a limit (`verdicts`), and sentences for people
(`explanations`).

With a reference, a budget is one of the reference's pairs, and the last pair taken there is the cut for every batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import assert_never

import polars as pl

from qaq_pipeline.config.conditions import Quotas
from qaq_pipeline.config.selections import (
    CONTROL_PREFIX,
    CONTROL_STRATEGIES,
    DiffSelection,
    IfdSelection,
    LengthSelection,
    PplSelection,
    RandomSelection,
    RmiBandSelection,
    RmiTopSelection,
    Selection,
    SumSelection,
)
from qaq_pipeline.schema.vocabularies import NullReason, SelectionReason
from qaq_pipeline.selection.grammar.composition import compose, group_of, is_open_to
from qaq_pipeline.selection.grammar.quotas import divide
from qaq_pipeline.selection.random_order import draw_column, stratified_places, with_draws
from qaq_pipeline.selection.verdicts import Cut, Limit, Rule, flag, judge, last_taken, limit_of, pool_size, verdicts

_CONTROL_SEEDS = dict(zip(CONTROL_STRATEGIES, range(len(CONTROL_STRATEGIES)), strict=True))
"""Each control has its own seed: with the same draws, the controls would take mostly the same pairs."""
_NO_STRATUM = 0

_ScoredSelection = (
    DiffSelection | SumSelection | RmiBandSelection | RmiTopSelection | IfdSelection | PplSelection | LengthSelection
)


def select(candidates: pl.DataFrame, selection: Selection, reference: pl.DataFrame | None = None) -> pl.DataFrame:
    """The verdict of one selection on every candidate, sorted by pair_id: pair_id and the fields of VERDICT.

    It takes the first k = floor(f * n + 1/2) of the n pairs in the pool, or a count, or the longest prefix whose
    answers fit the token budget, in the order of (score, pair_id). Pairs that a filter of the selection excludes count
    in n, and have no position.

    `valid` and `where` exclude pairs like a filter. Of each query it takes the best pairs up to `max_per_query`, then
    of each cluster up to `max_per_cluster`, and quotas divide the limit among groups.

    With a reference, it takes the pairs that do not come after the last one taken of the reference, in the same order,
    or every pair that no filter excludes where all such pairs of the reference were taken. Conditions and caps hold for
    the batch's pairs only; without them, both ways give the same on the reference's own pairs. A random selection's
    score tells nothing of a pair, so it takes the share of its pool that its budget is of the reference's.

    Args:
        candidates: of the batch, with the columns that the selection names (`with_pair_columns`).
        selection: a named selection.
        reference: candidates of the reference; None: the budget is of the batch.
    """
    if isinstance(selection, RandomSelection):
        return _select_random(candidates, selection, reference)
    rule = compose(_rule(selection), selection)
    judged = judge(_of_model(candidates, selection), rule)
    if isinstance(selection, RmiBandSelection):
        limit = Limit()
    elif reference is not None:
        limit = last_taken(select(reference, selection.without_conditions))
    else:
        limit = limit_of(selection.budget, pool_size(judged))
    return verdicts(judged, selection.name, rule, _divided(limit, selection, judged))


def _divided(limit: Limit | Cut, selection: Selection, judged: pl.DataFrame) -> Limit | Cut | dict[str, Limit]:
    """The limit of each group, where the selection has quotas."""
    return limit if selection.quotas is None or isinstance(limit, Cut) else divide(limit, selection.quotas, judged)


def select_all(
    candidates: pl.DataFrame, selections: Sequence[Selection], reference: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Verdicts of all selections in their order, then of the two controls of the first, the published one.

    Args:
        candidates: of the batch, with the columns that the selections name.
        selections: named selections.
        reference: candidates of the reference whose cuts decide; None: budgets are of the batch.
    """
    seeds = {selection.seed for selection in selections if isinstance(selection, RandomSelection)}
    for seed in sorted(seeds | set(_CONTROL_SEEDS.values())):
        candidates = with_draws(candidates, seed)
    found = [select(candidates, selection, reference) for selection in selections]
    controls = _controls(candidates, selections[0], found[0], is_cut_frozen=reference is not None)
    return pl.concat([*found, *controls])


def draw_controls(
    candidates: pl.DataFrame, published: Selection, reference: pl.DataFrame | None, first_seed: int
) -> pl.DataFrame:
    """Verdicts of the controls of a selection, drawn with other seeds than the published ones.

    Args:
        candidates: of the batch, with the columns that the selection names.
        published: the published selection.
        reference: candidates of the reference whose cuts decide; None: budgets are of the batch.
        first_seed: seed of the first control; each other one has the next.
    """
    found = select(candidates, published, reference)
    return pl.concat(
        _controls(candidates, published, found, is_cut_frozen=reference is not None, first_seed=first_seed)
    )


def model_of(selection: Selection) -> str:
    """The model whose scores and ranks a selection reads; strong where it orders by the gap or the sum."""
    return "strong" if isinstance(selection, DiffSelection | SumSelection) else selection.model


def _of_model(candidates: pl.DataFrame, selection: Selection) -> pl.LazyFrame:
    """One row for each pair, sorted by pair_id. Lazy: only the columns that the selection reads are copied."""
    return candidates.lazy().filter(pl.col("model") == model_of(selection)).sort("pair_id")


def _rule(selection: _ScoredSelection) -> Rule:
    rank = pl.col("rank")
    match selection:
        case DiffSelection() | SumSelection():
            return _disagreement_rule(selection)
        case RmiBandSelection():
            outside = (~_within(rank, selection.band), SelectionReason.OUTSIDE_BAND)
            return Rule(rank.is_not_null(), rank, barriers=(outside,), taken=SelectionReason.IN_BAND)
        case RmiTopSelection():
            return Rule(rank.is_not_null(), rank)
        case IfdSelection():
            ifd = pl.col(selection.measure)
            above = (~_within(ifd, (None, selection.maximum)), SelectionReason.IFD_ABOVE_MAXIMUM)
            return Rule(ifd.is_not_null(), ifd, barriers=(above,))
        case PplSelection():
            log_ppl = pl.col(selection.measure)
            in_pool = log_ppl.is_not_null() & ~_has_too_few_query_tokens()
            return Rule(in_pool, log_ppl, descending=selection.order == "high")
        case LengthSelection():
            return Rule(pl.col("is_scored_by_all"), pl.col("num_a_tokens_untruncated"))
    assert_never(selection)


def _disagreement_rule(selection: DiffSelection | SumSelection) -> Rule:
    filters = (
        ("gap", (selection.min_gap, None), SelectionReason.GAP_BELOW_MINIMUM),
        ("rank", selection.rank_strong, SelectionReason.RANK_STRONG_OUT_OF_RANGE),
        ("rmi", selection.rmi_strong, SelectionReason.RMI_STRONG_OUT_OF_RANGE),
    )
    return Rule(
        pl.col("gap").is_not_null(),
        pl.col("gap" if isinstance(selection, DiffSelection) else "rank_sum"),
        descending=selection.strategy.endswith("_high"),
        barriers=tuple((~_within(pl.col(column), ends), why) for column, ends, why in filters if ends is not None),
    )


def _within(value: pl.Expr, half_open: tuple[float | None, float | None]) -> pl.Expr:
    """Whether lo < value <= hi; None: no such end.

    Safe on ranks: j / m and a decimal bound of the same value round to the same float.
    """
    low, high = half_open
    return (pl.lit(True) if low is None else value > low) & (pl.lit(True) if high is None else value <= high)


def _has_too_few_query_tokens() -> pl.Expr:
    """Whether the pair is left unscored for its short Q: its log PPLs are kept as facts, but never select it."""
    reasons = (pl.col(f"null_reason_{score}") for score in ("rmi", "ifd"))
    return pl.any_horizontal(reason.eq_missing(NullReason.TOO_FEW_QUERY_TOKENS.value) for reason in reasons)


# --- random selections and controls -------------------------------------------------------------------------------


def _select_random(
    candidates: pl.DataFrame, selection: RandomSelection, reference: pl.DataFrame | None
) -> pl.DataFrame:
    """Pool: pairs that every model could score, and for stratified_random with a stratum under the named model."""
    in_pool = pl.col("is_scored_by_all")
    if selection.strategy == "stratified_random":
        in_pool &= pl.col("stratum").is_not_null()
    rows = _of_model(with_draws(candidates, selection.seed), selection).with_columns(in_pool=flag(in_pool))
    pool = _answer_tokens(rows.filter("in_pool"))
    limit = limit_of(selection.budget, pool.len())
    if reference is not None and selection.budget.fraction is None:
        limit = _same_share(limit, pool, _answer_tokens(_of_model(reference, selection).filter(flag(in_pool))))
    return _draw(rows, selection, limit)


def _answer_tokens(rows: pl.LazyFrame) -> pl.Series:
    return rows.select("answer_tokens").collect().to_series()


def _same_share(limit: Limit, pool: pl.Series, reference_pool: pl.Series) -> Limit:
    """A limit of rows or answer tokens of the reference's pool, as the same share of the batch's pool.

    Both pools are the answer tokens of their pairs.
    """
    if limit.answer_tokens is not None:
        tokens, of = int(pool.sum()), int(reference_pool.sum())
        return Limit(answer_tokens=limit.answer_tokens * tokens // of if of else 0)
    assert limit.num_rows is not None
    of = reference_pool.len()
    share = Fraction(min(limit.num_rows, of), of) if of else Fraction(0)
    return Limit(num_rows=math.floor(share * pool.len() + Fraction(1, 2)))


def _controls(
    candidates: pl.DataFrame, published: Selection, found: pl.DataFrame, *, is_cut_frozen: bool, first_seed: int = 0
) -> list[pl.DataFrame]:
    """The random selections from the published one's pool, under its conditions and cap, up to the same limits."""
    for seed in _CONTROL_SEEDS.values():
        candidates = with_draws(candidates, first_seed + seed)
    in_pool = found["reason"] != SelectionReason.NOT_IN_POOL.value
    rows = _of_model(candidates, published).with_columns(in_pool.alias("in_pool"))
    limit: Limit | dict[str, Limit]
    if published.quotas is None:
        limit = _control_limit(_answer_tokens(rows), published, found, is_cut_frozen=is_cut_frozen)
    else:
        limit = _control_limits(rows, published, published.quotas, found)
    same = published.model_dump(include={"valid", "where", "quotas", "max_per_query", "max_per_cluster"})
    controls = (
        RandomSelection(
            name=CONTROL_PREFIX + strategy, strategy=strategy, model=model_of(published), seed=first_seed + seed, **same
        )
        for strategy, seed in _CONTROL_SEEDS.items()
    )
    return [_draw(rows, control, limit) for control in controls]


def _control_limit(
    answer_tokens: pl.Series, published: Selection, found: pl.DataFrame, *, is_cut_frozen: bool
) -> Limit:
    """A control takes as many rows as the published selection took, or its token budget.

    Where filters leave the published selection fewer answer tokens than its budget, the control gets no more. A token
    budget of a reference says nothing about the batch: the control then gets the tokens that were taken.
    """
    budget = None if isinstance(published, RmiBandSelection) else published.budget
    if budget is None or budget.answer_tokens is None:
        return Limit(num_rows=int(found["is_selected"].sum()))
    is_capped = found["reason"].is_in([SelectionReason.QUERY_FULL.value, SelectionReason.CLUSTER_FULL.value])
    can_be_taken = found["position"].is_not_null() & ~is_capped
    counted = found["is_selected"] if is_cut_frozen else can_be_taken
    tokens = int(answer_tokens.filter(counted).sum())
    return Limit(answer_tokens=tokens if is_cut_frozen else min(budget.answer_tokens, tokens))


def _control_limits(rows: pl.LazyFrame, published: Selection, quotas: Quotas, found: pl.DataFrame) -> dict[str, Limit]:
    """A control takes of each group as many rows, or answer tokens, as the published selection took."""
    taken = rows.filter(found["is_selected"]).group_by(group_of(quotas).alias("group"))
    counts = (pl.len().cast(pl.Int64).alias("rows"), pl.col("answer_tokens").sum().cast(pl.Int64))
    sizes = taken.agg(*counts).collect()
    if isinstance(published, RmiBandSelection) or published.budget.answer_tokens is None:
        return {group: Limit(num_rows) for group, num_rows, _ in sizes.iter_rows()}
    return {group: Limit(answer_tokens=tokens) for group, _, tokens in sizes.iter_rows()}


def _draw(rows: pl.LazyFrame, selection: RandomSelection, limit: Limit | dict[str, Limit]) -> pl.DataFrame:
    """Verdicts in the order of the draws, which the rows have; stratified: in the order of `stratified_places`."""
    score = pl.col(draw_column(selection.seed))
    if selection.strategy == "stratified_random":
        # A pair of the published pool may lack a stratum (ppl, ifd): such pairs are a stratum of their own.
        is_open = pl.col("in_pool") & is_open_to(selection)
        rows = rows.with_columns(stratum=pl.when(is_open).then(pl.col("stratum").fill_null(_NO_STRATUM)))
        score = stratified_places(rows.select("stratum").collect().to_series(), score, _num_rows(limit))
    rule = compose(Rule(pl.col("in_pool"), score, descending=False), selection)
    judged = judge(rows, rule)
    divided = _divided(limit, selection, judged) if isinstance(limit, Limit) else limit
    return verdicts(judged, selection.name, rule, divided)


def _num_rows(limit: Limit | dict[str, Limit]) -> int | None:
    """The rows of a limit, or of all groups; None: it is of tokens."""
    if isinstance(limit, Limit):
        return limit.num_rows
    rows = [one.num_rows for one in limit.values() if one.num_rows is not None]
    return sum(rows) if len(rows) == len(limit) else None
