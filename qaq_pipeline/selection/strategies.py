"""What each named selection takes, and for every candidate pair the reason: from scores and ranks to verdicts.

Belongs here: the strategies, their pools, orders and budgets, and the random controls of the published selection.
Does not belong here: how scores and ranks are made, the rows that share a pair, and sentences for people.

With a reference, what is taken of its pairs decides: a budget is of the reference, and the last pair taken there is the
cut for every batch.

A candidate is a distinct pair. Ties go by pair_id and frames are sorted by it first, so no verdict depends on the
order of the input.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

import polars as pl

from qaq_pipeline.config.selections import (
    CONTROL_PREFIX,
    CONTROL_STRATEGIES,
    Budget,
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
from qaq_pipeline.schema.tables import VERDICT
from qaq_pipeline.schema.vocabularies import NullReason, SelectionReason

_MODEL_COLUMNS = [
    "rmi",
    "log_ppl_q",
    "log_ppl_q_given_a",
    "log_ppl_a",
    "log_ppl_a_given_q",
    "ifd_ppl",
    "ifd_loss",
    "null_reason_rmi",
    "null_reason_ifd",
    "num_a_tokens_untruncated",
]
_CONTROL_SEED = 0
_TOKENS = "num_a_tokens_untruncated:strong"
_NO_STRATUM = 0

_ScoredSelection = (
    DiffSelection | SumSelection | RmiBandSelection | RmiTopSelection | IfdSelection | PplSelection | LengthSelection
)


@dataclass(frozen=True)
class _Rule:
    """What a strategy asks of a candidate: `barriers` hold, first first, why a pair of the pool cannot be taken."""

    in_pool: pl.Expr
    score: pl.Expr
    descending: bool = True
    barriers: tuple[tuple[pl.Expr, SelectionReason], ...] = ()
    taken: SelectionReason = SelectionReason.WITHIN_BUDGET


@dataclass(frozen=True)
class _Limit:
    """How far down the order is taken: rows, or answer tokens, or (both None) all that can be."""

    num_rows: int | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True)
class _Cut:
    """The last pair that was taken of a reference: what comes after it in the selection's order is not taken."""

    score: float
    pair_id: str


def candidates(disagreement: pl.DataFrame, scores: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """One row a distinct pair, sorted by pair_id: gap, rank_sum, and `<column>:<role>` of every model's numbers.

    Raises:
        ValueError: the ranks or scores of a role are not those of the pairs of `disagreement`.
    """
    ordered = disagreement.sort("pair_id")
    roles = sorted(scores)
    wide = [ordered.select("pair_id", "gap", "rank_sum"), _ranks_by_role(ordered["ranks"], roles)]
    for role in roles:
        frame = scores[role].select("pair_id", *_MODEL_COLUMNS).sort("pair_id")
        if not frame["pair_id"].equals(ordered["pair_id"]):
            counts = f"{ordered.height} pairs are ranked, {frame.height} are of {role!r}"
            raise ValueError(f"ranks and scores are not of the same pairs ({counts}); make the ranks again")
        wide.append(frame.drop("pair_id").rename(lambda column, role=role: f"{column}:{role}"))
    return pl.concat(wide, how="horizontal")


def _ranks_by_role(ranks: pl.Series, roles: Sequence[str]) -> pl.DataFrame:
    """`stratum:<role>` and `rank:<role>` of the long form, in which every pair has the roles in alphabetical order."""
    frame = ranks.alias("ranks").to_frame()
    by_role = {role: pl.col("ranks").list.get(i, null_on_oob=True) for i, role in enumerate(roles)}
    same_roles = pl.all_horizontal(
        pl.col("ranks").list.len() == len(roles),
        *(of_role.struct.field("model").eq_missing(role) for role, of_role in by_role.items()),
    )
    if not frame.select(same_roles.all()).item():
        raise ValueError(f"not every pair is ranked under the models {list(roles)}; make the ranks again")
    return frame.select(
        of_role.struct.field(column).alias(f"{column}:{role}")
        for role, of_role in by_role.items()
        for column in ("stratum", "rank")
    )


def select(
    candidates: pl.DataFrame, selection: Selection, roles: Sequence[str], reference: pl.DataFrame | None = None
) -> pl.DataFrame:
    """The verdict of one selection on every candidate, sorted by pair_id; columns as VERDICT, after pair_id.

    Taken are the first k = floor(f * n + 1/2) of the n pairs in the pool, or a count, or the longest prefix whose
    answers fit the token budget, in the order of (score, pair_id). Pairs that a filter of the selection keeps out
    count in n, and have no position.

    With `reference`, the candidates of a reference, taken are the pairs that do not come after the last one taken
    of those, in the same order, or all that can be where all of those were; of the reference itself that is the same.
    A random selection's score says nothing of a pair, so it takes the share of its pool that its budget is of the
    reference's.
    """
    ordered = candidates.sort("pair_id")
    if isinstance(selection, RandomSelection):
        return _select_random(ordered, selection, roles, reference)
    rule = _rule(selection, roles)
    if isinstance(selection, RmiBandSelection):
        limit = _Limit()
    elif reference is not None:
        limit = _last_taken(select(reference, selection, roles))
    else:
        limit = _limit(selection.budget, ordered.select(_flag(rule.in_pool).sum()).item())
    return _verdicts(ordered, selection.name, rule, limit)


def _last_taken(verdicts: pl.DataFrame) -> _Cut | _Limit:
    """No limit where all was taken that could be: the budget cut nothing off, and refuses no worse pair of a batch."""
    taken = verdicts.filter("is_selected").sort("position")
    if taken.is_empty():
        return _Limit(num_rows=0)
    if taken.height == verdicts["position"].count():
        return _Limit()
    return _Cut(taken["score"][-1], taken["pair_id"][-1])


def select_all(
    candidates: pl.DataFrame,
    selections: Sequence[Selection],
    roles: Sequence[str],
    reference: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Verdicts of all selections in their order, then of the two controls of the first, the published one.

    Args:
        candidates: of the batch.
        selections: named selections.
        roles: of the models.
        reference: candidates of the reference whose cuts decide; None: budgets are of the batch.
    """
    seeds = {selection.seed for selection in selections if isinstance(selection, RandomSelection)}
    ordered = candidates.sort("pair_id")
    for seed in sorted(seeds | {_CONTROL_SEED}):
        ordered = _with_draws(ordered, seed)
    verdicts = [select(ordered, selection, roles, reference) for selection in selections]
    limit = _control_limit(ordered, selections[0], verdicts[0], is_cut_frozen=reference is not None)
    controls = [_control(ordered, selections[0], verdicts[0], strategy, limit) for strategy in CONTROL_STRATEGIES]
    return pl.concat([*verdicts, *controls])


def _rule(selection: _ScoredSelection, roles: Sequence[str]) -> _Rule:
    match selection:
        case DiffSelection() | SumSelection():
            return _disagreement_rule(selection)
        case RmiBandSelection():
            rank = pl.col(f"rank:{selection.model}")
            outside = (~_within(rank, selection.band), SelectionReason.OUTSIDE_BAND)
            return _Rule(rank.is_not_null(), rank, barriers=(outside,), taken=SelectionReason.IN_BAND)
        case RmiTopSelection():
            rank = pl.col(f"rank:{selection.model}")
            return _Rule(rank.is_not_null(), rank)
        case IfdSelection():
            return _ifd_rule(selection)
        case PplSelection():
            log_ppl = pl.col(f"{selection.measure}:{selection.model}")
            in_pool = log_ppl.is_not_null() & ~_has_too_few_query_tokens(selection.model)
            return _Rule(in_pool, log_ppl, descending=selection.order == "high")
        case LengthSelection():
            return _Rule(_scored_by_all(roles), pl.col(f"num_a_tokens_untruncated:{selection.model}"))
    assert_never(selection)


def _disagreement_rule(selection: DiffSelection | SumSelection) -> _Rule:
    score = pl.col("gap" if isinstance(selection, DiffSelection) else "rank_sum")
    barriers: list[tuple[pl.Expr, SelectionReason]] = []
    if selection.min_gap is not None:
        barriers.append((pl.col("gap") <= selection.min_gap, SelectionReason.GAP_BELOW_MINIMUM))
    if selection.rank_strong is not None:
        outside = ~_within(pl.col("rank:strong"), selection.rank_strong)
        barriers.append((outside, SelectionReason.RANK_STRONG_OUT_OF_RANGE))
    if selection.rmi_strong is not None:
        outside = ~_within(pl.col("rmi:strong"), selection.rmi_strong)
        barriers.append((outside, SelectionReason.RMI_STRONG_OUT_OF_RANGE))
    descending = selection.strategy.endswith("_high")
    return _Rule(pl.col("gap").is_not_null(), score, descending, tuple(barriers))


def _ifd_rule(selection: IfdSelection) -> _Rule:
    ifd = pl.col(f"{selection.measure}:{selection.model}")
    if selection.maximum is None:
        return _Rule(ifd.is_not_null(), ifd)
    return _Rule(ifd.is_not_null(), ifd, barriers=((ifd > selection.maximum, SelectionReason.IFD_ABOVE_MAXIMUM),))


def _within(value: pl.Expr, half_open: tuple[float | None, float | None]) -> pl.Expr:
    """Whether lo < value <= hi; None: no such end.

    Safe on ranks: j / m and a decimal bound of the same value round to the same float.
    """
    low, high = half_open
    return (pl.lit(True) if low is None else value > low) & (pl.lit(True) if high is None else value <= high)


def _has_too_few_query_tokens(role: str) -> pl.Expr:
    """Whether the pair is left unscored for its short Q: its log PPLs are kept as facts, but never select it."""
    reasons = (pl.col(f"null_reason_{score}:{role}") for score in ("rmi", "ifd"))
    return pl.any_horizontal(reason.eq_missing(NullReason.TOO_FEW_QUERY_TOKENS.value) for reason in reasons)


def _scored_by_all(roles: Sequence[str]) -> pl.Expr:
    """Whether every model has an RMI of the pair, or, where RMI is not wanted, an IFD."""
    return pl.all_horizontal(
        pl.col(f"rmi:{role}").is_not_null()
        | (
            (pl.col(f"null_reason_rmi:{role}") == NullReason.NOT_WANTED.value) & pl.col(f"ifd_ppl:{role}").is_not_null()
        ).fill_null(False)
        for role in roles
    )


def _limit(budget: Budget, pool_size: int) -> _Limit:
    """Rows: floor(f * n + 1/2) or the count; else answer tokens. f is the decimal as written: 0.29 * 50 is 14.5."""
    if budget.fraction is not None:
        return _Limit(num_rows=math.floor(Fraction(str(budget.fraction)) * pool_size + Fraction(1, 2)))
    return _Limit(num_rows=budget.count, answer_tokens=budget.answer_tokens)


def _flag(condition: pl.Expr) -> pl.Expr:
    return condition.fill_null(False)


def _verdicts(ordered: pl.DataFrame, name: str, rule: _Rule, limit: _Limit | _Cut) -> pl.DataFrame:
    """Verdicts of a frame sorted by pair_id, in its order."""
    in_pool = _flag(rule.in_pool)
    barriers = ((~in_pool, SelectionReason.NOT_IN_POOL), *rule.barriers)
    judged = ordered.select(
        "pair_id",
        pl.col(_TOKENS).alias("answer_tokens"),
        pl.coalesce(pl.when(_flag(holds)).then(pl.lit(why.value)) for holds, why in barriers).alias("barrier"),
        pl.when(in_pool).then(rule.score).cast(pl.Float64).alias("score"),
        in_pool.sum().cast(pl.Int64).alias("pool_size"),
    ).with_columns(position=_position(rule.descending))
    if isinstance(limit, _Cut):
        num_taken = judged.select(_flag(_up_to(limit, rule.descending)).sum()).item()
        cut = pl.lit(limit.score)
    else:
        num_taken = _num_taken(judged, limit)
        last = pl.col("score").filter(pl.col("position") == num_taken).first()
        cut = pl.when(pl.col("position").count() > num_taken).then(last)
    is_selected = _flag(pl.col("position") <= num_taken)
    return judged.select(
        "pair_id",
        selection=pl.lit(name),
        is_selected=is_selected,
        reason=pl.coalesce(
            "barrier",
            pl.when(is_selected).then(pl.lit(rule.taken.value)),
            pl.lit(SelectionReason.BELOW_CUT.value),
        ),
        score="score",
        position="position",
        pool_size="pool_size",
        cut=cut,
    ).select("pair_id", *VERDICT.inner)


def _position(descending: bool) -> pl.Expr:
    """Place, from 1, among the pairs without a barrier, by score and then in the order of the frame; else null."""
    ascending = -pl.col("score") if descending else pl.col("score")
    return pl.when(pl.col("barrier").is_null()).then(ascending).rank("ordinal").cast(pl.Int64)


def _up_to(cut: _Cut, descending: bool) -> pl.Expr:
    """Whether a placed pair does not come after the cut. Such pairs are the first ones in the order."""
    score = pl.col("score")
    before = score > cut.score if descending else score < cut.score
    level = (score == cut.score) & (pl.col("pair_id") <= cut.pair_id)
    return pl.col("position").is_not_null() & (before | level)


def _num_taken(judged: pl.DataFrame, limit: _Limit) -> int:
    """How many of the first places are taken: the longest prefix within the limit."""
    num_placed = int(judged["position"].count())
    if limit.answer_tokens is None:
        return num_placed if limit.num_rows is None else min(limit.num_rows, num_placed)
    in_order = judged.filter(pl.col("position").is_not_null()).sort("position")["answer_tokens"]
    return int((in_order.cum_sum() <= limit.answer_tokens).sum())


def _select_random(
    ordered: pl.DataFrame, selection: RandomSelection, roles: Sequence[str], reference: pl.DataFrame | None
) -> pl.DataFrame:
    """Pool: pairs that every model could score, and for stratified_random with a stratum under the named model."""
    in_pool = _scored_by_all(roles)
    if selection.strategy == "stratified_random":
        in_pool &= pl.col(f"stratum:{selection.model}").is_not_null()
    membership = ordered.select(_flag(in_pool)).to_series()
    pool = ordered.filter(membership)
    limit = _limit(selection.budget, pool.height)
    if reference is not None and selection.budget.fraction is None:
        limit = _same_share(limit, pool, reference.filter(_flag(in_pool)))
    return _draw(ordered, selection, membership, limit)


def _same_share(limit: _Limit, pool: pl.DataFrame, reference_pool: pl.DataFrame) -> _Limit:
    """A limit of rows or answer tokens of the reference's pool, as the same share of the batch's pool."""
    if limit.answer_tokens is not None:
        tokens, of = (int(frame[_TOKENS].sum()) for frame in (pool, reference_pool))
        return _Limit(answer_tokens=limit.answer_tokens * tokens // of if of else 0)
    assert limit.num_rows is not None
    of = reference_pool.height
    share = Fraction(min(limit.num_rows, of), of) if of else Fraction(0)
    return _Limit(num_rows=math.floor(share * pool.height + Fraction(1, 2)))


def _control_limit(
    ordered: pl.DataFrame, published: Selection, verdicts: pl.DataFrame, *, is_cut_frozen: bool
) -> _Limit:
    """What a control may take: as many rows as the published selection took, or its token budget.

    Where filters leave the published selection fewer answer tokens than its budget, the control gets no more. A token
    budget of a reference is no measure for the batch: the control then gets the tokens that were taken.
    """
    budget = None if isinstance(published, RmiBandSelection) else published.budget
    if budget is None or budget.answer_tokens is None:
        return _Limit(num_rows=int(verdicts["is_selected"].sum()))
    counted = verdicts["is_selected"] if is_cut_frozen else verdicts["position"].is_not_null()
    tokens = int(ordered[_TOKENS].filter(counted).sum())
    return _Limit(answer_tokens=tokens if is_cut_frozen else min(budget.answer_tokens, tokens))


def _control(
    ordered: pl.DataFrame, published: Selection, verdicts: pl.DataFrame, strategy: str, limit: _Limit
) -> pl.DataFrame:
    """A random selection from the published one's pool, up to the limit."""
    model = getattr(published, "model", "strong")
    control = RandomSelection.model_validate(
        {"name": f"{CONTROL_PREFIX}{strategy}", "strategy": strategy, "model": model, "seed": _CONTROL_SEED}
    )
    return _draw(ordered, control, verdicts["reason"] != SelectionReason.NOT_IN_POOL.value, limit)


def _draw(ordered: pl.DataFrame, selection: RandomSelection, in_pool: pl.Series, limit: _Limit) -> pl.DataFrame:
    """Verdicts in the order of the draws; stratified: in the order of `_stratified_places`."""
    drawn = _with_draws(ordered, selection.seed).with_columns(in_pool.alias("in_pool"))
    score = pl.col(_draw_column(selection.seed))
    if selection.strategy == "stratified_random":
        # A pair of the published pool may lack a stratum (ppl, ifd): such pairs are a stratum of their own.
        stratum = pl.when("in_pool").then(pl.col(f"stratum:{selection.model}").fill_null(_NO_STRATUM))
        drawn = drawn.with_columns(stratum=stratum)
        score = _stratified_places(drawn["stratum"], score, limit.num_rows)
    return _verdicts(drawn, selection.name, _Rule(pl.col("in_pool"), score, descending=False), limit)


def _stratified_places(stratum: pl.Series, draw: pl.Expr, num_rows: int | None) -> pl.Expr:
    """(i - 1/2) / q for the i-th draw of a stratum, from 1, whose quota is q; beyond it 1 + (i - q - 1/2) / (n - q).

    Sorted by it, the first `num_rows` pairs are exactly the quotas, spread evenly. Without a number of rows (a token
    budget) the quota is the whole stratum n, and a prefix of k rows of S strata holds k * n / N of it, give or take
    1/2 + S * n / (2 * N): one row where strata are of equal size.
    """
    sizes = dict(stratum.drop_nulls().value_counts().iter_rows())
    total = sum(sizes.values())
    taken = quotas(sizes, total if num_rows is None else min(num_rows, total))
    place = pl.when(pl.col("stratum").is_not_null()).then(draw).rank("ordinal").over("stratum").cast(pl.Float64) - 0.5
    quota, size = (
        pl.col("stratum").replace_strict(list(of), list(of.values()), default=None, return_dtype=pl.Float64)
        for of in (taken, sizes)
    )
    return pl.when(place < quota).then(place / quota).otherwise(1 + (place - quota) / (size - quota))


def quotas(sizes: Mapping[int, int], num_rows: int) -> dict[int, int]:
    """floor(k * n_s / n), and one more for the largest remainders until k are given; ties to the lower stratum."""
    total = sum(sizes.values())
    shares = {stratum: divmod(num_rows * size, total) for stratum, size in sorted(sizes.items())}
    left = num_rows - sum(whole for whole, _ in shares.values())
    larger = set(sorted(shares, key=lambda stratum: (-shares[stratum][1], stratum))[:left])
    return {stratum: whole + (stratum in larger) for stratum, (whole, _) in shares.items()}


def _draw_column(seed: int) -> str:
    return f"draw:{seed}"


def _with_draws(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    if _draw_column(seed) in frame.columns:
        return frame
    return frame.with_columns(draws(frame["pair_id"], seed).alias(_draw_column(seed)))


def draws(pair_ids: pl.Series, seed: int) -> pl.Series:
    """floor(h / 2**11) / 2**53, in [0, 1), of h = the 64-bit big-endian blake2b of pair_id under the key of `seed`.

    hashlib, since Series.hash is not stable across versions of Polars.
    """
    key = hashlib.blake2b(str(seed).encode()).digest()
    digests = [hashlib.blake2b(pair_id.encode(), key=key, digest_size=8).digest() for pair_id in pair_ids]
    hashed = pl.Series(digests, dtype=pl.Binary).bin.reinterpret(dtype=pl.UInt64, endianness="big")
    return (hashed // 2**11).cast(pl.Float64) / 2**53
