"""What comes before a query: the earlier turns of its conversation, and the tools that its record offers.

Belongs here: the text of an earlier turn with its calls of tools, and the field `history` of a record that is no
conversation. Does not belong here: which turns are earlier ones (`conversations`), and how a model reads them
(`lm.prompts`).

It is read where `records.context` is `history`. It is context of the query and the answer, and is never scored.

    tools      the tools of the record, as JSON
    user       text
    assistant  text, then each call of a tool as JSON between <tool_call> and </tool_call>
    tool       what a tool said

Neighbours of one role are one turn, joined by an empty line; turns without text are left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qaq_pipeline.ingest.values import Field, is_blank, joined
from qaq_pipeline.schema.vocabularies import RejectReason
from qaq_pipeline.storage.row_files import RejectedError, kind

FIELD = "history"
"""Field of a record that is no conversation: a list of lists of a query and its answer."""
TOOLS = "tools"
"""Field of the tools that a record offers."""

_NO_TOOLS = ("[]", "{}", "null")
_CALL = "<tool_call>\n{}\n</tool_call>"


class Earlier(NamedTuple):
    """A turn before a query."""

    role: str
    text: Field


def said(role: str, text: object, content: object, calls: Iterable[object]) -> str:
    """What an earlier turn says.

    Args:
        role: of the turn; `call`: its text is a call.
        text: of the turn; anything else than text: its content is shown as JSON.
        content: as it came.
        calls: of tools, in fields of their own.
    """
    own = text if isinstance(text, str) else ("" if content is None else _json(content))
    if role == "call":
        return _CALL.format(own)
    return "\n".join([*([] if is_blank(own) else [own]), *(_CALL.format(_json(_function(call))) for call in calls)])


def _function(call: object) -> object:
    return call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def merged(turns: Iterable[Earlier]) -> list[Earlier]:
    """The turns, with neighbours of one role as one."""
    given = (turn for turn in turns if not is_blank(str(turn.text.value)))
    return [
        Earlier(role, joined([turn.text for turn in of_role], "\n\n"))
        for role, of_role in itertools.groupby(given, key=lambda turn: turn.role)
    ]


def of_tools(record: Mapping[str, object]) -> list[Earlier]:
    """The tools of a record, as it names them; none where it names none."""
    tools = record.get(TOOLS)
    named = "" if not tools else (tools if isinstance(tools, str) else _json(tools))
    return merged([Earlier("tools", Field(f"`{TOOLS}`", "" if named.strip() in _NO_TOOLS else named))])


def of_field(record: Mapping[str, object]) -> list[Earlier]:
    """The turns in the field `history` of a record that is no conversation.

    Raises:
        RejectedError: it is no list of lists of two texts.
    """
    given = record.get(FIELD)
    return merged(_turns(given if isinstance(given, list) else [given])) if given else []


def _turns(exchanges: list[object]) -> Iterator[Earlier]:
    for place, exchange in enumerate(exchanges):
        texts = exchange if isinstance(exchange, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RejectedError(
                RejectReason.WRONG_TYPE,
                f"`{FIELD}[{place}]` is {kind(exchange)}; a list of a query and an answer is expected",
            )
        yield Earlier("user", Field(f"`{FIELD}[{place}][0]`", texts[0]))
        yield Earlier("assistant", Field(f"`{FIELD}[{place}][1]`", texts[1]))


def stored(turns: Sequence[Earlier]) -> list[dict[str, object]] | None:
    """The turns as RawData has them; None: there are none."""
    return [{"role": turn.role, "content": turn.text.value} for turn in turns] or None
