"""Parts that the settings models share: the closed base class, the error, the patterns of names, and the hash.

Does not belong here: a setting.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

ROLE_NAME = r"^[a-z][a-z0-9_]{0,31}$"
NAME = r"^[a-z][a-z0-9_-]{0,63}$"
"""A selection, a reference or a benchmark."""


class SettingsError(ValueError):
    """The settings cannot be used. The text names the file, the field, the value and what is allowed."""


class Closed(BaseModel):
    """A frozen model that refuses fields that are not declared."""

    # Input is hidden since it may be a secret: SettingsError shows the values that may be shown.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def settings_hash(*parts: object) -> str:
    """Hash of the settings that an asset reads (16 hex digits): part of its code version and provenance.

    Args:
        parts: settings models, or containers and values of JSON.
    """
    values = json.dumps(to_jsonable_python(parts), sort_keys=True)
    return hashlib.blake2b(values.encode(), digest_size=8).hexdigest()
