"""Batch gates: checks that a batch is fit for scoring and for publication. Polars only.

Belongs here: the condition of each gate, and the verdict in words. Does not belong here: bugs, which raise before
anything is written, and the rows of a gated batch (decisions lists them as `batch_gated`).

Each gate is judged once and its verdict stored once, with the table of the asset that judges it: before scoring with
screened_data, after scoring with the rmi_scores of each model. All later steps of any run read the stored verdicts; an
asset check could only stop the assets of its own run. Tables whose rows a verdict decides also record it: planted_rows
that of the screening, decisions (from which a publication reads it) and calibration the first of all. The column
batch_gate of screened_data shows the reason to readers of the rows alone, and makes the data version change with the
verdict; no code reads it.
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
"""Key, in the provenance, of the limit with which scores were judged. It is stored because a changed limit changes no
data version, so a stale verdict would not show."""


class StaleVerdictError(ValueError):
    """A stored verdict was made with another limit than the settings have. The text says what to materialise."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The reason why a batch is stopped."""

    reason: GateReason
    sentence: str

    def as_json(self) -> dict[str, str]:
        """Return the verdict as a table's provenance stores it."""
        return asdict(self)


def as_provenance(gate: Gate | None) -> dict[str, Any]:
    """Return the verdict as part of a table's provenance; empty if the batch passed."""
    return {} if gate is None else {PROVENANCE_KEY: gate.as_json()}


def of_provenance(provenance: Mapping[str, Any]) -> Gate | None:
    """Read the verdict stored with a table; None: it passed."""
    stored = provenance.get(PROVENANCE_KEY)
    return None if stored is None else Gate(GateReason(stored["reason"]), stored["sentence"])


def of_batch(
    batch: str, screened: Mapping[str, Any], rmi_scores: Mapping[str, Mapping[str, Any]], settings: GateSettings
) -> Gate | None:
    """Return the first gate that a batch fails, from the stored verdicts.

    A changed model comes before too few scorable pairs; within each, models are ordered by role.

    Args:
        batch: name of the batch.
        screened: provenance of screened_data.
        rmi_scores: provenance of rmi_scores by role.
        settings: the current limits.

    Raises:
        StaleVerdictError: scores were judged with another limit.
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
    """Return whether a batch is gated by a verdict that is not in its stored provenance (None: nothing stored)."""
    return gate is not None and (before is None or gate != of_provenance(before))


def withdrawn(reason: str) -> Gate:
    """Return the verdict on a withdrawn batch."""
    return Gate(GateReason.BATCH_WITHDRAWN, f"it was withdrawn: {reason}")


def cannot_tell(sentence: str) -> Gate:
    """Return the verdict on a batch about which the scores tell nothing."""
    return Gate(
        GateReason.CANNOT_TELL,
        f"{sentence}; look at examples on the batch's page, then correct the delivery, choose other models, or set "
        "gates.must_tell: false",
    )


def before_scoring(screened: pl.DataFrame, settings: GateSettings) -> Gate | None:
    """Return the first gate that a batch's ScreenedData fails."""
    if screened.is_empty():
        return Gate(GateReason.EMPTY_BATCH, "it has no row; deliver it again with some")
    unreadable = screened.filter(pl.col("reason") == RejectReason.UNREADABLE_FILE.value)
    if not unreadable.is_empty():
        faults = " ".join(unreadable["evidence"].to_list()).rstrip(".")
        return Gate(GateReason.UNREADABLE_FILE, f"one of its files cannot be read: {faults}; then deliver it again")
    rejected = screened.filter(pl.col("status") == Status.REJECTED.value).height
    limit = settings.max_rejected_share
    if limit is not None and rejected / screened.height > limit:
        return Gate(
            GateReason.TOO_MANY_REJECTED,
            f"{rejected} of its {screened.height} rows cannot be read, more than the share of {limit:g} "
            f"(gates.max_rejected_share): {commonest_faults(screened, 'evidence')}. Fix the delivery, name the fields "
            "in records.fields, or raise the share",
        )
    return None


def commonest_faults(rows: pl.DataFrame, detail: str = "detail", most: int = 3) -> str:
    """The reasons of rejected rows, commonest first, each with the detail of its first row; empty: there are none.

    Args:
        rows: with `status`, `reason`, and the detail.
        detail: name of its column.
        most: number of reasons.
    """
    rejected = rows.filter(status=Status.REJECTED.value)
    reasons = rejected.group_by("reason", maintain_order=True).agg(pl.len(), pl.col(detail).first())
    worst = reasons.sort("len", descending=True, maintain_order=True).head(most)
    return "; ".join(f"{reason} ({count:,}): {detail}" for reason, count, detail in worst.iter_rows())


def after_scoring(
    role: str, scores: pl.DataFrame, provenance: Mapping[str, Any], settings: GateSettings
) -> Gate | None:
    """Return the first gate that a batch fails by the RmiScores of a model and the provenance of its logprobs.

    A batch without pairs passes.
    """
    if "identity_after" in provenance:
        before, after = provenance["identity"], provenance["identity_after"]
        return Gate(
            GateReason.MODEL_CHANGED,
            f"the files of the {role} model {before['model']} changed while it scored ({before['revision']} "
            f"before, {after['revision']} after), so its scores may come from either; run the batch again: scores "
            "made after the change are not in the cache",
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
        "(gates.min_scorable_share); see the null reasons in logprobs, fix their cause, or lower the share",
    )
