"""Which of two answers with nearly the same words has the worse code: it must not represent the other as a duplicate.

Belongs here: code that lost its lines, and code that its own language cannot parse. Does not belong here: which rows
are similar (`duplicates`), and whether an answer is right: nothing is run.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
import warnings
from collections.abc import Callable

import yaml

Answer = tuple[str, str | None]
"""Text and language of an answer."""

_FENCED = re.compile(r"^ {0,3}(?P<fence>`{3,}|~{3,})[^`\n]*\n(?P<code>.*?)^ {0,3}(?P=fence)", re.MULTILINE | re.DOTALL)
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


def _parses(answer: Answer) -> bool:
    """Whether the code can be parsed; True where no parser of its language is here, or there is too much of it."""
    text, language = answer
    parse = _PARSERS.get((language or "python").lower())
    blocks = [found["code"] for found in _FENCED.finditer(text)] or [text]
    if parse is None or len(text) > _LONGEST:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as invalid escapes in a string.
            for block in blocks:
                parse(block)
    except (SyntaxError, ValueError, RecursionError, MemoryError, yaml.YAMLError):
        return False
    return True


def _parse_makefile(code: str) -> None:
    after_rule = False
    for line in code.splitlines():
        if after_rule and line.startswith(" ") and line.strip():
            raise ValueError("a recipe line begins with a blank and not with a tab")
        after_rule = bool(re.match(r"[^\s#=:]+[^=:]*:(?![=:])", line)) or (after_rule and line.startswith("\t"))


_PARSERS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("python", "py", "python3"), ast.parse),
    "json": json.loads,
    "toml": tomllib.loads,
    **dict.fromkeys(("yaml", "yml"), lambda code: list(yaml.safe_load_all(code))),
    **dict.fromkeys(("make", "makefile", "gnumake"), _parse_makefile),
}
