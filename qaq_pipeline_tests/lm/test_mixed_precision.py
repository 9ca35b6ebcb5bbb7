"""mixed_precision: nearer to float32 of the same weights than plain bfloat16 is, in every runner; what has which dtype.

The models are those of `test_runners`. A single log-probability may be nearer by chance: means over all are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qaq_pipeline.config.settings import ModelSettings
from qaq_pipeline.lm import attention, causal_lm, devices, mixed_precision
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.runners import (
    OwnLogitsRunner,
    PackedRunner,
    PaddedRunner,
    UnsupportedModelError,
    choose_runner,
)
from qaq_pipeline_tests.lm.test_runners import (
    TINY,
    AtOnceRunner,
    mixed_sequences,
    naive_scores,
    runner_of,
    tiny,
)
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.varlen import attend_by_segment

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "cohere", "granite"]

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
DEEPSEEK = {
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


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


@pytest.mark.parametrize(
    ("model_type", "values"),
    [("deepseek_v3", EXPERTS | DEEPSEEK | {"qk_nope_head_dim": 8, "num_key_value_heads": 4}), ("glm4_moe", EXPERTS)],
)
def test_what_an_architecture_computes_in_float32_stays_so(model_type: str, values: dict[str, Any]) -> None:
    """The choice of experts: a wrong one changes a log-probability by more than all rounding."""
    config = AutoConfig.for_model(model_type, **TINY | values)
    plain, better = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        exact = AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16).float()
        for errors, is_mixed in ((plain, False), (better, True)):
            model = copy.deepcopy(exact).to(torch.bfloat16)
            if is_mixed:
                mixed_precision.use(model)
            scores = runner_of(OwnLogitsRunner, model)(mixed_sequences())
            errors.append(mean_error(scores, naive_scores(exact, mixed_sequences())))
    assert sum(better) < sum(plain)


def test_a_model_that_passes_over_its_body_computes_so_too() -> None:
    config = AutoConfig.for_model("opt", **TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    chosen = choose_runner(model, "opt", is_mixed=True)
    assert torch.isfinite(
        torch.cat([torch.cat(one) for one in runner_of(lambda _: chosen, model)(mixed_sequences())])
    ).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fastest_runner_is_the_same_as_in_bfloat16(family: str) -> None:
    runners = [choose_runner(tiny(family, torch.bfloat16), family, is_mixed=is_mixed) for is_mixed in (False, True)]
    assert len({runner.name for runner in runners}) == 1


def test_a_head_that_is_no_linear_layer_is_refused(check_sentence: Check) -> None:
    model = tiny("llama", torch.bfloat16)

    class Head(torch.nn.Module):
        def __init__(self, weight: torch.nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.weight.t()

    model.lm_head = Head(model.lm_head.weight)
    with pytest.raises(UnsupportedModelError) as error:
        choose_runner(model, "some/model", is_mixed=True)
    check_sentence(error.value)


def test_a_model_that_mixed_precision_changes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def double(model: Any) -> None:
        model.get_output_embeddings().weight.data *= 2

    monkeypatch.setattr(mixed_precision, "use", double)
    with pytest.raises(UnsupportedModelError, match=r"^some/model: .* differ by .* set `dtype: bfloat16`$"):
        choose_runner(tiny("llama", torch.bfloat16), "some/model", is_mixed=True)


def test_a_model_is_loaded_in_mixed_precision_if_the_settings_say_so(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "peak_flops_per_second", lambda *_: 1e9)
    used: list[Any] = []
    use = mixed_precision.use

    def spied(model: Any) -> None:
        used.append(model)
        use(model)

    monkeypatch.setattr(mixed_precision, "use", spied)
    files = ModelFiles("tiny", tiny_model_dir(), "files:0")
    for dtype in ("bfloat16", "mixed"):
        settings = ModelSettings.model_validate({"directory": "tiny", "device": "cpu", "dtype": dtype})
        causal_lm.load_model(settings, files)
    (model,) = used
    assert model.dtype == torch.bfloat16
