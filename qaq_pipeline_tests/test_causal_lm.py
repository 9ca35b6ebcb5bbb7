"""causal_lm: equal to the model's own logits over architectures, refused where it would not be; tokenizer, device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qaq_pipeline import logprobs
from qaq_pipeline.causal_lm import (
    CausalLM,
    HfTokenizer,
    UnsupportedModelError,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from qaq_pipeline.config import ModelSettings
from qaq_pipeline.model_files import ModelFiles
from qaq_pipeline.prompts import Target, TokenSequence
from qaq_pipeline.schema import Quantity
from qaq_pipeline_tests.conftest import TEMPLATES
from qaq_pipeline_tests.naive import BOS, END_OF_TEXT, IM_END, IM_START, VOCABULARY_SIZE, naive_logprobs, text

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} | {
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", BLOOM),
    "llama": ("llama", TINY),
    "llama_tied": ("llama", TINY | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "qwen2": ("qwen2", TINY),
    "qwen3": ("qwen3", TINY),
    "gemma2": (
        "gemma2",
        TINY | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 16},
    ),
    "gemma3_text": ("gemma3_text", TINY | {"sliding_window": 16}),
    "gemma3_text_softcap": ("gemma3_text", TINY | {"sliding_window": 16, "final_logit_softcapping": 3.0}),
    "mistral_window": ("mistral", TINY | {"sliding_window": 16}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("cohere", {k: v for k, v in TINY.items() if k != "head_dim"} | {"logit_scale": 0.25}),
    "granite": ("granite", TINY | {"logits_scaling": 8.0}),
}


def tiny(model_type: str, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A seeded model of that architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=dtype).eval()


def sequence(ids: list[int], *spans: tuple[int, int]) -> TokenSequence:
    targets = tuple(Target(quantity, *span) for quantity, span in zip(Quantity, spans, strict=False))
    return TokenSequence("p", ids, targets)


def random_sequences() -> list[TokenSequence]:
    """Sequences of 3 to 60 tokens, each with two targets."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(0, VOCABULARY_SIZE, (length,), generator=generator).tolist() for length in (60, 3, 17, 40)]
    return [sequence(ids, (1, len(ids) // 2 + 1), (len(ids) // 2 + 1, len(ids))) for ids in drawn]


def files(folder: Path) -> ModelFiles:
    return ModelFiles("tiny", folder, "files:0")


def model_settings(**values: Any) -> ModelSettings:
    return ModelSettings.model_validate({"directory": "tiny", "device": "cpu", "dtype": "float32"} | values)


# --- the model's own log-probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACCEPTED)
def test_scores_equal_the_models_own_full_logits_one_sequence_at_a_time(name: str) -> None:
    model = tiny(*ACCEPTED[name])
    sequences = random_sequences()
    for one, values in zip(sequences, CausalLM(model, name).score(sequences), strict=True):
        for target, value in zip(one.targets, values, strict=True):
            ids = one.token_ids
            naive = naive_logprobs(model, ids[: target.start], ids[target.start : target.stop])
            torch.testing.assert_close(value, naive, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_changes_its_logits_afterwards_is_refused_by_name(name: str) -> None:
    model = tiny(*REFUSED[name])
    with pytest.raises(
        UnsupportedModelError, match=rf"some/{name} \({type(model).__name__}\): .* nats .* not supported"
    ):
        CausalLM(model, f"some/{name}")


class ScaledLlama(LlamaForCausalLM):
    """Scales its logits where no config field says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return dataclasses.replace(output, logits=output.logits * 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_scales_its_logits_in_code_is_refused(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = ScaledLlama(LlamaConfig(**TINY))
    with pytest.raises(UnsupportedModelError, match="not supported"):
        CausalLM(model.to(dtype), "scaled")


def test_a_model_that_sees_what_stands_to_the_right_is_refused() -> None:
    model = tiny("gemma3_text", TINY | {"use_bidirectional_attention": True})
    with pytest.raises(UnsupportedModelError, match="not supported"):
        CausalLM(model, "bidirectional")


def test_a_model_with_broken_weights_is_refused() -> None:
    model = tiny("llama", TINY)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(UnsupportedModelError, match="differ by nan nats"):
        CausalLM(model, "broken")


def test_neither_order_nor_company_nor_padding_moves_a_score() -> None:
    scorer = CausalLM(tiny("llama", TINY), "tiny")
    sequences = random_sequences()
    together = scorer.score(sequences)
    for variant in (scorer.score(sequences[::-1])[::-1], [scorer.score([one])[0] for one in sequences]):
        torch.testing.assert_close(variant, together, atol=1e-5, rtol=0)


def test_fault_4_the_models_head_sees_target_rows_only_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "ROWS_PER_CHUNK_CPU", 8)
    model = tiny("llama", TINY)
    scorer = CausalLM(model, "tiny")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[0]))
    sequences = random_sequences()
    scorer.score(sequences)
    num_targets = sum(target.stop - target.start for one in sequences for target in one.targets)
    assert max(rows) <= 8
    assert sum(rows) == num_targets
    rows.clear()
    scorer.score([sequence(list(range(1, 51)), (45, 50))])
    assert rows == [5]


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_in_the_dtype_asked_for(dtype: str, tiny_model_dir: Callable[..., Path]) -> None:
    scorer = load_model(model_settings(dtype=dtype), files(tiny_model_dir()), min_context=512)
    assert scorer.dtype == getattr(torch, dtype)
    assert scorer.device == torch.device("cpu")
    assert scorer.max_context == 512
    ((value,),) = scorer.score([sequence([BOS, *text("print(1)")], (1, 9))])
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()


def test_a_model_whose_attention_sdpa_cannot_compute_is_loaded_all_the_same(tmp_path: Path) -> None:
    model = tiny(*ACCEPTED["gemma2"])
    model.save_pretrained(tmp_path)
    scorer = load_model(model_settings(), files(tmp_path))
    ids = list(range(3, 50))
    ((value,),) = scorer.score([sequence(ids, (20, 47))])
    torch.testing.assert_close(value, naive_logprobs(model, ids[:20], ids[20:]), atol=1e-4, rtol=0)


def test_a_window_wider_than_the_models_is_an_error_that_names_the_remedy(tiny_model_dir: Callable[..., Path]) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"tiny: made for 512 tokens.*\(513\); set scoring.max_tokens to 512"
    ):
        load_model(model_settings(), files(tiny_model_dir()), min_context=513)


def test_a_model_that_states_no_longest_sequence_is_taken_at_any_window(tmp_path: Path) -> None:
    tiny(*ACCEPTED["bloom"]).save_pretrained(tmp_path)
    assert load_model(model_settings(), files(tmp_path), min_context=1_000_000).max_context is None


def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_missing_device_is_an_error_that_names_the_remedy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_accelerator(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"device '{device}' is not on this machine; set `device: auto`"):
        resolve_device(device)


def test_a_gpu_number_that_is_not_there_is_a_missing_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(UnsupportedModelError, match="'cuda:2' is not on this machine"):
        resolve_device("cuda:2")


def test_device_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    no_accelerator(monkeypatch)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_auto_is_bfloat16_only_where_it_is_natively_fast(
    is_native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: is_native)
    assert resolve_dtype("auto", torch.device("cpu")) == dtype
    assert resolve_dtype("auto", torch.device("cuda")) == dtype
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def tokenizer_of(folder: Path, template: str | None = None) -> HfTokenizer:
    return HfTokenizer(AutoTokenizer.from_pretrained(folder), template)


def test_markup_reads_special_tokens_and_delivered_text_does_not(tiny_model_dir: Callable[..., Path]) -> None:
    tokenizer = tokenizer_of(tiny_model_dir())
    source = "<|im_start|>user\nhé<|im_end|>"
    assert tokenizer.encode_markup(source) == [IM_START, *text("user\nhé"), IM_END]
    assert tokenizer.encode_texts([source, "", " a"]) == [text(source), [], text(" a")]
    assert tokenizer.encode_markup(source) == [IM_START, *text("user\nhé"), IM_END]
    assert tokenizer.encode_texts([]) == []


def test_bos_and_end_of_text_are_those_of_the_tokenizer(tiny_model_dir: Callable[..., Path]) -> None:
    with_bos, without = (tokenizer_of(tiny_model_dir(has_bos=has_bos)) for has_bos in (True, False))
    assert (with_bos.bos_token_id, without.bos_token_id) == (BOS, None)
    assert with_bos.end_of_text_id == without.end_of_text_id == END_OF_TEXT


@pytest.mark.parametrize("eos_token_id", [7, None])
def test_without_a_named_end_of_text_token_the_end_of_sequence_token_stands_for_it(eos_token_id: int | None) -> None:
    tokenizer = SimpleNamespace(is_fast=True, chat_template=None, bos_token_id=None, eos_token_id=eos_token_id)
    tokenizer.get_vocab = lambda: {"<|im_end|>": 7, "a": 1}
    assert HfTokenizer(tokenizer).end_of_text_id == eos_token_id


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="old/model: a fast tokenizer"):
        HfTokenizer(SimpleNamespace(is_fast=False, name_or_path="old/model"))


def test_a_model_without_a_chat_template_is_an_error_that_names_the_remedy(
    tiny_model_dir: Callable[..., Path],
) -> None:
    tokenizer = tokenizer_of(tiny_model_dir(template="none"))
    with pytest.raises(UnsupportedModelError, match="set `frame: plain`, or `chat_template_from`"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_a_borrowed_template_replaces_the_models_own(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "sibling.jinja").write_text("[{{ messages[0]['content'] }}]{{ bos_token }}")
    borrowing = model_settings(chat_template_from="sibling.jinja")
    tokenizer = load_tokenizer(borrowing, files(tiny_model_dir()), tmp_path)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "[x]<s>"
    own = load_tokenizer(model_settings(), files(tiny_model_dir()), tmp_path)
    assert (
        own.render_chat([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


def test_of_several_named_templates_the_default_one_is_taken(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    several: Any = AutoTokenizer.from_pretrained(tiny_model_dir())
    several.chat_template = {"default": TEMPLATES["chatml"], "tool_use": "{{ raise_exception('no tools here') }}"}
    several.save_pretrained(tmp_path)
    message = [{"role": "user", "content": "x"}]
    assert tokenizer_of(tmp_path).render_chat(message) == tokenizer_of(tiny_model_dir()).render_chat(message)


def test_a_template_that_asks_for_todays_date_renders_the_same_tomorrow(tiny_model_dir: Callable[..., Path]) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}no clock{% endif %}" + str(
        TEMPLATES["chatml"]
    )
    message = [{"role": "user", "content": "x"}]
    plain = tokenizer_of(tiny_model_dir()).render_chat(message)
    assert tokenizer_of(tiny_model_dir(), dated).render_chat(message) == "26 Jul 2024" + plain
