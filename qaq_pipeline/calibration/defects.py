"""Defects that make a good pair bad: each is one small function of a pair, deterministic for a seed.

Belongs here: the changes to the text of a pair, and the cheap guess of a text's programming language that some of them
need. Does not belong here: which rows get which defect (`planting`).

A defect that is impossible in a pair gives None, so no pair is labelled defective that is not.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qaq_pipeline.schema.vocabularies import Defect

VERSION = "4"
"""Part of the code version of planted_rows: a new value plants again."""

CUT_AT = (0.1, 0.9)
"""The shares of the answer's characters between which `cut_answer` cuts."""

_ALIASES = {
    "c": "cpp",
    "c++": "cpp",
    "js": "javascript",
    "node": "javascript",
    "ts": "javascript",
    "typescript": "javascript",
    "py": "python",
    "python3": "python",
    "c#": "csharp",
    "shell": "bash",
    "sh": "bash",
    "golang": "go",
    "rb": "ruby",
}
"""Names of languages in deliveries, and the names that `guess_language` gives them."""
_SHORTEST_TO_CUT = 40
_FEWEST_LINES_TO_CUT = 3
_MOST_CANDIDATES = 2000
_LOOKED_AT = 4000
"""Characters of an answer from which its language is guessed."""


@dataclass(frozen=True, slots=True)
class Text:
    """The part of a row that a defect reads."""

    query: str
    answer: str
    language: str | None = None
    """The programming language of the answer; None: unknown."""


@dataclass(frozen=True, slots=True)
class Others:
    """The answers of other rows that a defect may give to this one."""

    answer: str | None
    """The answer to another query that this row may get (`mismatches`); None: there is none."""
    of_batch: Sequence[Text]
    """Rows of the batch, in the order of the draw."""


def make(defect: Defect, text: Text, others: Others, seed: str) -> Text | None:
    """The text with the defect; None where the defect is impossible in it.

    Args:
        defect: to be made.
        text: of a row as delivered.
        others: rows from which an answer may be taken.
        seed: of every random choice.
    """
    made = _MAKERS[defect](text, others, random.Random(f"{defect}:{seed}"))  # noqa: S311
    is_defective = made is not None and made.query.strip() and made.answer.strip() and made != text
    return made if is_defective else None


def _other_answer(text: Text, others: Others, _: random.Random) -> Text | None:
    """The answer to another query."""
    return None if others.answer is None else Text(text.query, others.answer)


def _echo(text: Text, _: Others, choice: random.Random) -> Text:
    """The query, repeated as the answer; in half of the rows after an introduction."""
    introduction = choice.choice(ECHO_INTRODUCTIONS) if choice.random() < 1 / 2 else ""
    return Text(text.query, introduction + text.query)


def _refusal(text: Text, _: Others, choice: random.Random) -> Text:
    return Text(text.query, choice.choice(REFUSALS))


def _filler(text: Text, _: Others, choice: random.Random) -> Text:
    """Fluent text that fits every query and answers none."""
    return Text(text.query, choice.choice(FILLERS))


def _cut_answer(text: Text, _: Others, choice: random.Random) -> Text | None:
    """The answer up to any of its characters, except the first and the last tenth."""
    answer = text.answer.strip()
    if len(answer) < _SHORTEST_TO_CUT:
        return None
    first, last = (round(share * len(answer)) for share in CUT_AT)
    return Text(text.query, answer[: choice.randint(first, last)].rstrip())


def _cut_at_line(text: Text, _: Others, choice: random.Random) -> Text | None:
    """The answer up to the end of any of its lines but the last; blank lines do not count."""
    answer = text.answer.strip()
    ends = [found.end() for found in _LINE.finditer(answer)]
    if len(ends) < _FEWEST_LINES_TO_CUT:
        return None
    return Text(text.query, answer[: choice.choice(ends[:-1])].rstrip())


def _invented_terms(text: Text, _: Others, choice: random.Random) -> Text | None:
    """Half of the query's content words, rounded up, are replaced by invented words, equal words by the same one."""
    words = sorted({word.lower() for word in _CONTENT_WORD.findall(text.query)} - FUNCTION_WORDS)
    if not words:
        return None
    chosen = choice.sample(words, (len(words) + 1) // 2)
    invented = {word: _nonsense(choice) for word in chosen}

    def replace(found: re.Match[str]) -> str:
        word = found.group()
        new = invented.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() and new != word else new

    return Text(_CONTENT_WORD.sub(replace, text.query), text.answer)


def _nonsense(choice: random.Random) -> str:
    """A pronounceable word of two or three syllables, such as `dovamik`."""
    syllables = [choice.choice("bdfgklmnprstvz") + choice.choice("aeiou") for _ in range(choice.randint(2, 3))]
    return "".join(syllables) + choice.choice("bdfgkmnprtvz")


def _wrong_language(text: Text, others: Others, _: random.Random) -> Text | None:
    """An answer in another programming language, to the query that shares most words with this one."""
    if text.language is None:
        return None
    words, language = _words(text), _canonical(text.language)
    fitting = (
        other
        for other in others.of_batch[:_MOST_CANDIDATES]
        if other.query != text.query and _canonical(other.language) not in (None, language)
    )
    best = max(fitting, key=lambda other: len(words & _words(other)), default=None)
    return None if best is None else Text(text.query, best.answer)


def _canonical(language: str | None) -> str | None:
    return None if language is None else _ALIASES.get(language, language)


def _words(text: Text) -> set[str]:
    return set(text.query.lower().split())


def _one_token_bug(text: Text, _: Others, choice: random.Random) -> Text | None:
    """One operator, constant or number of the code is changed: a likelihood that notices it deserves no credit."""
    if text.language is None:
        return None
    places = list(_BUGGY.finditer(text.answer))
    if not places:
        return None
    place = choice.choice(places)
    token = place.group()
    changed = _COUNTERPARTS.get(token) or str(int(token) + 1)
    return Text(text.query, text.answer[: place.start()] + changed + text.answer[place.end() :])


def language_of(delivered: str | None, answer: str) -> str | None:
    """The programming language that the row names, else that of its answer: `en` says nothing about code."""
    named = None if delivered is None else delivered.strip().lower()
    return named if named is not None and _is_known(named) else guess_language(answer)


def _is_known(language: str) -> bool:
    return bool(_NOT_GUESSED.fullmatch(language)) or _canonical(language) in {"bash", *_LANGUAGES}


def guess_language(answer: str) -> str | None:
    """The programming language of an answer by typical tokens of its beginning; None: unknown, or no code."""
    beginning = answer[:_LOOKED_AT]
    return next((name for name, tokens in _LANGUAGES.items() if tokens.search(beginning)), None)


_MAKERS: dict[Defect, Callable[[Text, Others, random.Random], Text | None]] = {
    Defect.OTHER_ANSWER: _other_answer,
    Defect.ECHO: _echo,
    Defect.INVENTED_TERMS: _invented_terms,
    Defect.CUT_ANSWER: _cut_answer,
    Defect.CUT_AT_LINE: _cut_at_line,
    Defect.REFUSAL: _refusal,
    Defect.FILLER: _filler,
    Defect.WRONG_LANGUAGE: _wrong_language,
    Defect.ONE_TOKEN_BUG: _one_token_bug,
}

ECHO_INTRODUCTIONS = (
    "Here is the task: ",
    "The question is:\n\n",
    "You asked: ",
    "Let me restate the problem. ",
    "Sure! ",
)

REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "As an AI language model, I am not able to write or run code for you.",
    "I apologize, but I cannot assist with this. Please consult a professional.",
    "Sorry, I don't have enough information to answer that question.",
    "I'm unable to provide that. Is there anything else I can help you with?",
)

FILLERS = (
    "Great question! There are many ways to approach this, and the best one depends on your needs. Start by breaking "
    "the problem into smaller steps, then solve each of them in turn and test the result.",
    "This is an important topic. A good solution is clear, efficient and easy to maintain. Think about edge cases, "
    "follow best practices, and do not forget to document what you have done.",
    "Sure! I would be happy to help you with this. Here is a complete solution that does exactly what you asked for. "
    "Let me know if you have any further questions!",
    "To do this, first make sure that you understand the requirements. Then choose a suitable tool, implement the "
    "solution, and check that it works as expected. Finally, review it and improve it where needed.",
    "In conclusion, this task can be accomplished in several ways, each of which has its own advantages and drawbacks. "
    "It is up to you to decide which one is the most appropriate in your case.",
)

_LINE = re.compile(r"[^\n]*\S[^\n]*")
_CONTENT_WORD = re.compile(r"\b[A-Za-z]{4,}\b")
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    about above after also another because been before being below between both could does doing done down each
    even ever every from give given goes have having here into just like make many more most much must need only
    onto other over please should show some such take tell than that their them then there these they this those
    through under until upon used uses using very want were what when where which while whose will with within
    without would write your
    """,
    )
)

_LANGUAGES = {
    name: re.compile(tokens, re.MULTILINE)
    for name, tokens in {
        "sql": r"^[ \t]*(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|(CREATE|ALTER) (TABLE|DATABASE))\b",
        "php": r"<\?php|\$\w+\s*=[^=]",
        "html": r"<(!DOCTYPE|html|head|body|div|form|table|input|ul|p|h1)\b",
        "csharp": r"\busing System\b|\bConsole\.Write|\bpublic (static )?\w+(\[\]|<\w+>)? \w+\s*\(.*\)\s*$",
        "java": r"\bpublic (static |final )?(class|void|int|String|boolean)\b|\bSystem\.out\.",
        "cpp": r"#include\s*<|\bstd::|\bcout\s*<<|\bint main\s*\(",
        "go": r"^package \w+|\bfunc \w*\(.*\{|:= ",
        "rust": r"\bfn \w+\(|\blet mut |\bprintln!",
        "javascript": r"\bfunction\b.*\{|\b(const|let|var) \w+\s*=|=>|\bconsole\.log\(",
        "python": r"^[ \t]*(def \w+\(|class \w+.*:|(for|while|if) .+:$|import \w+|from [\w.]+ import )|\bprint\(",
        "ruby": r"^[ \t]*(puts|require) |\.each do \|",
        "css": r"^[.#@\w][^{}()=\n]{0,80}\{\s*[a-z-]+\s*:[^{}\n]+;",
        "shell": r"^#!/bin/(ba)?sh|^[ \t]*(sudo|grep|awk|sed|find|echo|chmod|git) ",
    }.items()
}
"""For each language, patterns that hardly occur in other languages, the most reliable first. A wrong guess spoils one
planted row; no score of the batch changes."""

_NOT_GUESSED = re.compile(
    r"clojure|cobol|dart|elixir|erlang|fortran|f#|groovy|haskell|julia|kotlin|lisp|lua|matlab|objective-c|ocaml|pascal|"
    r"perl|powershell|prolog|r|scala|scheme|solidity|swift|vb|zig"
)
"""Programming languages that a delivery may name, but that are never guessed from code."""

_SWAPPED = (
    ("==", "!="),
    ("&&", "||"),
    ("++", "--"),
    ("+=", "-="),
    (" < ", " > "),
    (" + ", " - "),
    ("True", "False"),
    ("true", "false"),
    ("min", "max"),
    ("ASC", "DESC"),
)
_COUNTERPARTS = {"<=": "<", ">=": ">", " * ": " + ", " / ": " * ", "append": "remove"} | {
    token: other for pair in _SWAPPED for token, other in (pair, pair[::-1])
}
_BUGGY = re.compile(
    r"==|!=|<=|>=|&&|\|\||\+\+|--|\+=|-=| [<>+\-*/] |\b(?:[Tt]rue|[Ff]alse|min|max|append|ASC|DESC|\d{1,6})\b"
)
