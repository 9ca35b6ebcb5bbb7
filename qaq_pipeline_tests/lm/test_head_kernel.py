"""head_kernel: equal to the naive formula, over dtypes, vocabularies and targets; run by Triton's interpreter on a CPU.

Tolerances: as in `test_lm_head`, some units of the last bit of the largest number.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from qaq_pipeline.lm import lm_head
from qaq_pipeline_tests.lm.test_lm_head import UNIT

Kernel = Callable[..., torch.Tensor]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is made for Linux on x86-64")


def run_kernel(*arguments: Any) -> torch.Tensor:
    from qaq_pipeline.lm import head_kernel

    return head_kernel.token_logprobs(*arguments)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """The kernel in a process of its own: triton reads when it is imported whether to interpret."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            child.submit(int).result()  # It has started, with this environment.
        yield lambda *arguments: child.submit(run_kernel, *arguments).result()


def drawn(num_rows: int, num_words: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_words)
    return (torch.randn(num_rows, num_words, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_words", [1, 7, 4096, 9001])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_it_is_as_exact_as_torch(kernel: Kernel, dtype: torch.dtype, num_words: int, scale: float) -> None:
    logits_NV = drawn(5, num_words, scale, dtype)
    targets_N = torch.tensor([0, num_words - 1, num_words // 2, num_words // 3, 0])
    found_N = kernel(logits_NV, targets_N[:, None])
    exact_N = torch.log_softmax(logits_NV.double(), -1)[torch.arange(5), targets_N]
    largest = max(float(logits_NV.double().abs().max()), float(exact_N.abs().max()), 1.0)
    assert found_N.dtype == torch.float32
    assert (found_N - exact_N).abs().max() <= 16 * UNIT * largest


@pytest.mark.parametrize(("factor", "softcap"), [(0.25, None), (1.0, 30.0), (2.0, 3.0)])
def test_scaled_and_capped_logits_are_those_of_the_plain_head(
    kernel: Kernel, factor: float, softcap: float | None
) -> None:
    logits_NV = drawn(6, 300, 10.0, torch.float32)
    targets_NK = torch.tensor([[0], [1], [299], [7], [150], [3]])
    plain = lm_head.Head(lambda hidden: hidden, factor, softcap).logprobs(logits_NV, targets_NK)
    torch.testing.assert_close(kernel(logits_NV, targets_NK, factor, softcap), plain, atol=1e-5, rtol=0)


def test_any_of_several_tokens_and_ids_outside_the_vocabulary(kernel: Kernel) -> None:
    logits_NV = drawn(5, 50, 5.0, torch.float32)
    targets_NK = torch.tensor([[3, -1, -1], [3, 49, -1], [0, 7, 20], [50, 7, 9999], [-1, 50, -7]])
    plain = lm_head.token_logprobs(logits_NV, targets_NK)
    assert plain[-1] == -math.inf
    torch.testing.assert_close(kernel(logits_NV, targets_NK), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("odd", [[0.0, -math.inf], [0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_what_is_not_finite_stays_visibly_so(kernel: Kernel, odd: list[float]) -> None:
    for target in (0, 1):
        logits_1V, targets_11 = torch.tensor([odd]), torch.tensor([[target]])
        found, plain = (of(logits_1V, targets_11).item() for of in (kernel, lm_head.token_logprobs))
        assert math.isfinite(found) == math.isfinite(plain)


def test_rows_need_not_follow_one_another_in_memory_and_there_may_be_none(kernel: Kernel) -> None:
    wide_NV = drawn(4, 64, 1.0, torch.float32)
    targets_NK = torch.tensor([[0], [1], [2], [3]])
    expected = lm_head.token_logprobs(wide_NV[:, :50], targets_NK)
    torch.testing.assert_close(kernel(wide_NV[:, :50], targets_NK), expected, atol=1e-5, rtol=0)
    assert kernel(wide_NV[:0], targets_NK[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_it_compiles_for_gpus_that_are_not_here(dtype: str, architecture: int) -> None:
    """For A100 and H100, with all values of a row in registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qaq_pipeline.lm import head_kernel

    integers = dict.fromkeys(("row_stride", "num_words", "num_targets"), "i32")
    arguments = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "logprobs_ptr": "*fp32", **integers}
    constants = {"HAS_SOFTCAP": True, "BLOCK": head_kernel.WORDS_PER_BLOCK}
    signature = arguments | dict.fromkeys(("factor", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(head_kernel._row_logprob, signature, constants)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": head_kernel._WARPS})
    assert compiled.asm["cubin"]
    assert ".local" not in compiled.asm["ptx"]
