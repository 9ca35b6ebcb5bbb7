"""One measurement of memory, in a separate process: `python -m bench.memory engine` prints bytes."""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import opponents
from bench.rows import ENGINE, peak_extra_memory
from qaq_pipeline.lm.causal_lm import CausalLM
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.schema.vocabularies import Quantity

LENGTH, VOCABULARY = 4096, 151_936


def main(who: str) -> None:
    """Score two rows of 4,096 tokens, all targets except the first, and print the extra memory in bytes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    sequences = [TokenSequence("0", list(range(n, LENGTH + n)), (Target(Quantity.Q, 1, LENGTH),)) for n in (10, 20)]
    score = (
        opponents.engine(CausalLM(model, "m", max_tokens=LENGTH)) if who == ENGINE else opponents.reference_loop(model)
    )
    torch.set_num_threads(2)
    score([TokenSequence("0", [1, 2, 3], (Target(Quantity.Q, 1, 3),))])
    print(peak_extra_memory(lambda: score(sequences)))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
