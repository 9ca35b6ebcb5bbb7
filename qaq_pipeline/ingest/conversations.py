"""The pairs of a conversation.

Belongs here: turns, their roles and marks, the parts of a text, tools, and which answers may be trained on. Does not
belong here: records that are no conversations (`fields`).

A turn is {role, content} or {from, value}. A content is a text, or a list of parts: texts, or {type: text, text or
value}, which are joined as they are. The record's system field and the system turns, wherever they are, are the system
text, joined by newlines; a field that repeats one of the turns is left out.

An exchange is one or more user turns and the turns after them up to the next user turn. Its user turns are the query
and its assistant turns the answer; several of them are joined by an empty line. The turns of earlier exchanges are not
part of its query: `records.context` says whether they are its context (`histories`). An exchange is no pair if a turn
of its answer

    calls a tool, or is what a tool said     its text cannot be told from the query alone
    is marked as not to be trained on        weight, loss, train or loss_weight is 0 or false; for the whole record,
                                             KTO's label or kto_tag is false

The reasoning of a turn is in a field of `records.fields.reasoning`, in parts of type reasoning or thinking, or at the
beginning of its text, in tags (`reasonings`).

`last` takes the last exchange that is a pair, `every` each of them, and rejects the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest import histories
from qaq_pipeline.ingest.fields import CHOSEN, CONVERSATIONS, first_present, query_of, with_content
from qaq_pipeline.ingest.histories import Earlier
from qaq_pipeline.ingest.values import Field, joined
from qaq_pipeline.schema.vocabularies import RejectReason
from qaq_pipeline.storage.row_files import RejectedError, kind, shown

_ROLES = (
    dict.fromkeys(("user", "human"), "user")
    | dict.fromkeys(("assistant", "gpt", "model", "bing", "chatgpt", "bard"), "assistant")
    | dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("tool", "function", "observation", "ipython", "environment", "tool_response"), "tool")
    | dict.fromkeys(("function_call", "tool_call"), "call")
)
_MARKS = ("weight", "loss", "train", "loss_weight")
_LABELS = ("label", "kto_tag")
_CALLS = ("tool_calls", "function_call")
_INLINE_CALLS = ("<tool_call>", "<function_call>", "<|tool_call|>")
_TOOL_PARTS = ("tool_use", "tool_result", "tool_call", "tool_response", "function_call")
_REASONING_PARTS = ("reasoning", "thinking")
_TURN_FIELDS = frozenset(
    ("role", "from", "content", "value", "name", "id", "tool_call_id", "recipient", *_MARKS, *_CALLS)
)


class Candidate(NamedTuple):
    """A query and an answer, not yet checked to be text."""

    system: Field
    query: Field
    answer: Field
    turn_index: int = 0
    fault: RejectedError | None = None
    """Why it is no pair although it has both."""
    reasoning: Field = Field("reasoning", None)
    """Reasoning in a field of its own."""
    history: Sequence[Earlier] = ()
    """Turns before the query that are its context."""


class _Turn(NamedTuple):
    role: str
    text: Field
    is_barred: bool = False
    """Its record says that it is not to be trained on."""
    tool_field: str | None = None
    """The field that calls a tool, or is what a tool said; None: there is none."""
    reasoning: Field = Field("reasoning", None)
    fault: RejectedError | None = None
    """Why its text cannot be read."""
    said: str = ""
    """What it says, its calls of tools included, as context of later turns."""


@dataclass(frozen=True)
class _Exchange:
    asked: list[_Turn]
    replies: list[_Turn]
    before: list[_Turn]
    """The turns of earlier exchanges, where they are context."""

    @property
    def fault(self) -> RejectedError | None:
        turns = (*self.before, *self.asked, *self.replies)
        unread = next((turn.fault for turn in turns if turn.fault is not None), None)
        if unread is not None:
            return unread
        used = next((turn for turn in (*self.asked, *self.replies) if turn.tool_field is not None), None)
        if used is not None:
            found = f"`{used.tool_field}` is a call of a tool, or what a tool said"
            return RejectedError(RejectReason.USES_TOOLS, found)
        barred = next((turn for turn in self.replies if turn.is_barred), None)
        if barred is not None:
            return RejectedError(
                RejectReason.NOT_FOR_TRAINING, f"the turn of {barred.text.name} is marked as not to be trained on"
            )
        return None


def pairs(record: Mapping[str, object], shape: str, settings: RecordSettings) -> list[Candidate]:
    """The candidates of a conversation.

    Raises:
        RejectedError: a turn cannot be read, or no user turn is answered.
    """
    found = _answered(record, _turns_of(record, shape, settings), label_fault(record, shape), settings)
    if settings.multi_turn == "every":
        return found
    # The answers in a prompt are context: what completes it is taken, or nothing is.
    is_whole = shape in CONVERSATIONS or (shape == "preference" and _is_whole(_chosen(record, settings)))
    candidates = found if is_whole else found[-1:]
    return [next((pair for pair in reversed(candidates) if pair.fault is None), candidates[-1])]


def _chosen(record: Mapping[str, object], settings: RecordSettings) -> list[_Turn]:
    chosen = first_present(record, CHOSEN)
    turns = chosen.value if isinstance(chosen.value, list) else [chosen.value]
    return _turns(turns, chosen.name.strip("`"), settings)


def _is_whole(chosen: list[_Turn]) -> bool:
    """Whether the chosen turns of a preference are a whole conversation."""
    return any(turn.role == "user" for turn in chosen)


def is_conversation(record: Mapping[str, object], shape: str) -> bool:
    """Whether the pairs of a record of the shape are in lists of turns."""
    if shape == "prompt_completion":
        return all(isinstance(record.get(side), list) for side in ("prompt", "completion"))
    is_turns = isinstance(first_present(record, CHOSEN).value, (list, dict))
    return shape in CONVERSATIONS or (shape == "preference" and is_turns)


def label_fault(record: Mapping[str, object], shape: str) -> RejectedError | None:
    """The fault of a record whose label, as of KTO, says that its answer is a bad one.

    Elsewhere `label` can be anything.
    """
    for name in _LABELS if shape == "prompt_completion" or shape in CONVERSATIONS else ("kto_tag",):
        if record.get(name) is not None and _says_no(record[name]):
            return RejectedError(RejectReason.NOT_FOR_TRAINING, f"`{name}` is false: the answer is a bad one")
    return None


def unread_of_turns(record: Mapping[str, object], shape: str, settings: RecordSettings) -> Iterator[str]:
    """The names of fields of turns that are neither read nor known."""
    read = _TURN_FIELDS | {*settings.fields.reasoning}
    for field in (CONVERSATIONS.get(shape), "prompt", "completion", *CHOSEN):
        turns = record.get(field) if field is not None else None
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                yield from (f"{field}[].{name}" for name in with_content(turn) if name not in read)


# --- lists of turns -------------------------------------------------------------------------------------------------


def _turns_of(record: Mapping[str, object], shape: str, settings: RecordSettings) -> list[_Turn]:
    if shape == "prompt_completion":
        return _prompted(
            _turns(record["prompt"], "prompt", settings),
            _turns(record["completion"], "completion", settings),
            "completion",
        )
    if shape == "preference":
        return _preferred(record, settings)
    field = CONVERSATIONS[shape]
    if record.get(field) is None:
        raise missing(f"`{field}`", RejectReason.MISSING_QUERY, record)
    return _turns(record[field], field, settings)


def _preferred(record: Mapping[str, object], settings: RecordSettings) -> list[_Turn]:
    """The chosen turns: a whole conversation, or what follows the prompt."""
    turns = _chosen(record, settings)
    if _is_whole(turns):
        return turns
    for field in ("prompt", *CONVERSATIONS.values()):
        if isinstance(record.get(field), list):
            return _prompted(_turns(record[field], field, settings), turns, "chosen")
    query = query_of(record, settings.fields.query, settings.fields)
    return [_Turn("user", query), *turns]


def _prompted(prompt: list[_Turn], completion: list[_Turn], name: str) -> list[_Turn]:
    """The turns of a prompt, and those of its completion up to the next user turn."""
    asked = [turn.role for turn in prompt if turn.role != "system"]
    end = next((index for index, turn in enumerate(completion) if turn.role == "user"), len(completion))
    replies = completion[:end]
    if asked[-1:] not in (["user"], ["tool"]) or not any(turn.role == "assistant" for turn in replies):
        found = f"`prompt` does not end with a user turn, or `{name}` has no assistant turn"
        raise RejectedError(RejectReason.NO_ANSWERED_TURN, found)
    return [*prompt, *replies]


def _turns(value: object, field: str, settings: RecordSettings) -> list[_Turn]:
    if not isinstance(value, list):
        raise RejectedError(RejectReason.WRONG_TYPE, f"`{field}` is {kind(value)}; a list of turns is expected")
    return [_turn(turn, f"{field}[{index}]", settings) for index, turn in enumerate(value)]


def _turn(value: object, place: str, settings: RecordSettings) -> _Turn:
    if not isinstance(value, dict):
        found = f"`{place}` is {kind(value)}; an object with role and content is expected"
        raise RejectedError(RejectReason.WRONG_TYPE, found)
    role_field = "from" if "from" in value and "role" not in value else "role"
    text_field = "value" if "value" in value and "content" not in value else "content"
    name = value.get(role_field)
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        found = f"`{place}.{role_field}` is {shown(name)}; known roles: {', '.join(_ROLES)}"
        raise RejectedError(RejectReason.UNKNOWN_ROLE, found)
    content = value.get(text_field)
    called = next((name for name in _CALLS if _has_content(value.get(name))), None)
    uses_tool = role in ("tool", "call") or called is not None or _has_tool_part(content)
    text, fault = Field(f"`{place}.{text_field}`", None), None
    try:
        text = Field(text.name, _text_of(content, f"{place}.{text_field}"))
    except RejectedError as error:
        fault = None if uses_tool and role != "system" else error
    uses_tool = uses_tool or _calls_inline(role, text.value)
    tool_field = f"{place}.{called or text_field}" if uses_tool else None
    is_barred = any(_says_no(value.get(mark)) for mark in _MARKS)
    calls = () if role == "tool" else (call for field in _CALLS for call in _list_of(value.get(field)))
    said = histories.said(role, text.value, content, filter(_has_content, calls))
    reasoning = first_present(value, settings.fields.reasoning)
    if reasoning.value is None and isinstance(content, list):
        reasoning = Field(f"`{place}.{text_field}`", _reasoning_of(content))
    return _Turn("assistant" if role == "call" else role, text, is_barred, tool_field, reasoning, fault, said)


def _list_of(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _has_content(value: object) -> bool:
    """Whether a value says something: Parquet gives each turn every field, and each object every key."""
    if isinstance(value, dict):
        return any(map(_has_content, value.values()))
    return bool(value)


def _has_tool_part(content: object) -> bool:
    parts = content if isinstance(content, list) else []
    return any(isinstance(part, dict) and part.get("type") in _TOOL_PARTS for part in parts)


def _reasoning_of(content: list[object]) -> str | None:
    """The text of the parts of a content that are reasoning; None: there is none."""
    parts = [part for part in content if isinstance(part, dict) and part.get("type") in _REASONING_PARTS]
    texts = [first_present(part, ("text", "value", *_REASONING_PARTS)).value for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if found else None


def _text_of(content: object, place: str) -> object:
    """The text of a content that is a list of parts; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = [
        _text_of_part(part, f"{place}[{index}]")
        for index, part in enumerate(content)
        if not (isinstance(part, dict) and part.get("type") in _REASONING_PARTS)
    ]
    return "".join(texts) if texts else None


def _text_of_part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RejectedError(
            RejectReason.WRONG_TYPE, f"`{place}` is {kind(part)}; a part with type and text is expected"
        )
    what = part.get("type", "text")
    if what not in ("text", "input_text", "output_text"):
        raise RejectedError(
            RejectReason.OTHER_THAN_TEXT, f"`{place}` is a part of type {shown(what)}; text is expected"
        )
    text = first_present(part, ("text", "value")).value
    if not isinstance(text, str):
        raise RejectedError(RejectReason.WRONG_TYPE, f"the text of `{place}` is {kind(text)}; text is expected")
    return text


def _calls_inline(role: str, text: object) -> bool:
    return role == "assistant" and isinstance(text, str) and any(call in text for call in _INLINE_CALLS)


def _says_no(mark: object) -> bool:
    if isinstance(mark, str):
        return mark.strip().lower() in ("false", "0", "0.0", "no")
    return isinstance(mark, (bool, int, float)) and mark == 0


# --- exchanges ------------------------------------------------------------------------------------------------------


def _answered(
    record: Mapping[str, object], turns: list[_Turn], barred: RejectedError | None, settings: RecordSettings
) -> list[Candidate]:
    has_context = settings.context == "history"
    exchanges = _exchanges(turns, has_context=has_context)
    answered = [one for one in exchanges if any(turn.role == "assistant" for turn in one.replies)]
    if not answered:
        found = f"no user turn is followed by an assistant turn; {len(turns)} turns"
        raise RejectedError(RejectReason.NO_ANSWERED_TURN, found)
    system = _system_of(record, turns, settings)
    unread = next((turn.fault for turn in turns if turn.role == "system" and turn.fault is not None), None)
    tools = histories.of_tools(record) if has_context else []
    return [_candidate(one, system, tools, index, unread or barred) for index, one in enumerate(answered)]


def _exchanges(turns: list[_Turn], *, has_context: bool) -> Iterator[_Exchange]:
    before: list[_Turn] = []
    asked: list[_Turn] = []
    replies: list[_Turn] = []
    for turn in turns:
        if turn.role == "user":
            if replies:
                yield _Exchange(asked, replies, before)
                before = [*before, *asked, *replies] if has_context else []
                asked, replies = [], []
            asked.append(turn)
        elif turn.role != "system" and asked:
            replies.append(turn)
    if replies:
        yield _Exchange(asked, replies, before)


def _candidate(
    exchange: _Exchange, system: Field, tools: Sequence[Earlier], index: int, barred: RejectedError | None
) -> Candidate:
    query = joined([turn.text for turn in exchange.asked], "\n\n")
    answer = joined([turn.text for turn in exchange.replies if turn.role == "assistant"], "\n\n")
    thought = [turn.reasoning for turn in exchange.replies if turn.reasoning.value is not None]
    reasoning = joined(thought, "\n\n") if thought else Field("reasoning", None)
    before = (Earlier(turn.role, Field(turn.text.name, turn.said)) for turn in exchange.before)
    history = [*tools, *histories.merged(before)]
    return Candidate(system, query, answer, index, exchange.fault or barred, reasoning, history)


def _system_of(record: Mapping[str, object], turns: list[_Turn], settings: RecordSettings) -> Field:
    own = first_present(record, settings.fields.system)
    given = [turn.text for turn in turns if turn.role == "system" and turn.text.value is not None]
    if own.value is not None and own.value not in [field.value for field in given]:
        given.insert(0, own)
    return joined(given or [own], "\n")


def missing(name: str, reason: RejectReason, record: Mapping[str, object]) -> RejectedError:
    """The fault of a record without a field."""
    names = ", ".join(shown(field) for field in list(record)[:10]) or "none"
    return RejectedError(reason, f"{name} is absent or null; fields of the row: {names}")
