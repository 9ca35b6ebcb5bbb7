"""The language that the code fences of an answer name.

Belongs here: reading fences, and one name for each language. Does not belong here: guessing a language from code
(`calibration.defects`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from pygments.lexers import get_all_lexers

_FENCE = re.compile(r"^ {0,3}(?:`{3,}|~{3,})(?P<info>[^`\n]*)$", re.MULTILINE)
_INFO = re.compile(r"[ {.]*(?P<name>[a-z][\w+#-]*) *(?:$|[{}:,].*| \S+=.*)", re.IGNORECASE | re.ASCII)
"""A name, and perhaps a path or attributes after it: `python`, `python:a.py`, `{.python}`, `python title=a.py`."""

_NOT_CODE = {"console", "doscon", "output", "pwsh-session", "pycon", "text"}
"""Names of Pygments for what is shown beside code."""
_OWN = {"r": "r"}
"""Where the first name that Pygments knows is not the usual one."""


def language_of(answer: str) -> str | None:
    """Name of the first language that an opening code fence names, as Pygments spells it; None: no fence names one.

    Other words after a fence, such as `that`, are no languages. Nor are terminals and plain text.
    """
    return next((known for name in _names(answer) if (known := _languages().get(name)) is not None), None)


def _names(answer: str) -> Iterator[str]:
    is_open = False
    for fence in _FENCE.finditer(answer):
        is_open = not is_open
        if is_open and (info := _INFO.fullmatch(fence["info"])):
            yield info["name"].lower()


@cache
def _languages() -> dict[str, str]:
    """The name of the language of each name that Pygments knows."""
    names = {
        alias.lower(): aliases[0].lower()
        for _, aliases, _, _ in get_all_lexers(plugins=False)
        for alias in aliases
        if aliases[0].lower() not in _NOT_CODE
    }
    return names | _OWN
