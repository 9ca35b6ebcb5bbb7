"""The reasoning before an answer: told from the answer, and as it stands before it in training files.

Belongs here: the tags. Does not belong here: which field has it (`fields`, `conversations`), and whether it is scored
(`records`).
"""

from __future__ import annotations

import re

_INLINE = re.compile(
    r"\s*<(?P<tag>think|thinking|reasoning)>(?P<text>.*?)</(?P=tag)>(?:(?:[ \t]*\r?\n)+|[ \t]*)", re.DOTALL
)
"""Up to the end of its last line: the first line of the answer keeps its indentation."""


def split_off(reasoning: str | None, answer: str | None) -> tuple[str | None, str | None]:
    """Reasoning, in tags, and the answer without it.

    Args:
        reasoning: text of a field of its own, with or without tags; None or blank: there is none.
        answer: text that may begin with reasoning in tags. An answer of nothing else is left whole.
    """
    found = None if answer is None else _INLINE.match(answer)
    inline = None
    if answer is not None and found is not None and answer[found.end() :].strip():
        inline, answer = found[0], answer[found.end() :]
    plain = _without_tags(reasoning or "")
    if not plain or (found is not None and inline is not None and _without_tags(inline) == plain):
        return inline, answer
    return f"<think>\n{plain}\n</think>\n\n{inline or ''}", answer


def _without_tags(text: str) -> str:
    found = _INLINE.fullmatch(text)
    return (text if found is None else found["text"]).strip()
