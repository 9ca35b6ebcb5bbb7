"""Shared parts of the settings models: the closed base class, the error, the name patterns, checks, and the hash.

Does not belong here: a setting.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

ROLE_NAME = r"^[a-z][a-z0-9_]{0,31}$"
NAME = r"^[a-z][a-z0-9_-]{0,63}$"
"""Pattern of the name of a selection, a reference or a benchmark."""

_USER = re.compile(r"(?<=://)[^\s?#'\"]*:[^\s?#'\"]*@|(?:(?<=http://)|(?<=https://))[^\s?#'\"]+@")
"""User and password of a URL. Elsewhere than in HTTP a user alone is no secret: Azure has the container there."""
_PARAMETER = re.compile(
    r"([?&;#](?:[^=&;#\s]*[-_])?(?:access|api)?"
    r"(?:sig|signature|token|key|keyid|secret|password|credential|credentials|auth|code)=)[^&;#\s'\")]+",
    re.IGNORECASE,
)
"""A parameter of a URL that gives access, such as `X-Amz-Signature`."""


class SettingsError(ValueError):
    """The settings are invalid. The text names the file, the field, the value and the allowed values."""


class Closed(BaseModel):
    """A frozen model that rejects undeclared fields. The docstring under a field is its description in the docs."""

    # Pydantic hides the input because it may be a secret. SettingsError shows the values that are safe to show.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)

    def require_one_of(self, *fields: str) -> None:
        """Raise ValueError unless exactly one of the fields is given."""
        given = [name for name in fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(fields)}; got {given or 'none'}")


def require_distinct(what: str, names: Iterable[str]) -> None:
    """Raise ValueError if a name appears twice."""
    for name, number in Counter(names).items():
        if number > 1:
            raise ValueError(f"{what}: {str(name)!r} appears twice")


def without_credentials(text: str) -> str:
    """A text whose URLs have no user, no password, and no values of parameters that give access."""
    return _PARAMETER.sub(r"\1…", _USER.sub("", text))


def settings_hash(*parts: object) -> str:
    """Hash the settings that an asset reads (16 hex digits): part of its code version and provenance.

    Args:
        parts: settings models, or JSON values.
    """
    values = json.dumps(to_jsonable_python(parts), sort_keys=True)
    return hashlib.blake2b(values.encode(), digest_size=8).hexdigest()
