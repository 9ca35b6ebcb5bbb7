"""A value of a delivered row that should be text.

Belongs here: what the readers of fields and conversations share. Does not belong here: any name of a field.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Unicode does not count zero-width characters as white space, but they are invisible too.
_BLANK = re.compile(r"[\s\u200b\u2060\ufeff]*")


class Field(NamedTuple):
    """A value that should be text, and its name in the row. None: absent or null."""

    name: str
    value: object


def joined(fields: list[Field], separator: str) -> Field:
    """The texts of fields as one, under the first name; a value that is no text comes back alone.

    Fields without a value, or with nothing but white space, are left out where another one has text.
    """
    given = [field for field in fields if field.value is not None]
    other = next((field for field in given if not isinstance(field.value, str)), None)
    texts = [field for field in given if isinstance(field.value, str) and not is_blank(field.value)]
    if other is not None or not texts:
        return other or (given or fields)[0]
    return texts[0] if len(texts) == 1 else Field(texts[0].name, separator.join(str(text.value) for text in texts))


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return _BLANK.fullmatch(text) is not None


def storable(value: object) -> str | None:
    """Return the value if it is text that UTF-8 can encode; a lone surrogate, as JSON can escape it, is not."""
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value
