"""A Triton kernel: the log-probability of target tokens from logits, each of which is read once.

Belongs here: the kernel and its call. Does not belong here: the choice between it and torch's operations
(`gpu_speed`), and the product of hidden states and head (`lm_head`).

torch's `logits.float().logsumexp()` moves some 32 bytes for each logit. With a vocabulary of 152,000 words that takes
longer than the whole body of a model of 0.6 billion weights. Needs triton, which comes with torch for CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS_PER_BLOCK = 4096
_WARPS = 8


@triton.jit
def _capped(logits, factor, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scaled logits in fp32, bounded by `softcap * tanh(logits / softcap)`."""
    logits = logits.to(tl.float32) * factor
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits


@triton.jit
def _row_logprob(
    logits_ptr,
    targets_ptr,
    logprobs_ptr,
    row_stride,
    num_words,
    num_targets,
    factor,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: ln sum exp of its targets less that of all words, as a maximum so far and a sum relative to it."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    words = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)  # By lane, so that lanes are reduced once.
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_words, BLOCK):
        inside = start + words < num_words
        logits = tl.load(row_ptr + start + words, mask=inside, other=0.0)
        logits = tl.where(inside, _capped(logits, factor, softcap, HAS_SOFTCAP), float("-inf"))
        larger = tl.maximum(largest, logits)
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf less -inf would not be a number.
        total = total * tl.exp(largest - base) + tl.exp(logits - base)
        largest = larger
    maximum = tl.max(largest, 0)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    whole = base + tl.log(tl.sum(total * tl.exp(largest - base), 0))
    chosen = tl.full((), float("-inf"), tl.float32)
    for number in range(num_targets):
        word = tl.load(targets_ptr + row * num_targets + number)
        is_word = (word >= 0) & (word < num_words)
        logit = tl.load(row_ptr + word, mask=is_word, other=0.0)
        logit = tl.where(is_word, _capped(logit, factor, softcap, HAS_SOFTCAP), float("-inf"))
        larger = tl.maximum(chosen, logit)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        chosen = base + tl.log(tl.exp(chosen - base) + tl.exp(logit - base))
    tl.store(logprobs_ptr + row, chosen - whole)


def token_logprobs(
    logits_NV: torch.Tensor, targets_NK: torch.Tensor, factor: float = 1.0, softcap: float | None = None
) -> torch.Tensor:
    """As `lm_head.token_logprobs` of the scaled and capped logits, with fp32 from the first operation on: fp32 [N].

    Args:
        logits_NV: in any floating dtype; words of a row are neighbours in memory.
        targets_NK: int64.
        factor: of the logits.
        softcap: their bound, applied after the factor.
    """
    num_rows, num_words = logits_NV.shape
    logprobs_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    if num_rows:
        _row_logprob[(num_rows,)](
            logits_NV,
            targets_NK.contiguous(),
            logprobs_N,
            logits_NV.stride(0),
            num_words,
            targets_NK.shape[1],
            factor,
            1.0 if softcap is None else softcap,
            HAS_SOFTCAP=softcap is not None,  # pyrefly: ignore
            BLOCK=min(WORDS_PER_BLOCK, triton.next_power_of_2(num_words)),  # pyrefly: ignore
            num_warps=_WARPS,  # pyrefly: ignore
        )
    return logprobs_N
