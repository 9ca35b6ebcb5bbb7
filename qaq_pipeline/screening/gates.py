"""Data gates: whether a batch is fit to be scored, and to be published. Polars only.

Belongs here: what each gate asks, and the verdict in words. Does not belong here: faults of the code, which raise
before anything is written, and what becomes of a gated batch (its rows stand in decisions as `batch_gated`).

A verdict is stored with the table that it was made of, so that whatever reads the table later knows it, in whichever
run: an asset check could stop the assets of its own run only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import GateSettings
from qaq_pipeline.schema.vocabularies import GateReason, RejectReason, Status

PROVENANCE_KEY = "gate"


@dataclass(frozen=True, slots=True)
class Gate:
    """Why a batch goes no further."""

    reason: GateReason
    sentence: str

    def as_json(self) -> dict[str, str]:
        """As it is stored in a table's provenance."""
        return asdict(self)


def of_provenance(provenance: Mapping[str, Any]) -> Gate | None:
    """The verdict that is stored with a table; None: it passed."""
    stored = provenance.get(PROVENANCE_KEY)
    return None if stored is None else Gate(GateReason(stored["reason"]), stored["sentence"])


def withdrawn(reason: str) -> Gate:
    """The verdict on a batch that was withdrawn."""
    return Gate(GateReason.BATCH_WITHDRAWN, f"it was withdrawn: {reason}")


def before_scoring(screened: pl.DataFrame, settings: GateSettings) -> Gate | None:
    """The first gate that a batch's ScreenedData does not pass."""
    if screened.is_empty():
        return Gate(GateReason.EMPTY_BATCH, "it has no row; deliver it again with some")
    unreadable = screened.filter(pl.col("reason") == RejectReason.UNREADABLE_FILE.value)
    if not unreadable.is_empty():
        faults = " ".join(unreadable["evidence"].to_list()).rstrip(".")
        return Gate(GateReason.UNREADABLE_FILE, f"a file of it cannot be read: {faults}; then deliver it again")
    rejected = screened.filter(pl.col("status") == Status.REJECTED.value).height
    limit = settings.max_rejected_share
    if limit is not None and rejected / screened.height > limit:
        return Gate(
            GateReason.TOO_MANY_REJECTED,
            f"{rejected} of its {screened.height} rows cannot be read, more than the share of {limit:g} "
            "(gates.max_rejected_share); mend the delivery, or raise the share",
        )
    return None


def after_scoring(
    scores: Mapping[str, pl.DataFrame], provenance: Mapping[str, Mapping[str, Any]], settings: GateSettings
) -> Gate | None:
    """The first gate that a batch does not pass by the RmiScores of its models, and their provenance.

    A batch without a pair passes.
    """
    for role, made_of in sorted(provenance.items()):
        if "identity_after" in made_of:
            before, after = made_of["identity"], made_of["identity_after"]
            return Gate(
                GateReason.MODEL_CHANGED,
                f"the files of the {role} model {before['model']} changed while it scored ({before['revision']} "
                f"before, {after['revision']} after), so its scores may be of either; run the batch again: what was "
                "scored after the change is not in the cache",
            )
    num_pairs = next(iter(scores.values())).height
    limit = settings.min_scorable_share
    if limit is None or num_pairs == 0:
        return None
    for role, frame in sorted(scores.items()):
        scorable = frame.select((pl.col("rmi").is_not_null() | pl.col("ifd_ppl").is_not_null()).sum()).item()
        if scorable / num_pairs < limit:
            return Gate(
                GateReason.TOO_FEW_SCORABLE,
                f"the {role} model could score {scorable} of its {num_pairs} pairs, less than the share of {limit:g} "
                "(gates.min_scorable_share); see the null reasons in logprobs, mend their cause, or lower the share",
            )
    return None
