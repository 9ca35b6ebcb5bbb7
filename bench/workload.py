"""The workload: models of real shapes with random weights, and token sequences of real lengths. Nothing is fetched.

Belongs here: shapes, lengths, the four likelihoods of a pair as sequences. Does not belong here: the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qaq_pipeline.lm.batching import num_attended
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.lm.workers import ScorerFacts
from qaq_pipeline.schema.vocabularies import Quantity

BOS = 1
MIDDLE = tuple(range(900, 905))
"""Five tokens between the two parts of a pair, the length of "\\n\\nAnswer:\\n"."""


@dataclass(frozen=True, slots=True)
class Item:
    """One pair as token ids."""

    q: list[int]
    a: list[int]


@dataclass(frozen=True, slots=True)
class Mix:
    """The lengths in a data set: log-normal, with these means, in tokens."""

    name: str
    mean_q: float
    mean_a: float
    spread: float
    pairs_per_block: int


SHORT = Mix("short", 26, 62, 0.6, 12)
"""Lengths as in Code Alpaca, tokenised by SmolLM2."""
LONG = Mix("long", 110, 400, 0.25, 8)
"""Pairs of about 300 to 750 tokens."""
PRODUCTION = Mix("production", 150, 600, 0.5, 512)
"""Lengths as in the paper's data; for GPUs."""

MODELS: dict[str, Any] = {
    "135M": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ),
    "0.6B": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
        )
    ),
    "6.7B": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32256,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=16384,
        )
    ),
}
"""The shapes of SmolLM2-135M, Qwen3-0.6B and DeepSeek-Coder-6.7B."""


def build(name: str, dtype: torch.dtype, device: str) -> Any:
    """Return the model of that shape, with seeded random weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MODELS[name]().eval().requires_grad_(requires_grad=False)
    finally:
        torch.set_default_dtype(before)


def draw(mix: Mix, number: int, seed: int = 0) -> list[Item]:
    """Return pairs of the mix, with random token ids."""
    random = np.random.default_rng(seed)

    def text(mean: float) -> list[int]:
        length = random.lognormal(np.log(mean) - mix.spread**2 / 2, mix.spread)
        return random.integers(1000, 30_000, max(1, round(length))).tolist()

    return [Item(text(mix.mean_q), text(mix.mean_a)) for _ in range(number)]


def two_passes(items: list[Item]) -> list[TokenSequence]:
    """Return the two passes that give a pair's four likelihoods, plain frame without instruction, prior `bare`."""
    sequences = []
    for number, item in enumerate(items):
        for first, second, quantities in (
            (item.q, item.a, (Quantity.Q, Quantity.A_GIVEN_Q)),
            (item.a, item.q, (Quantity.A, Quantity.Q_GIVEN_A)),
        ):
            ids = [BOS, *first, *MIDDLE, *second]
            targets = (
                Target(quantities[0], 1, 1 + len(first)),
                Target(quantities[1], len(ids) - len(second), len(ids)),
            )
            sequences.append(TokenSequence(f"{number:032x}", ids, targets))
    return sequences


def default_passes(items: list[Item], prefix_tokens: int = 75) -> list[TokenSequence]:
    """Return passes for RMI alone under default settings: chat frame, prior `null_answer`, one shared prefix."""
    prefix = list(range(100, 100 + prefix_tokens))
    sequences = []
    for number, item in enumerate(items):
        for answer, quantity in (([], Quantity.Q), (item.a, Quantity.Q_GIVEN_A)):
            ids = [*prefix, *answer, *MIDDLE, *item.q]
            target = Target(quantity, len(ids) - len(item.q), len(ids))
            sequences.append(TokenSequence(f"{number:032x}", ids, (target,), num_shared=prefix_tokens - 1))
    return sequences


def flops(facts: ScorerFacts, sequences: Sequence[TokenSequence]) -> float:
    """Return the useful floating-point operations of these passes: body, causal attention, head on the targets."""
    return facts.flops(
        sum(len(one.token_ids) for one in sequences),
        sum(target.stop - target.start for one in sequences for target in one.targets),
        sum(num_attended(len(one.token_ids)) for one in sequences),
    )
