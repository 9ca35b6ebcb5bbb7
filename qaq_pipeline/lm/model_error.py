"""The error of a model that cannot be used.

Belongs here: the kind that all such errors are of, so that a caller needs none of their modules. Does not belong here:
the errors themselves.
"""

from __future__ import annotations


class ModelError(ValueError):
    """A model, its tokenizer, its template or its device cannot be used. The text names it, the fault and the remedy.

    Running again raises it again.
    """


def first_line(error: BaseException) -> str:
    """The first line of the text of another library's error, which may be a page; its kind if it has no text.

    Without its full stop: it is quoted.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
