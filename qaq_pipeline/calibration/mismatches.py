"""The answers of mismatches: for each query, the answer to another query that it gets.

Belongs here: which answer a row gets. Does not belong here: the draw of the rows (`planting`).
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cache

from qaq_pipeline.calibration.defects import Text

_WORD = re.compile(r"\w+")


def other_answers(texts: Sequence[Text], number: int) -> dict[int, str]:
    """The answers to other queries for the first rows that can have one, at most `number`, by place of the row.

    A row gets the next answer in the order of the rows, and from the last row on to the first, that is not its own and
    is given to no query near this one. No two rows get the same answer where distinct ones suffice for both, even if an
    earlier row has to pass its answer on (a maximum matching by augmenting paths). Answers that differ in white space
    only are the same.

    Args:
        texts: rows with distinct queries, in their order.
        number: how many rows get an answer.
    """
    spelled = ["".join(text.answer.split()) for text in texts]
    given_to: defaultdict[str, list[int]] = defaultdict(list)
    for place, answer in enumerate(spelled):
        given_to[answer].append(place)
    words = [set(_WORD.findall(text.query.lower())) for text in texts]

    @cache
    def fitting(place: int) -> list[str]:
        answers = dict.fromkeys([*spelled[place + 1 :], *spelled[:place]])
        return [a for a in answers if not any(_is_near(words[place], words[other]) for other in given_to[a])]

    found: dict[int, str] = {}
    taken_by: dict[str, int] = {}
    for place in range(len(texts)):
        if len(found) == number:
            break
        if not _take(place, fitting, found, taken_by) and fitting(place):
            found[place] = fitting(place)[0]
    return {place: texts[given_to[answer][0]].answer for place, answer in found.items()}


def _is_near(words: set[str], other: set[str]) -> bool:
    """Jaccard similarity of at least 1/2: |a & b| / (|a| + |b| - |a & b|) >= 1/2; a query is near itself."""
    return 3 * len(words & other) >= len(words) + len(other)


def _take(place: int, fitting: Callable[[int], Sequence[str]], found: dict[int, str], taken_by: dict[str, int]) -> bool:
    """Give the row a free answer, along the shortest chain of rows that pass theirs on; False: there is none."""
    reached_from: dict[str, int] = {}
    rows = deque([place])
    while rows:
        row = rows.popleft()
        for answer in fitting(row):
            if answer in reached_from:
                continue
            reached_from[answer] = row
            if answer in taken_by:
                rows.append(taken_by[answer])
                continue
            _pass_on(answer, reached_from, found, taken_by)
            return True
    return False


def _pass_on(answer: str | None, reached_from: dict[str, int], found: dict[int, str], taken_by: dict[str, int]) -> None:
    """Give the free answer to the row from which it was reached, that row's to the one before, and so on."""
    while answer is not None:
        row = reached_from[answer]
        found[row], taken_by[answer], answer = answer, row, found.get(row)
