"""The naive reference that the fast path must equal: contexts written by hand, one sequence, all logits, fp32.

Nothing here calls `qaq_pipeline`: a fault of the package cannot hide in both sides of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL_TOKENS = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259, "<|endoftext|>": 260}
"""Ids of the tiny tokenizer's special tokens; every byte has the id of its value."""

VOCABULARY_SIZE = 300

BOS, EOS, IM_START, IM_END, END_OF_TEXT = SPECIAL_TOKENS.values()

ENDS = (EOS, IM_END, END_OF_TEXT)
"""Ids of the tokens that end a text or a turn."""

SYSTEM = "Write clean code."
"""The system prompt of the hand-written contexts."""

TASK = (
    "TASK: Given an answer, generate the most likely coding problem that this answer is responding to. "
    'If the inferred question is outside programming, respond with "INVALID".\nAnswer:\n'
)

PRIORS = ("null_answer", "user", "bare")
FRAMES = ("chat", "plain")


def text(value: str) -> list[int]:
    """Token ids of text under the tiny tokenizer: its bytes."""
    return list(value.encode())


def contexts(frame: str, prior: str, query: list[int], answer: list[int], bos: int = BOS) -> dict[str, list[int]]:
    """What stands before the scored tokens of each quantity, in a model with the tiny ChatML template."""
    if frame == "chat":
        head = [bos, IM_START, *text("system\nWrite clean code."), IM_END, *text("\n"), IM_START, *text("user\n")]
        tail = [IM_END, *text("\n"), IM_START, *text("assistant\n")]
        priors = {"null_answer": head + text(TASK) + tail, "user": head, "bare": [bos]}
        return {
            "q": priors[prior],
            "q_given_a": head + text(TASK) + answer + tail,
            "a": head + tail,
            "a_given_q": head + query + tail,
            "end": head + text(TASK) + answer,
        }
    forward = [bos, *text("Write clean code.\n\nProblem:\n")]
    reverse = [bos, *text("Write clean code.\n\n" + TASK)]
    priors = {"null_answer": reverse + text("\n\nProblem:\n"), "user": forward, "bare": [bos]}
    return {
        "q": priors[prior],
        "q_given_a": reverse + answer + text("\n\nProblem:\n"),
        "a": forward + text("\n\nAnswer:\n"),
        "a_given_q": forward + query + text("\n\nAnswer:\n"),
        "end": reverse + answer,
    }


def _full_logprobs(model: Any, ids: list[int]) -> Any:
    """ln p of every token of the vocabulary after each token of `ids`, as a tensor [T, V]."""
    import torch

    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
    return torch.log_softmax(logits_TV, dim=-1)


def naive_logprobs(model: Any, context: list[int], target: list[int]) -> Any:
    """ln p of each token of `target` after `context`, from the model's own full logits in fp32, as a tensor."""
    import torch

    ids = [*context, *target]
    logprobs_TV = _full_logprobs(model, ids)
    return torch.stack([logprobs_TV[position - 1, ids[position]] for position in range(len(context), len(ids))]).cpu()


def naive_logprob_of_any(model: Any, context: list[int], any_of: Sequence[int]) -> Any:
    """ln p that the token after `context` is one of `any_of`, as a tensor of one element."""
    import torch

    return torch.logsumexp(_full_logprobs(model, context)[-1, list(any_of)], dim=0, keepdim=True).cpu()


def naive_nll_of_any(model: Any, context: list[int], any_of: Sequence[int]) -> float:
    """-ln p that the token after the context is one of `any_of`, in nats."""
    return -float(naive_logprob_of_any(model, context, any_of))


def naive_nll(model: Any, context: list[int], target: list[int]) -> float:
    """Sum of -ln p of the target's tokens after the context, in nats."""
    return -float(naive_logprobs(model, context, target).double().sum())
