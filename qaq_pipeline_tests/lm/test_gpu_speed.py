"""gpu_speed: a changed runner gives the same log-probabilities; a change that cannot be made is named and undone.

On a CPU layers are compiled without code of their own (the backend `eager`): what is tested is the division of a layer
into what is compiled and what is not, and that batches of other sizes compile nothing again. `pytest -m gpu` runs the
real thing. Tolerances are those of `test_runners`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from qaq_pipeline.lm import attention, gpu_speed
from qaq_pipeline.lm.causal_lm import CausalLM
from qaq_pipeline.lm.lm_head import token_logprobs
from qaq_pipeline.lm.runners import FastRunner, PackedRunner, PaddedRunner, choose_runner
from qaq_pipeline.lm.workers import BrokenDeviceError
from qaq_pipeline_tests.lm.test_runners import (
    TINY,
    AtOnceRunner,
    assert_same,
    mixed_sequences,
    naive_mixed,
    runner_of,
    tiny,
)
from qaq_pipeline_tests.support.varlen import attend_by_segment

pytestmark = pytest.mark.usefixtures("one_thread")

KERNEL, COMPILED = gpu_speed.CHANGES


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are compiled without code of their own, and afresh."""
    monkeypatch.setattr(gpu_speed, "compile_layer", functools.partial(gpu_speed.compile_layer, backend="eager"))
    monkeypatch.setattr(attention, "varlen_kernel", lambda: attend_by_segment)
    torch._dynamo.reset()
    counters.clear()


def kernel_here(logits: torch.Tensor, targets: torch.Tensor, factor: float, softcap: float | None) -> torch.Tensor:
    """The kernel of the head, in torch's operations."""
    logits = logits * factor
    return token_logprobs(logits if softcap is None else torch.tanh(logits / softcap) * softcap, targets)


@pytest.fixture
def head_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("qaq_pipeline.lm.head_kernel")
    monkeypatch.setattr(module, "token_logprobs", kernel_here)


@pytest.mark.usefixtures("head_kernel")
@pytest.mark.parametrize("kind", [PackedRunner, AtOnceRunner, PaddedRunner])
@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3_text_softcap", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "cohere"))],
)
def test_a_changed_runner_gives_the_models_own_full_logits(family: str, kind: type[PackedRunner]) -> None:
    model = tiny(family)
    runner = choose_runner(model, family, wanted=[kind], changes=gpu_speed.CHANGES)
    assert isinstance(runner, kind)
    assert runner.changes == [KERNEL, COMPILED]
    score = runner_of(lambda _: runner, model)
    assert_same(score(mixed_sequences()), naive_mixed(family))
    compiled_before = counters["frames"]["ok"]
    for number in range(1, 5):
        assert_same(score(mixed_sequences()[number:]), naive_mixed(family)[number:])
    assert counters["frames"]["ok"] == compiled_before > 0


def test_layers_share_what_is_compiled() -> None:
    frames = []
    for number in (2, 12):
        torch._dynamo.reset()
        counters.clear()
        model: Any = LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": number})).eval()
        assert choose_runner(model, "llama", changes={COMPILED: gpu_speed.CHANGES[COMPILED]})
        frames.append(counters["frames"]["ok"])
    assert frames[0] == frames[1] > 0


def test_a_change_that_fails_is_named_and_undone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_triton(_: FastRunner, __: Any) -> gpu_speed.Undo:
        raise ImportError("No module named 'triton'")

    def fail_to_compile(*_: Any, **__: Any) -> Any:
        raise TypeError("no compiler of C++ was found\nand more")

    backend = functools.partial(gpu_speed.compile_layer.func, dynamic=True, backend=fail_to_compile)
    monkeypatch.setattr(gpu_speed, "compile_layer", backend)
    model = tiny("llama")
    changes = gpu_speed.CHANGES | {KERNEL: no_triton}
    with caplog.at_level(logging.WARNING):
        runner = choose_runner(model, "some/model", changes=changes)
    assert isinstance(runner, FastRunner)
    assert runner.changes == []
    first, second = caplog.messages
    assert first == (
        "some/model (LlamaForCausalLM): the kernel of the head cannot be used, which is slower: "
        "No module named 'triton'"
    )
    assert second.startswith("some/model (LlamaForCausalLM): compiled layers cannot be used, which is slower: ")
    assert_same(runner_of(lambda _: runner, model)(mixed_sequences()), naive_mixed("llama"))


def test_a_kernel_that_is_wrong_is_named_and_undone(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(runner: FastRunner, _: Any) -> gpu_speed.Undo:
        runner.head, before = gpu_speed.replace(runner.head, factor=2.0), runner.head
        return lambda: setattr(runner, "head", before)

    model = tiny("llama")
    runner = choose_runner(model, "some/model", changes={KERNEL: wrong})
    assert "the kernel of the head cannot be used, which is slower: log-probabilities differ by" in caplog.text
    assert_same(runner_of(lambda _: runner, model)(mixed_sequences()), naive_mixed("llama"))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_on_a_cpu_nothing_is_changed(family: str) -> None:
    model = tiny(family)
    assert CausalLM(model, family).facts.runner in ("packed", "padded")
    assert not any(module._compiled_call_impl for module in model.modules())


@pytest.mark.slow
def test_layers_are_compiled_however_many_models_were_before() -> None:
    """torch gives up on a function after eight variants, whichever model they were of, and says nothing."""
    for number in range(10):
        config = LlamaConfig(**TINY | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64 + 8 * number})
        model: Any = LlamaForCausalLM(config).eval()
        model = model.to([torch.float32, torch.bfloat16][number % 2])
        compiled_before = counters["frames"]["ok"]
        choose_runner(model, "llama", changes={COMPILED: gpu_speed.CHANGES[COMPILED]})
        assert counters["frames"]["ok"] > compiled_before


@pytest.mark.parametrize("where", ["runner", "change"])
def test_a_device_that_fails_in_the_self_test_is_named_as_broken(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    if where == "runner":
        monkeypatch.setattr(PackedRunner, "logprobs", fail)
    choose = functools.partial(choose_runner, changes={KERNEL: fail})
    with pytest.raises(BrokenDeviceError, match=r"^cpu: CUDA error: an illegal memory access"):
        CausalLM(tiny("llama"), "some/model", choose=choose)


def test_memory_that_runs_out_while_layers_are_compiled_is_no_reason_to_go_on() -> None:
    def run_out(_: FastRunner, __: Any) -> gpu_speed.Undo:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        choose_runner(tiny("llama"), "some/model", changes={KERNEL: run_out})
