"""Batches of real pairs in which a share is made bad, by other words, donors and places than the product plants.

Belongs here: the bad rows and the batches. Does not belong here: how they are scored and judged (`curated`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qaq_pipeline.calibration import defects
from qaq_pipeline.calibration.defects import Others, Text, guess_language
from qaq_pipeline.schema.vocabularies import Defect

CLEAN = "clean"
ROWS = 400
"""Rows of a draw."""
SHARES = (0.0, 0.1, 0.25, 0.5, 0.8)
"""Shares of bad rows; 0: as delivered."""
ALONE = 0.25
"""Share of the bad rows of a kind that has runs of its own."""

REFUSALS = (
    "Unfortunately, this is something I cannot do for you.",
    "I will not be able to complete this task, because it goes beyond what I am allowed to do.",
    "My apologies, but this request can't be fulfilled.",
    "This is outside of my abilities as an assistant, so I have to decline.",
    "No answer can be given here; please ask an expert.",
)
FILLERS = (
    "What a nice task! Programming problems like this are a wonderful way to learn. Take your time, read the "
    "documentation carefully, and you will surely find a solution that suits you.",
    "The answer depends on the context. In general one should plan first, write readable code, test every part and "
    "refactor when necessary.",
    "Certainly! Below you will find everything that you asked for, explained step by step so that it is easy to "
    "follow. Enjoy!",
    "There is more than one way of doing it. Compare the alternatives, weigh their strengths and weaknesses, and pick "
    "the one that feels right.",
)
ECHOES = ("{}", "Task: {}", "You asked: {}", "{}\n")
SYLLABLES = ("ka", "ro", "mi", "zet", "plu", "vor", "gan", "tis", "qua", "bel", "dro", "fex")

_WORD = re.compile(r"\b[A-Za-z]{4,}\b")
_SHORTEST_TO_CUT = 40
_FEWEST_LINES = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a batch, and what is wrong with it."""

    query: str
    answer: str
    kind: str = CLEAN


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of which a share is bad."""

    draw: int
    name: str
    """The share of bad rows in percent, or the kind that has a run of its own."""
    rows: tuple[Row, ...]


_Pair = tuple[str, str]
_Maker = Callable[[_Pair, Sequence[_Pair], random.Random], _Pair | None]


def read_pairs(path: Path) -> list[_Pair]:
    """The pairs of an Alpaca file, each query once, in a fixed random order."""
    found: dict[str, str] = {}
    for record in json.loads(path.read_text(encoding="utf-8")):
        given = record.get("input", "")
        query = record["instruction"] + (f"\n{given}" if given.strip() else "")
        if query.strip() and record["output"].strip():
            found.setdefault(query, record["output"])
    pairs = list(found.items())
    random.Random(0).shuffle(pairs)  # noqa: S311
    return pairs


def batches(pairs: Sequence[_Pair], draws: int, draws_alone: int) -> list[Batch]:
    """The batches of every draw: each share of bad rows, then, for the first draws, the kinds with a run of their own.

    Raises:
        ValueError: there are too few pairs.
    """
    if len(pairs) < draws * ROWS:
        raise ValueError(f"{draws} draws need {draws * ROWS} distinct pairs, and there are {len(pairs)}")
    found = []
    for draw in range(draws):
        own = pairs[draw * ROWS : (draw + 1) * ROWS]
        choice = random.Random(100 + draw)  # noqa: S311
        bad = spoil(own, [*KINDS], round(max(SHARES) * ROWS), choice)
        for share in SHARES:
            first = dict(list(bad.items())[: round(share * ROWS)])
            found.append(_batch(draw, f"{share:.0%}", own, first))
        alone = ALONE_KINDS if draw < draws_alone else ()
        found += [_batch(draw, kind, own, spoil(own, [kind], round(ALONE * ROWS), choice)) for kind in alone]
    return found


def _batch(draw: int, name: str, own: Sequence[_Pair], bad: dict[int, Row]) -> Batch:
    return Batch(draw, name, tuple(bad.get(place, Row(*pair)) for place, pair in enumerate(own)))


def spoil(own: Sequence[_Pair], kinds: Sequence[str], number: int, choice: random.Random) -> dict[int, Row]:
    """Bad rows by place, the kinds in turn; a row in which its kind is impossible stays clean."""
    places = list(range(len(own)))
    choice.shuffle(places)
    found: dict[int, Row] = {}
    for place in places:
        if len(found) == number:
            break
        kind = kinds[len(found) % len(kinds)]
        if kind == "cut":
            kind = ("cut anywhere", "cut at a line")[len(found) // len(kinds) % 2]
        made = _MAKERS[kind](own[place], own, choice)
        if made is not None and made[1].strip() and made != own[place]:
            found[place] = Row(*made, kind)
    return found


def _other_answer(pair: _Pair, own: Sequence[_Pair], choice: random.Random) -> _Pair | None:
    others = [answer for query, answer in own if query != pair[0] and answer.strip() != pair[1].strip()]
    return pair[0], choice.choice(others)


def _similar_answer(pair: _Pair, own: Sequence[_Pair], _: random.Random) -> _Pair | None:
    """The answer to the query with the most words in common."""
    words = set(pair[0].lower().split())

    def likeness(other: _Pair) -> float:
        of_other = set(other[0].lower().split())
        return len(words & of_other) / len(words | of_other)

    others = [other for other in own if other[0] != pair[0] and other[1].strip() != pair[1].strip()]
    return pair[0], max(others, key=likeness)[1]


def _wrong_language(pair: _Pair, own: Sequence[_Pair], _: random.Random) -> _Pair | None:
    """The answer in another language to the query with the most words in common."""
    language, words = guess_language(pair[1]), set(pair[0].lower().split())
    others = [other for other in own if other[0] != pair[0] and guess_language(other[1]) not in (None, language)]
    if language is None or not others:
        return None
    return pair[0], max(others, key=lambda other: len(words & set(other[0].lower().split())))[1]


def _cut_anywhere(pair: _Pair, _: Sequence[_Pair], choice: random.Random) -> _Pair | None:
    length = len(pair[1])
    if length < _SHORTEST_TO_CUT:
        return None
    return pair[0], pair[1][: choice.randint(int(0.15 * length), int(0.9 * length))].rstrip()


def _cut_at_line(pair: _Pair, _: Sequence[_Pair], choice: random.Random) -> _Pair | None:
    lines = pair[1].strip().split("\n")
    if len(lines) < _FEWEST_LINES:
        return None
    return pair[0], "\n".join(lines[: choice.randint(1, len(lines) - 1)]).rstrip()


def _invented(pair: _Pair, _: Sequence[_Pair], choice: random.Random) -> _Pair | None:
    """Half of the longer words of the query become invented ones."""
    words = sorted({word.lower() for word in _WORD.findall(pair[0])} - defects.FUNCTION_WORDS)
    if not words:
        return None
    chosen = choice.sample(words, (len(words) + 1) // 2)
    invented = {word: "".join(choice.choice(SYLLABLES) for _ in range(choice.randint(2, 4))) for word in chosen}
    return _WORD.sub(lambda found: invented.get(found.group().lower(), found.group()), pair[0]), pair[1]


def _one_token_bug(pair: _Pair, _: Sequence[_Pair], choice: random.Random) -> _Pair | None:
    made = defects.make(
        Defect.ONE_TOKEN_BUG, Text(*pair, guess_language(pair[1])), Others(None, ()), f"bench:{choice.random()}"
    )
    return None if made is None else (made.query, made.answer)


_MAKERS: dict[str, _Maker] = {
    "other answer": _other_answer,
    "refusal": lambda pair, _, choice: (pair[0], choice.choice(REFUSALS)),
    "echo": lambda pair, _, choice: (pair[0], choice.choice(ECHOES).format(pair[0])),
    "filler": lambda pair, _, choice: (pair[0], choice.choice(FILLERS)),
    "cut anywhere": _cut_anywhere,
    "cut at a line": _cut_at_line,
    "wrong language": _wrong_language,
    "invented terms": _invented,
    "similar answer": _similar_answer,
    "one-token bug": _one_token_bug,
}
KINDS = ("other answer", "refusal", "echo", "filler", "cut", "wrong language", "invented terms")
"""The kinds of bad rows, in equal parts; cut answers are cut anywhere and at a line's end in turn."""
ALONE_KINDS = ("similar answer", "one-token bug")
"""Kinds with runs of their own."""
