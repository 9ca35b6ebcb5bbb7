"""Who scores: this project's engine, the reference loop, and lm-eval-harness's engine, behind one signature.

Belongs here: each implementation as its users run it. Does not belong here: timing, or what is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qaq_pipeline.lm.batching import BatchQueue
from qaq_pipeline.lm.causal_lm import CausalLM
from qaq_pipeline.lm.prompts import TokenSequence

Score = Callable[[Sequence[TokenSequence]], list[list[float]]]
"""Sequences to the sums of ln p of each of their targets, in nats."""


def engine(model: CausalLM, batch_tokens: int | None = None) -> Score:
    """This project: batches by token budget, longest first, through the model's runner."""

    def score(sequences: Sequence[TokenSequence]) -> list[list[float]]:
        queue = BatchQueue([sequences], batch_tokens or model.facts.batch_tokens, is_padded=model.facts.is_padded)
        place = {id(sequence): number for number, sequence in enumerate(sequences)}
        sums: list[list[float]] = [[] for _ in sequences]
        while batch := queue.take():
            for sequence, logprobs in zip(batch, model.score(batch), strict=True):
                sums[place[id(sequence)]] = [float(values.sum(dtype="float64")) for values in logprobs]
        return sums

    return score


def reference_loop(model: Any) -> Score:
    """As the published scripts do it: one text at a time, a pass for each likelihood, full logits, their cross entropy.

    Superfiltering and the authors' `rmi_math.py` differ in prompts, not in this loop.
    """

    @torch.inference_mode()
    def score(sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return [[-one_pass(sequence.token_ids, t.start, t.stop) for t in sequence.targets] for sequence in sequences]

    def one_pass(ids: list[int], start: int, stop: int) -> float:
        input_ids = torch.tensor([ids[:stop]], device=model.device)
        labels = input_ids.clone()
        labels[0, :start] = -100
        loss = model(input_ids, labels=labels, use_cache=False).loss
        return float(loss) * (stop - start)

    return score


def lm_eval_engine(model: Any, batch_size: int = 8) -> Score:
    """lm-eval-harness's `HFLM`: its own ordering, padding and head; a request for each likelihood."""
    from lm_eval.models.huggingface import HFLM

    lm: Any = HFLM(pretrained=model, tokenizer=_any_tokenizer(), batch_size=batch_size, max_length=4096)

    def score(sequences: Sequence[TokenSequence]) -> list[list[float]]:
        requests = [
            (("", ""), sequence.token_ids[: t.start], sequence.token_ids[t.start : t.stop])
            for sequence in sequences
            for t in sequence.targets
        ]
        sums = iter(value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True))
        return [[next(sums) for _ in sequence.targets] for sequence in sequences]

    return score


def _any_tokenizer() -> Any:
    """A tokenizer, which lm-eval asks for and this benchmark, whose texts are token ids, does not need."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
