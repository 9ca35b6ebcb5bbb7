"""Which of two answers with nearly the same words has the worse code: it must not represent the other as a duplicate.

Belongs here: code that lost its lines, and code that its own language cannot parse. Does not belong here: which rows
are similar (`duplicates`), and whether an answer is right: nothing is run.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import tomllib
import warnings
from collections.abc import Callable

import yaml

Answer = tuple[str, str | None]
"""Text and language of an answer."""

_FENCED = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,}) *(?P<info>[^`\s]*)[^`\n]*\n(?P<code>.*?)^ {0,3}(?P=fence)", re.MULTILINE | re.DOTALL
)
_LOST_LINES = 0.5
"""An answer with less than this share of the lines of another one with the same words has lost line ends."""
_LONGEST = 100_000
"""Characters of code that are parsed."""


def is_worse(one: Answer, other: Answer) -> bool:
    """Whether the code of one answer lost its lines or cannot be parsed, where that of the other is whole."""
    if _num_lines(one) < _LOST_LINES * _num_lines(other):
        return True
    return not _parses(one) and _parses(other)


def _num_lines(answer: Answer) -> int:
    return sum(1 for line in answer[0].splitlines() if line.strip())


@functools.lru_cache(maxsize=10_000)
def _parses(answer: Answer) -> bool:
    """Whether the code can be parsed; True where no parser of its language is here, or there is too much of it.

    Code of a language that nothing names is taken for Python: of two answers with the same words, one that parses as
    Python is the better one.
    """
    text, language = answer
    if len(text) > _LONGEST:
        return True
    fenced = [(found["info"].lower() or language or "python", found["code"]) for found in _FENCED.finditer(text)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as invalid escapes in a string.
            for name, code in fenced or [((language or "python").lower(), text)]:
                if (parse := _PARSERS.get(name)) is not None:
                    parse(code)
    except Exception:  # noqa: BLE001  # Parsers of damaged text raise errors of any kind.
        return False
    return True


def _parse_makefile(code: str) -> None:
    in_rule = is_continued = False
    for line in code.splitlines():
        if in_rule and not is_continued and line.startswith(" ") and line.strip():
            raise ValueError("a recipe line begins with a blank and not with a tab")
        head = line.split("=", 1)[0]
        is_rule = ":" in head and not head.endswith(":") and line[:1] not in (" ", "\t", "#")
        is_rule = is_rule or (line.rstrip().endswith(":") and line[:1] not in (" ", "\t", "#"))
        in_rule = is_rule or (in_rule and (is_continued or line.startswith("\t")))
        is_continued = line.rstrip().endswith("\\")


_PARSERS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("python", "py", "python3"), ast.parse),
    "json": json.loads,
    "toml": tomllib.loads,
    **dict.fromkeys(("yaml", "yml"), lambda code: list(yaml.safe_load_all(code))),
    **dict.fromkeys(("make", "makefile", "gnumake"), _parse_makefile),
}
