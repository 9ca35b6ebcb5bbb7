"""Data gates: whether a batch is fit to be scored, and to be published. Polars only.

Belongs here: the condition of each gate, and the verdict in words. Does not belong here: faults of the code, which
raise before anything is written, and the rows of a gated batch (decisions lists them as `batch_gated`).

Each gate is judged once and its verdict stored once, with the table of the asset that judges it: before scoring with
screened_data, after scoring with the rmi_scores of each model. All that follows reads the stored verdicts, in whichever
run: an asset check could stop the assets of its own run only. Rows that a verdict decides record it with their table:
decisions, from which a publication reads it, and planted_rows. The column batch_gate of screened_data shows the reason
to those who read the rows alone, and changes their data version with the verdict; no code reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import GateSettings
from qaq_pipeline.schema.vocabularies import GateReason, RejectReason, Status

PROVENANCE_KEY = "gate"
LIMIT_KEY = "min_scorable_share"
"""Key of the limit under which scores were judged: no data version shows that a verdict is stale."""


class StaleVerdictError(ValueError):
    """A stored verdict was made under another limit than the settings. The text says what to materialise."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The reason why a batch goes no further."""

    reason: GateReason
    sentence: str

    def as_json(self) -> dict[str, str]:
        """The verdict as a table's provenance stores it."""
        return asdict(self)


def as_provenance(gate: Gate | None) -> dict[str, Any]:
    """The verdict as part of a table's provenance; nothing where the batch passed."""
    return {} if gate is None else {PROVENANCE_KEY: gate.as_json()}


def of_provenance(provenance: Mapping[str, Any]) -> Gate | None:
    """The verdict that is stored with a table; None: it passed."""
    stored = provenance.get(PROVENANCE_KEY)
    return None if stored is None else Gate(GateReason(stored["reason"]), stored["sentence"])


def of_batch(
    batch: str, screened: Mapping[str, Any], rmi_scores: Mapping[str, Mapping[str, Any]], settings: GateSettings
) -> Gate | None:
    """The first gate that a batch does not pass, from the stored verdicts.

    A changed model comes before too few scorable pairs, then the models in the order of their roles.

    Args:
        batch: name of the batch.
        screened: provenance of screened_data.
        rmi_scores: provenance of rmi_scores by role.
        settings: the limits in force.

    Raises:
        StaleVerdictError: scores were judged under another limit.
    """
    for role, made_of in sorted(rmi_scores.items()):
        if made_of[LIMIT_KEY] != settings.min_scorable_share:
            raise StaleVerdictError(
                f"rmi_scores|{role} of batch {batch} were judged with gates.min_scorable_share {made_of[LIMIT_KEY]}, "
                f"the settings say {settings.min_scorable_share}; materialise rmi_scores of this batch first (or "
                "`qaq refresh`)"
            )
    found = [gate for _, made_of in sorted(rmi_scores.items()) if (gate := of_provenance(made_of)) is not None]
    after = sorted(found, key=lambda gate: gate.reason is not GateReason.MODEL_CHANGED)
    return of_provenance(screened) or next(iter(after), None)


def is_new(gate: Gate | None, before: Mapping[str, Any] | None) -> bool:
    """Whether a batch is gated by another verdict than the stored provenance says; None: nothing was stored."""
    return gate is not None and (before is None or gate != of_provenance(before))


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
    role: str, scores: pl.DataFrame, provenance: Mapping[str, Any], settings: GateSettings
) -> Gate | None:
    """The first gate that a batch does not pass by the RmiScores of one model, and the provenance of its logprobs.

    A batch without a pair passes.
    """
    if "identity_after" in provenance:
        before, after = provenance["identity"], provenance["identity_after"]
        return Gate(
            GateReason.MODEL_CHANGED,
            f"the files of the {role} model {before['model']} changed while it scored ({before['revision']} "
            f"before, {after['revision']} after), so its scores may be of either; run the batch again: what was "
            "scored after the change is not in the cache",
        )
    limit, num_pairs = settings.min_scorable_share, scores.height
    if limit is None or num_pairs == 0:
        return None
    scorable = scores.select((pl.col("rmi").is_not_null() | pl.col("ifd_ppl").is_not_null()).sum()).item()
    if scorable / num_pairs >= limit:
        return None
    return Gate(
        GateReason.TOO_FEW_SCORABLE,
        f"the {role} model could score {scorable} of its {num_pairs} pairs, less than the share of {limit:g} "
        "(gates.min_scorable_share); see the null reasons in logprobs, mend their cause, or lower the share",
    )
