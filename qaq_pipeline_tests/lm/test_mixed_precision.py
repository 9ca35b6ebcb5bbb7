"""mixed_precision: nearer to float32 of the same weights than plain bfloat16 is, in every runner; what has which dtype.

The models are those of `test_runners`. A single log-probability may be nearer by chance: means over all are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import attention, causal_lm, devices, mixed_precision
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.runners import OwnLogitsRunner, PackedRunner, PaddedRunner, choose_runner
from qaq_pipeline_tests.lm.test_runners import AtOnceRunner, mixed_sequences, naive_scores, runner_of, tiny
from qaq_pipeline_tests.support.varlen import attend_by_segment

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "cohere", "granite"]


def mixed(family: str) -> Any:
    model = tiny(family, torch.bfloat16)
    mixed_precision.use(model)
    return model


def mean_error(scores: list[list[torch.Tensor]], exact: list[list[torch.Tensor]]) -> float:
    errors = [torch.cat(found) - torch.cat(right) for found, right in zip(scores, exact, strict=True)]
    return float(torch.cat(errors).abs().mean())


@pytest.mark.parametrize("kind", [PackedRunner, AtOnceRunner, PaddedRunner, OwnLogitsRunner])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_nearer_to_float32_than_plain_bfloat16(
    family: str, kind: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if (family, kind) == ("gemma2", AtOnceRunner):
        pytest.skip("no kernel caps its scores")
    monkeypatch.setattr(attention, "varlen_kernel", lambda: attend_by_segment)
    of_the_same_weights = naive_scores(tiny(family, torch.bfloat16).float(), mixed_sequences())
    plain, better = (
        mean_error(runner_of(kind, model)(mixed_sequences()), of_the_same_weights)
        for model in (tiny(family, torch.bfloat16), mixed(family))
    )
    assert better < 0.95 * plain


def test_sums_of_layers_and_logits_are_in_float32_and_products_in_bfloat16() -> None:
    model = mixed("llama")
    seen: dict[str, torch.dtype] = {}
    for name in ("layers.1", "norm", "layers.1.mlp.down_proj", "layers.1.self_attn.q_proj"):
        model.base_model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.dtype})
        )
    logits = model(torch.tensor([[1, 2, 3]]), use_cache=False).logits
    assert seen == {
        "layers.1": torch.float32,
        "norm": torch.float32,
        "layers.1.mlp.down_proj": torch.bfloat16,
        "layers.1.self_attn.q_proj": torch.bfloat16,
    }
    assert logits.dtype == torch.float32
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fastest_runner_is_the_same_as_in_bfloat16(family: str) -> None:
    assert choose_runner(mixed(family), family).name == choose_runner(tiny(family, torch.bfloat16), family).name


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = tiny("llama", torch.bfloat16)
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="its head is no linear layer"):
        mixed_precision.use(model)


def test_a_model_is_loaded_in_mixed_precision_if_the_settings_say_so(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "peak_flops_per_second", lambda *_: 1e9)
    used: list[Any] = []
    monkeypatch.setattr(mixed_precision, "use", used.append)
    files = ModelFiles("tiny", tiny_model_dir(), "files:0")
    for dtype in ("bfloat16", "mixed"):
        settings = ModelSettings.model_validate({"directory": "tiny", "device": "cpu", "dtype": dtype})
        causal_lm.load_model(settings, files)
    (model,) = used
    assert model.dtype == torch.bfloat16
