"""tokenizer: special tokens in prompts and in delivered text, BOS, and the model's own or a borrowed chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from qaq_pipeline.config.settings import ScoringSettings
from qaq_pipeline.lm.chat_frame import TemplateUnusableError
from qaq_pipeline.lm.prompts import PairEncoder
from qaq_pipeline.lm.runners import UnsupportedModelError
from qaq_pipeline.lm.tokenizer import HfTokenizer, load_tokenizer, warnings
from qaq_pipeline_tests.conftest import TEMPLATES
from qaq_pipeline_tests.lm.test_causal_lm import files, model_settings
from qaq_pipeline_tests.support.naive import BOS, END_OF_TEXT, ENDS, EOS, IM_END, IM_START, SPECIAL_TOKENS, text
from qaq_pipeline_tests.support.sentences import Check


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
    tokenizer.added_tokens_decoder = {}
    tokenizer.get_vocab = lambda: {"<|im_end|>": 7, "a": 1}
    assert HfTokenizer(tokenizer).end_of_text_id == eos_token_id


def test_the_end_tokens_are_those_of_the_names_of_the_tokenizer_and_of_the_generation_config(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir(), tmp_path / "model")
    for stops, expected in ((EOS, ENDS), ([IM_START, END_OF_TEXT], tuple(sorted({*ENDS, IM_START}))), (None, ENDS)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        assert load_tokenizer(model_settings(), files(folder), tmp_path).end_token_ids == expected
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(model_settings(), files(folder), tmp_path).end_token_ids == ENDS


def test_an_ordinary_token_that_is_named_like_an_end_token_ends_nothing() -> None:
    tokenizer = SimpleNamespace(is_fast=True, chat_template=None, bos_token_id=None, eos_token_id=None)
    tokenizer.get_vocab = lambda: {"</s>": 3, "<eos>": 4, "<|im_end|>": 7, "a": 1}
    tokenizer.added_tokens_decoder = {
        4: SimpleNamespace(content="<eos>", special=False),
        7: SimpleNamespace(content="<|im_end|>", special=True),
    }
    found = HfTokenizer(tokenizer)
    assert found.end_token_ids == (7,)
    assert [found.is_control(token_id) for token_id in (1, 3, 4, 7)] == [False, False, False, True]


def test_special_tokens_are_control_tokens_and_bytes_are_not(tiny_model_dir: Callable[..., Path]) -> None:
    tokenizer = tokenizer_of(tiny_model_dir())
    assert all(map(tokenizer.is_control, SPECIAL_TOKENS.values()))
    assert not any(map(tokenizer.is_control, range(256)))


def test_a_slow_tokenizer_is_refused(check_sentence: Check) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        HfTokenizer(SimpleNamespace(is_fast=False, name_or_path="old/model"))
    check_sentence(error.value)


def test_a_model_without_a_chat_template_is_an_error_that_names_the_remedy(
    tiny_model_dir: Callable[..., Path], check_sentence: Check
) -> None:
    tokenizer = tokenizer_of(tiny_model_dir(template="none"))
    with pytest.raises(UnsupportedModelError) as error:
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    check_sentence(error.value)


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


def test_a_named_template_is_chosen(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    save_templates(tiny_model_dir(), tmp_path, default=TEMPLATES["chatml"], short="[{{ messages[0]['content'] }}]")
    message = [{"role": "user", "content": "x"}]
    named = load_tokenizer(model_settings(chat_template_name="short"), files(tmp_path), tmp_path)
    borrowed = load_tokenizer(
        model_settings(chat_template_name="short", chat_template_from=str(tmp_path)), files(tiny_model_dir()), tmp_path
    )
    assert named.render_chat(message) == borrowed.render_chat(message) == "[x]"


def save_templates(source: Path, folder: Path, **templates: str | None) -> None:
    several: Any = AutoTokenizer.from_pretrained(source)
    several.chat_template = templates
    several.save_pretrained(folder)


@pytest.mark.parametrize("settings", [{"chat_template_name": "chatml"}, {}])
@pytest.mark.parametrize("is_borrowed", [False, True])
def test_a_template_that_is_not_there_or_has_to_be_chosen_is_an_error_with_the_names(
    settings: dict[str, str],
    is_borrowed: bool,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    check_sentence: Check,
) -> None:
    save_templates(tiny_model_dir(), tmp_path, tool_use="a", rag="b")
    source = {"chat_template_from": str(tmp_path)} if is_borrowed else {}
    folder = tiny_model_dir() if is_borrowed else tmp_path
    with pytest.raises(TemplateUnusableError, match="set `chat_template_name` to one of: rag, tool_use") as error:
        load_tokenizer(model_settings(**settings, **source), files(folder), tmp_path).render_chat([])
    check_sentence(error.value)


def test_templates_do_not_matter_to_plain_text(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    save_templates(tiny_model_dir(), tmp_path, tool_use="a", rag="b")
    for given in ({}, {"chat_template_name": "absent", "template_variables": {"x": 1}}):
        model = model_settings(frame="plain", **given)
        assert load_tokenizer(model, files(tmp_path), tmp_path).encode_texts(["a"]) == [text("a")]


def test_variables_are_given_to_the_template(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    (tmp_path / "thinking.jinja").write_text("{{ thinking }}|{{ budget }}|{{ effort }}|{{ messages[0]['content'] }}")
    variables = {"thinking": False, "budget": 0, "effort": "low"}
    model = model_settings(chat_template_from="thinking.jinja", template_variables=variables)
    tokenizer = load_tokenizer(model, files(tiny_model_dir()), tmp_path)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "False|0|low|x"


# --- warnings --------------------------------------------------------------------------------------------------------

_USER = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
_GEMMA = (
    "{% for message in messages %}<start_of_turn>user\n{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PHI = "{% for message in messages %}<|user|>\n{{ message['content'] }}<|end|>\n{% endfor %}<|assistant|>\n"


def warned(folder: Path, cache: Path, **settings: str) -> list[str]:
    model, found = model_settings(**settings), files(folder)
    tokenizer = load_tokenizer(model, found, cache)
    encoder = PairEncoder(tokenizer, model, ScoringSettings(), found.num_embeddings())
    return warnings(model, found, tokenizer, encoder)


@pytest.mark.parametrize("frame", ["chat", "plain"])
def test_a_model_with_its_own_template_is_no_warning(
    frame: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    assert warned(tiny_model_dir(), tmp_path, frame=frame) == []


@pytest.mark.parametrize("template", [_USER, _GEMMA, _PHI], ids=["llama2", "gemma", "phi3"])
def test_a_borrowed_template_whose_markers_are_no_tokens_is_a_warning(
    template: str, tiny_model_dir: Callable[..., Path], tmp_path: Path, check_sentence: Check
) -> None:
    (tmp_path / "sibling.jinja").write_text(template)
    check_sentence("\n".join(warned(tiny_model_dir(), tmp_path, chat_template_from="sibling.jinja")))


def test_a_template_without_generation_prompt_is_a_warning(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, check_sentence: Check
) -> None:
    template = str(TEMPLATES["chatml"]).partition("{% if add_generation_prompt %}")[0]
    (tmp_path / "sibling.jinja").write_text(template)
    (warning,) = warned(tiny_model_dir(), tmp_path, chat_template_from="sibling.jinja")
    check_sentence(warning)


def prompting(folder: Path, generation_prompt: str, finished: str = "") -> Path:
    """A template as of ChatML, with more text at the end of its generation prompt, and before a finished answer."""
    before = f"{{% if message.role == 'assistant' %}}{finished}{{% endif %}}"
    (folder / "sibling.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
        + before
        + "{{ message.content }}<|im_end|>"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}"
        f"{generation_prompt}{{% endif %}}"
    )
    return folder


@pytest.mark.parametrize(
    ("generation_prompt", "finished"),
    [("◁think▷", ""), ("<scratchpad>{{ '\n' }}", ""), ("{notes}Hm", ""), ("<pad>", "<pad></pad>{{ '\n' }}")],
)
def test_a_generation_prompt_that_leaves_a_block_of_any_name_open_is_a_warning(
    generation_prompt: str, finished: str, tiny_model_dir: Callable[..., Path], tmp_path: Path, check_sentence: Check
) -> None:
    prompting(tmp_path, generation_prompt, finished)
    (warning,) = warned(tiny_model_dir(), tmp_path, chat_template_from="sibling.jinja")
    check_sentence(warning)


@pytest.mark.parametrize(
    ("generation_prompt", "finished"),
    [
        *[("", ""), ("", "<think>{{ '\n\n' }}</think>"), ("<think>{{ '\n' }}", ""), ("◁think▷◁/think▷", "")],
        *[("<pad></pad>{{ '\n' }}", ""), ("<pad></pad>", "<pad></pad>"), ("<|begin|>..<|end|>", "")],
        ("<think>{{ '\n' }}", "<think>{{ '\n\n' }}</think>{{ '\n\n' }}"),
    ],
)
def test_a_generation_prompt_that_opens_nothing_or_closes_it_is_no_warning(
    generation_prompt: str, finished: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    prompting(tmp_path, generation_prompt, finished)
    said = warned(tiny_model_dir(), tmp_path, chat_template_from="sibling.jinja")
    assert [one for one in said if "before A" in one] == []


def test_a_model_that_spells_inst_in_text_is_no_warning(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir(), tmp_path / "mistral")
    (folder / "chat_template.jinja").write_text(_USER)
    assert warned(folder, tmp_path) == []


def test_a_tokenizer_with_more_tokens_than_embeddings_is_a_warning(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, check_sentence: Check
) -> None:
    folder = shutil.copytree(tiny_model_dir(), tmp_path / "tiny")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(60)])
    tokenizer.save_pretrained(folder)
    (warning,) = warned(folder, tmp_path)
    check_sentence(warning)
