"""runners: every runner reproduces the model's own log-probabilities, and the fastest correct one is chosen.

The models are tiny and random. Their weights are large enough that a wrong mask, position or head changes a
log-probability by tenths of a nat. Their windows have 16 tokens; prefixes and sequences are longer.

Tolerances: the same sums in another order change a log-probability of these models by about 1e-6, and by 1e-5 for
Granite, whose logits are large. The bound is 1e-4 against the naive result, and 1e-5 between batches of one runner.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qaq_pipeline.lm import attention, lm_head, runners
from qaq_pipeline.lm.attention import AttentionUnsupportedError
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.lm.runners import (
    KEPT_PREFIXES,
    OwnLogitsRunner,
    PackedRunner,
    PaddedRunner,
    UnsupportedModelError,
    can_pack,
    choose_runner,
    pad_right,
)
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline_tests.support.naive import VOCABULARY_SIZE, naive_logprob_of_any, naive_logprobs
from qaq_pipeline_tests.support.varlen import attend_by_segment

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WITHOUT_HEAD_DIM = {name: value for name, value in TINY.items() if name != "head_dim"}
EARLY_GPT: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
GPT2 = EARLY_GPT | {"n_embd": 32, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 16}
BOTH_LAYERS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
SOFTCAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", TINY),
    "llama_tied": ("llama", TINY | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", TINY),
    "qwen2_window": ("qwen2", TINY | BOTH_LAYERS | {"use_sliding_window": True}),
    "qwen3": ("qwen3", TINY),
    "gemma2": ("gemma2", TINY | BOTH_LAYERS | SOFTCAPS),
    "gemma3_text": ("gemma3_text", TINY | BOTH_LAYERS),
    "gemma3_text_softcap": ("gemma3_text", TINY | BOTH_LAYERS | {"final_logit_softcapping": 3.0}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", TINY),
    "starcoder2": ("starcoder2", TINY | WINDOW),
    "phi3": ("phi3", TINY | WINDOW),
    "mistral": ("mistral", TINY | WINDOW),
    "cohere": ("cohere", WITHOUT_HEAD_DIM | {"logit_scale": 0.25}),
    "granite": ("granite", TINY | {"logits_scaling": 8.0}),
}
"""Architectures whose rows are packed."""

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PADDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", EARLY_GPT | {"hidden_size": 32}, "its attention does not use transformers' interface"),
    "mamba": ("mamba", TINY | {"state_size": 8}, "it has layers of linear_attention"),
    "qwen3_next": (
        "qwen3_next",
        TINY | LINEAR | EXPERTS | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
        "it has layers of linear_attention",
    ),
    "gpt_oss": ("gpt_oss", TINY | EXPERTS | WINDOW, "GptOssAttention requires s_aux"),
    "qwen2_moe_window": (
        "qwen2_moe",
        TINY | EXPERTS | BOTH_LAYERS | {"use_sliding_window": True, "shared_expert_intermediate_size": 16},
        r"its log-probabilities differ by [\d.]+ nats from the model's own",
    ),
}
"""Architectures that need transformers' own attention, and why. Qwen2-MoE's window is only in its masks."""

FAMILIES = {
    **PACKED,
    **{name: case[:2] for name, case in PADDED.items()},
    "mistral_wide": ("mistral", TINY | {"sliding_window": 100}),
}

PREFIX = 24
"""Length of the test's prefixes, longer than every window."""


class ScaledLlama(LlamaForCausalLM):
    """Scales its logits, although no config field says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return dataclasses.replace(output, logits=output.logits * 0.5)


@functools.cache
def _built(family: str, dtype: torch.dtype) -> Any:
    model_type, values = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=dtype).eval()


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A new copy of a family's seeded model, since a packed runner replaces the model's attention."""
    return copy.deepcopy(_built(family, dtype))


def scaled_llama(dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = ScaledLlama(LlamaConfig(**TINY))
    return model.to(dtype).eval()


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sequence(ids: list[int], *spans: tuple[int, int], num_shared: int = 0) -> TokenSequence:
    targets = tuple(Target(quantity, *span) for quantity, span in zip(Quantity, spans, strict=False))
    return TokenSequence("p", ids, targets, num_shared)


def continued(prefix: int, length: int) -> TokenSequence:
    """A sequence of a numbered prefix and further tokens, all of them in one target, or in two if there are enough."""
    ids = random_ids(PREFIX, 1000 + prefix) + random_ids(length, 100 * prefix + length)
    spans = [(PREFIX, PREFIX + length // 2), (PREFIX + length // 2, PREFIX + length)][0 if length > 1 else 1 :]
    return sequence(ids, *spans, num_shared=PREFIX - 1)


def ending(one: TokenSequence, *any_of: int, at: int) -> TokenSequence:
    """The sequence with one more target: any of these tokens right at that position, in the place of its own."""
    end = Target(Quantity.END, at, at + 1, any_of)
    return dataclasses.replace(one, targets=(*one.targets, end))


def ended_sequences() -> list[TokenSequence]:
    """Sequences that ask for one or several end tokens: beside other targets or alone, in the middle or last."""
    return [
        ending(continued(0, 20), 2, at=PREFIX + 10),
        ending(continued(0, 9), 2, 7, 299, at=PREFIX),
        ending(sequence([*random_ids(PREFIX, 1001), 2], num_shared=PREFIX - 1), 0, 2, at=PREFIX),
        ending(sequence(random_ids(12, 8), (1, 12)), 5, 6, 7, 8, at=11),
        ending(sequence(random_ids(20, 9)), 2, at=1),
    ]


def mixed_sequences() -> list[TokenSequence]:
    """Sequences with two shared prefixes, with a unique one, and with none; targets in either order, and ends."""
    alone = random_ids(45, 5)
    return [
        *(continued(0, length) for length in (60, 1, 17)),
        sequence(alone, (20, 45), (1, 20)),
        *(continued(1, length) for length in (3, 40)),
        sequence(random_ids(2, 6), (1, 2)),
        continued(2, 30),
        *ended_sequences(),
    ]


def unshared(sequences: list[TokenSequence]) -> list[TokenSequence]:
    return [dataclasses.replace(one, num_shared=0) for one in sequences]


def naive_scores(model: Any, sequences: list[TokenSequence]) -> list[list[torch.Tensor]]:
    """Each target alone, from the model's own full logits, without a cache, which makes linear attention inexact."""
    model.config.use_cache = False
    return [[naive_score(model, one.token_ids, target) for target in one.targets] for one in sequences]


def naive_score(model: Any, ids: list[int], target: Target) -> torch.Tensor:
    if target.any_of:
        return naive_logprob_of_any(model, ids[: target.start], target.any_of)
    return naive_logprobs(model, ids[: target.start], ids[target.start : target.stop])


@functools.cache
def naive_mixed(family: str) -> list[list[torch.Tensor]]:
    """The naive scores of `mixed_sequences`."""
    return naive_scores(tiny(family), mixed_sequences())


def runner_of(kind: Callable[[Any], runners.Runner], model: Any) -> Callable[..., list[list[torch.Tensor]]]:
    """`score` of a runner of that kind."""
    with torch.inference_mode():
        return torch.inference_mode()(kind(model).score)


def assert_same(scores: Any, expected: Any, atol: float = 1e-4) -> None:
    torch.testing.assert_close(scores, expected, atol=atol, rtol=0)


# --- the model's own log-probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_with_shared_prefixes_give_the_models_own_full_logits(family: str) -> None:
    score = runner_of(PackedRunner, tiny(family))
    for _ in range(2):  # The second time, the prefixes are already computed.
        assert_same(score(mixed_sequences()), naive_mixed(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_give_the_models_own_full_logits(family: str) -> None:
    assert_same(runner_of(PaddedRunner, tiny(family))(mixed_sequences()), naive_mixed(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sequence_at_a_time_gives_the_models_own_full_logits(family: str) -> None:
    assert_same(runner_of(OwnLogitsRunner, tiny(family))(mixed_sequences()), naive_mixed(family))


def test_own_logits_are_cut_to_targets_where_the_model_cannot_do_so() -> None:
    class WholeLlama(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:  # pyrefly: ignore
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model = tiny("llama")
    model.__class__ = WholeLlama
    assert_same(runner_of(OwnLogitsRunner, model)(mixed_sequences()), naive_mixed("llama"))


@pytest.mark.parametrize("kind", [PackedRunner, PaddedRunner, OwnLogitsRunner])
def test_the_token_that_stands_at_an_end_does_not_matter(kind: Callable[[Any], runners.Runner]) -> None:
    """And neither do the tokens after it, if nothing after it is scored."""
    score, (one, *_) = runner_of(kind, tiny("gemma2")), ended_sequences()
    end = one.targets[-1]
    only_end = dataclasses.replace(one, targets=(end,))
    cut = dataclasses.replace(only_end, token_ids=one.token_ids[: end.stop])
    others = [dataclasses.replace(cut, token_ids=[*cut.token_ids[:-1], token]) for token in (0, *end.any_of, 299)]
    ((expected,), *found) = score([only_end, cut, *others])
    assert_same([values for (values,) in found], [expected] * len(found), atol=1e-5)


@pytest.mark.parametrize("kind", [PackedRunner, PaddedRunner, OwnLogitsRunner])
@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt2"])
def test_neither_order_nor_company_nor_padding_moves_a_score(
    family: str, kind: Callable[[Any], runners.Runner]
) -> None:
    score, sequences = runner_of(kind, tiny(family)), mixed_sequences()
    together = score(sequences)
    assert_same(score(sequences[::-1])[::-1], together, atol=1e-5)
    assert_same([score([one])[0] for one in sequences], together, atol=1e-5)
    assert_same(score([*sequences, continued(3, 150)])[:-1], together, atol=1e-5)


def test_padding_stands_on_the_right() -> None:
    ids_BT = pad_right([sequence([5, 6, 7], (1, 3)), sequence([8], (1, 1))])
    assert ids_BT.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert ids_BT.dtype == torch.long


@pytest.mark.parametrize("kind", [PackedRunner, PaddedRunner])
def test_fault_4_the_models_head_sees_target_rows_only_in_chunks(
    kind: Callable[[Any], runners.Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "ROWS_PER_CHUNK_CPU", 8)
    model = tiny("llama")
    score = runner_of(kind, model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[0]))
    score(mixed_sequences())
    assert max(rows) <= 8
    assert sum(rows) == sum(target.stop - target.start for one in mixed_sequences() for target in one.targets)
    rows.clear()
    score([sequence(list(range(1, 51)), (45, 50))])
    assert rows == [5]


def test_the_models_own_head_sees_target_rows_only() -> None:
    model = tiny("llama")
    rows: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[:-1]))
    runner_of(OwnLogitsRunner, model)([sequence(list(range(1, 51)), (45, 50)), sequence([1, 2, 3], (1, 3))])
    assert rows == [(1, 5), (1, 2)]


# --- a kernel for all sequences of a row, as on a GPU ---------------------------------------------------------------


class AtOnceRunner(PackedRunner):
    """Attends to all sequences of a row at once."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, at_once=True)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow kernel that runs here, too."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda: attend_by_segment)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("family", [family for family in PACKED if family != "gemma2"])
def test_a_kernel_for_all_sequences_gives_the_models_own_full_logits(family: str) -> None:
    score = runner_of(AtOnceRunner, tiny(family))
    for sequences in (mixed_sequences(), mixed_sequences(), unshared(mixed_sequences())):
        assert_same(score(sequences), naive_mixed(family))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_the_self_test_accepts_such_a_kernel(family: str) -> None:
    assert isinstance(choose_runner(tiny(family), family, wanted=[AtOnceRunner, PaddedRunner]), AtOnceRunner)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "Gemma2Attention caps its scores, which no kernel for rows does"),
        ("llama", "its log-probabilities differ by .* nats from the model's own"),
    ],
)
def test_where_the_kernel_cannot_be_used_batches_are_padded(
    family: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def aligned_at_the_first_key(*operands: Any, **others: Any) -> torch.Tensor:
        queries, keys, values, query_bounds, _, longest, _ = operands
        return attend_by_segment(queries, keys, values, query_bounds, query_bounds, longest, longest, **others)

    monkeypatch.setattr(attention, "varlen_kernel", lambda: aligned_at_the_first_key)
    assert choose_runner(tiny(family), family, wanted=[AtOnceRunner, PaddedRunner]).name == "padded"
    assert re.search(f"the runner 'packed' cannot be used: {reason}", caplog.text)


@pytest.mark.parametrize(
    ("device", "dtype", "is_packed"),
    [
        ("cpu", torch.float32, True),
        ("cuda", torch.bfloat16, True),
        ("cuda:1", torch.float16, True),
        ("cuda", torch.float32, False),
        ("mps", torch.float16, False),
    ],
)
def test_rows_are_packed_where_there_is_a_kernel_for_them(device: str, dtype: torch.dtype, *, is_packed: bool) -> None:
    assert can_pack(torch.device(device), dtype) == is_packed


# --- shared prefixes -------------------------------------------------------------------------------------------------


class Counted:
    """A packed runner of a tiny llama, and the rows of tokens that its model has processed since the last call.

    A row has one token of each prefix, which what follows is predicted from, and no sequence's last token.
    """

    def __init__(self) -> None:
        model = tiny("llama")
        self._rows: list[int] = []
        self.score = runner_of(PackedRunner, model)
        model.base_model.embed_tokens.register_forward_hook(
            lambda _module, inputs, _output: self._rows.append(inputs[0].numel())
        )

    def rows(self) -> list[int]:
        rows = self._rows.copy()
        self._rows.clear()
        return rows


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_a_prefix_is_computed_once_and_then_known(counted: Counted) -> None:
    first = counted.score([continued(0, 5), continued(0, 9)])
    assert counted.rows() == [PREFIX - 1, 5 + 9]
    again = counted.score([continued(0, 5), continued(0, 9), continued(0, 7)])
    assert counted.rows() == [5 + 9 + 7]
    assert_same(again[:2], first, atol=1e-5)


def test_a_prefix_that_only_one_sequence_has_is_not_computed_apart(counted: Counted) -> None:
    counted.score([continued(0, 5), continued(1, 9), sequence(random_ids(10, 1), (1, 10))])
    assert counted.rows() == [(PREFIX + 4) + (PREFIX + 8) + 9]


def test_a_known_prefix_serves_a_sequence_alone(counted: Counted) -> None:
    counted.score([continued(0, 5), continued(0, 9)])
    counted.rows()
    alone = counted.score([continued(0, 5), continued(1, 9)])
    assert counted.rows() == [5 + (PREFIX + 8)]
    assert_same(alone, naive_scores(tiny("llama"), [continued(0, 5), continued(1, 9)]))


def test_two_prefixes_in_one_row_are_each_computed_once(counted: Counted) -> None:
    sequences = [continued(0, 5), continued(1, 6), continued(0, 7), continued(1, 8)]
    scores = counted.score(sequences)
    assert counted.rows() == [PREFIX - 1, PREFIX - 1, 5 + 6 + 7 + 8]
    assert_same(scores, naive_scores(tiny("llama"), sequences))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_sharing_a_prefix_moves_no_score(family: str) -> None:
    sequences = mixed_sequences()
    shared, apart = (runner_of(PackedRunner, tiny(family)) for _ in range(2))
    assert_same(shared(sequences), apart(unshared(sequences)), atol=1e-5)


def test_the_tokens_that_count_as_shared_decide_not_their_number(counted: Counted) -> None:
    """Two prefixes of equal length, or of which one starts with the other, are different prefixes."""
    longer, shorter = continued(0, 12), dataclasses.replace(continued(0, 5), num_shared=PREFIX - 4)
    sequences = [longer, continued(0, 9), shorter, dataclasses.replace(shorter), continued(1, 6), continued(1, 7)]
    scores = counted.score(sequences)
    assert counted.rows()[:-1] == [PREFIX - 1, PREFIX - 4, PREFIX - 1]
    assert_same(scores, naive_scores(tiny("llama"), sequences))


def test_of_known_prefixes_those_used_last_are_kept(counted: Counted) -> None:
    for prefix in range(KEPT_PREFIXES):
        counted.score([continued(prefix, 3), continued(prefix, 4)])
    counted.score([continued(0, 5)])
    assert counted.rows()[-1] == 5
    counted.score([continued(KEPT_PREFIXES, 3), continued(KEPT_PREFIXES, 4)])
    counted.rows()
    for prefix, is_known in [(0, True), (1, False), (2, True), (KEPT_PREFIXES, True)]:
        counted.score([continued(prefix, 3)])
        assert counted.rows() == [(0 if is_known else PREFIX - 1) + 3]


def test_a_row_may_need_more_prefixes_than_are_kept(counted: Counted) -> None:
    sequences = [continued(prefix, length) for prefix in range(KEPT_PREFIXES + 2) for length in (3, 4)]
    scores = counted.score(sequences)
    assert counted.rows() == [PREFIX - 1] * (KEPT_PREFIXES + 2) + [(3 + 4) * (KEPT_PREFIXES + 2)]
    assert_same(scores, naive_scores(tiny("llama"), sequences))
    known = 0
    for prefix in range(KEPT_PREFIXES + 2):
        counted.score([continued(prefix, 3)])
        known += counted.rows() == [3]
    assert known == KEPT_PREFIXES


# --- which runner is chosen ------------------------------------------------------------------------------------------


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """The log messages of the package."""
    return [record for record in caplog.records if record.name == runners.__name__]


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_are_chosen_on_a_cpu_without_a_word(family: str, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_runner(tiny(family), family).name == "packed"
    assert logged(caplog) == []


@pytest.mark.parametrize("family", PADDED)
def test_what_cannot_be_packed_is_padded_and_the_reason_logged(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family)
    chosen = choose_runner(model, f"some/{family}")
    assert chosen.name == "padded"
    assert_same(torch.inference_mode()(chosen.score)(mixed_sequences()), naive_mixed(family))
    (record,) = logged(caplog)
    assert record.levelno == logging.WARNING
    label, _, reason = record.getMessage().partition(": the runner 'packed' cannot be used: ")
    assert label == f"some/{family} ({type(model).__name__})"
    assert re.fullmatch(PADDED[family][2], reason)


@pytest.mark.parametrize("wanted", [[PaddedRunner], [PaddedRunner, PackedRunner], [PackedRunner, PaddedRunner]])
def test_the_first_wanted_runner_that_is_right_is_chosen(wanted: list[type[PackedRunner | PaddedRunner]]) -> None:
    assert choose_runner(tiny("llama"), "tiny", wanted=wanted).name == wanted[0].name


def assert_falls_back_to_own_logits(model: Any, caplog: pytest.LogCaptureFixture, *reasons: str) -> None:
    label, before = f"odd ({type(model).__name__})", model.config._attn_implementation
    expected = naive_scores(copy.deepcopy(model), mixed_sequences())
    chosen = choose_runner(model, "odd")
    assert chosen.name == "own_logits"
    assert model.config._attn_implementation == before
    assert_same(torch.inference_mode()(chosen.score)(mixed_sequences()), expected)
    packed, padded, slow = logged(caplog)
    assert {record.levelno for record in (packed, padded, slow)} == {logging.WARNING}
    for record, kind, reason in zip((packed, padded), ("packed", "padded"), reasons, strict=True):
        assert record.getMessage().startswith(f"{label}: the runner '{kind}' cannot be used: {reason}")
    assert slow.getMessage() == f"{label}: scored with the model's own logits, one sequence at a time, which is slow"


def test_a_model_that_scales_its_logits_in_code_is_scored_by_its_own_logits(caplog: pytest.LogCaptureFixture) -> None:
    differs = "its log-probabilities differ by "
    assert_falls_back_to_own_logits(scaled_llama(), caplog, differs, differs)


def test_a_model_whose_body_cannot_be_had_without_the_head_is_scored_by_its_own_logits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny("llama")
    model.base_model_prefix = ""
    no_body = "the architecture does not separate the body from the head"
    assert_falls_back_to_own_logits(model, caplog, no_body, no_body)


def test_scaled_logits_show_in_bfloat16_too() -> None:
    assert choose_runner(scaled_llama(torch.bfloat16), "scaled").name == "own_logits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_half_precision_is_packed_as_well(family: str, dtype: torch.dtype) -> None:
    assert choose_runner(tiny(family, dtype), family).name == "packed"


def lost_window(kept: Callable[..., Any]) -> Callable[..., Any]:
    return lambda row, length, prefix, _window, like: kept(row, length, prefix, None, like)


def window_off_by_one(kept: Callable[..., Any]) -> Callable[..., Any]:
    return lambda row, length, prefix, window, like: kept(row, length, prefix, window and window + 1, like)


def lost_prefix(kept: Callable[..., Any]) -> Callable[..., Any]:
    def masked(row: Any, length: int, prefix: int, window: int | None, like: torch.Tensor) -> Any:
        mask = kept(row, length, prefix, window, like)
        return mask if mask is None else mask.index_fill(1, torch.arange(prefix), -torch.inf)

    return masked


def not_a_number(kept: Callable[..., Any]) -> Callable[..., Any]:
    def masked(row: Any, length: int, prefix: int, window: int | None, like: torch.Tensor) -> Any:
        mask = kept(row, length, prefix, window, like)
        return mask if mask is None else mask * torch.nan

    return masked


@pytest.mark.parametrize("fault", [lost_window, window_off_by_one, lost_prefix, not_a_number])
@pytest.mark.parametrize("family", ["mistral", "mistral_wide", "gemma2"])
def test_the_self_test_finds_a_mask_that_is_wrong(
    family: str,
    fault: Callable[[Callable[..., Any]], Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attention, "_mask", fault(attention._mask))
    assert choose_runner(tiny(family), family).name == "padded"
    assert "the runner 'packed' cannot be used: its log-probabilities differ by" in caplog.text


def test_the_self_test_reads_the_sample_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    score_one = OwnLogitsRunner._logprobs_of

    def spied(self: OwnLogitsRunner, one: TokenSequence) -> torch.Tensor:
        seen.append(one.token_ids)
        return score_one(self, one)

    monkeypatch.setattr(OwnLogitsRunner, "_logprobs_of", spied)
    sample = random_ids(40, 3)
    choose_runner(tiny("mistral_wide"), "mistral", sample)
    beginnings = {tuple(ids[:9]) for ids in seen}
    assert beginnings == {tuple(sample[:9])}
    assert max(map(len, seen)) > 100  # Its window.
    assert set().union(*seen) <= set(sample)


def longrope(original: int) -> Any:
    """A tiny Phi-3 whose rotary embeddings change for all sequences if one exceeds that length."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "factor": 8.0}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": original} | factors
    values = TINY | {"max_position_embeddings": 2048, "original_max_position_embeddings": original}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("phi3", **values, rope_parameters=rope)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_positions_that_depend_on_the_longest_of_a_batch_keep_sequences_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = longrope(original=200)
    chosen = choose_runner(model, "phi", max_tokens=400)
    assert chosen.name == "own_logits"
    assert "longrope positions depend on the longest sequence of a forward pass" in caplog.text
    short, long = sequence(random_ids(20, 1), (5, 20)), sequence(random_ids(300, 2), (5, 300))
    with torch.inference_mode():
        ((beside,), _) = chosen.score([short, long])
    naive = naive_logprobs(model, short.token_ids[:5], short.token_ids[5:])
    torch.testing.assert_close(beside, naive, atol=1e-4, rtol=0)


def test_they_are_packed_where_no_sequence_can_be_that_long() -> None:
    assert choose_runner(longrope(original=200), "phi", max_tokens=200).name == "packed"


def test_a_context_shorter_than_the_self_test_would_like_is_respected() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=48)
        model = AutoModelForCausalLM.from_config(config).eval()
    assert choose_runner(model, "short", max_tokens=48).name == "packed"


def test_a_runner_that_an_architecture_breaks_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("view size is not compatible")

    monkeypatch.setattr(PackedRunner, "score", broken)
    assert choose_runner(tiny("llama"), "odd").name == "padded"
    assert "odd (LlamaForCausalLM): the runner 'packed' cannot be used: view size is not compatible" in caplog.text


@pytest.mark.parametrize("start", [3, 20])
def test_a_target_that_a_shared_token_would_predict_is_an_error(start: int) -> None:
    with pytest.raises(ValueError, match="a target begins among or right after the 20 shared tokens"):
        sequence(random_ids(40, 1), (start, 40), num_shared=20)


def test_no_runner_is_asked_for_a_body_that_is_the_whole_model() -> None:
    model = tiny("llama")
    model.base_model_prefix = ""
    for kind in (PackedRunner, PaddedRunner):
        with pytest.raises(AttentionUnsupportedError, match="does not separate the body from the head"):
            kind(model)


# --- what no runner can score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_what_stands_to_the_right_is_refused(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("gemma3_text", **TINY, use_bidirectional_attention=True)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"^both/ways: not a causal model: tokens to the right .* by [\d.]+ nats; choose"
    ):
        choose_runner(model, "both/ways")


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_model_with_broken_weights_is_refused(weight: str, broken: float) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_parameter(weight)[5] = broken
    with pytest.raises(UnsupportedModelError, match=r"^broken: its log-probabilities are not finite: .*float32"):
        choose_runner(model, "broken")
