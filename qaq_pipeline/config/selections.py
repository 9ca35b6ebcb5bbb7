"""The settings of selections: one closed model per strategy, and their budgets.

Does not belong here: what every selection has (`conditions`), and what a strategy does (`selection.strategies`).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from qaq_pipeline.config.base import ROLE_NAME, Closed
from qaq_pipeline.config.conditions import Composed

CONTROL_STRATEGIES: tuple[Literal["random", "stratified_random"], ...] = ("random", "stratified_random")
CONTROL_PREFIX = "control_"
"""Prefix of a control's name, before the control's strategy."""


class Budget(Closed):
    """The size of a selection: exactly one of the three fields."""

    fraction: float | None = Field(None, gt=0, le=1)
    """Share of the selection's pool: floor(f * n + 1/2) of n pairs."""
    count: int | None = Field(None, ge=1)
    """Pairs per batch; with `ranking.pool: reference`, pairs of the reference."""
    answer_tokens: int | None = Field(None, ge=1)
    """Maximum total of answer tokens, counted by the strong model's tokenizer before any answer is truncated: per
    batch, or with `ranking.pool: reference`, in the reference."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        self.require_one_of("fraction", "count", "answer_tokens")
        return self


def _check_range(ends: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    low, high = ends
    if low is not None and high is not None and not low < high:
        raise ValueError(f"must be [lo, hi] with lo < hi; got {list(ends)}")
    return ends


_Rank = Annotated[float, Field(ge=0, le=1)]
_RankRange = Annotated[tuple[_Rank, _Rank], AfterValidator(_check_range)]
_RmiRange = Annotated[tuple[float | None, float | None], AfterValidator(_check_range)]


class _Budgeted(Composed):
    budget: Budget = Budget(fraction=0.25, count=None, answer_tokens=None)
    """Size of the selection."""


class _OfModel(Composed):
    model: str = Field("strong", pattern=ROLE_NAME)
    """Role of the model whose scores order the pairs. length: whose tokenizer counts the tokens. stratified_random:
    whose strata are used. random: without effect."""


class _Disagreement(_Budgeted):
    min_gap: float | None = Field(None, ge=-1, le=1)
    """Take only pairs whose gap is above this."""
    rank_strong: _RankRange | None = None
    """Take only pairs with lo < rank_strong <= hi. Excludes pairs that both models rank low."""
    rmi_strong: _RmiRange | None = None
    """Take only pairs with lo < RMI of the strong model <= hi, in nats/token; null: no limit. A calibration suggests lo
    and hi: most mismatches have an RMI below lo, and most echoes an RMI above hi."""


class DiffSelection(_Disagreement):
    """The pairs of all strata with the highest gap (diff_high: the paper's QAQ) or the lowest gap (diff_low)."""

    strategy: Literal["diff_high", "diff_low"]


class SumSelection(_Disagreement):
    """The pairs of all strata with the highest (sum_high) or the lowest (sum_low) rank_strong + rank_weak."""

    strategy: Literal["sum_high", "sum_low"]


class RmiBandSelection(_OfModel):
    """Every pair whose stratified rank lies in (lo, hi]: its share is fixed by the band, not by a budget."""

    strategy: Literal["rmi_band"]
    band: _RankRange = (0.5, 0.75)
    """Half-open range (lo, hi] of the rank."""


class RmiTopSelection(_Budgeted, _OfModel):
    """The pairs with the highest rank of RMI within their strata."""

    strategy: Literal["rmi_top"]


class IfdSelection(_Budgeted, _OfModel):
    """The pairs with the highest instruction-following difficulty (IFD), the baseline that QAQ argues against."""

    strategy: Literal["ifd"]
    measure: Literal["ifd_ppl", "ifd_loss"] = "ifd_ppl"
    """Ratio of perplexities, or of losses."""
    maximum: float | None = Field(1.0, gt=0)
    """Take no pair above this value. Above 1, Q makes A less likely."""


class PplSelection(_Budgeted, _OfModel):
    """The pairs with the highest or the lowest perplexity."""

    strategy: Literal["ppl"]
    measure: Literal["log_ppl_q", "log_ppl_q_given_a", "log_ppl_a", "log_ppl_a_given_q"] = "log_ppl_a_given_q"
    """Perplexity that orders the pairs."""
    order: Literal["high", "low"] = "high"
    """Take the highest or the lowest values."""


class LengthSelection(_Budgeted, _OfModel):
    """The pairs with the most answer tokens."""

    strategy: Literal["length"]


class RandomSelection(_Budgeted, _OfModel):
    """Pairs in a random order, the same on every machine. stratified_random takes the same share of every stratum."""

    strategy: Literal["random", "stratified_random"]
    seed: int = Field(0, ge=0)
    """Seed of the hash that orders the pairs."""


Selection = Annotated[
    DiffSelection
    | SumSelection
    | RmiBandSelection
    | RmiTopSelection
    | IfdSelection
    | PplSelection
    | LengthSelection
    | RandomSelection,
    Field(discriminator="strategy"),
]
