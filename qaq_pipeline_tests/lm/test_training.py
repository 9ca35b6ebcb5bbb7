"""training: the token ids of an example, steps of equal size, pairs that do not see each other, and what is learnt."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qaq_pipeline.config.settings import ModelSettings, ScoringSettings, TrialSettings
from qaq_pipeline.lm import devices, model_files, training, training_steps
from qaq_pipeline.lm.prompts import Pair, PairEncoder
from qaq_pipeline.lm.runners import UnsupportedModelError
from qaq_pipeline.lm.tokenizer import load_tokenizer
from qaq_pipeline.lm.training import Progress
from qaq_pipeline.lm.training_steps import Example, Work, draw, packed, split
from qaq_pipeline_tests.support.naive import BOS, END_OF_TEXT, IM_END, SYSTEM, contexts, naive_logprobs, text
from qaq_pipeline_tests.support.sentences import Check

pytestmark = pytest.mark.usefixtures("one_thread")


def encoder_for(folder: Path, **model: object) -> PairEncoder:
    settings = ModelSettings(directory=str(folder), system_prompt=SYSTEM, **model)  # pyrefly: ignore[bad-argument-type]
    tokenizer = load_tokenizer(settings, model_files.locate(settings, folder), folder)
    return PairEncoder(tokenizer, settings, ScoringSettings(max_tokens=400))


@pytest.mark.parametrize(("frame", "end"), [("chat", IM_END), ("plain", END_OF_TEXT)])
def test_an_example_is_the_answer_after_its_query_with_the_end_of_the_turn_or_text(
    tiny_model_dir: Callable[..., Path], frame: str, end: int
):
    (example,) = training_steps.encode(encoder_for(tiny_model_dir(), frame=frame), [Pair("1", None, "ask", "tell")])
    before = contexts(frame, "bare", text("ask"), text("tell"))["a_given_q"]
    assert example.token_ids == (*before, *text("tell"), end)
    assert example.num_prompt == len(before)
    assert example.num_trained == len("tell") + 1


def test_a_truncated_answer_has_no_end(tiny_model_dir: Callable[..., Path]):
    (example,) = training_steps.encode(encoder_for(tiny_model_dir()), [Pair("1", None, "ask", "a" * 1000)])
    assert example.token_ids[-1] == ord("a")
    assert len(example.token_ids) <= 400


def test_a_pair_beyond_the_window_is_left_out(tiny_model_dir: Callable[..., Path]):
    pairs = [Pair("1", None, "q" * 1000, "tell"), Pair("2", None, "ask", "tell")]
    assert [one.pair_id for one in training_steps.encode(encoder_for(tiny_model_dir()), pairs)] == ["2"]


examples = st.lists(st.integers(1, 30), min_size=1, max_size=40).map(
    lambda lengths: [Example(str(i), (0, *[1] * length), 1) for i, length in enumerate(lengths)]
)
units = st.sampled_from(["tokens", "rows"])


def drawn(found: list[Example], work: Work, seed: int) -> list[Example]:
    """The examples in the order of a training; a pair is named by the place of its example."""
    pairs = [Pair(str(place), None, "", "") for place in range(len(found))]
    return draw(lambda window: [found[int(pair.pair_id)] for pair in window], pairs, work, seed)


@given(examples, st.integers(1, 300), units, st.integers(0, 9))
def test_a_training_has_the_amount_and_at_most_one_example_more(found, amount, unit, seed):
    work = Work(unit, amount, 1)
    sizes = [work.size(one) for one in drawn(found, work, seed)]
    assert sum(sizes[:-1]) < amount <= sum(sizes)


@given(examples, st.integers(0, 9))
def test_no_example_repeats_before_all_were_used(found, seed):
    total = sum(one.num_trained for one in found)
    once = drawn(found, Work("tokens", total, 3), seed)
    assert sorted(one.pair_id for one in once) == sorted(one.pair_id for one in found)
    twice = [one.pair_id for one in drawn(found, Work("tokens", 2 * total, 3), seed)]
    assert all(twice.count(one.pair_id) == 2 for one in found)


@given(examples, st.integers(1, 12), units)
def test_steps_are_contiguous_never_empty_and_about_equal(found, num_steps, unit):
    work = Work(unit, 1, num_steps)
    steps = split(found, work)
    assert [one for step in steps for one in step] == found
    assert len(steps) == min(num_steps, len(found))
    assert all(steps)
    share = sum(map(work.size, found)) / len(steps)
    for place, step in enumerate(steps):
        if len(step) > 1:
            assert sum(work.size(one) for before in steps[: place + 1] for one in before) <= (place + 1) * share + 1e-9


def test_rows_are_divided_evenly():
    found = [Example(str(i), (0, 1), 1) for i in range(24)]
    assert [len(step) for step in split(found, Work("rows", 24, 3))] == [8, 8, 8]


def test_a_seed_decides_the_order():
    found, work = [Example(str(i), (0, 1), 1) for i in range(20)], Work("rows", 20, 4)
    assert drawn(found, work, 1) == drawn(found, work, 1)
    assert drawn(found, work, 1) != drawn(found, work, 2)


def test_only_the_pairs_that_are_used_are_encoded():
    encoded: list[str] = []

    def encode(window):
        encoded.extend(pair.pair_id for pair in window)
        return [Example(pair.pair_id, (0, 1), 1) for pair in window]

    draw(encode, [Pair(str(i), None, "", "") for i in range(5000)], Work("rows", 10, 1), 0)
    assert len(encoded) == 256


@pytest.mark.parametrize("pairs", [[], [Pair("1", None, "too long", "")]])
def test_nothing_to_train_on_is_an_error(pairs: list[Pair]):
    with pytest.raises(ValueError, match="no row to train on"):
        draw(lambda _: [], pairs, Work("rows", 1, 1), 0)


def test_a_model_whose_pairs_see_each_other_is_refused(tiny_model_dir: Callable[..., Path], check_sentence: Check):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)
    found = [Example("1", (BOS, *text("one answer")), 4), Example("2", (BOS, *text("another answer")), 4)]
    training.check_packing(model, "tiny", found)
    forward = model.forward
    model.forward = lambda **inputs: forward(**{name: one for name, one in inputs.items() if name != "position_ids"})
    with pytest.raises(UnsupportedModelError) as error:
        training.check_packing(model, "tiny", found)
    assert "the pairs see each other" in str(error.value)


def test_a_pair_in_a_packed_step_has_the_loss_that_it_has_alone(tiny_model_dir: Callable[..., Path]):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)
    step = [
        Example("1", (BOS, *text("one answer")), 4),
        Example("2", (BOS, *text("another answer, which is longer")), 9),
        Example("3", (BOS, *text("x")), 1),
    ]
    inputs = {name: tensor[None] for name, tensor in packed(step).items()}
    with torch.no_grad():
        loss = float(model(**inputs, use_cache=False).loss)
    naive = [
        -float(
            naive_logprobs(model, list(one.token_ids[: one.num_prompt]), list(one.token_ids[one.num_prompt :])).sum()
        )
        for one in step
    ]
    assert loss == pytest.approx(sum(naive) / sum(one.num_trained for one in step), abs=1e-5)


# peft 0.21 asks transformers 5 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_lowers_the_loss_and_reports_it(tiny_model_dir: Callable[..., Path], method: str):
    folder = tiny_model_dir()
    settings, trial = (
        ModelSettings(directory=str(folder), device="cpu"),
        TrialSettings(
            method=method,  # pyrefly: ignore[bad-argument-type]
            learning_rate=1e-2,
            curve_points=2,  # pyrefly: ignore[bad-argument-type]
        ),
    )
    files = model_files.locate(settings, folder)
    found = [Example("1", (BOS, *text("the same answer again")), 4)]
    steps = [found] * 20
    reported: list[Progress] = []

    def trained() -> torch.Tensor:
        model = training.load_for_training(files, 3, torch.device("cpu"))
        model = training.train(model, steps, trial, 3, [found], reported.append)
        assert "_original_forward" not in vars(model), "the forward pass is still that of the training, in bfloat16"
        with torch.no_grad():
            return model(**{name: tensor[None] for name, tensor in packed(found).items()}).loss

    loss = float(trained())
    before = next(one.loss for one in reported if one.loss is not None)
    assert loss < before / 2
    held_out = [one.held_out_loss for one in reported if one.held_out_loss is not None]
    assert len(held_out) >= 2
    assert held_out[-1] == pytest.approx(loss, rel=0.05)
    assert reported[-1].num_steps == 20
    assert not math.isnan(loss)
    assert float(trained()) == loss


def test_a_training_holds_the_first_gpu_and_refuses_another_one(monkeypatch: pytest.MonkeyPatch, check_sentence: Check):
    leased: list[tuple[torch.device, int]] = []

    @contextlib.contextmanager
    def lease(device: torch.device, limit: int) -> Iterator[list[str]]:
        leased.append((device, limit))
        yield ["cuda:0"]

    monkeypatch.setattr(devices, "lease_gpus", lease)
    monkeypatch.setattr(devices, "resolve_device", torch.device)
    with training.device_for(ModelSettings(hub="x/y", device="cuda")) as device:
        assert (device, leased) == (torch.device("cuda:0"), [(torch.device("cuda:0"), 1)])
    with (
        pytest.raises(devices.DeviceNotFoundError) as error,
        training.device_for(ModelSettings(hub="x/y", device="cuda:1")),
    ):
        pass
    check_sentence(error.value)


@pytest.mark.gpu
def test_training_on_a_gpu_lowers_the_loss(tiny_model_dir: Callable[..., Path]):
    folder = tiny_model_dir()
    settings = ModelSettings(directory=str(folder), device="cuda")
    trial, found = TrialSettings(learning_rate=1e-2), [Example("1", (BOS, *text("the same answer again")), 4)]
    inputs = {name: tensor[None].cuda() for name, tensor in packed(found).items()}
    with training.device_for(settings) as device:
        model = training.load_for_training(model_files.locate(settings, folder), 3, device)
        with torch.no_grad():
            before = float(model(**inputs).loss)
        training.train(model, [found] * 20, trial, 3)
        with torch.no_grad():
            assert float(model(**inputs).loss) < before / 2
