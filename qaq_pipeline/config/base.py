"""Shared parts of the settings models: the closed base class, the error, the name patterns, and the hash.

Does not belong here: a setting.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

ROLE_NAME = r"^[a-z][a-z0-9_]{0,31}$"
NAME = r"^[a-z][a-z0-9_-]{0,63}$"
"""Pattern of the name of a selection, a reference or a benchmark."""


class SettingsError(ValueError):
    """The settings are invalid. The text names the file, the field, the value and the allowed values."""


class Closed(BaseModel):
    """A frozen model that rejects undeclared fields."""

    # Pydantic hides the input because it may be a secret. SettingsError shows the values that are safe to show.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def settings_hash(*parts: object) -> str:
    """Hash the settings that an asset reads (16 hex digits): part of its code version and provenance.

    Args:
        parts: settings models, or JSON values.
    """
    values = json.dumps(to_jsonable_python(parts), sort_keys=True)
    return hashlib.blake2b(values.encode(), digest_size=8).hexdigest()
