"""Something in a text that must not be published: its kind and its place, never the thing itself.

Belongs here: what the searches return. Does not belong here: what they look for (`secrets`, `personal_data`).
"""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """What was found in a text."""

    kind: str
    place: int
    """Its first character, counted from 1."""
