"""prompts: the ids of every pass against contexts written by hand, BOS, truncation, and pairs that cannot be scored."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from qaq_pipeline.config.settings import ModelSettings, ScoringSettings
from qaq_pipeline.lm.prompts import EncodedPair, Pair, PairEncoder, TemplateUnusableError
from qaq_pipeline.schema.vocabularies import NullReason, Quantity
from qaq_pipeline_tests.support.frames import TEXTS
from qaq_pipeline_tests.support.naive import (
    BOS,
    END_OF_TEXT,
    ENDS,
    EOS,
    FRAMES,
    IM_END,
    IM_START,
    PRIORS,
    SPECIAL_TOKENS,
    SYSTEM,
    TASK,
    contexts,
    text,
)
from qaq_pipeline_tests.support.sentences import Check

ALL = frozenset(Quantity)
RMI = frozenset({Quantity.Q, Quantity.Q_GIVEN_A})
IFD = frozenset({Quantity.A, Quantity.A_GIVEN_Q})
END = frozenset({Quantity.END})
QUERY_SIDE = (Quantity.Q, Quantity.Q_GIVEN_A)
Messages = list[dict[str, str]]


def chatml(messages: Messages) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def with_bos(messages: Messages) -> str:
    return "<s>" + chatml(messages)


def without_system(messages: Messages) -> str:
    if messages[0]["role"] == "system":
        raise TemplateError("System role not supported")
    return chatml(messages)


def ignoring_system(messages: Messages) -> str:
    return chatml([message for message in messages if message["role"] != "system"])


def injecting_system(messages: Messages) -> str:
    injected = {"role": "system", "content": "You are Tiny, made by the tests."}
    return chatml(messages if messages[0]["role"] == "system" else [injected, *messages])


def trimming(messages: Messages) -> str:
    return chatml([message | {"content": message["content"].strip()} for message in messages])


def repeating_system(messages: Messages) -> str:
    return chatml([message for message in messages if message["role"] == "system"] + messages)


def dropping_user(messages: Messages) -> str:
    return chatml([message | {"content": ""} for message in messages])


def repeating_user(messages: Messages) -> str:
    return chatml([*messages, messages[-1]])


def broken(messages: Messages) -> str:
    raise TemplateError("no turn is good enough")


class ByteTokenizer:
    """A `prompts.Tokenizer` without transformers: bytes, and the special tokens of the tiny model."""

    def __init__(
        self,
        render: Callable[[Messages], str] = chatml,
        bos: int | None = BOS,
        end_of_text: int | None = END_OF_TEXT,
        ends: tuple[int, ...] = ENDS,
    ) -> None:
        self.bos_token_id = bos
        self.end_of_text_id = end_of_text
        self.end_token_ids = ends
        self._render = render

    def is_control(self, token_id: int) -> bool:
        return token_id in SPECIAL_TOKENS.values()

    def render_chat(self, messages: Messages) -> str:
        return self._render(messages)

    def encode_markup(self, text: str, *, continues: bool = False) -> list[int]:
        pieces = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text)
        ids = [[SPECIAL_TOKENS[piece]] if piece in SPECIAL_TOKENS else list(piece.encode()) for piece in pieces]
        return list(itertools.chain(*ids))

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def encoder(
    tokenizer: Any = None,
    *,
    frame: str = "chat",
    system_prompt: str = SYSTEM,
    num_embeddings: int | None = None,
    **scoring: Any,
) -> PairEncoder:
    model = ModelSettings.model_validate({"directory": "tiny", "frame": frame, "system_prompt": system_prompt})
    return PairEncoder(tokenizer or ByteTokenizer(), model, ScoringSettings.model_validate(scoring), num_embeddings)


def pair(query: str, answer: str, system: str | None = None) -> Pair:
    return Pair("0" * 32, system, query, answer)


def encode(encoder: PairEncoder, query: str, answer: str, system: str | None = None) -> EncodedPair:
    (encoded,) = encoder.encode([pair(query, answer, system)], ALL)
    return encoded


def scored(encoded: EncodedPair) -> dict[Quantity, tuple[list[int], list[int]]]:
    """Context and scored ids of each quantity of the sequences; none is scored twice. The end's are its end tokens."""
    found = {}
    for sequence in encoded.sequences:
        for target in sequence.targets:
            assert target.quantity not in found
            assert bool(target.any_of) == (target.quantity is Quantity.END)
            ids = sequence.token_ids
            assert target.stop <= len(ids)
            found[target.quantity] = (ids[: target.start], list(target.any_of) or ids[target.start : target.stop])
    return found


def by_hand(query: str, answer: str) -> dict[Quantity, list[int]]:
    """The scored ids of each quantity of a pair."""
    texts = {quantity: text(query if quantity in QUERY_SIDE else answer) for quantity in TEXTS}
    return texts | {Quantity.END: list(ENDS)}


def overhead(frame: str) -> int:
    """Tokens around Q and A in the longer of the two passes."""
    around = contexts(frame, "user", [], [])
    return max(len(around[Quantity.Q_GIVEN_A]), len(around[Quantity.A_GIVEN_Q]))


# --- the passes, against contexts written by hand --------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_every_pass_is_the_one_written_by_hand(frame: str, prior: str, twenty_samples: list[Pair]) -> None:
    for sample, encoded in zip(
        twenty_samples, encoder(frame=frame, prior=prior).encode(twenty_samples, ALL), strict=True
    ):
        q, a = text(sample.query), text(sample.answer)
        expected = contexts(frame, prior, q, a)
        ids = by_hand(sample.query, sample.answer)
        assert scored(encoded) == {quantity: (expected[quantity], ids[quantity]) for quantity in Quantity}
        assert encoded.pair_id == sample.pair_id
        assert (encoded.num_q_tokens, encoded.num_a_tokens) == (len(q), len(a))
        assert (encoded.num_a_tokens_untruncated, encoded.is_truncated) == (len(a), False)
        assert encoded.null_reasons == {}


@pytest.mark.parametrize("frame", FRAMES)
def test_the_null_answer_prior_differs_from_the_reverse_pass_by_the_answer_alone(frame: str) -> None:
    answer = text("~~~~")
    passes = scored(encode(encoder(frame=frame, prior="null_answer"), "Reverse s.", "~~~~"))
    reverse = passes[Quantity.Q_GIVEN_A][0]
    (place,) = [i for i in range(len(reverse)) if reverse[i : i + 4] == answer]
    assert reverse[:place] + reverse[place + 4 :] == passes[Quantity.Q][0]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_the_same_query_ids_are_scored_in_both_passes(frame: str, prior: str, twenty_samples: list[Pair]) -> None:
    for encoded in encoder(frame=frame, prior=prior).encode(twenty_samples, ALL):
        passes = scored(encoded)
        assert passes[Quantity.Q][1] == passes[Quantity.Q_GIVEN_A][1]
        assert passes[Quantity.A][1] == passes[Quantity.A_GIVEN_Q][1]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_end_of_turn_and_other_special_tokens_are_never_scored(
    frame: str, prior: str, twenty_samples: list[Pair]
) -> None:
    special = set(SPECIAL_TOKENS.values())
    for encoded in encoder(frame=frame, prior=prior).encode(twenty_samples, ALL):
        passes = scored(encoded)
        assert all(special.isdisjoint(passes[quantity][1]) for quantity in TEXTS)


def test_scored_text_begins_right_after_the_generation_prompt() -> None:
    generation_prompt = [IM_END, *text("\n"), IM_START, *text("assistant\n")]
    passes = scored(encode(encoder(), "Reverse s.", "s[::-1]"))
    for quantity in TEXTS:
        assert passes[quantity][0][-len(generation_prompt) :] == generation_prompt, quantity


SEQUENCES = [
    ("null_answer", RMI, 2),
    ("null_answer", IFD, 2),
    ("null_answer", END, 1),
    ("null_answer", RMI | END, 2),
    ("null_answer", IFD | END, 3),
    ("null_answer", ALL, 4),
    ("bare", RMI, 2),
    ("bare", RMI | END, 2),
    ("bare", ALL, 4),
    ("user", RMI, 2),
    ("user", IFD, 2),
    ("user", ALL - END, 3),
    ("user", ALL, 3),
]


@pytest.mark.parametrize(("prior", "wanted", "number"), SEQUENCES)
@pytest.mark.parametrize("frame", FRAMES)
def test_only_what_is_wanted_is_asked_for_in_the_fewest_sequences(
    frame: str, prior: str, wanted: Collection[Quantity], number: int
) -> None:
    everything = scored(encode(encoder(frame=frame, prior=prior), "Reverse s.", "s[::-1]"))
    (encoded,) = encoder(frame=frame, prior=prior).encode([pair("Reverse s.", "s[::-1]")], wanted)
    assert len(encoded.sequences) == number
    assert scored(encoded) == {quantity: everything[quantity] for quantity in wanted}
    assert encoded.null_reasons == dict.fromkeys(ALL - set(wanted), NullReason.NOT_WANTED)


# --- faults of the reference scripts (method, section 4) -------------------------------------------------------------


@pytest.mark.parametrize("num_characters", [*range(1, 11), 11, 12, 30])
def test_fault_1_every_token_of_a_query_is_scored_after_a_user_turn_however_short(num_characters: int) -> None:
    query = "abcdefghijklmnopqrstuvwxyz0123456789"[:num_characters]
    for wanted in (ALL, RMI):
        (encoded,) = encoder(prior="user").encode([pair(query, "an answer")], wanted)
        context, ids = scored(encoded)[Quantity.Q]
        assert ids == text(query)
        assert context == contexts("chat", "user", [], [])[Quantity.Q]
        assert encoded.num_q_tokens == num_characters


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_fault_2_a_long_answer_never_cuts_the_query(frame: str, prior: str) -> None:
    query, answer = "Write it, all of it.", "x = 1\n" * 5000
    encoded = encode(encoder(frame=frame, prior=prior, max_tokens=400), query, answer)
    passes = scored(encoded)
    kept = 400 - overhead(frame) - len(query)
    cut = contexts(frame, prior, text(query), text(answer)[:kept])
    assert passes == {
        Quantity.Q: (cut[Quantity.Q], text(query)),
        Quantity.Q_GIVEN_A: (cut[Quantity.Q_GIVEN_A], text(query)),
        Quantity.A: (cut[Quantity.A], text(answer)[:kept]),
        Quantity.A_GIVEN_Q: (cut[Quantity.A_GIVEN_Q], text(answer)[:kept]),
    }
    assert encoded.null_reasons == {Quantity.END: NullReason.ANSWER_TRUNCATED}
    assert max(len(sequence.token_ids) for sequence in encoded.sequences) == 400
    assert encoded.is_truncated
    assert (encoded.num_a_tokens, encoded.num_a_tokens_untruncated) == (kept, len(answer))


def test_fault_2_a_query_that_fills_the_window_is_refused_and_never_scored_on_nothing() -> None:
    room = 400 - overhead("chat")
    fits = encode(encoder(max_tokens=400), "q" * (room - 1), "answer")
    assert (fits.num_a_tokens, fits.is_truncated) == (1, True)
    assert fits.null_reasons == {Quantity.END: NullReason.ANSWER_TRUNCATED}
    for length in (room, room + 1, 5000):
        refused = encode(encoder(max_tokens=400), "q" * length, "answer")
        assert refused.sequences == ()
        assert refused.null_reasons == dict.fromkeys(ALL, NullReason.QUERY_TOO_LONG)
        assert (refused.num_a_tokens, refused.is_truncated) == (0, False)
        assert (refused.num_q_tokens, refused.num_a_tokens_untruncated) == (length, len("answer"))


ANY_TEXT = st.text(max_size=60) | st.sampled_from(["<|im_end|>", "<s>", "\n", "é" * 40])


@given(query=ANY_TEXT, answer=ANY_TEXT, prior=st.sampled_from(PRIORS), frame=st.sampled_from(FRAMES), data=st.data())
@effort(max_examples=200)
def test_fault_2_a_quantity_is_scored_whole_or_null_with_a_reason_whatever_the_texts(
    query: str, answer: str, prior: str, frame: str, data: st.DataObject
) -> None:
    max_tokens = data.draw(st.integers(16, overhead(frame) + 80))
    too_long = data.draw(st.sampled_from(["truncate_answer", "leave_unscored"]))
    ends = data.draw(st.sampled_from([(), (EOS,), ENDS]))
    tokenizer = ByteTokenizer(end_of_text=None, bos=data.draw(st.sampled_from([BOS, None])), ends=ends)
    encoded = encode(
        encoder(tokenizer, frame=frame, prior=prior, max_tokens=max_tokens, too_long=too_long), query, answer
    )
    passes = scored(encoded)
    assert set(passes) | set(encoded.null_reasons) == ALL
    assert set(passes).isdisjoint(encoded.null_reasons)
    own_end = {IM_END} if frame == "chat" else set()
    counts = {Quantity.END: len(own_end.union(ends))} | dict.fromkeys(QUERY_SIDE, encoded.num_q_tokens)
    for quantity, (context, ids) in passes.items():
        assert 0 < len(ids) == counts.get(quantity, encoded.num_a_tokens)
        assert len(context) > 0
    assert all(len(sequence.token_ids) <= max_tokens for sequence in encoded.sequences)
    if passes:
        dropped = int(prior == "bare" and tokenizer.bos_token_id is None)
        assert passes[Quantity.Q][1] == passes[Quantity.Q_GIVEN_A][1] == text(query)[dropped:]
        assert passes[Quantity.A][1] == passes[Quantity.A_GIVEN_Q][1] == text(answer)[: encoded.num_a_tokens]
        assert encoded.is_truncated == (encoded.num_a_tokens < len(text(answer)))
        assert (Quantity.END in passes) == (not encoded.is_truncated and (frame == "chat" or ends != ()))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("render", [chatml, with_bos, without_system, ignoring_system, injecting_system])
def test_fault_3_exactly_one_bos_whichever_template(frame: str, prior: str, render: Any) -> None:
    for sequence in encode(encoder(ByteTokenizer(render), frame=frame, prior=prior), "Reverse s.", "s").sequences:
        assert [i for i, token in enumerate(sequence.token_ids) if token == BOS] == [0]


@pytest.mark.parametrize("prior", PRIORS)
def test_fault_3_a_template_that_writes_bos_itself_gives_the_same_ids(prior: str) -> None:
    one, other = (encode(encoder(ByteTokenizer(render), prior=prior), "q", "a") for render in (chatml, with_bos))
    assert one.sequences == other.sequences


# --- left context without BOS ----------------------------------------------------------------------------------------


def test_without_bos_the_end_of_text_token_stands_before_plain_text() -> None:
    tokenizer = ByteTokenizer(bos=None)
    for prior in PRIORS:
        passes = scored(encode(encoder(tokenizer, frame="plain", prior=prior), "Reverse s.", "s"))
        expected = contexts("plain", prior, text("Reverse s."), text("s"), bos=END_OF_TEXT)
        assert {quantity: context for quantity, (context, _) in passes.items()} == expected


def test_without_bos_a_chat_template_begins_as_its_model_was_trained() -> None:
    tokenizer = ByteTokenizer(bos=None)
    passes = scored(encode(encoder(tokenizer, prior="user"), "Reverse s.", "s"))
    expected = contexts("chat", "user", text("Reverse s."), text("s"))
    assert {quantity: [BOS, *context] for quantity, (context, _) in passes.items()} == expected
    bare = scored(encode(encoder(tokenizer, prior="bare"), "Reverse s.", "s"))
    assert bare[Quantity.Q] == ([END_OF_TEXT], text("Reverse s."))


def test_a_bare_prior_without_any_left_context_drops_the_first_token_on_both_sides() -> None:
    tokenizer = ByteTokenizer(bos=None, end_of_text=None)
    encoded = encode(encoder(tokenizer, prior="bare"), "Reverse s.", "s")
    passes = scored(encoded)
    assert passes[Quantity.Q] == (text("R"), text("everse s."))
    assert passes[Quantity.Q_GIVEN_A][1] == text("everse s.")
    assert passes[Quantity.Q_GIVEN_A][0][-1:] == text("R")
    assert encoded.num_q_tokens == len("everse s.")
    assert passes[Quantity.A][1] == text("s")

    only = encode(encoder(tokenizer, prior="bare"), "R", "s")
    assert only.sequences == ()
    assert only.num_q_tokens == 0
    assert only.null_reasons == dict.fromkeys(ALL, NullReason.NO_TOKENS_TO_SCORE)

    for prior in ("user", "null_answer"):
        whole = scored(encode(encoder(tokenizer, prior=prior), "Reverse s.", "s"))
        assert whole[Quantity.Q][1] == whole[Quantity.Q_GIVEN_A][1] == text("Reverse s.")


# --- the end of the answer -------------------------------------------------------------------------------------------


def end_of(encoded: EncodedPair) -> tuple[list[int], list[int]]:
    return scored(encoded)[Quantity.END]


def test_the_end_is_read_where_the_reverse_pass_leaves_the_answer() -> None:
    for frame in FRAMES:
        encoded = encode(encoder(frame=frame), "Reverse s.", "s[::-1]")
        (reverse,) = (one for one in encoded.sequences if Quantity.END in {target.quantity for target in one.targets})
        end, query = reverse.targets
        assert (end.quantity, query.quantity) == (Quantity.END, Quantity.Q_GIVEN_A)
        assert (end.any_of, end.stop) == (ENDS, end.start + 1)
        assert reverse.token_ids[end.start] == (IM_END if frame == "chat" else ord("\n"))
        assert encoded.end_ids == "257 259 260"
    (without,) = encoder().encode([pair("Reverse s.", "s[::-1]")], TEXTS)
    assert without.end_ids == ""


@pytest.mark.parametrize(("ends", "chat"), [((), (IM_END,)), ((EOS,), (EOS, IM_END)), ((EOS, IM_END), (EOS, IM_END))])
def test_the_chat_frame_adds_the_token_that_ends_the_turn_and_the_plain_frame_adds_none(
    ends: tuple[int, ...], chat: tuple[int, ...]
) -> None:
    tokenizer = ByteTokenizer(ends=ends)
    assert (encoder(tokenizer).end_ids(), encoder(tokenizer, frame="plain").end_ids()) == (chat, ends)
    assert end_of(encode(encoder(tokenizer), "q", "a"))[1] == list(chat)


def test_text_that_the_template_writes_after_a_turn_ends_no_answer() -> None:
    """As in Llama 2's template: ` [/INST]` follows the text of the user."""
    asked = encoder(ByteTokenizer(lambda messages: f"[INST] {messages[-1]['content']} [/INST]", ends=(EOS,)))
    assert end_of(encode(asked, "q", "a"))[1] == [EOS]


def test_a_template_without_any_text_after_a_turn_has_the_end_before_the_query() -> None:
    asked = encoder(ByteTokenizer(lambda messages: "\n".join(message["content"] for message in messages)))
    reverse, alone = encode(asked, "query", "a"), asked.encode([pair("query", "a")], END)[0]
    assert end_of(reverse) == end_of(alone) == ([BOS, *text(f"{SYSTEM}\n{TASK}a")], list(ENDS))
    assert scored(reverse)[Quantity.Q_GIVEN_A][1] == text("query")


def test_without_any_end_token_the_end_is_null_with_a_reason_and_the_rest_is_scored() -> None:
    endless = encode(encoder(ByteTokenizer(ends=()), frame="plain"), "q", "a")
    assert endless.null_reasons == {Quantity.END: NullReason.NO_END_TOKEN}
    assert set(scored(endless)) == set(TEXTS)
    (alone,) = encoder(ByteTokenizer(ends=()), frame="plain").encode([pair("q", "a")], END)
    assert alone.sequences == ()


# --- too long, or empty ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_pair_that_just_fits_is_not_truncated(frame: str, prior: str) -> None:
    answer = "a" * (400 - overhead(frame) - len("query"))
    encoding = encoder(frame=frame, prior=prior, max_tokens=400)
    fits = encode(encoding, "query", answer)
    assert (fits.is_truncated, fits.num_a_tokens, fits.null_reasons) == (False, len(answer), {})
    longer = encode(encoding, "query", answer + "a")
    assert (longer.is_truncated, longer.num_a_tokens) == (True, len(answer))
    assert longer.null_reasons == {Quantity.END: NullReason.ANSWER_TRUNCATED}
    (without_end,) = encoding.encode([pair("query", answer)], TEXTS)
    assert longer.sequences == without_end.sequences


@pytest.mark.parametrize("wanted", [RMI, IFD, END, ALL])
def test_the_answer_is_cut_alike_whichever_scores_are_wanted(wanted: Collection[Quantity]) -> None:
    (encoded,) = encoder(max_tokens=400).encode([pair("query", "a" * 1000)], wanted)
    assert encoded.num_a_tokens == 400 - overhead("chat") - len("query")


def test_leave_unscored_names_the_pair_too_long_and_cuts_nothing() -> None:
    refusing = encoder(max_tokens=400, too_long="leave_unscored")
    (refused,) = refusing.encode([pair("query", "a" * 1000)], RMI)
    assert refused.sequences == ()
    assert refused.null_reasons == dict.fromkeys(RMI, NullReason.PAIR_TOO_LONG) | dict.fromkeys(
        IFD | END, NullReason.NOT_WANTED
    )
    assert (refused.num_a_tokens, refused.num_a_tokens_untruncated, refused.is_truncated) == (0, 1000, False)
    fits = encode(refusing, "query", "a" * (400 - overhead("chat") - 5))
    assert fits.null_reasons == {}
    (both,) = refusing.encode([pair("query", "a" * 1000)], ALL)
    assert both.null_reasons == dict.fromkeys(ALL, NullReason.PAIR_TOO_LONG), "nothing is truncated"
    too_long_alone = encode(refusing, "q" * 400, "a")
    assert set(too_long_alone.null_reasons.values()) == {NullReason.QUERY_TOO_LONG}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("query", "answer"), [("", "a"), ("q", ""), ("", "")])
def test_an_empty_query_or_answer_has_no_tokens_to_score(query: str, answer: str, prior: str) -> None:
    encoded = encode(encoder(prior=prior), query, answer)
    assert encoded.sequences == ()
    assert encoded.null_reasons == dict.fromkeys(ALL, NullReason.NO_TOKENS_TO_SCORE)
    assert encoded.is_truncated is False


# --- system text -----------------------------------------------------------------------------------------------------


OTHER = "Answer like a pirate."


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_rows_own_system_text_replaces_the_prompt_as_context_and_is_not_scored(frame: str, prior: str) -> None:
    other = encoder(frame=frame, prior=prior, system_prompt=OTHER)
    encoded = other.encode([pair("q", "a", SYSTEM), pair("q", "a"), pair("q", "a", "")], ALL)
    own, default, empty = (scored(one) for one in encoded)
    assert {quantity: context for quantity, (context, _) in own.items()} == contexts(frame, prior, text("q"), text("a"))
    assert default == empty
    for quantity in ALL - ({Quantity.Q} if prior == "bare" else set()):
        assert default[quantity][0] != own[quantity][0]
        assert default[quantity][1] == own[quantity][1]


@pytest.mark.parametrize("frame", FRAMES)
def test_earlier_turns_are_context_after_the_system_text_and_are_not_scored(frame: str) -> None:
    turns = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello."}]
    said = "The conversation so far:\n\nUser:\nHi <|im_end|>\n\nAssistant:\nHello."
    with_history = [Pair("0" * 32, system, "q", "a", turns) for system in (SYSTEM, None)]
    in_words = [pair("q", "a", f"{SYSTEM}\n\n{said}"), pair("q", "a", f"{OTHER}\n\n{said}")]
    one = encoder(frame=frame, system_prompt=OTHER)
    assert [scored(found) for found in one.encode(with_history, ALL)] == [
        scored(found) for found in one.encode(in_words, ALL)
    ]
    assert all(sequence.num_shared == 0 for found in one.encode(with_history, ALL) for sequence in found.sequences)
    without = encoder(frame=frame, system_prompt="")
    assert scored(without.encode([Pair("0" * 32, None, "q", "a", turns)], ALL)[0]) == scored(
        without.encode([pair("q", "a", said)], ALL)[0]
    )


FOLDED = text(f"user\n{SYSTEM}\n\n")


@pytest.mark.parametrize("render", [without_system, ignoring_system])
def test_a_template_that_refuses_or_ignores_the_system_turn_has_it_open_the_user_turn(render: Any) -> None:
    passes = scored(encode(encoder(ByteTokenizer(render), prior="user"), "q", "a"))
    tail = [IM_END, *text("\n"), IM_START, *text("assistant\n")]
    assert passes[Quantity.Q][0] == [BOS, IM_START, *FOLDED]
    assert passes[Quantity.Q_GIVEN_A][0] == [BOS, IM_START, *FOLDED, *text(TASK + "a"), *tail]
    assert passes[Quantity.A_GIVEN_Q][0] == [BOS, IM_START, *FOLDED, *text("q"), *tail]
    assert passes[Quantity.A][0] == [BOS, IM_START, *FOLDED, *tail]


def test_a_template_that_injects_a_system_prompt_is_given_the_settings_one() -> None:
    one, other = (encode(encoder(ByteTokenizer(render)), "q", "a").sequences for render in (chatml, injecting_system))
    assert one == other


def test_an_empty_system_prompt_is_an_empty_system_turn() -> None:
    passes = scored(encode(encoder(system_prompt="", prior="user"), "q", "a"))
    assert passes[Quantity.Q][0] == [BOS, IM_START, *text("system\n"), IM_END, *text("\n"), IM_START, *text("user\n")]
    folded = scored(encode(encoder(ByteTokenizer(without_system), system_prompt="", prior="user"), "q", "a"))
    assert folded[Quantity.Q][0] == [BOS, IM_START, *text("user\n")]


def test_a_template_that_trims_its_turns_trims_no_query_no_answer_and_no_system_text() -> None:
    texts = ("  indented\n\n", "\n\n    return 1\n", "  Be brief.\n")
    one, other = (encode(encoder(ByteTokenizer(render)), *texts).sequences for render in (chatml, trimming))
    assert one == other


def test_a_template_that_repeats_the_system_text_repeats_all_of_it() -> None:
    for system in ("Be <|im_end|>.", None):
        passes = scored(encode(encoder(ByteTokenizer(repeating_system), prior="user"), "q", "a", system))
        turn = [IM_START, *text(f"system\n{system or SYSTEM}"), IM_END, *text("\n")]
        assert passes[Quantity.Q][0] == [BOS, *turn, *turn, IM_START, *text("user\n")]


CONTROL = "Be brief.<|im_end|>\n<|im_start|>assistant\n</s>"


@pytest.mark.parametrize("render", [chatml, with_bos, without_system, ignoring_system, trimming])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_system_text_is_text_whatever_control_tokens_stand_in_it(frame: str, prior: str, render: Any) -> None:
    def control_tokens(encoded: EncodedPair) -> list[list[int]]:
        return [[token for token in one.token_ids if token > 255] for one in encoded.sequences]

    tokenizer, special = ByteTokenizer(render), "<s>" + CONTROL
    plain = encode(encoder(tokenizer, frame=frame, prior=prior), "q", "a", "Be brief.")
    own = encode(encoder(tokenizer, frame=frame, prior=prior), "q", "a", special)
    default = encode(encoder(tokenizer, frame=frame, prior=prior, system_prompt=special), "q", "a")
    assert control_tokens(plain) == control_tokens(own) == control_tokens(default)
    assert [one.token_ids for one in own.sequences] == [one.token_ids for one in default.sequences]
    for quantity, (context, _) in scored(own).items():
        spelled = bytes(token for token in context if token < 256).decode()
        assert (special in spelled) == (prior != "bare" or quantity != Quantity.Q)


def test_pairs_without_their_own_system_text_share_their_prefix_with_control_tokens_in_the_settings_text() -> None:
    encoded = encoder(system_prompt=CONTROL).encode([pair("q", "a"), pair("other", "b"), pair("q", "a", SYSTEM)], ALL)
    one, other, own = ([sequence.num_shared for sequence in pair.sequences] for pair in encoded)
    assert one == other
    assert min(one) > len(CONTROL)
    assert own == [0] * 4


# --- thinking blocks -------------------------------------------------------------------------------------------------


def opening(marker: str) -> Any:
    return ByteTokenizer(lambda messages: chatml(messages) + marker)


CLOSED = {
    "<think>\n": "<think>\n\n</think>\n\n",
    "<think>": "<think>\n</think>\n\n",
    "[THINK]": "[THINK]\n[/THINK]\n\n",
    "<thinking>\n": "<thinking>\n\n</thinking>\n\n",
    "<reasoning>\n": "<reasoning>\n\n</reasoning>\n\n",
    "<seed:think>": "<seed:think>\n</seed:think>\n\n",
    "<think></think><think>Okay, ": "<think></think><think>Okay, \n</think>\n\n",
}


@pytest.mark.parametrize("opened", CLOSED)
def test_a_template_that_opens_a_thinking_block_has_it_closed_before_the_scored_text(opened: str) -> None:
    markup = encoder(opening(opened)).markup(SYSTEM)
    for after in (markup.between_q_and_a, markup.between_a_and_q):
        assert after == "<|im_end|>\n<|im_start|>assistant\n" + CLOSED[opened]
    passes = scored(encode(encoder(opening(opened)), "q", "a"))
    assert passes[Quantity.A_GIVEN_Q][0][-len(CLOSED[opened]) :] == text(CLOSED[opened])


@pytest.mark.parametrize(
    "prompt",
    [
        "<think>\n\n</think>\n\n",
        "<|START_THINKING|><|END_THINKING|>",
        "<|channel>thought\n<channel|>",
        "Think first. ",
        "",
    ],
)
def test_a_thinking_block_that_is_closed_or_never_opened_stays_as_it_is(prompt: str) -> None:
    assert encoder(opening(prompt)).markup(SYSTEM).between_q_and_a == f"<|im_end|>\n<|im_start|>assistant\n{prompt}"


@pytest.mark.parametrize("marker", ["<|START_THINKING|>", "<|begin_of_thought|>", "<|channel|>analysis<|message|>"])
def test_a_thinking_block_with_an_unknown_end_is_refused_by_name(marker: str, check_sentence: Check) -> None:
    with pytest.raises(TemplateUnusableError) as error:
        encoder(opening(marker))
    assert marker.split("analysis", maxsplit=1)[0] in str(error.value)
    check_sentence(error.value)


def test_a_template_that_thinks_does_not_matter_to_plain_text() -> None:
    one, other = (encode(encoder(opening(said), frame="plain"), "q", "a") for said in ("", "<|START_THINKING|>"))
    assert one == other


# --- tokens beyond the embedding -------------------------------------------------------------------------------------


def test_a_token_beyond_the_embedding_costs_its_row_alone() -> None:
    pairs = [pair("q", "a"), pair("é", "a"), pair("q", "aé"), pair("q", "a", "é")]
    # The first byte of é is 195. Without BOS and end-of-text, plain prompts have bytes alone.
    limited = encoder(ByteTokenizer(bos=None, end_of_text=None), frame="plain", num_embeddings=195)
    fine, *others = limited.encode(pairs, TEXTS)
    assert fine == encoder(ByteTokenizer(bos=None, end_of_text=None), frame="plain").encode(pairs, TEXTS)[0]
    for other in others:
        assert other.sequences == ()
        beyond = dict.fromkeys(TEXTS, NullReason.TOKEN_BEYOND_EMBEDDING)
        assert other.null_reasons == beyond | {Quantity.END: NullReason.NOT_WANTED}
        assert (other.num_a_tokens, other.is_truncated) == (0, False)


def test_a_token_beyond_the_embedding_that_is_cut_away_costs_nothing() -> None:
    limited = encoder(num_embeddings=300, max_tokens=400)
    assert encode(limited, "q", "a" * 400 + "é").null_reasons == {Quantity.END: NullReason.ANSWER_TRUNCATED}


def test_an_end_token_beyond_the_embedding_is_left_out() -> None:
    assert encoder(ByteTokenizer(ends=(EOS, 400)), num_embeddings=300).end_ids() == (EOS, IM_END)
    assert encoder(ByteTokenizer(ends=(400,)), frame="plain", num_embeddings=300).end_ids() == ()


@pytest.mark.parametrize(("frame", "system_prompt"), [("chat", SYSTEM), ("plain", "é")])
def test_prompts_that_the_model_cannot_read_are_an_error_with_the_remedy(
    frame: str, system_prompt: str, check_sentence: Check
) -> None:
    with pytest.raises(TemplateUnusableError) as error:
        encoder(ByteTokenizer(bos=None, end_of_text=None), frame=frame, system_prompt=system_prompt, num_embeddings=195)
    check_sentence(error.value)


@pytest.mark.parametrize("render", [dropping_user, repeating_user, broken])
def test_a_template_that_cannot_carry_the_passes_is_an_error_that_names_the_remedy(
    render: Any, check_sentence: Check
) -> None:
    with pytest.raises(TemplateUnusableError) as error:
        encoder(ByteTokenizer(render))
    check_sentence(error.value)


# --- special tokens as text, with the real tokenizer -----------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "emits_bos", "no_system", "ignores_system", "trims"])
@pytest.mark.parametrize("prior", PRIORS)
def test_the_real_tokenizer_gives_what_the_byte_tokenizer_gives(
    template: str, prior: str, tiny_model_dir: Callable[..., Path], twenty_samples: list[Pair]
) -> None:
    from transformers import AutoTokenizer

    from qaq_pipeline.lm.tokenizer import HfTokenizer

    fakes = {"no_system": without_system, "ignores_system": ignoring_system}
    real = HfTokenizer(AutoTokenizer.from_pretrained(tiny_model_dir(template=template)))
    fake = ByteTokenizer(fakes.get(template, chatml))
    for frame in FRAMES:
        one, other = (encoder(tokenizer, frame=frame, prior=prior) for tokenizer in (real, fake))
        assert one.encode(twenty_samples, ALL) == other.encode(twenty_samples, ALL)
        assert one.template_hash() == other.template_hash() or template == "emits_bos"


def test_special_tokens_in_query_and_answer_are_ordinary_text(tiny_model_dir: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    from qaq_pipeline.lm.tokenizer import HfTokenizer

    query, answer = "What is <|im_end|>?\n<|im_start|>assistant\n<s>", "</s><|endoftext|>"
    tokenizer = HfTokenizer(AutoTokenizer.from_pretrained(tiny_model_dir()))
    passes = scored(encode(encoder(tokenizer), query, answer))
    assert passes[Quantity.Q][1] == passes[Quantity.Q_GIVEN_A][1] == text(query)
    assert passes[Quantity.A][1] == passes[Quantity.A_GIVEN_Q][1] == text(answer)
    assert {quantity: context for quantity, (context, _) in passes.items()} == contexts(
        "chat", "null_answer", text(query), text(answer)
    )


# --- the template's hash ---------------------------------------------------------------------------------------------


def test_the_template_hash_changes_with_whatever_changes_a_prompt_and_with_nothing_else() -> None:
    base = encoder().template_hash()
    assert base == encoder().template_hash() == encoder(max_tokens=100, too_long="leave_unscored").template_hash()
    assert re.fullmatch("[0-9a-f]{16}", base)
    changed = {
        "frame": encoder(frame="plain"),
        "prior": encoder(prior="user"),
        "other prior": encoder(prior="bare"),
        "clause": encoder(invalid_clause=False),
        "clause in the plain frame": encoder(frame="plain", invalid_clause=False),
        "system prompt": encoder(system_prompt="Write clean code"),
        "template": encoder(ByteTokenizer(without_system)),
        "other template": encoder(ByteTokenizer(lambda messages: chatml(messages) + "<think>\n\n</think>\n")),
        "system prompt that is empty": encoder(system_prompt=""),
        "other generation prompt": encoder(ByteTokenizer(lambda messages: chatml(messages) + "Answer: ")),
    }
    hashes = {name: changed_encoder.template_hash() for name, changed_encoder in changed.items()}
    assert len({base, *hashes.values()}) == 1 + len(hashes), hashes


def test_without_the_clause_the_instruction_ends_before_it() -> None:
    passes = scored(encode(encoder(frame="plain", prior="null_answer", invalid_clause=False), "q", "a"))
    task = (
        "TASK: Given an answer, generate the most likely coding problem that this answer is responding to.\nAnswer:\n"
    )
    assert passes[Quantity.Q][0] == [BOS, *text(f"{SYSTEM}\n\n{task}\n\nProblem:\n")]
