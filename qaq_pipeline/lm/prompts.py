"""Turns a pair (query Q, answer A) into token sequences: the text around Q and A in each pass, and the scored tokens.

Belongs here: the literal text of every prompt, the chat and plain frames, the priors, the token boundary, BOS and
truncation. Does not belong here: chat templates (`chat_frame`), the Hugging Face tokenizer (`tokenizer`), models.

The two passes of QAQ (arXiv 2603.12165; method of the authors' `rmi_math.py`, wording for code by this project):

    forward    [before Q] Q [between] A         log PPL(A | Q); with an empty Q: log PPL(A)
    reverse    [before A] A [between] Q         log PPL(Q | A)

A `Markup` holds the four literal texts. Both frames produce one; all later steps are the same. Prefix, system text, Q,
middle and A are tokenised separately and their ids are concatenated, so both passes score the same ids of Q. The ids of
system text, Q and A spell exactly these texts; special tokens in them are read as ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import Protocol

from qaq_pipeline.config.settings import ModelSettings, ScoringSettings
from qaq_pipeline.lm.chat_frame import SYSTEM_SLOT, Markup, TemplateUnusableError, chat_markup
from qaq_pipeline.schema.vocabularies import QUANTITIES_OF, NullReason, Quantity

PROMPT_VERSION = "3"

TASK = (
    "TASK: Given an answer, generate the most likely coding problem that this answer is responding to."
    "{invalid_clause}\nAnswer:\n"
)
INVALID_CLAUSE = ' If the inferred question is outside programming, respond with "INVALID".'

PLAIN_QUERY = "\n\nProblem:\n"
PLAIN_ANSWER = "\n\nAnswer:\n"

HISTORY = "The conversation so far:"
"""Comes before earlier turns, which are context of both passes, as the system text is. Reading them as turns of the
chat template would need another place for them in the reverse pass, whose only turn shows the answer."""

MIN_SHARED_TOKENS = 8
"""Shortest shared prefix. A prefix needs a mask in every layer, which costs more than a shorter one saves."""


class Tokenizer(Protocol):
    """The interface to a tokenizer; tests replace it."""

    bos_token_id: int | None
    end_of_text_id: int | None
    end_token_ids: tuple[int, ...]
    """Tokens that end a text or a turn."""

    def is_control(self, token_id: int) -> bool:
        """Whether the token is a special one or a marker of the template, which no ordinary text contains."""

    def encode_markup(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of prompt text that begins or `continues` a sequence. Added tokens in it are recognised."""

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of delivered texts. Control tokens in them are read as ordinary text; none is added."""

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The messages as the chat template renders them, with the generation prompt at the end."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, its answer, and the row's own system text and earlier turns if it has some."""

    pair_id: str
    system: str | None
    query: str
    answer: str
    history: Sequence[Mapping[str, str]] | None = None
    """Role and content of each earlier turn that is context."""


@dataclass(frozen=True, slots=True)
class Target:
    """Tokens [start, stop) of a sequence, whose NLL is the quantity."""

    quantity: Quantity
    start: int
    stop: int
    any_of: tuple[int, ...] = ()
    """If not empty: the quantity is -ln p that the token at `start` is one of these, whichever token stands there."""

    @property
    def end_ids(self) -> str:
        """`any_of` as the score cache stores it."""
        return " ".join(map(str, self.any_of))


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
    end_ids: str
    """The end tokens of this pair, as the score cache stores them; empty if the end is not scored."""
    sequences: tuple[TokenSequence, ...]
    null_reasons: Mapping[Quantity, NullReason]


def _slot(system: str) -> str:
    """The place of a system text in the markup; an empty one is rendered as it is."""
    return SYSTEM_SLOT if system else ""


class PairEncoder:
    """Turns pairs into token sequences for one model, in its frame, with the configured prior and window.

    Args:
        tokenizer: the model's tokenizer.
        model: the model's settings.
        scoring: prior and window.
        num_embeddings: number of tokens that the model can read; None if unknown.

    Raises:
        TemplateUnusableError: the template cannot be used, or the model cannot read the prompts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: ModelSettings,
        scoring: ScoringSettings,
        num_embeddings: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_embeddings = math.inf if num_embeddings is None else num_embeddings
        self._model = model
        self._scoring = scoring
        self._left_context = tokenizer.end_of_text_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._slotted_markup = lru_cache(self._render_markup)
        self._markup_ids = lru_cache(maxsize=1024)(self._encode_markup)
        self._require_readable(self._markup_ids(model.system_prompt))  # Raises now if the template cannot be used.

    def markup(self, system: str) -> Markup[str]:
        """The literal prompt texts for a system text."""
        return Markup(*(part.replace(SYSTEM_SLOT, system) for part in self._slotted_markup(_slot(system))))

    def _render_markup(self, system: str) -> Markup[str]:
        task = TASK.format(invalid_clause=INVALID_CLAUSE if self._scoring.invalid_clause else "")
        if self._model.frame == "plain":
            return Markup(system + PLAIN_QUERY, PLAIN_ANSWER, f"{system}\n\n{task}", PLAIN_QUERY)
        return chat_markup(self._tokenizer.render_chat, system, task)

    def template_text(self) -> str:
        """Everything that determines the prompts, as JSON: the input of the template hash."""
        return json.dumps(
            {
                "version": PROMPT_VERSION,
                "frame": self._model.frame,
                "prior": self._scoring.prior,
                "history": HISTORY,
                "markups": [self.markup(system) for system in (self._model.system_prompt, "any other system text")],
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
        # Earlier turns are those of one pair: kept, the ids of 1,024 long ones would take a gigabyte.
        markup_ids = self._encode_markup if pair.history else self._markup_ids
        markup = markup_ids(self._context(pair))
        before_q, between_q_and_a, before_a, between_a_and_q = map(len, markup)
        # Of the longer pass, so that A is cut at the same token in every pass.
        overhead = max(before_q + between_q_and_a, before_a + between_a_and_q)
        room = self._scoring.max_tokens - overhead - len(q_ids)
        kept = a_ids[: max(room, 0)]
        failure = self._failure(q_ids, a_ids, room)
        has_context = bool(pair.system or pair.history)
        if failure is None and not all(map(self._can_read, (*(markup if has_context else ()), q_ids, kept))):
            failure = NullReason.TOKEN_BEYOND_EMBEDDING
        reasons = {quantity: NullReason.NOT_WANTED for quantity in Quantity if quantity not in wanted}
        end_ids = self.end_ids(markup)
        if Quantity.END in wanted and (no_end := self._no_end(end_ids, is_truncated=len(kept) < len(a_ids))):
            reasons[Quantity.END] = no_end
        if failure is not None:
            reasons |= dict.fromkeys(wanted, failure)
        scored = frozenset(Quantity) - reasons.keys()
        sequences = () if failure else self._sequences(pair.pair_id, markup, q_ids, kept, scored, end_ids)
        if has_context:
            sequences = tuple(replace(sequence, num_shared=0) for sequence in sequences)
        return EncodedPair(
            pair_id=pair.pair_id,
            num_q_tokens=max(len(q_ids) - self._num_dropped, 0),
            num_a_tokens=0 if failure else len(kept),
            num_a_tokens_untruncated=len(a_ids),
            is_truncated=failure is None and len(kept) < len(a_ids),
            end_ids="".join(target.end_ids for one in sequences for target in one.targets),
            sequences=sequences,
            null_reasons=reasons,
        )

    def _context(self, pair: Pair) -> str:
        """The system text of both passes: the row's own or the model's, and the turns before the query."""
        system = pair.system or self._model.system_prompt
        if not pair.history:
            return system
        turns = (f"{turn['role'].capitalize()}:\n{turn['content']}" for turn in pair.history)
        return "\n\n".join([*([system] if system else []), HISTORY, *turns])

    def _failure(self, q_ids: list[int], a_ids: list[int], room: int) -> NullReason | None:
        """The reason why the pair cannot be scored, or None. Q is never cut; at least one token of A must remain."""
        if len(q_ids) <= self._num_dropped or not a_ids:
            return NullReason.NO_TOKENS_TO_SCORE
        if room < 1:
            return NullReason.QUERY_TOO_LONG
        if room < len(a_ids) and self._scoring.too_long == "leave_unscored":
            return NullReason.PAIR_TOO_LONG
        return None

    def end_ids(self, markup: Markup[list[int]] | None = None) -> tuple[int, ...]:
        """Tokens that end the answer in the reverse prompt: the tokenizer's, and the one with which the template ends a
        user's turn. In the plain frame, ordinary text follows the answer, so only the tokenizer's end it.

        Args:
            markup: ids of the prompts; None: those with the model's system text.
        """
        following = (markup or self._markup_ids(self._model.system_prompt)).between_a_and_q[:1]
        own = filter(self._tokenizer.is_control, following if self._model.frame == "chat" else ())
        ends = {*own, *self._tokenizer.end_token_ids}
        return tuple(sorted(one for one in ends if one < self._num_embeddings))

    @cached_property
    def end_of_answer(self) -> int | None:
        """The token with which a model learns to end an answer: the one that ends a turn in the chat frame, or the end
        of text. None: the model has neither.
        """
        after_query = self._markup_ids(self._model.system_prompt).between_q_and_a[:1]
        is_end = self._model.frame == "chat" and set(after_query) <= set(self._tokenizer.end_token_ids)
        end = after_query[0] if after_query and is_end else self._tokenizer.end_of_text_id
        return end if end is not None and self._can_read([end]) else None

    def _no_end(self, end_ids: Collection[int], *, is_truncated: bool) -> NullReason | None:
        """The reason why the end of the answer cannot be scored, or None."""
        if is_truncated:
            return NullReason.ANSWER_TRUNCATED
        return None if end_ids else NullReason.NO_END_TOKEN

    @property
    def _num_dropped(self) -> int:
        """Number of tokens of Q without left context: 1 if the prior is `bare` and no token can precede Q, else 0."""
        return int(self._scoring.prior == "bare" and self._left_context is None)

    def _sequences(
        self,
        pair_id: str,
        markup: Markup[list[int]],
        q: list[int],
        a: list[int],
        wanted: Collection[Quantity],
        end_ids: tuple[int, ...],
    ) -> tuple[TokenSequence, ...]:
        """The cheapest sequences for the wanted quantities.

        The end of A is read where the pass of Q | A leaves A. With the prior `user`, the pass of A | Q also scores Q.
        """
        priors = {
            "null_answer": [markup.before_a, [], markup.between_a_and_q, q],
            "user": [markup.before_q, q],
            "bare": [[] if self._left_context is None else [self._left_context], q],
        }
        passes = {
            Quantity.Q: priors[self._scoring.prior],
            Quantity.Q_GIVEN_A: [markup.before_a, a, markup.between_a_and_q, q],
            Quantity.A_GIVEN_Q: [markup.before_q, q, markup.between_q_and_a, a],
            Quantity.A: [markup.before_q, [], markup.between_q_and_a, a],
            Quantity.END: [markup.before_a, a, [*markup.between_a_and_q, *q][:1]],
        }
        scored = {last: {last: len(parts) - 1} for last, parts in passes.items() if last in wanted}
        if Quantity.Q_GIVEN_A in scored and Quantity.END in scored:
            scored[Quantity.Q_GIVEN_A] = {Quantity.END: 2, Quantity.Q_GIVEN_A: 3}
            del scored[Quantity.END]
        if self._scoring.prior == "user" and Quantity.Q in scored and Quantity.A_GIVEN_Q in scored:
            scored[Quantity.A_GIVEN_Q] = {Quantity.Q: 1, Quantity.A_GIVEN_Q: 3}
            del scored[Quantity.Q]
        return tuple(self._sequence(pair_id, passes[last], targets, end_ids) for last, targets in scored.items())

    def _sequence(
        self, pair_id: str, parts: list[list[int]], scored: Mapping[Quantity, int], end_ids: tuple[int, ...]
    ) -> TokenSequence:
        """The parts one after another, with a target at the part of each quantity. The first part may be shared."""
        stops = list(accumulate(map(len, parts)))
        dropped = dict.fromkeys(QUANTITIES_OF["rmi"], self._num_dropped)
        targets = tuple(
            Target(Quantity.END, stops[part - 1], stops[part - 1] + 1, any_of=end_ids)
            if quantity is Quantity.END
            else Target(quantity, stops[part - 1] + dropped.get(quantity, 0), stops[part])
            for quantity, part in scored.items()
        )
        num_shared = len(parts[0]) - 1
        token_ids = list(chain.from_iterable(parts))
        return TokenSequence(pair_id, token_ids, targets, num_shared if num_shared >= MIN_SHARED_TOKENS else 0)

    def _can_read(self, ids: list[int]) -> bool:
        return max(ids, default=0) < self._num_embeddings

    def _require_readable(self, markup: Markup[list[int]]) -> None:
        beyond = max(chain.from_iterable(markup), default=0)
        if beyond >= self._num_embeddings:
            raise TemplateUnusableError(
                f"the prompts have a token (id {beyond}) beyond the {self._num_embeddings} embeddings of the model: "
                "its tokenizer, chat template or system prompt is another model's; correct them, or set `frame: plain`"
            )

    def _encode_markup(self, system: str) -> Markup[list[int]]:
        """The ids of the prompts. The system text is encoded as delivered text, in which no special token is read."""
        (system_ids,) = self._tokenizer.encode_texts([system])
        before_q, between_q_and_a, before_a, between_a_and_q = (
            self._encode_part(part, system_ids, begins=place in (0, 2))
            for place, part in enumerate(self._slotted_markup(_slot(system)))
        )
        return Markup(
            self._with_left_context(before_q), between_q_and_a, self._with_left_context(before_a), between_a_and_q
        )

    def _encode_part(self, part: str, system_ids: list[int], *, begins: bool) -> list[int]:
        first, *others = part.split(SYSTEM_SLOT)
        ids = self._tokenizer.encode_markup(first, continues=not begins)
        for text in others:
            ids = [*ids, *system_ids, *self._tokenizer.encode_markup(text, continues=True)]
        return ids

    def _with_left_context(self, ids: list[int]) -> list[int]:
        """The ids with exactly one BOS if the tokenizer has one, else, in the plain frame, an end-of-text token.

        The chat template of a model without BOS starts with its own special token, as in the model's training.
        """
        bos = self._tokenizer.bos_token_id
        has_own = ids[:1] == [bos] if bos is not None else self._model.frame == "chat"
        return ids if has_own or self._left_context is None else [self._left_context, *ids]
