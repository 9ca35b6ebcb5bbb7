"""Whether an answer leaves a bracket or a code fence open: evidence of a cut that no likelihood has.

Belongs here: the count, from the text alone, in any programming language. Does not belong here: what follows from it
(`signals.unclosed`), and whether code is correct.
"""

from __future__ import annotations

import re

import polars as pl

_TOKEN = re.compile(r"```|[()\[\]{}]")
_OPENS = {")": "(", "]": "[", "}": "{"}
_FENCE = "```"


def is_unclosed(answers: pl.Series) -> pl.Series:
    """Whether each answer has an opening bracket without its closing one, or a code fence that does not end.

    Closing brackets without an opening one, as in `:)`, count for nothing; brackets inside quotes count like others.
    """
    return answers.map_elements(_is_unclosed, return_dtype=pl.Boolean)


def _is_unclosed(answer: str) -> bool:
    is_in_fence, opened = False, []
    for token in _TOKEN.findall(answer):
        if token == _FENCE:
            is_in_fence = not is_in_fence
        elif token not in _OPENS:
            opened.append(token)
        elif opened and opened[-1] == _OPENS[token]:
            opened.pop()
    return is_in_fence or bool(opened)
