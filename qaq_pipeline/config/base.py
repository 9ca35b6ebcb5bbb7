"""What every settings model shares: the closed base class, its error, names and hashes.

Does not belong here: a setting.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

ROLE_NAME = r"^[a-z][a-z0-9_]{0,31}$"
SELECTION_NAME = r"^[a-z][a-z0-9_-]{0,63}$"
CONTROL_STRATEGIES = ("random", "stratified_random")
CONTROL_PREFIX = "control_"


class SettingsError(ValueError):
    """The settings cannot be used. The text names the file, the field, the value and what is allowed."""


class Closed(BaseModel):
    """Frozen, and without fields that are not declared."""

    # SettingsError shows the values that may be shown.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def settings_hash(*parts: object) -> str:
    """Hash of the settings that an asset reads (16 hex digits): part of its code version and provenance.

    Args:
        parts: settings models, or containers and values of JSON.
    """
    values = json.dumps(to_jsonable_python(parts), sort_keys=True)
    return hashlib.blake2b(values.encode(), digest_size=8).hexdigest()
