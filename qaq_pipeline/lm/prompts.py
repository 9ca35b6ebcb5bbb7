"""Turns a pair (query Q, answer A) into token sequences: the text around Q and A in each pass, and the scored tokens.

Belongs here: the literal text of every prompt, the chat and plain frames, the priors, the token boundary, BOS and
truncation. Does not belong here: the Hugging Face tokenizer (`tokenizer`), models, batches.

The two passes of QAQ (arXiv 2603.12165; method of the authors' `rmi_math.py`, wording for code by this project):

    forward    [before Q] Q [between] A         log PPL(A | Q); with an empty Q: log PPL(A)
    reverse    [before A] A [between] Q         log PPL(Q | A)

A `Markup` holds the four literal texts. Both frames produce one; all later steps are the same. Prefix, Q, middle and A
are tokenised separately and their ids are concatenated, so both passes score the same ids of Q. Special tokens in the
text of Q and A are read as ordinary text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from jinja2.exceptions import TemplateError

from qaq_pipeline.config.settings import ModelSettings, ScoringSettings
from qaq_pipeline.schema.vocabularies import NullReason, Quantity

PROMPT_VERSION = "1"

TASK = (
    "TASK: Given an answer, generate the most likely coding problem that this answer is responding to."
    "{invalid_clause}\nAnswer:\n"
)
INVALID_CLAUSE = ' If the inferred question is outside programming, respond with "INVALID".'

PLAIN_QUERY = "\n\nProblem:\n"
PLAIN_ANSWER = "\n\nAnswer:\n"

MIN_SHARED_TOKENS = 8
"""Shortest shared prefix. A prefix needs a mask in every layer, which costs more than a shorter one saves."""

_SLOT = "QAQ6b1fSLOT"
_SYSTEM_PROBE = "QAQ6b1fSYSTEM"


class TemplateUnusableError(ValueError):
    """A chat template cannot express the prompts. The text names the fault and the remedy."""


class Tokenizer(Protocol):
    """The interface to a tokenizer; tests replace it."""

    bos_token_id: int | None
    end_of_text_id: int | None

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of prompt text. Special tokens in it are recognised; none is added."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of delivered texts. Special tokens in them are read as ordinary text; none is added."""
        ...

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The messages as the chat template renders them, with the generation prompt at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, its answer, and the row's own system text if it has one."""

    pair_id: str
    system: str | None
    query: str
    answer: str


@dataclass(frozen=True, slots=True)
class Target:
    """Tokens [start, stop) of a sequence, whose NLL is the quantity."""

    quantity: Quantity
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One forward pass of a model: token ids and the targets in them."""

    pair_id: str
    token_ids: list[int]
    targets: tuple[Target, ...]
    num_shared: int = 0
    """Number of leading tokens shared with the sequences of all pairs without their own system text: a runner may
    compute them once. The last token of the prefix is not included, because it predicts the next token."""

    def __post_init__(self) -> None:
        """Raises ValueError if a shared token would predict a target: hidden states of shared tokens are not kept."""
        if self.num_shared and any(target.start <= self.num_shared for target in self.targets):
            raise ValueError(f"a target begins among or right after the {self.num_shared} shared tokens")


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The token sequences and counts of one pair. If `null_reasons` names a quantity, no sequence scores it."""

    pair_id: str
    num_q_tokens: int
    num_a_tokens: int
    num_a_tokens_untruncated: int
    is_truncated: bool
    sequences: tuple[TokenSequence, ...]
    null_reasons: Mapping[Quantity, NullReason]


@dataclass(frozen=True, slots=True)
class Markup:
    """The literal text around Q and A in the two passes, for one system text."""

    before_q: str
    between_q_and_a: str
    before_a: str
    between_a_and_q: str


def task_text(*, invalid_clause: bool) -> str:
    """The instruction of the reverse pass, up to where A begins."""
    return TASK.format(invalid_clause=INVALID_CLAUSE if invalid_clause else "")


def plain_markup(system: str, *, invalid_clause: bool) -> Markup:
    """The markup of the frame `plain`: literal text, for models without a chat template."""
    return Markup(
        before_q=system + PLAIN_QUERY,
        between_q_and_a=PLAIN_ANSWER,
        before_a=f"{system}\n\n{task_text(invalid_clause=invalid_clause)}",
        between_a_and_q=PLAIN_QUERY,
    )


def chat_markup(render: Callable[[list[dict[str, str]]], str], system: str, *, invalid_clause: bool) -> Markup:
    """The markup of the frame `chat`: the text that the template puts around a user turn, with the generation prompt.

    The system prompt is always explicit, because templates otherwise insert their own. If a template has no system
    turn, the system text opens the user turn.

    Raises:
        TemplateUnusableError: the template fails, or drops or repeats the user's text.
    """
    has_system_turn = _has_system_turn(render)
    task = task_text(invalid_clause=invalid_clause)
    forward = _render_around_slot(render, system, "", has_system_turn=has_system_turn)
    reverse = _render_around_slot(render, system, task, has_system_turn=has_system_turn)
    return Markup(*forward, *reverse)


def _render_around_slot(
    render: Callable[[list[dict[str, str]]], str], system: str, user_prefix: str, *, has_system_turn: bool
) -> tuple[str, str]:
    user = {"role": "user", "content": user_prefix + _SLOT}
    if has_system_turn:
        text = _render_or_refuse(render, [{"role": "system", "content": system}, user])
    else:
        folded = {"role": "user", "content": f"{system}\n\n{user_prefix}{_SLOT}".lstrip()}
        text = _render_or_refuse(render, [folded])
    before, slot, after = text.partition(_SLOT)
    if not slot or _SLOT in after:
        raise TemplateUnusableError(
            "the chat template drops or repeats the user's text; set `frame: plain`, or `chat_template_from`"
        )
    return before, after


def _has_system_turn(render: Callable[[list[dict[str, str]]], str]) -> bool:
    """Whether the template shows a system turn, rather than refusing or ignoring it."""
    probe = [{"role": "system", "content": _SYSTEM_PROBE}, {"role": "user", "content": _SLOT}]
    try:
        return _SYSTEM_PROBE in render(probe)
    except TemplateError:
        return False


def _render_or_refuse(render: Callable[[list[dict[str, str]]], str], messages: list[dict[str, str]]) -> str:
    try:
        return render(messages)
    except TemplateError as error:
        raise TemplateUnusableError(
            f"the chat template fails on one user turn ({error}); set `frame: plain`, or `chat_template_from`"
        ) from error


class PairEncoder:
    """Turns pairs into token sequences for one model, in its frame, with the configured prior and window.

    Raises:
        TemplateUnusableError: the frame is `chat` and the template cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelSettings, scoring: ScoringSettings) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._scoring = scoring
        self._pieces = lru_cache(maxsize=1024)(self._encode_pieces)
        self._left_context = _first_present(tokenizer.bos_token_id, tokenizer.end_of_text_id)
        self._default = self._pieces(model.system_prompt)

    def markup(self, system: str) -> Markup:
        """The literal prompt texts for a system text."""
        clause = self._scoring.invalid_clause
        if self._model.frame == "plain":
            return plain_markup(system, invalid_clause=clause)
        return chat_markup(self._tokenizer.render_chat, system, invalid_clause=clause)

    def template_text(self) -> str:
        """Everything that determines the prompts, as JSON: the input of the template hash."""
        markups = [self.markup(system) for system in (self._model.system_prompt, "any other system text")]
        return json.dumps(
            {
                "version": PROMPT_VERSION,
                "frame": self._model.frame,
                "prior": self._scoring.prior,
                "markups": [[m.before_q, m.between_q_and_a, m.before_a, m.between_a_and_q] for m in markups],
            },
            sort_keys=True,
        )

    def template_hash(self) -> str:
        """Hash of `template_text` (16 hex digits)."""
        return hashlib.blake2b(self.template_text().encode(), digest_size=8).hexdigest()

    def encode(self, pairs: Sequence[Pair], wanted: Collection[Quantity]) -> list[EncodedPair]:
        """The sequences that yield the wanted quantities of each pair, in the order of `pairs`."""
        query_ids = self._tokenizer.encode_texts([pair.query for pair in pairs])
        answer_ids = self._tokenizer.encode_texts([pair.answer for pair in pairs])
        return [
            self._encode_pair(pair, q_ids, a_ids, wanted)
            for pair, q_ids, a_ids in zip(pairs, query_ids, answer_ids, strict=True)
        ]

    def _encode_pair(self, pair: Pair, q_ids: list[int], a_ids: list[int], wanted: Collection[Quantity]) -> EncodedPair:
        pieces = self._pieces(pair.system or self._model.system_prompt)
        room = self._scoring.max_tokens - pieces.overhead - len(q_ids)
        kept = a_ids[: max(room, 0)]
        failure = self._failure(q_ids, a_ids, room)
        reasons = {quantity: NullReason.NOT_WANTED for quantity in Quantity if quantity not in wanted}
        if failure is not None:
            reasons |= dict.fromkeys(wanted, failure)
        sequences = () if failure else self._sequences(pair.pair_id, pieces, q_ids, kept, wanted)
        if pair.system:
            sequences = tuple(replace(sequence, num_shared=0) for sequence in sequences)
        return EncodedPair(
            pair_id=pair.pair_id,
            num_q_tokens=max(len(q_ids) - self._num_dropped, 0),
            num_a_tokens=0 if failure else len(kept),
            num_a_tokens_untruncated=len(a_ids),
            is_truncated=failure is None and len(kept) < len(a_ids),
            sequences=sequences,
            null_reasons=reasons,
        )

    def _failure(self, q_ids: list[int], a_ids: list[int], room: int) -> NullReason | None:
        """The reason why the pair cannot be scored, or None. Q is never cut; at least one token of A must remain."""
        if len(q_ids) <= self._num_dropped or not a_ids:
            return NullReason.NO_TOKENS_TO_SCORE
        if room < 1:
            return NullReason.QUERY_TOO_LONG
        if room < len(a_ids) and self._scoring.too_long == "leave_unscored":
            return NullReason.PAIR_TOO_LONG
        return None

    @property
    def _num_dropped(self) -> int:
        """Number of tokens of Q without left context: 1 if the prior is `bare` and no token can precede Q, else 0."""
        return int(self._scoring.prior == "bare" and self._left_context is None)

    def _sequences(
        self, pair_id: str, pieces: _Pieces, q: list[int], a: list[int], wanted: Collection[Quantity]
    ) -> tuple[TokenSequence, ...]:
        """The cheapest sequences for the wanted quantities: with the prior `user`, the pass of A | Q also scores Q."""
        query, answer = _Span(q, self._num_dropped), _Span(a, 0)
        forward: dict[Quantity, _Span] = {Quantity.A_GIVEN_Q: answer}
        plans: list[tuple[list[list[int] | _Span], dict[Quantity, _Span]]] = []
        if self._scoring.prior == "user":
            if Quantity.A_GIVEN_Q in wanted:
                forward[Quantity.Q] = query
            else:
                plans.append(([pieces.before_q, query], {Quantity.Q: query}))
        elif self._scoring.prior == "bare":
            context = [] if self._left_context is None else [self._left_context]
            plans.append(([context, query], {Quantity.Q: query}))
        else:
            plans.append(([pieces.before_a, pieces.between_a_and_q, query], {Quantity.Q: query}))
        plans += [
            ([pieces.before_a, a, pieces.between_a_and_q, query], {Quantity.Q_GIVEN_A: query}),
            ([pieces.before_q, query, pieces.between_q_and_a, answer], forward),
            ([pieces.before_q, pieces.between_q_and_a, answer], {Quantity.A: answer}),
        ]
        sequences = (_concatenate(pair_id, parts, scored, wanted) for parts, scored in plans)
        return tuple(sequence for sequence in sequences if sequence.targets)

    def _encode_pieces(self, system: str) -> _Pieces:
        markup = self.markup(system)
        return _Pieces(
            before_q=self._with_left_context(self._tokenizer.encode_markup(markup.before_q)),
            between_q_and_a=self._tokenizer.encode_markup(markup.between_q_and_a),
            before_a=self._with_left_context(self._tokenizer.encode_markup(markup.before_a)),
            between_a_and_q=self._tokenizer.encode_markup(markup.between_a_and_q),
        )

    def _with_left_context(self, ids: list[int]) -> list[int]:
        """The ids with exactly one BOS if the tokenizer has one, else, in the plain frame, an end-of-text token.

        The chat template of a model without BOS starts with its own special token, as in the model's training.
        """
        bos = self._tokenizer.bos_token_id
        if bos is not None:
            return ids if ids[:1] == [bos] else [bos, *ids]
        if self._model.frame == "plain" and self._left_context is not None:
            return [self._left_context, *ids]
        return ids


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Token ids of a `Markup`, with left context."""

    before_q: list[int]
    between_q_and_a: list[int]
    before_a: list[int]
    between_a_and_q: list[int]

    @property
    def overhead(self) -> int:
        """Number of tokens besides Q and A in the longer pass, so that A is cut at the same token in every pass."""
        return max(
            len(self.before_q) + len(self.between_q_and_a),
            len(self.before_a) + len(self.between_a_and_q),
        )


class _Span:
    """Token ids that may be a target, except the first `skip`. Compared by identity."""

    __slots__ = ("ids", "skip")

    def __init__(self, ids: list[int], skip: int) -> None:
        self.ids = ids
        self.skip = skip


def _concatenate(
    pair_id: str,
    parts: Sequence[list[int] | _Span],
    scored: Mapping[Quantity, _Span],
    wanted: Collection[Quantity],
) -> TokenSequence:
    """Concatenates the parts, with a target at each scored span.

    If the first part is the template's own text, its tokens form a shared prefix.
    """
    token_ids: list[int] = []
    targets = []
    for part in parts:
        start = len(token_ids)
        token_ids += part.ids if isinstance(part, _Span) else part
        targets += [
            Target(quantity, start + span.skip, len(token_ids))
            for quantity, span in scored.items()
            if span is part and quantity in wanted
        ]
    num_shared = 0 if isinstance(parts[0], _Span) else len(parts[0]) - 1
    return TokenSequence(pair_id, token_ids, tuple(targets), num_shared if num_shared >= MIN_SHARED_TOKENS else 0)


def _first_present(*ids: int | None) -> int | None:
    return next((token_id for token_id in ids if token_id is not None), None)
