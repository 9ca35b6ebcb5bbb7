"""Tiny tokenizers of the families in use, with their real normalizers and pre-tokenizers, and code-like texts.

Nothing here calls `qaq_pipeline`: what a family's token ids spell is computed from the spelling of its tokens alone.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

MARKERS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""The special tokens of every family."""

_WORDS = ("def", "return", "print", "import", "value", "self", "None", "日本語", "Größe", "naïve", "Ελλάδα", "🙂", "∑")
_MARKS = (
    "(",
    ")",
    "[",
    "]:",
    "=",
    "+=",
    "->",
    "# ",
    "//",
    "...",
    "'s",
    "{x}",
    "0x1F",
    "3.14",
    "2024",
    "<|im_end|>",
    "</s>",
)
_BLANKS = (" ", " ", " ", "  ", "\n", "\n    ", "\n\n", "\n\t", "\n        ", "\t", "")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")


@functools.cache
def texts(number: int = 500) -> list[str]:
    """Texts that look like code and prose: indented, with blanks first and last, digits, scripts and control tokens."""
    draw = random.Random(0)
    parts = [*_WORDS, *_MARKS]
    lengths = [draw.randint(1, 30) for _ in range(number)]
    return ["".join(draw.choice(_BLANKS) + draw.choice(parts) for _ in range(length)) for length in lengths]


@dataclass(frozen=True)
class Family:
    """A tokenizer, and what its token ids spell."""

    backend: Tokenizer
    is_byte_level: bool

    def spell(self, ids: Sequence[int]) -> str:
        """The text of tokens one after another. Nothing is left out or added."""
        tokens = [self.backend.id_to_token(token_id) or "" for token_id in ids]
        return b"".join(map(self._bytes, tokens)).decode()

    def _bytes(self, token: str) -> bytes:
        if token in MARKERS:
            return token.encode()
        if self.is_byte_level:
            return bytes(_byte_of()[character] for character in token)
        if token.startswith("<0x") and len(token) == 6:
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _byte_level(*steps: Any, normalizer: Any = None, use_regex: bool = False, add_prefix_space: bool = False) -> Family:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts(), trainer)
    return Family(_with_markers(backend), is_byte_level=True)


def _sentencepiece_bpe(normalizer: Any, pre_tokenizer: Any = None, *, strips: bool = True) -> Family:
    """BPE over ▁ with byte fallback, as it was converted from SentencePiece."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    # Control tokens are no words of a vocabulary: training sees none.
    without = [text.replace("</s>", "").replace("<|im_end|>", "") for text in texts()]
    trained.train_from_iterator(without, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *_byte_tokens(), *learned["vocab"]]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in learned["merges"]]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    end = [decoders.Strip(" ", 1, 0)] if strips else []
    return _sentencepiece(model, normalizer, pre_tokenizer, end)


def _unigram(scheme: str) -> Family:
    pieces = ["<unk>", *_byte_tokens()]
    words = dict.fromkeys(["▁", *"".join(texts(50)).replace(" ", "▁"), *("▁" + word for word in _WORDS)])
    scored = [(piece, -20.0) for piece in pieces] + [(word, -8.0 / len(word)) for word in words if word not in pieces]
    model = models.Unigram(scored, unk_id=0, byte_fallback=True)
    return _sentencepiece(model, None, pre_tokenizers.Metaspace("▁", prepend_scheme=scheme), None, scheme)


def _sentencepiece(model: Any, normalizer: Any, pre_tokenizer: Any, end: Any, scheme: str = "") -> Family:
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    first = decoders.Metaspace("▁", prepend_scheme=scheme) if scheme else decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), first, decoders.Fuse(), *(end or [])])
    return Family(_with_markers(backend), is_byte_level=False)


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _with_markers(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in MARKERS])
    return backend


def _legacy() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


FAMILIES: dict[str, Callable[[], Family]] = {
    "llama2": lambda: _sentencepiece_bpe(_legacy()),
    "mistral": lambda: _sentencepiece_bpe(None, pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)),
    "gemma": lambda: _sentencepiece_bpe(normalizers.Replace(" ", "▁"), strips=False),
    "unigram_first": lambda: _unigram("first"),
    "unigram_always": lambda: _unigram("always"),
    "gpt2": lambda: _byte_level(use_regex=True),
    "gpt2_prefix": lambda: _byte_level(use_regex=True, add_prefix_space=True),
    "llama3": lambda: _byte_level(_split(LLAMA3)),
    "qwen2": lambda: _byte_level(_split(QWEN2), normalizer=normalizers.NFC()),
    "deepseek_coder": lambda: _byte_level(*map(_split, DEEPSEEK_CODER), pre_tokenizers.Digits(individual_digits=True)),
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
}
"""The families by name: SentencePiece as BPE and as Unigram, and byte-level BPE."""

PUTTING_BLANKS = ("llama2", "mistral", "unigram_first", "unigram_always", "gpt2_prefix")
"""The families that put a blank before a text by themselves."""


@functools.cache
def family(name: str) -> Family:
    """The family of that name."""
    return FAMILIES[name]()
