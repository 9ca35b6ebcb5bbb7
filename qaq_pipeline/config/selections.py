"""The settings of selections: one closed model per strategy, and their budgets.

Does not belong here: what a strategy does (`selection.strategies`).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qaq_pipeline.config.base import NAME, ROLE_NAME, Closed

CONTROL_STRATEGIES = ("random", "stratified_random")
CONTROL_PREFIX = "control_"
"""Prefix of a control's name, before the control's strategy."""


class Budget(Closed):
    """The size of a selection: exactly one of the three fields."""

    fraction: float | None = Field(
        None, gt=0, le=1, description="Share of the selection's pool: floor(f * n + 1/2) of n pairs."
    )
    count: int | None = Field(
        None, ge=1, description="Pairs per batch; with `ranking.pool: reference`, pairs of the reference."
    )
    answer_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of answer tokens, counted before truncation with the strong model's tokenizer: per batch, "
        "or with `ranking.pool: reference`, in the reference.",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("fraction", "count", "answer_tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of fraction, count, answer_tokens; got {given or 'none'}")
        return self


_NAME = Field(pattern=NAME, description="Name of the selection, as in the decisions and the exports.")
_ROLE = Field("strong", pattern=ROLE_NAME, description="Role of the model that provides the score.")
_BUDGET = Field(Budget(fraction=0.25, count=None, answer_tokens=None), description="Size of the selection.")


class _Disagreement(Closed):
    name: str = _NAME
    budget: Budget = _BUDGET
    min_gap: float | None = Field(None, ge=-1, le=1, description="Take only pairs whose gap is above this.")
    rank_strong: tuple[float, float] | None = Field(
        None, description="Take only pairs with lo < rank_strong <= hi. Excludes pairs that both models rank low."
    )
    rmi_strong: tuple[float | None, float | None] | None = Field(
        None,
        description="Take only pairs with lo < RMI of the strong model <= hi, in nats/token; null: no limit. A "
        "calibration suggests lo and hi: mismatches lie below lo, echoes above hi.",
    )

    @model_validator(mode="after")
    def _range(self) -> Self:
        _check_range("rank_strong", self.rank_strong)
        low, high = self.rmi_strong or (None, None)
        if low is not None and high is not None and not low < high:
            raise ValueError(f"rmi_strong must be [lo, hi] with lo < hi; got {[low, high]}")
        return self


class DiffSelection(_Disagreement):
    """Global top-k by gap (diff_high: the paper's QAQ) or by lowest gap (diff_low)."""

    strategy: Literal["diff_high", "diff_low"]


class SumSelection(_Disagreement):
    """Global top-k by rank_strong + rank_weak (sum_high) or by the lowest sum (sum_low)."""

    strategy: Literal["sum_high", "sum_low"]


class RmiBandSelection(Closed):
    """Every pair whose stratified rank lies in (lo, hi]: its share is fixed by the band, not by a budget."""

    name: str = _NAME
    strategy: Literal["rmi_band"]
    band: tuple[float, float] = Field((0.5, 0.75), description="Half-open range (lo, hi] of the rank.")
    model: str = _ROLE

    @model_validator(mode="after")
    def _range(self) -> Self:
        _check_range("band", self.band)
        return self


class RmiTopSelection(Closed):
    """Global top-k by the stratified rank of RMI."""

    name: str = _NAME
    strategy: Literal["rmi_top"]
    budget: Budget = _BUDGET
    model: str = _ROLE


class IfdSelection(Closed):
    """Global top-k by instruction-following difficulty, the baseline that QAQ argues against."""

    name: str = _NAME
    strategy: Literal["ifd"]
    budget: Budget = _BUDGET
    model: str = _ROLE
    measure: Literal["ifd_ppl", "ifd_loss"] = Field("ifd_ppl", description="Ratio of perplexities, or of losses.")
    maximum: float | None = Field(
        1.0, gt=0, description="Take no pair above this value. Above 1, Q makes A less likely."
    )


class PplSelection(Closed):
    """Global top-k by a perplexity."""

    name: str = _NAME
    strategy: Literal["ppl"]
    budget: Budget = _BUDGET
    model: str = _ROLE
    measure: Literal["log_ppl_q", "log_ppl_q_given_a", "log_ppl_a", "log_ppl_a_given_q"] = Field(
        "log_ppl_a_given_q", description="Perplexity that orders the pairs."
    )
    order: Literal["high", "low"] = Field("high", description="Take the highest or the lowest values.")


class LengthSelection(Closed):
    """Global top-k by the number of answer tokens, longest first."""

    name: str = _NAME
    strategy: Literal["length"]
    budget: Budget = _BUDGET
    model: str = _ROLE


class RandomSelection(Closed):
    """Pairs in the order of a keyed hash of pair_id; stratified: the same share of every stratum of PPL(Q)."""

    name: str = _NAME
    strategy: Literal["random", "stratified_random"]
    budget: Budget = _BUDGET
    model: str = _ROLE
    seed: int = Field(0, ge=0, description="Key of the hash that orders the pairs.")


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


def _check_range(field: str, value: tuple[float, float] | None) -> None:
    """Raise ValueError if the range is not within [0, 1] or is empty."""
    if value is not None and not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"{field} must be [lo, hi] with 0 <= lo < hi <= 1; got {list(value)}")
