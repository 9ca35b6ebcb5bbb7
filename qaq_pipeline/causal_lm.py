"""The model runtime: a Hugging Face causal LM on its device, which gives log-probabilities of target tokens.

Belongs here: the tokenizer and model adapters, dtype and device choice, the start-up self-test.
Does not belong here: which sequences are scored, in which order, or where scores are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qaq_pipeline import logprobs, model_files
from qaq_pipeline.config import ModelSettings
from qaq_pipeline.model_files import ModelFiles
from qaq_pipeline.prompts import Target, TokenSequence
from qaq_pipeline.schema import Quantity

SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Mean difference from the model's own logits that the self-test allows, in nats per token, by dtype: a batch of
another shape rounds differently, while a wrong head or mask is off by more than one."""

_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro +%}"
"""Put before a template that asks for today's date: prompts, and with them scores, must not change at midnight. The
date is the one that Llama 3's own templates fall back on."""

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>")


class UnsupportedModelError(ValueError):
    """The model cannot be scored right. The text names the model, what differs, and the remedy."""


class HfTokenizer:
    """A `prompts.Tokenizer` over a Hugging Face fast tokenizer.

    Raises:
        UnsupportedModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is required")
        self._tokenizer = tokenizer
        self._chat_template = chat_template or (tokenizer.get_chat_template() if tokenizer.chat_template else None)
        if self._chat_template and "strftime_now" in self._chat_template:
            self._chat_template = _FIXED_DATE + self._chat_template
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.end_of_text_id = self._find_end_of_text()

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of prompt text; special tokens in it are recognised, none is added."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of delivered texts; special tokens in them are ordinary text, none is added."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The messages as the chat template renders them, up to and with the generation prompt.

        Raises:
            UnsupportedModelError: the tokenizer has no chat template, and none was borrowed.
        """
        if not self._chat_template:
            raise UnsupportedModelError(
                f"{self._tokenizer.name_or_path} has no chat template: set `frame: plain`, or `chat_template_from` "
                "to the instruct sibling of the same family"
            )
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=self._chat_template
        )

    def _find_end_of_text(self) -> int | None:
        vocabulary = self._tokenizer.get_vocab()
        named = next((vocabulary[token] for token in _END_OF_TEXT if token in vocabulary), None)
        return self._tokenizer.eos_token_id if named is None else named


def load_tokenizer(model: ModelSettings, files: ModelFiles, cache: Path) -> HfTokenizer:
    """The tokenizer of the model's files, with its own chat template or the borrowed one."""
    borrowed = model_files.chat_template(model.chat_template_from, cache) if model.chat_template_from else None
    return HfTokenizer(AutoTokenizer.from_pretrained(files.folder), borrowed)


def resolve_device(device: str) -> torch.device:
    """The device that `auto` stands for: a GPU where there is one.

    Raises:
        UnsupportedModelError: the named device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    has_gpu = torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count()
    available = {"cpu": True, "cuda": has_gpu, "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        raise UnsupportedModelError(f"device {device!r} is not on this machine; set `device: auto` or `cpu`")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that `auto` stands for: bfloat16 on GPUs and on CPUs with native bfloat16, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


class CausalLM:
    """A causal language model that scores token sequences.

    Raises:
        UnsupportedModelError: its fast path does not give the model's own log-probabilities.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._name = name
        self._head = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._self_test()

    @property
    def max_context(self) -> int | None:
        """Longest sequence the model was made for, in tokens; None where it states none."""
        return getattr(self._model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def score(self, sequences: Sequence[TokenSequence]) -> list[list[torch.Tensor]]:
        """For each sequence and each of its targets, ln p of the target's tokens: fp32, on the CPU, in nats."""
        return logprobs.batch_logprobs(self._hidden, self._logits, sequences, self.device)

    def _hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self._model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = self._head(hidden_ND)
        if self._softcap is None:
            return logits_NV
        return torch.tanh(logits_NV / self._softcap) * self._softcap

    @torch.inference_mode()
    def _self_test(self) -> None:
        """Compare two padded sequences with the model's own logits, one at a time: no wrong number gets past it."""
        ids = [[(7 * i + 3 * n) % self._head.weight.shape[0] for i in range(n)] for n in (13, 8)]
        sequences = [TokenSequence("", row, (Target(Quantity.Q, 1, len(row)),)) for row in ids]
        for row, (fast,) in zip(ids, self.score(sequences), strict=True):
            ids_1T = torch.tensor([row], device=self.device)
            own_TV = self._model(input_ids=ids_1T, use_cache=False).logits[0]
            own = logprobs.token_logprobs(own_TV[:-1], ids_1T[0, 1:]).cpu()
            difference = float((fast - own).abs().mean())
            if not difference <= SELF_TEST_TOLERANCE[self.dtype]:
                raise UnsupportedModelError(
                    f"{self._name} ({type(self._model).__name__}): log-probabilities differ by {difference:.2g} nats "
                    "from the model's own logits; this architecture is not supported yet"
                )


def load_model(model: ModelSettings, files: ModelFiles, min_context: int = 0) -> CausalLM:
    """The model on its device, in its dtype, tested against its own logits.

    Raises:
        UnsupportedModelError: the device is missing, the model was made for sequences shorter than `min_context`
            tokens, or the self-test fails.
    """
    device = resolve_device(model.device)
    # The attention is transformers' choice: SDPA, but eager where an architecture needs it (Gemma 2's soft-capping).
    loaded = AutoModelForCausalLM.from_pretrained(
        files.folder, dtype=resolve_dtype(model.dtype, device), trust_remote_code=False
    )
    scorer = CausalLM(loaded.to(device), files.name)
    if scorer.max_context is not None and scorer.max_context < min_context:
        raise UnsupportedModelError(
            f"{files.name}: made for {scorer.max_context} tokens, fewer than scoring.max_tokens ({min_context}); "
            f"set scoring.max_tokens to {scorer.max_context} or less"
        )
    return scorer
