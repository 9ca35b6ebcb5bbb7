"""GGUF files: the conversion to a directory in Hugging Face layout, with the same token ids as the original model.

Belongs here: which pre-tokenizers a conversion carries over, and the conversion itself. Does not belong here: where a
GGUF file and its conversion are (`model_files`). torch and transformers load on first use.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qaq_pipeline.lm.model_error import ModelError, first_line

VERSION = 3
"""Increased if the same file converts to something else."""

_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
"""Pre-tokenizers by their names in GGUF files, as in the published tokenizer.json of their models."""

_NFC = ("qwen2", "qwen35", "deepseek-r1-qwen", "command-r", "mpt", "olmo")
"""The pre-tokenizers of those models that normalise texts to NFC, which a GGUF file does not say."""

_MAX_DIFFERING = 0.01
"""Share of tokens that a tokenizer.json may spell otherwise than the GGUF file: converters respell added tokens."""

_UNUSED = 5
"""The type of the tokens that a converter adds up to the size of the embedding."""


class ConversionError(ModelError):
    """A GGUF file cannot be converted to the same model. The text names the file, the fault and the remedy."""


def tokenizer_beside(gguf: Path) -> Path:
    """The place of the original tokenizer.json of a GGUF file; it need not exist."""
    return gguf.with_name(f"{gguf.stem}.tokenizer.json")


def convert(gguf: Path, folder: Path) -> None:
    """Write the de-quantised weights (fp32 safetensors) and the tokenizer. The folder appears once it is complete.

    Raises:
        ConversionError: it cannot be read, or texts would get other token ids than in the original model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        tokenizer = _tokenizer(gguf)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    except ConversionError:
        raise
    except (LookupError, NotImplementedError, OSError, TypeError, ValueError) as error:  # Not those of memory.
        raise ConversionError(
            f"{gguf}: cannot be read as a GGUF file of a causal language model ({first_line(error)}); fetch it again, "
            "or correct `gguf` in the settings"
        ) from error
    # The weights are plain fp32 now, but the attributes of the quantised file would prevent saving them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if tokenizer_beside(gguf).exists():
            shutil.copy(tokenizer_beside(gguf), Path(partial) / "tokenizer.json")
        Path(partial).rename(folder)


def _tokenizer(gguf: Path) -> Any:
    """The tokenizer that transformers makes of the file, with the pre-tokenizer that the file names."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, get_gguf_tokenizer

    _, stored, _ = get_gguf_tokenizer(str(gguf))
    name = stored.get("pre_tokenizer_type")
    is_carried_over = stored["tokenizer_type"] != "gpt2" or name in GGUF_PRE_TOKENIZER_SPLITS
    pre_tokenizer = None if is_carried_over else _pre_tokenizer(name)
    if tokenizer_beside(gguf).exists():
        _require_same_vocabulary(gguf, stored)
    elif pre_tokenizer is None and not is_carried_over:
        raise ConversionError(
            f"{gguf}: its texts may get other tokens than in the original model, because its pre-tokenizer "
            f"({name or 'not named'}) cannot be carried over; put the tokenizer.json of the original repository beside "
            f"it, as {tokenizer_beside(gguf).name}, or set `hub` or `directory` to the original model"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    if stored["tokenizer_type"] == "gpt2" and name in _NFC:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(name: str | None) -> Any:
    """The pre-tokenizer of that name, or None if it is not known exactly."""
    from tokenizers import Regex, pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _GPT2:
        return byte_level
    if name in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([digits, byte_level])
    if name == "deepseek-coder":
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _DEEPSEEK_CODER]
        unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, digits, unsplit])
    return None


def _require_same_vocabulary(gguf: Path, stored: Mapping[str, Any]) -> None:
    """A tokenizer.json with other ids than the file has, or with fewer, would give texts other tokens."""
    from tokenizers import Tokenizer

    beside, remedy = tokenizer_beside(gguf), "put the tokenizer.json of the same model there, or remove it"
    try:
        vocabulary = Tokenizer.from_file(str(beside)).get_vocab()
    except Exception as error:  # The library raises errors of no other kind.
        raise ConversionError(
            f"{beside}: cannot be read as a tokenizer.json ({first_line(error)}); {remedy}"
        ) from error
    types = stored.get("token_type") or [None] * len(stored["tokens"])
    own = {
        index: _spelling(token)
        for index, (token, kind) in enumerate(zip(stored["tokens"], types, strict=True))
        if kind != _UNUSED
    }
    given = {index: _spelling(token) for token, index in vocabulary.items()}
    num_others = sum(own.get(index) != given.get(index) for index in own.keys() | given.keys())
    if num_others > _MAX_DIFFERING * len(own):
        raise ConversionError(
            f"{beside}: {num_others:,} tokens are not the same in it ({len(given):,} tokens) and in {gguf.name} "
            f"({len(own):,}); {remedy}"
        )


def _spelling(token: str) -> str:
    """The spelling by which tokens are compared: GGUF files have blanks for SentencePiece's mark of a blank."""
    return token.replace("▁", " ")
