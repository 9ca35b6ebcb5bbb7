"""What makes a runner faster on a GPU, beyond what every device does: a kernel for the head, and compiled layers.

Belongs here: each such change, and how it is undone. Does not belong here: the self-test that each has to pass
(`runners`), and the kernel itself (`head_kernel`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from qaq_pipeline.lm import attention

if TYPE_CHECKING:
    from qaq_pipeline.lm.runners import FastRunner

Undo = Callable[[], None]

compile_layer = functools.partial(torch.nn.Module.compile, dynamic=True)
"""Compiles a layer in place, when it first runs, for batches of any size; tests replace its backend."""


def use_head_kernel(runner: FastRunner, _model: Any) -> Undo:
    """Compute the log-probabilities of the head by one kernel. Raises ImportError if triton is not installed."""
    from qaq_pipeline.lm import head_kernel

    head = runner.head
    runner.head = replace(head, kernel=head_kernel.token_logprobs)
    return lambda: setattr(runner, "head", head)


def compile_layers(runner: FastRunner, model: Any) -> Undo:
    """Fuse the norms, rotations and activations of each layer. All layers share what is compiled.

    The attention to packed rows, which looks up keys of prefixes, is left out.

    Raises:
        ValueError: the architecture has no list of layers.
    """
    layers = _layers_of(runner.body, model)
    torch._dynamo.reset()  # It stops to compile a function, without a word, after eight variants, whatever the model.
    AttentionInterface.register(attention.PACKED, torch.compiler.disable(attention.packed_attention))
    for layer in layers:
        compile_layer(layer)

    def undo() -> None:
        for layer in layers:
            layer._compiled_call_impl = None

    return undo


def _layers_of(body: Any, model: Any) -> list[torch.nn.Module]:
    number = model.config.get_text_config().num_hidden_layers
    lists = [one for one in body.children() if isinstance(one, torch.nn.ModuleList) and len(one) == number]
    if not lists:
        raise ValueError("its body has no list of layers")
    return list(lists[0])


CHANGES: dict[str, Callable[[FastRunner, Any], Undo]] = {
    "the kernel of the head": use_head_kernel,
    "compiled layers": compile_layers,
}
"""Each change by its name in messages, in the order in which they are tried."""
