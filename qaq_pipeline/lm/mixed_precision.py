"""The dtype `mixed`: weights and products in bfloat16; the residual stream, the norms and the logits in float32.

Belongs here: how a model is made to compute so. Does not belong here: the choice of a dtype (`devices`), and the test
of what comes out (`runners`).

In plain bfloat16 each layer rounds the sum of all layers before it to 8 bits, and the head rounds the logits. Together
that makes more than half of the error of a log-probability; products are summed in float32 anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


def use(model: Any) -> None:
    """Make a model in bfloat16 compute in mixed precision, whoever calls it, its body or its head.

    Raises:
        ValueError: the head is no linear layer.
    """
    head, body, device = model.get_output_embeddings(), model.base_model, model.device.type
    if not isinstance(head, torch.nn.Linear):
        raise ValueError("its head is no linear layer")  # noqa: TRY004 - it is the architecture's.
    # Each layer adds to what comes from here, so the sum keeps this dtype.
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, embedded: embedded.float())
    for module in body.modules():
        if isinstance(module, torch.nn.LayerNorm):  # torch's wants weights of the dtype of its input.
            module.float()
        elif _is_router(module):
            module.float().forward = _with_autocast(module.forward, device, is_enabled=False)
    for whole in {model, body}:
        whole.forward = _with_autocast(whole.forward, device, is_enabled=True)
    head.forward = _with_autocast(functools.partial(_logits, head), device, is_enabled=False)


def _is_router(module: torch.nn.Module) -> bool:
    """Whether a module multiplies with weights of its own, as those do that choose experts in float32."""
    weight = getattr(module, "weight", None)
    known = torch.nn.Linear | torch.nn.Embedding | Conv1D
    return isinstance(weight, torch.nn.Parameter) and weight.dim() == 2 and not isinstance(module, known)


def _with_autocast(forward: Callable[..., Any], device: str, *, is_enabled: bool) -> Callable[..., Any]:
    """The same forward pass with products in bfloat16, or in the dtypes of their operands."""

    @functools.wraps(forward)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=is_enabled, cache_enabled=False):
            return forward(*arguments, **named)

    return wrapped


def _logits(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The product of hidden states rounded to bfloat16 with the head, in float32."""
    rounded = hidden.to(head.weight.dtype)
    if rounded.device.type == "cuda":
        logits = torch.mm(rounded.flatten(0, -2), head.weight.t(), out_dtype=torch.float32)
        logits = logits.view(*hidden.shape[:-1], -1)
    else:
        logits = linear(rounded.float(), head.weight.float())
    return logits if head.bias is None else logits + head.bias.float()
