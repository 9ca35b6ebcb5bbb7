"""Derives the rank-free scores log PPL, RMI and IFD from stored sums and token counts.

Belongs here: the formulas, as Polars expressions over whole tables. A pair without a score has null and a reason.
Does not belong here: strata and ranks (`selection.ranks`), models, files, Dagster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import EligibilitySettings
from qaq_pipeline.schema.tables import RmiScores, dtypes
from qaq_pipeline.schema.vocabularies import QUANTITIES_OF, NullReason, Quantity

_CARRIED = (
    "identity",
    "identity_after",
    "identity_hash",
    "frame",
    "template",
    "end_ids",
    "scoring",
    "scored_with",
    "warnings",
)


def facts(logprobs: Mapping[str, Any], eligibility: EligibilitySettings) -> dict[str, Any]:
    """The part of the provenance of RmiScores that their input does not show, from the provenance of Logprobs."""
    return {
        **{key: logprobs[key] for key in _CARRIED if key in logprobs},
        "scored_from": logprobs["inputs"],
        "eligibility": eligibility.model_dump(mode="json"),
    }


def rmi_scores(logprobs: pl.DataFrame, eligibility: EligibilitySettings) -> pl.DataFrame:
    """RmiScores of a Logprobs frame, sorted by pair_id.

    log_ppl_x = sum_nll_x / tokens of x
    rmi       = log_ppl_q - log_ppl_q_given_a
    ifd_ppl   = exp(log_ppl_a_given_q - log_ppl_a)
    ifd_loss  = log_ppl_a_given_q / log_ppl_a
    nll_end   = sum_nll_end

    A score is null, with a reason, if a sum is null (the sum's reason), if Q has fewer tokens than
    `eligibility.min_query_tokens`, or if the formula has no finite value. If one IFD is null, so is the other.
    """
    divisors = {one: pl.col(one.tokens_column) for one in Quantity if one.tokens_column}
    log_ppl = {f"log_ppl_{one}": pl.col(f"sum_nll_{one}") / divisor for one, divisor in divisors.items()}
    few = pl.col("num_q_tokens") < eligibility.min_query_tokens
    scored = logprobs.lazy().sort("pair_id").with_columns(**log_ppl)
    scored = scored.with_columns(
        rmi=pl.col("log_ppl_q") - pl.col("log_ppl_q_given_a"),
        ifd_ppl=(pl.col("log_ppl_a_given_q") - pl.col("log_ppl_a")).exp(),
        ifd_loss=pl.col("log_ppl_a_given_q") / pl.col("log_ppl_a"),
        nll_end=pl.col("sum_nll_end"),
        is_short_query=pl.col("num_q_tokens") < eligibility.short_query_tokens,
    ).with_columns(
        null_reason_rmi=_null_reason(QUANTITIES_OF["rmi"], few, ("rmi",)),
        null_reason_ifd=_null_reason(QUANTITIES_OF["ifd"], few, ("ifd_ppl", "ifd_loss")),
    )
    reasons = {"rmi": "null_reason_rmi", "ifd_ppl": "null_reason_ifd", "ifd_loss": "null_reason_ifd"}
    kept = {score: pl.when(pl.col(reason).is_null()).then(score) for score, reason in reasons.items()}
    return scored.with_columns(**kept).select(list(dtypes(RmiScores))).collect()


def _null_reason(parts: tuple[Quantity, ...], few_tokens: pl.Expr, values: tuple[str, ...]) -> pl.Expr:
    """The first reason that applies: a sum's (failures before not_wanted), too few tokens, no finite value."""
    sums = [pl.col(f"null_reason_{part}") for part in parts]
    failures = [pl.when(reason != NullReason.NOT_WANTED.value).then(reason) for reason in sums]
    non_finite = pl.any_horizontal(~pl.col(value).is_finite() for value in values)
    return pl.coalesce(
        *failures,
        *sums,
        pl.when(few_tokens).then(pl.lit(NullReason.TOO_FEW_QUERY_TOKENS.value)),
        pl.when(non_finite).then(pl.lit(NullReason.NON_FINITE.value)),
    )
