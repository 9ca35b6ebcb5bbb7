"""A pair (query Q, answer A) as token ids: what stands around Q and A in each pass, and which tokens are scored.

Belongs here: the literal text of every prompt, the chat and plain frames, the priors, the token boundary, BOS and
truncation. Does not belong here: running a model, or batching.

The two passes of QAQ (arXiv 2603.12165; method of the authors' `rmi_math.py`, wording for code by this project):

    forward    [before Q] Q [between] A         log PPL(A | Q); with A after an empty Q: log PPL(A)
    reverse    [before A] A [between] Q         log PPL(Q | A)

A `Markup` holds the four literal texts; both frames produce one, and everything after it is shared. Prefix, Q,
middle and A are tokenised separately and their ids concatenated, so that the same ids of Q are the target in both
passes. Text of Q and A is never read as special tokens.
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
"""A shared prefix costs its sequences a mask in every layer: below this many tokens that costs more than it saves."""

_SLOT = "QAQ6b1fSLOT"
_SYSTEM_PROBE = "QAQ6b1fSYSTEM"

QUANTITIES_OF = {
    "rmi": (Quantity.Q, Quantity.Q_GIVEN_A),
    "ifd": (Quantity.A, Quantity.A_GIVEN_Q),
}
"""Which negative log-likelihoods each score is made of."""


class TemplateUnusableError(ValueError):
    """A chat template cannot carry the passes; the text names the model and the remedy."""


class Tokenizer(Protocol):
    """The seam to a real tokenizer."""

    bos_token_id: int | None
    end_of_text_id: int | None

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of prompt text; special tokens in it are recognised, none is added."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of delivered texts; special tokens in them are ordinary text, none is added."""
        ...

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The messages as the chat template renders them, up to and with the generation prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, its answer, and the row's own system text, if it has one."""

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
    """Leading tokens that the sequences of every pair without a system text of its own begin with, so that a runner
    may compute them once. The last token of the prefix is not among them: what follows is predicted from it."""

    def __post_init__(self) -> None:
        """Raises ValueError where a target would be predicted from a shared token, whose hidden state is not kept."""
        if self.num_shared and any(target.start <= self.num_shared for target in self.targets):
            raise ValueError(f"a target begins among or right after the {self.num_shared} shared tokens")


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """What a model is asked of one pair. Where `null_reasons` names a quantity, no sequence scores it."""

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
    """The frame `plain`: literal text, for models without a chat template."""
    return Markup(
        before_q=system + PLAIN_QUERY,
        between_q_and_a=PLAIN_ANSWER,
        before_a=f"{system}\n\n{task_text(invalid_clause=invalid_clause)}",
        between_a_and_q=PLAIN_QUERY,
    )


def chat_markup(render: Callable[[list[dict[str, str]]], str], system: str, *, invalid_clause: bool) -> Markup:
    """The frame `chat`: what the template puts around a user turn, up to the generation prompt.

    The system prompt is always explicit, since templates otherwise inject one of their own; where a template has
    no system turn, the system text opens the user turn.

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
    """Turns pairs into token sequences for one model, in its frame, with the settings' prior and window.

    Raises:
        TemplateUnusableError: from the constructor, where the frame is `chat` and the template cannot be used.
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
        """Everything that determines the prompts, as JSON: what the template hash is taken of."""
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
        """The sequences that give the wanted quantities of each pair, in the order of `pairs`."""
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
        """Why the pair as a whole cannot be scored: Q is never cut, and at least one token of A must stay."""
        if len(q_ids) <= self._num_dropped or not a_ids:
            return NullReason.NO_TOKENS_TO_SCORE
        if room < 1:
            return NullReason.QUERY_TOO_LONG
        if room < len(a_ids) and self._scoring.too_long == "leave_unscored":
            return NullReason.PAIR_TOO_LONG
        return None

    @property
    def _num_dropped(self) -> int:
        """Tokens of Q without left context: its first one, where a bare prior has no token to stand before it."""
        return int(self._scoring.prior == "bare" and self._left_context is None)

    def _sequences(
        self, pair_id: str, pieces: _Pieces, q: list[int], a: list[int], wanted: Collection[Quantity]
    ) -> tuple[TokenSequence, ...]:
        """The cheapest sequences for the wanted quantities: with the prior `user`, Q comes free with A | Q."""
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
        """Exactly one BOS where the tokenizer defines one; else, in plain text, the end-of-text token.

        A chat template of a model without BOS begins as its model was trained, with a special token of its own.
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
        """Tokens beside Q and A in the longer pass, so that A is cut alike in all of them."""
        return max(
            len(self.before_q) + len(self.between_q_and_a),
            len(self.before_a) + len(self.between_a_and_q),
        )


class _Span:
    """Token ids that may be a target, less the first `skip` of them. Compared by identity."""

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
    """The parts one after another, with a target wherever a scored span comes to lie.

    Where they begin with the template's own text, its tokens are shared with all sequences that do.
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
