"""The Hugging Face tokenizer of a model and its chat template.

Belongs here: the adapter from transformers' tokenizers to `prompts.Tokenizer`, and its loading.
Does not belong here: the text of the prompts (`prompts`), and where the files come from (`model_files`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import model_files
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.runners import UnsupportedModelError

_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro +%}"
"""Prepended to a template that uses today's date: prompts, and therefore scores, must not change at midnight. The date
is the default of Llama 3's own templates."""

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>")
_END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|EOT|>", "<|eot|>")


class HfTokenizer:
    """A `prompts.Tokenizer` over a Hugging Face fast tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        chat_template: a borrowed template.
        generated_ends: tokens at which the model's generation config stops.

    Raises:
        UnsupportedModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, generated_ends: Sequence[int] = ()) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is required")
        self._tokenizer = tokenizer
        self._chat_template = chat_template or (tokenizer.get_chat_template() if tokenizer.chat_template else None)
        if self._chat_template and "strftime_now" in self._chat_template:
            self._chat_template = _FIXED_DATE + self._chat_template
        self.bos_token_id: int | None = tokenizer.bos_token_id
        vocabulary = tokenizer.get_vocab()
        named = (vocabulary[token] for token in _END_OF_TEXT if token in vocabulary)
        self.end_of_text_id: int | None = next(named, tokenizer.eos_token_id)
        self._control_ids = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        named_ends = {vocabulary[token] for token in (*_END_OF_TEXT, *_END_OF_TURN) if token in vocabulary}
        ends = (named_ends & self._control_ids).union(generated_ends)
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_token_ids: tuple[int, ...] = tuple(sorted(ends.union(own)))

    def is_control(self, token_id: int) -> bool:
        """Whether the token is a special one, which no ordinary text contains."""
        return token_id in self._control_ids

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of prompt text. Special tokens in it are recognised; none is added."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of delivered texts. Special tokens in them are read as ordinary text; none is added."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The messages as the chat template renders them, with the generation prompt at the end.

        Raises:
            UnsupportedModelError: the tokenizer has no chat template, and none is borrowed.
        """
        if not self._chat_template:
            raise UnsupportedModelError(
                f"{self._tokenizer.name_or_path} has no chat template: set `frame: plain`, or `chat_template_from` "
                "to the instruct model of the same family"
            )
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=self._chat_template
        )


def load_tokenizer(model: ModelSettings, files: ModelFiles, cache: Path) -> HfTokenizer:
    """The tokenizer in the model's files, with its own or a borrowed chat template."""
    borrowed = model_files.chat_template(model.chat_template_from, cache) if model.chat_template_from else None
    return HfTokenizer(AutoTokenizer.from_pretrained(files.folder), borrowed, files.generated_ends())
