"""Which of two rows with nearly the same words has the worse code: it must not represent the other as a duplicate.

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
from typing import NamedTuple

import yaml

_FENCED = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,}) *(?P<info>[^`\s]*)[^`\n]*\n(?P<code>.*?)^ {0,3}(?P=fence)", re.MULTILINE | re.DOTALL
)
_LOST_LINES = 0.5
"""A text with less than this share of the lines of another one with the same words has lost line ends."""
_LONGEST = 100_000
"""Characters of code that are parsed."""


class Texts(NamedTuple):
    """The texts of a row that may have code, and the language of its answer."""

    query: str
    answer: str
    language: str | None


def is_worse(one: Texts, other: Texts) -> bool:
    """Whether the code of one row lost its lines or cannot be parsed, where that of the other is whole.

    Lines come first: code on one line may parse, as a comment. A query is not parsed, since it may ask for a fault.
    """
    has_lost, has_more = _has_lost_lines(one, other), _has_lost_lines(other, one)
    if has_lost or has_more:
        return has_lost and not has_more
    for language in _languages(one, other):
        parses, other_parses = _parses(one.answer, language), _parses(other.answer, language)
        if parses != other_parses:
            return other_parses
    return False


def _languages(one: Texts, other: Texts) -> list[str]:
    """Languages that the code of both answers may be of, the likeliest first.

    Code of a language that nothing names is taken for Python: of two answers with the same words, one that parses as
    Python is the better one. If that tells nothing, a language that the queries name may.
    """
    stated = {texts.language.lower() for texts in (one, other) if texts.language}
    if stated:
        return sorted(stated)
    words = re.findall(r"[a-z]+", f"{one.query} {other.query}".lower())
    return ["python", *sorted({word for word in words if word in _PARSERS} - {"python", "make"})]


def _has_lost_lines(one: Texts, other: Texts) -> bool:
    """Whether the query, the answer or a fenced block of one has far fewer lines than that of the other."""
    for text, other_text in ((one.query, other.query), (one.answer, other.answer)):
        counts, others = _num_lines(text), _num_lines(other_text)
        num_compared = len(counts) if len(counts) == len(others) else 1
        if any(map(_is_far_fewer, counts[:num_compared], others)):
            return True
    return False


def _is_far_fewer(count: int, other: int) -> bool:
    return count < _LOST_LINES * other


def _num_lines(text: str) -> list[int]:
    """Number of lines that are not blank: of the text, and of each fenced block in it."""
    parts = [text, *(found["code"] for found in _FENCED.finditer(text))]
    return [sum(1 for line in part.splitlines() if line.strip()) for part in parts]


@functools.lru_cache(maxsize=10_000)
def _parses(text: str, language: str) -> bool:
    """Whether the code, whose language its fences may name, can be parsed; True where no parser of it is here, or there
    is too much of it.
    """
    if len(text) > _LONGEST:
        return True
    fenced = [(found["info"].lower() or language, found["code"]) for found in _FENCED.finditer(text)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as invalid escapes in a string.
            for name, code in fenced or [(language, text)]:
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
