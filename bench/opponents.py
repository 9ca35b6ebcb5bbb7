"""The engines: this project's, the reference loop, and lm-eval-harness's, with one signature.

Belongs here: each implementation as its users run it. Does not belong here: timing and the workload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qaq_pipeline.lm.batching import BatchQueue
from qaq_pipeline.lm.causal_lm import CausalLM
from qaq_pipeline.lm.prompts import TokenSequence
from qaq_pipeline.lm.workers import score_batches
from qaq_pipeline.schema.vocabularies import NullReason

Score = Callable[[Sequence[TokenSequence]], list[list[float]]]
"""Maps sequences to the sum of ln p of each of their targets, in nats."""


def engine(model: CausalLM, batch_tokens: int | None = None) -> Score:
    """Return this project's engine: batches by token budget, longest first, through the model's runner."""

    def score(sequences: Sequence[TokenSequence]) -> list[list[float]]:
        queue = BatchQueue([sequences], batch_tokens or model.facts.batch_tokens, is_padded=model.facts.is_padded)
        place = {id(sequence): number for number, sequence in enumerate(sequences)}
        sums: list[list[float]] = [[] for _ in sequences]
        for batch, scores in score_batches(model, queue):
            if isinstance(scores, NullReason):
                raise MemoryError(f"{len(batch)} sequences do not fit into memory")  # noqa: TRY004 - it is an outcome.
            for sequence, logprobs in zip(batch, scores, strict=True):
                sums[place[id(sequence)]] = [float(values.sum(dtype="float64")) for values in logprobs]
        return sums

    return score


def reference_loop(model: Any) -> Score:
    """Score as the published scripts do: one text at a time, one pass per likelihood, cross entropy of full logits.

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
    """Return lm-eval-harness's `HFLM`: its own ordering, padding and head; one request per likelihood."""
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
    """Return a tokenizer: lm-eval requires one, though this benchmark's texts are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
