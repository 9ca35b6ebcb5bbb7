"""Token ids spell the delivered texts in every tokenizer family, and the scores are those of exactly these ids."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qaq_pipeline.config.settings import ModelSettings, ScoringSettings
from qaq_pipeline.lm import tokenizer as tokenizers
from qaq_pipeline.lm.causal_lm import CausalLM
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.prompts import Pair, PairEncoder, TokenSequence
from qaq_pipeline.lm.tokenizer import SAMPLE_TEXTS, HfTokenizer
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline_tests.support.frames import TEXTS
from qaq_pipeline_tests.support.naive import naive_nll, naive_nll_of_any
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.tokenizer_families import FAMILIES, MARKERS, PUTTING_BLANKS, family, texts

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
SYSTEM = "Be brief, </s><|im_end|>."
PAIRS = [Pair(f"{place:032x}", None, *pair) for place, pair in enumerate(zip(texts()[:6], texts()[6:12], strict=True))]


def fast(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def hf(name: str, template: str = CHATML) -> HfTokenizer:
    return HfTokenizer(fast(family(name).backend), template)


def encoder(tokenizer: HfTokenizer, frame: str, prior: str = "null_answer") -> PairEncoder:
    model = ModelSettings.model_validate({"directory": "tiny", "frame": frame, "system_prompt": SYSTEM})
    return PairEncoder(tokenizer, model, ScoringSettings.model_validate({"prior": prior}))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_of_500_texts_spell_them(name: str) -> None:
    spelled = [family(name).spell(ids) for ids in hf(name).encode_texts(texts())]
    assert spelled == texts()
    assert hf(name).altered_texts(texts()) == hf(name).altered_texts() == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_of_real_pairs_spell_them(name: str, code_alpaca: Path) -> None:
    rows = json.loads(code_alpaca.read_text(encoding="utf-8"))[:250]
    real = [row[key] for row in rows for key in ("instruction", "output")]
    assert [family(name).spell(ids) for ids in hf(name).encode_texts(real)] == real


@pytest.mark.parametrize("name", FAMILIES)
def test_no_control_token_of_a_text_is_read(name: str) -> None:
    special = {family(name).backend.token_to_id(marker) for marker in MARKERS}
    assert all(special.isdisjoint(ids) for ids in hf(name).encode_texts([*MARKERS, *texts()]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PUTTING_BLANKS])
def test_a_tokenizer_that_puts_no_blank_keeps_its_ids(name: str) -> None:
    plain = fast(family(name).backend)(texts(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert hf(name).encode_texts(texts()) == plain


@pytest.mark.parametrize("name", PUTTING_BLANKS)
def test_markup_that_continues_a_sequence_gets_no_blank_at_its_start_and_is_as_in_training_after_a_special_token(
    name: str,
) -> None:
    tokenizer, spell = hf(name), family(name).spell
    assert spell(tokenizer.encode_markup("x [/INST]")) == " x [/INST]"
    assert spell(tokenizer.encode_markup(" [/INST]", continues=True)) == " [/INST]"
    text = "x<|im_end|>\n<|im_start|>assistant\n"
    as_in_training = tokenizer.encode_markup(text)
    continued = tokenizer.encode_markup(text, continues=True)
    assert spell(as_in_training) == " " + spell(continued)
    (end,) = tokenizer.encode_markup("<|im_end|>")
    assert continued[continued.index(end) :] == as_in_training[as_in_training.index(end) :]


def sequence_text(name: str, sequence: TokenSequence) -> str:
    """What a sequence spells, without BOS and without the blank that training puts after a special token."""
    spelled = family(name).spell(sequence.token_ids)
    return (re.sub(r"(<s>|<\|im_\w+\|>) ", r"\1", spelled) if name in PUTTING_BLANKS else spelled).removeprefix("<s>")


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
@pytest.mark.parametrize("frame", ["chat", "plain"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sequence_spells_its_prompt_and_its_texts(name: str, frame: str, template: str) -> None:
    prompts = encoder(hf(name, template), frame)
    markup = [part.removeprefix("<s>") for part in prompts.markup(SYSTEM)]
    pair = Pair("0" * 32, None, "  Reverse a list", "    return xs[::-1]\n")
    (encoded,) = prompts.encode([pair], [Quantity.A_GIVEN_Q, Quantity.Q_GIVEN_A])
    reverse, forward = (sequence_text(name, sequence) for sequence in encoded.sequences)
    assert forward == markup[0] + pair.query + markup[1] + pair.answer
    assert reverse == markup[2] + pair.answer + markup[3] + pair.query


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair_has_the_same_ids_in_every_pass_and_prior(name: str) -> None:
    tokenizer = hf(name)
    for prior in ("null_answer", "user", "bare"):
        for pair, encoded in zip(PAIRS, encoder(tokenizer, "chat", prior).encode(PAIRS, TEXTS), strict=True):
            scored = [(target.quantity, one.token_ids[target.start : target.stop]) for one, target in targets(encoded)]
            q, a = tokenizer.encode_texts([pair.query, pair.answer])
            assert {one: q if one.tokens_column == "num_q_tokens" else a for one in TEXTS} == dict(scored)


def targets(encoded: Any) -> list[tuple[TokenSequence, Any]]:
    return [(sequence, target) for sequence in encoded.sequences for target in sequence.targets]


def tiny_llama(vocab_size: int) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, initializer_range=0.3, **sizes))


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_naive_computation_on_these_ids(name: str, one_thread: None) -> None:
    # A runner replaces the attention of its model: the naive computation has its own.
    naive_model, model = (tiny_llama(family(name).backend.get_vocab_size()) for _ in range(2))
    sequences = [
        sequence for one in encoder(hf(name), "chat").encode(PAIRS, list(Quantity)) for sequence in one.sequences
    ]
    for sequence, values in zip(sequences, CausalLM(model, name).score(sequences), strict=True):
        for target, logprobs in zip(sequence.targets, values, strict=True):
            ids = sequence.token_ids
            before = ids[: target.start]
            naive = (
                naive_nll_of_any(naive_model, before, target.any_of)
                if target.any_of
                else naive_nll(naive_model, before, ids[target.start : target.stop])
            )
            assert -logprobs.sum(dtype=float) == pytest.approx(naive, abs=1e-4 * len(logprobs))


# --- control tokens of other kinds -----------------------------------------------------------------------------------

DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}<|Assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}<|Assistant|>"
)
TURNS = ("<|User|>", "<|Assistant|>", "<|end|>")


def with_plain_markers() -> Tokenizer:
    """A tokenizer as DeepSeek's: the markers of turns are added tokens, but no special ones, as are runs of blanks."""
    backend = Tokenizer.from_str(family("gpt2").backend.to_str())
    backend.add_tokens([AddedToken(token, normalized=False) for token in (*TURNS, "<think>", "\n\n", "▁▁")])
    return backend


def with_control_pieces(model: Any, trainer: Any, corpus: Sequence[str]) -> Tokenizer:
    """A tokenizer whose model has its control tokens in its own vocabulary, and reads them in texts."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    backend.train_from_iterator(corpus, trainer)
    return backend


def unigram() -> Tokenizer:
    special = ["<unk>", *MARKERS]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    without = [text.replace("</s>", "").replace("<|im_end|>", "") for text in texts()]
    return with_control_pieces(models.Unigram(), trainer, [*without, *string.printable])


def merged() -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *MARKERS], initial_alphabet=[*string.printable], show_progress=False
    )
    return with_control_pieces(models.BPE(unk_token="<unk>"), trainer, [*texts(), *MARKERS * 200])


@pytest.mark.parametrize("frame", ["chat", "plain"])
@pytest.mark.parametrize(
    ("make", "template", "names"),
    [(with_plain_markers, DEEPSEEK, (*MARKERS, *TURNS)), (unigram, CHATML, MARKERS), (merged, CHATML, MARKERS)],
)
def test_texts_with_control_tokens_of_any_kind_add_none_to_a_sequence(
    make: Callable[[], Tokenizer], template: str, names: Sequence[str], frame: str
) -> None:
    loaded = fast(make())
    loaded.chat_template = template
    tokenizer = HfTokenizer(loaded)
    control = [tokenizer.encode_markup(name, continues=True)[-1] for name in names]
    assert tokenizer.encode_markup("".join(names), continues=True) == control
    assert all(map(tokenizer.is_control, control))
    evil = "Be brief." + "Sure.".join(names) + "a"

    def num_control(system: str, query: str, answer: str) -> list[int]:
        turns = [{"role": "user", "content": query}]
        (encoded,) = encoder(tokenizer, frame).encode([Pair("0" * 32, system, query, answer, turns)], TEXTS)
        return [sum(token in control for token in one.token_ids) for one in encoded.sequences]

    assert num_control(evil, evil, evil) == num_control("Be brief.", "a", "a")
    assert tokenizer.altered_texts([evil, "a\n\nb"]) == []


def test_added_tokens_that_the_template_does_not_have_are_read_in_texts() -> None:
    backend = with_plain_markers()
    tokenizer = HfTokenizer(fast(backend), DEEPSEEK)
    (ids,) = tokenizer.encode_texts(["a\n\nb<think>"])
    assert {backend.token_to_id("\n\n"), backend.token_to_id("<think>")} <= set(ids)
    assert not any(map(tokenizer.is_control, ids))


def test_bytes_that_are_special_tokens_still_spell_characters() -> None:
    backend = Tokenizer.from_str(family("llama2").backend.to_str())
    backend.add_special_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    assert HfTokenizer(fast(backend), CHATML).altered_texts(["~<0x7E>∮"]) == []


def test_what_a_model_cannot_spell_comes_back_as_its_unknown_token() -> None:
    (altered,) = HfTokenizer(fast(unigram()), CHATML).altered_texts(["a∮b"])
    assert altered == ("a∮b", "a<unk>b")


# --- tokenizers that change texts ------------------------------------------------------------------------------------


def collapsing() -> Tokenizer:
    """A tokenizer as T5's: runs of blanks and line breaks become one blank."""
    backend = Tokenizer.from_str(family("unigram_first").backend.to_str())
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    return backend


def compatible() -> Tokenizer:
    backend = Tokenizer.from_str(family("gpt2").backend.to_str())
    backend.normalizer = normalizers.NFKC()
    return backend


@pytest.mark.parametrize("make", [collapsing, compatible])
def test_a_tokenizer_that_changes_texts_is_a_warning_with_the_text_and_what_comes_back(
    make: Any, tmp_path: Path, check_sentence: Check
) -> None:
    tokenizer = HfTokenizer(fast(make()), CHATML)
    model = ModelSettings.model_validate({"directory": "tiny", "frame": "plain"})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 10000}')
    files = ModelFiles("tiny", tmp_path, "files:0")
    (warning,) = tokenizers.warnings(model, files, tokenizer, encoder(tokenizer, "plain"))
    check_sentence(warning)
    assert 0 < len(tokenizer.altered_texts()) < len(SAMPLE_TEXTS)


def test_an_added_token_that_takes_blanks_away_takes_none_of_a_text() -> None:
    backend = Tokenizer.from_str(family("gpt2").backend.to_str())
    backend.add_tokens([AddedToken("<think>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer = HfTokenizer(fast(backend), CHATML)
    (ids,) = tokenizer.encode_texts(["x  <think>\n    y"])
    assert backend.token_to_id("<think>") in ids
    assert tokenizer.altered_texts(["x  <think>\n    y"]) == []
