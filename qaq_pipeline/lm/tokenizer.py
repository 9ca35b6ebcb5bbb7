"""The Hugging Face tokenizer of a model and its chat template.

Belongs here: the adapter from transformers' tokenizers to `prompts.Tokenizer`, its loading, and warnings about what it
does to texts and templates.
Does not belong here: the text of the prompts (`prompts`), and where the files come from (`model_files`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import chat_frame, model_files
from qaq_pipeline.lm.chat_frame import Markup
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.prompts import PairEncoder
from qaq_pipeline.lm.runners import UnsupportedModelError

_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro +%}"
"""Prepended to a template that uses today's date: prompts, and therefore scores, must not change at midnight. The date
is the default of Llama 3's own templates."""

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>")
_END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|EOT|>", "<|eot|>")

_NO_CHARACTER = "\uffff"
"""A code point that Unicode keeps free of characters for good."""

SAMPLE_TEXTS = (
    "def f(x):\n    return x  # two  blanks\n",
    " a blank first",
    "\tif x:\n\t\tpass",
    "\n\n    return 1\n\n",
    "x = 2024 + 3.14e-10",
    "日本語の文字列、中文",
    "Größe naïve Ελλάδα",
    "ﬁne ① x²",
    "🙂 → ∑",
    "<|im_end|> and </s>",
)
"""Texts that a tokenizer may change: blanks, indentation, digits, other scripts, and control tokens as text."""


class HfTokenizer:
    """A `prompts.Tokenizer` over a Hugging Face fast tokenizer.

    Args:
        tokenizer: the tokenizer, as transformers loads it.
        chat_template: a borrowed chat template. Default: the tokenizer's own.
        template_name: name of the chat template, if the tokenizer has several.
        template_variables: variables of the chat template.
        generated_ends: tokens at which the model's generation config stops.

    Raises:
        UnsupportedModelError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        template_name: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        generated_ends: Sequence[int] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is required")
        self._tokenizer = tokenizer
        self._borrowed_template = chat_template
        self._template_name = template_name
        self._template_variables = dict(template_variables or {})
        self.bos_token_id: int | None = tokenizer.bos_token_id
        vocabulary = tokenizer.get_vocab()
        self.num_tokens = max(vocabulary.values(), default=-1) + 1
        """One more than the largest token id."""
        named = (vocabulary[token] for token in _END_OF_TEXT if token in vocabulary)
        self.end_of_text_id: int | None = next(named, tokenizer.eos_token_id)
        self._control_ids = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        named_ends = {vocabulary[token] for token in (*_END_OF_TEXT, *_END_OF_TURN) if token in vocabulary}
        ends = (named_ends & self._control_ids).union(generated_ends)
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_token_ids: tuple[int, ...] = tuple(sorted(ends.union(own)))

    def is_control(self, token_id: int) -> bool:
        """Whether the token is a special one or a marker of the template, which no ordinary text contains."""
        return token_id in self._control_ids or token_id in self._markers

    @cached_property
    def _markers(self) -> frozenset[int]:
        """Added tokens that are not special, but that the chat template has around its turns, as DeepSeek's has.

        Blanks are part of ordinary text, also where a tokenizer adds tokens for them.
        """
        read = set(self.encode_markup(chat_frame.all_turns(self.render_chat)))
        added = self._tokenizer.added_tokens_decoder.items()
        words = {token_id for token_id, token in added if token.content.replace("▁", " ").strip()}
        return frozenset(read & words - self._control_ids)

    @cached_property
    def _chat_template(self) -> str:
        own = self._borrowed_template or chat_frame.named_template(
            self._tokenizer.chat_template, self._template_name, self._tokenizer.name_or_path
        )
        if not own:
            raise UnsupportedModelError(
                f"{self._tokenizer.name_or_path} has no chat template: set `frame: plain`, or `chat_template_from` "
                "to the instruct model of the same family"
            )
        return _FIXED_DATE + own if "strftime_now" in own else own

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        """The tokenizer of delivered texts: it puts no space before a text, and reads no control token in it.

        It is the model's own one where that does the same.
        """
        own: Tokenizer = self._tokenizer.backend_tokenizer
        tokenizer = _prefix_free(own, self._markers)
        tokenizer.encode_special_tokens = True
        added = own.get_added_tokens_decoder()
        names = {token_id: added[token_id].content for token_id in self._control_ids | self._markers}
        read = [name for token_id, name in names.items() if _reads(tokenizer, name, token_id)]
        return _without_pieces(tokenizer, read) if read else tokenizer

    def encode_markup(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of prompt text. Added tokens in it are recognised; none is added.

        Text that begins a sequence is tokenised as in the model's training. If it `continues` one, no space is put
        before it, but after its first special token it is again tokenised as in training.
        """
        if not text:
            return []
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, backend = encoding["input_ids"], self._tokenizer.backend_tokenizer
        if not continues or self._text_tokenizer is backend:
            return ids
        added = backend.get_added_tokens_decoder()
        first = next((place for place, token_id in enumerate(ids) if token_id in added), len(ids))
        before = text if first == len(ids) else text[: encoding["offset_mapping"][first][0]]
        self._text_tokenizer.encode_special_tokens = False
        return [*self._text_tokenizer.encode(before, add_special_tokens=False).ids, *ids[first:]]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of delivered texts, which spell them. Control tokens in them are read as ordinary text."""
        tokenizer = self._text_tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def render_chat(self, messages: list[dict[str, str]], *, generation_prompt: bool = True) -> str:
        """The messages as the chat template renders them, with the generation prompt at the end.

        Raises:
            UnsupportedModelError: the tokenizer has no chat template, and none is borrowed.
            TemplateUnusableError: the tokenizer has no template of the chosen name, or one has to be chosen.
        """
        fixed = {"tokenize": False, "add_generation_prompt": generation_prompt, "chat_template": self._chat_template}
        return self._tokenizer.apply_chat_template(messages, **{**self._template_variables, **fixed})

    def altered_texts(self, texts: Sequence[str] = SAMPLE_TEXTS) -> list[tuple[str, str]]:
        """The texts that do not come back from their token ids, each with what comes back."""
        spelled = self._text_tokenizer.decode_batch(self.encode_texts(texts), skip_special_tokens=False)
        shown = [back.replace(_NO_CHARACTER, "") for back in spelled]
        return [(text, back) for text, back in zip(texts, shown, strict=True) if back != text]


def _prefix_free(backend: Tokenizer, markers: Collection[int]) -> Tokenizer:
    """The tokenizer without what puts a blank before a text or takes one away, and with the markers as special tokens.

    It is the same one if there is nothing to change.
    """
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    own = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    changed = {name: _without_prefix(part, name) for name, part in own.items()}
    # Special tokens are not looked for in delivered texts; other added tokens are.
    greedy = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    if changed == own and not markers and not any(token.lstrip or token.rstrip for token in greedy):
        return backend
    whole = json.loads(backend.to_str()) | changed
    kept = {"lstrip": False, "rstrip": False}
    for token in whole["added_tokens"]:
        token["special"] = token["special"] or token["id"] in markers
    whole["added_tokens"] = [token if token["special"] else token | kept for token in whole["added_tokens"]]
    return Tokenizer.from_str(json.dumps(whole))


def _reads(tokenizer: Tokenizer, name: str, token_id: int) -> bool:
    """Whether the name of a token as text is read as this token. A token of a byte may spell the name's characters."""
    encoding = tokenizer.encode(name, add_special_tokens=False)
    return (token_id, (0, len(name))) in zip(encoding.ids, encoding.offsets, strict=True)


def _without_pieces(backend: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer whose model reads none of these tokens in a text: their ids stay, under names that no text has.

    A model may read a control token if it is in the model's vocabulary, as SentencePiece's are.
    """
    whole = json.loads(backend.to_str())
    renamed, model = {name: f"{name}{_NO_CHARACTER}" for name in names}, whole["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Pieces with their scores, in the order of their ids.
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {renamed.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if renamed.keys().isdisjoint([*pair, "".join(pair)])]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    for token in whole["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    return Tokenizer.from_str(json.dumps(whole))


def _without_prefix(step: dict[str, Any] | None, part: str) -> dict[str, Any] | None:
    """A step of a tokenizer's part, or None if all that it does is to add or remove the first blank."""
    if step is None:
        return None
    kind = step["type"]
    if kind == "Sequence":
        (steps,) = (name for name in step if name != "type")
        return step | {steps: [kept for one in step[steps] if (kept := _without_prefix(one, part)) is not None]}
    if kind == "Prepend" or (part == "decoder" and kind == "Strip" and step["content"] == " "):
        return None
    if kind == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if part == "pre_tokenizer" and kind == "ByteLevel":
        return step | {"add_prefix_space": False}
    return step


def load_tokenizer(model: ModelSettings, files: ModelFiles, cache: Path) -> HfTokenizer:
    """The tokenizer in the model's files. In the frame `chat` it has its own or a borrowed chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of any kind.
        raise model_files.unreadable(files.folder, "tokenizer", error) from error
    if model.frame == "plain":
        return HfTokenizer(tokenizer, generated_ends=files.generated_ends())
    source, name = model.chat_template_from, model.chat_template_name
    borrowed = model_files.chat_template(source, cache, name) if source else None
    return HfTokenizer(tokenizer, borrowed, name, model.template_variables, files.generated_ends())


def warnings(model: ModelSettings, files: ModelFiles, tokenizer: HfTokenizer, encoder: PairEncoder) -> list[str]:
    """What may make the model's scores differ from those of the delivered texts, as sentences."""
    found = [*_text_warnings(files, tokenizer), *_size_warnings(files, tokenizer)]
    if model.frame == "plain":
        return found
    return [*found, *_template_warnings(model, files, tokenizer, encoder.markup(model.system_prompt))]


def _text_warnings(files: ModelFiles, tokenizer: HfTokenizer) -> Iterator[str]:
    if altered := tokenizer.altered_texts():
        text, back = altered[0]
        yield (
            f"the tokenizer of {files.name} changes texts: of {text!r} comes back {back!r} "
            f"({len(altered)} of {len(SAMPLE_TEXTS)} sample texts); the scores are those of the changed texts"
        )


def _size_warnings(files: ModelFiles, tokenizer: HfTokenizer) -> Iterator[str]:
    rows = files.num_embeddings()
    if rows is not None and tokenizer.num_tokens > rows:
        yield (
            f"the tokenizer of {files.name} has {tokenizer.num_tokens:,} tokens, the model {rows:,} embeddings: "
            "a pair with a token beyond them cannot be scored"
        )


def _template_warnings(
    model: ModelSettings, files: ModelFiles, tokenizer: HfTokenizer, markup: Markup[str]
) -> Iterator[str]:
    markers = chat_frame.markers(markup, is_borrowed=model.chat_template_from is not None)
    unknown = [marker for marker in markers if len(tokenizer.encode_markup(marker, continues=True)) != 1]
    if unknown:
        yield (
            f"the chat template uses {', '.join(unknown)}, which the tokenizer of {files.name} reads as several "
            "tokens: the template is probably that of another family"
        )
    if chat_frame.leaves_open(tokenizer.render_chat, markup.between_q_and_a):
        yield (
            f"the chat template of {files.name} has {markup.between_q_and_a!r} before A, and something else before the "
            "answer of a finished turn: if this opens a block, such as one of thoughts, A is scored inside it; switch "
            "it off by `template_variables`, or set `chat_template_from` or `frame: plain`"
        )
    message = [{"role": "user", "content": "x"}]
    is_open = chat_frame.opens_answer(markup)
    if not is_open and tokenizer.render_chat(message) == tokenizer.render_chat(message, generation_prompt=False):
        yield (
            f"the chat template of {files.name} has no generation prompt (add_generation_prompt changes nothing): "
            f"A is scored after {markup.between_q_and_a!r}, which may not open the assistant's turn"
        )
