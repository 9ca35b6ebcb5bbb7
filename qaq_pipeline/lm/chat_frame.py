"""The text that a chat template puts around a user turn.

Belongs here: rendering around Q and the system text, thinking blocks, the choice of a named template, markers of turns.
Does not belong here: the literal prompts and their token ids (`prompts`), and the tokenizer (`tokenizer`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from jinja2.exceptions import TemplateError

from qaq_pipeline.lm.model_error import ModelError

SYSTEM_SLOT = "QAQ6b1fSYSTEM"
"""Place of the system text. Templates are rendered with it, since they would read control tokens in a real text."""

_SLOT = "QAQ6b1fSLOT"

_THOUGHT = re.compile(
    r"(?P<bracket>[<\[])(?P<end>/?)(?P<name>[\w:.-]*(?:think|thought|reason)[\w:.-]*)[>\]]"
    r"|<\|[\w:.-]*(?:think|thought|reason)[\w:.-]*\|?>|<\|channel\|?>\s*(?:analysis|thought)",
    re.IGNORECASE,
)
"""A marker that opens or closes a thinking block. If it has a name, its closing marker is known."""

_THOUGHT_ENDS = re.compile(r"<\|[^|>]*end[^|>]*\|>|<channel\|>", re.IGNORECASE)
"""Closing markers of the other blocks, such as `<|END_THINKING|>`."""

_CLOSING = re.compile(rf"\s*(?:[^\w\s]/[\w:.-]+[^\w\s]|{_THOUGHT_ENDS.pattern})", re.IGNORECASE)
"""A closing marker of any name, such as `</name>`, or one of the other blocks."""

_MARKER = re.compile("<[|\uff5c][^|\uff5c<>\\s]+[|\uff5c]>|<(?:start|end)_of_turn>|\\[/?INST\\]")
"""Markers of turns that a model reads as single tokens."""

Text = TypeVar("Text", str, list[int])
Render = Callable[[list[dict[str, str]]], str]
"""Renders messages by a chat template, with the generation prompt at the end."""


class TemplateUnusableError(ModelError):
    """The prompts cannot be expressed for the model. The text names the fault and the remedy."""


class Markup(NamedTuple, Generic[Text]):
    """The literal text around Q and A in the two passes, for one system text, or the token ids of this text."""

    before_q: Text
    between_q_and_a: Text
    before_a: Text
    between_a_and_q: Text


def chat_markup(render: Render, system: str, task: str) -> Markup[str]:
    """The markup of the frame `chat`: the text that the template puts around a user turn, with the generation prompt.

    The system prompt is always explicit, because templates otherwise insert their own. If a template has no system
    turn, the system text opens the user turn.

    Raises:
        TemplateUnusableError: the template fails, drops or repeats the user's text, or opens a thinking block that
            cannot be closed.
    """
    has_system_turn = _has_system_turn(render)
    forward = _render_around_slot(render, system, "", has_system_turn=has_system_turn)
    reverse = _render_around_slot(render, system, task, has_system_turn=has_system_turn)
    return Markup(*forward, *reverse)


def _render_around_slot(render: Render, system: str, user_prefix: str, *, has_system_turn: bool) -> tuple[str, str]:
    if has_system_turn:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user_prefix + _SLOT}]
    else:
        messages = [{"role": "user", "content": f"{system}\n\n{user_prefix}{_SLOT}".lstrip()}]
    try:
        before, slot, after = render(messages).partition(_SLOT)
    except TemplateError as error:
        raise TemplateUnusableError(
            f"the chat template fails on one user turn ({error}); set `frame: plain`, or `chat_template_from`"
        ) from error
    if not slot or _SLOT in after:
        raise TemplateUnusableError(
            "the chat template drops or repeats the user's text; set `frame: plain`, or `chat_template_from`"
        )
    return before, _without_thinking(after)


def _has_system_turn(render: Render) -> bool:
    """Whether the template shows a system turn, rather than refusing or ignoring it."""
    probe = [{"role": "system", "content": SYSTEM_SLOT}, {"role": "user", "content": _SLOT}]
    try:
        return SYSTEM_SLOT in render(probe)
    except TemplateError:
        return False


def all_turns(render: Render) -> str:
    """What the template puts around turns of every role, in all conversations that it can render; may be empty."""
    system, user, assistant = ({"role": role, "content": _SLOT} for role in ("system", "user", "assistant"))
    found = []
    for messages in ([user], [system, user], [user, assistant, user]):
        with contextlib.suppress(Exception):  # Raised again, with its remedy, where the template is needed.
            found.append(render(messages))
    return "".join(found)


def _without_thinking(prompt: str) -> str:
    """The generation prompt with an opened thinking block closed, because A and Q are scored as answers."""
    marker = next(reversed([*_THOUGHT.finditer(prompt)]), None)
    if marker is None or marker["end"] or _THOUGHT_ENDS.search(prompt, marker.start()):
        return prompt
    if marker["name"] is None:
        raise TemplateUnusableError(
            f"the chat template opens a thinking block ({marker[0]}) and its closing marker is not known; switch "
            "thinking off by `template_variables` (such as enable_thinking: false), or set `frame: plain` or "
            "`chat_template_from`"
        )
    closing = f"</{marker['name']}>" if marker["bracket"] == "<" else f"[/{marker['name']}]"
    return f"{prompt}\n{closing}\n\n"


def leaves_open(render: Render, between_q_and_a: str) -> bool:
    """Whether the text before A opens something that is closed before the answer of a finished turn, or not there.

    It is compared with such a turn, so the names of blocks need not be known. False if the template shows none.
    """
    turns = [{"role": "user", "content": _SLOT}, {"role": "assistant", "content": SYSTEM_SLOT}]
    try:
        finished, slot, _ = render(turns).partition(_SLOT)[2].partition(SYSTEM_SLOT)
    except TemplateError:
        return False
    if not slot:
        return False
    if finished.startswith(between_q_and_a):
        return _CLOSING.match(finished, len(between_q_and_a)) is not None
    header = finished.rstrip()
    added = between_q_and_a[len(header) :].strip() if between_q_and_a.startswith(header) else ""
    return added != "" and not any(closing.end() == len(added) for closing in _CLOSING.finditer(added))


def named_template(templates: str | Mapping[str, str] | None, name: str | None, source: str) -> str | None:
    """The chosen one of a tokenizer's chat templates, or its only or default one; None if it has none.

    Raises:
        TemplateUnusableError: no template has this name, or one of several has to be chosen.
    """
    if not templates:
        return None
    named = {"default": templates} if isinstance(templates, str) else templates
    if (chosen := name or "default") in named:
        return named[chosen]
    fault = f"has no chat template named {name!r}" if name else "has several chat templates and no default one"
    raise TemplateUnusableError(f"{source} {fault}; set `chat_template_name` to one of: {', '.join(sorted(named))}")


def markers(markup: Markup[str], *, is_borrowed: bool) -> list[str]:
    """The markers of turns in a markup, each once.

    `[INST]` counts only in a borrowed template, because Llama 2 and the first Mistral models read it as text.
    """
    found = dict.fromkeys(marker for part in markup for marker in _MARKER.findall(part))
    return [marker for marker in found if is_borrowed or marker[0] != "["]


def opens_answer(markup: Markup[str]) -> bool:
    """Whether the text after Q has `[/INST]`, which ends the user's turn and opens the assistant's."""
    return "[/INST]" in markup.between_q_and_a
