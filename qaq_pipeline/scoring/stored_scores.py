"""The stored scores of a batch under every model, and whether two of them can be compared.

Belongs here: what scores must have in common. Does not belong here: the scores themselves (`rmi_scores`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qaq_pipeline.storage.stored_table import StoredTable

Scores = Mapping[str, StoredTable]
"""rmi_scores of a batch, by model."""


def scored_by(scores: Scores) -> dict[str, Any]:
    """What scores must have in common to be ranked together, by role: the model, its prompts and its window."""
    return {
        role: {key: table.provenance[key] for key in ("identity_hash", "scoring")} for role, table in scores.items()
    }


def identities(scores: Scores) -> dict[str, Any]:
    """ScoreIdentities by role."""
    return {role: table.provenance["identity"] for role, table in scores.items()}


def differently_scored(expected: Mapping[str, Any], scores: Scores) -> list[str]:
    """The models whose scores cannot be compared with those that were `scored_by` the expected ones."""
    return [role for role, found in scored_by(scores).items() if expected.get(role) != found]
