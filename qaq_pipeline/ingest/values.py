"""A value of a delivered row: whether it is text that can be stored, and what a person is told where it is not.

Belongs here: what the readers of files, fields and conversations share. Does not belong here: any name of a field.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from qaq_pipeline.schema.vocabularies import RejectReason

# Unicode does not count zero-width characters as white space, but they are invisible too.
_BLANK = re.compile(r"[\s\u200b\u2060\ufeff]*")


class RejectedError(Exception):
    """The reason why one row cannot be read."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def of_shape(self, shape: str) -> RejectedError:
        """Return the reason with the shape as which the row was read."""
        return RejectedError(self.reason, f"shape {shape}: {self.detail}")


class Field(NamedTuple):
    """A value that should be text, and its name in the row. None: absent or null."""

    name: str
    value: object


def joined(fields: list[Field], separator: str) -> Field:
    """The texts of fields as one, under the first name; a value that is no text comes back alone."""
    for field in fields:
        if not isinstance(field.value, str):
            return field
    texts = [str(field.value) for field in fields if not is_blank(str(field.value))]
    return Field(fields[0].name, separator.join(texts)) if len(fields) > 1 else fields[0]


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


def encoding_fault(text: str) -> RejectedError | None:
    """The fault of a text with bytes that are not UTF-8, decoded as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        detail = f"character {error.start + 1} of the row, the byte \\x{byte:02x}, is not UTF-8"
        return RejectedError(RejectReason.INVALID_UTF8, detail)
    return None


_KINDS: dict[type, str] = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
}


def kind(value: object) -> str:
    """The JSON type of a value, with its article."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def shown(value: object) -> str:
    """A value in a message: a text as its repr, which escapes characters that cannot be stored."""
    return f"{value!r:.60}" if isinstance(value, str) else kind(value)
