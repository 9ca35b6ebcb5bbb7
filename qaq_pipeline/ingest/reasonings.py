"""The reasoning before an answer: told from the answer, and as it stands before it in training files.

Belongs here: the tags. Does not belong here: which field has it (`fields`, `conversations`), and whether it is scored
(`records`).
"""

from __future__ import annotations

import re

_INLINE = re.compile(r"\s*<(?P<tag>think|thinking|reasoning)>.*?</(?P=tag)>\s*", re.DOTALL)


def split_off(reasoning: str | None, answer: str | None) -> tuple[str | None, str | None]:
    """Reasoning, in tags, and the answer without it.

    Args:
        reasoning: text of a field of its own, without tags; None or blank: there is none.
        answer: text that may begin with reasoning in tags. An answer of nothing else is left whole.
    """
    if reasoning is not None and reasoning.strip():
        return f"<think>\n{reasoning.strip()}\n</think>\n\n", answer
    found = None if answer is None else _INLINE.match(answer)
    if answer is None or found is None or found.end() == len(answer):
        return None, answer
    return found[0], answer[found.end() :]
