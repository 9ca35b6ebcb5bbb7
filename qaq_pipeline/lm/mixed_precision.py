"""The dtype `mixed`: weights and products in bfloat16; the residual stream, the norms and the logits in float32.

Belongs here: how a model is made to compute so. Does not belong here: the choice of a dtype (`devices`).

In plain bfloat16 each layer rounds the sum of all layers before it to 8 bits, and the head rounds the logits. Together
that makes three quarters of the error of a log-probability; the products themselves are summed in float32 anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear


def use(model: Any) -> None:
    """Make a model in bfloat16 compute in mixed precision, whoever calls its body or its head.

    Raises:
        ValueError: the head is no linear layer.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if not isinstance(head, torch.nn.Linear):
        raise ValueError("its head is no linear layer")  # noqa: TRY004 - it is the architecture's.
    # Each layer adds to what comes from here, so the sum keeps this dtype.
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, embedded: embedded.float())
    for module in body.modules():
        if isinstance(module, torch.nn.LayerNorm):  # torch's wants weights of the dtype of its input.
            module.float()
    body.forward = _with_products_in_bfloat16(body.forward, model.device.type)
    head.forward = functools.partial(_logits, head)


def _with_products_in_bfloat16(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_bfloat16(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return forward(*arguments, **named)

    return in_bfloat16


def _logits(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The product of hidden states rounded to bfloat16 with the head, in float32."""
    rounded = hidden.to(head.weight.dtype)
    if rounded.device.type == "cuda":
        logits = torch.mm(rounded.flatten(0, -2), head.weight.t(), out_dtype=torch.float32)
        logits = logits.view(*hidden.shape[:-1], -1)
    else:
        logits = linear(rounded.float(), head.weight.float())
    return logits if head.bias is None else logits + head.bias.float()
