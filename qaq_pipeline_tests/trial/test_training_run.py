"""training_run: what a training of an arm measures, that it repeats exactly, and that it is stored without loss."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm.batching import BatchTooLargeError
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.lm.training_steps import Work
from qaq_pipeline.lm.workers import ScorerFacts
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.trial import answer_losses
from qaq_pipeline.trial.arms import TrialError
from qaq_pipeline.trial.training_run import RunResult, TrialModel
from qaq_pipeline_tests.support.naive import SYSTEM, contexts, naive_logprobs, text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(weak={"system_prompt": SYSTEM}, trial={"learning_rate": 0.01, "curve_points": 2})


def test_an_untrained_model_is_measured_as_it_is(settings: Settings, twenty_samples: list[Pair]):
    found = TrialModel(settings).run([], None, 0, {"held_out": twenty_samples[:4]})
    model = AutoModelForCausalLM.from_pretrained(settings.models["weak"].directory, dtype=torch.float32)
    for pair, loss in zip(twenty_samples, found.losses["held_out"], strict=False):
        query, answer = text(pair.query), text(pair.answer)
        before = contexts("chat", "bare", query, answer)["a_given_q"]
        assert loss.item == pair.pair_id
        assert loss.num_tokens == len(answer)
        assert loss.nll == pytest.approx(-float(naive_logprobs(model, before, answer).sum()), rel=1e-4)
    assert (found.num_rows, found.num_tokens, found.num_steps, found.curve) == (0, 0, 0, [])


def test_a_training_lowers_the_loss_of_its_own_rows_and_repeats_exactly(settings: Settings, twenty_samples: list[Pair]):
    pairs, work = twenty_samples[:3], Work("tokens", 600, 6)
    measured = {"held_out": twenty_samples[:3], "HumanEval": twenty_samples[3:5]}
    model = TrialModel(settings)
    before, after = model.run([], None, 0, measured), model.run(pairs, work, 0, measured)

    def mean(result: RunResult) -> float:
        return sum(one.nll / one.num_tokens for one in result.losses["held_out"]) / 3

    assert mean(after) < 0.8 * mean(before)
    assert (after.num_rows, after.num_steps) == (3, 6)
    assert 600 <= after.num_tokens < 700
    assert sum("held_out_loss" in point for point in after.curve) >= 2
    assert model.run(pairs, work, 0, measured).losses == after.losses
    other = model.run(pairs, work, 1, measured)
    assert other.losses != after.losses
    assert not any("held_out_loss" in point for point in other.curve)


# peft 0.21 asks transformers 5 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_trained_and_leave_an_untrained_model_as_it_is(
    settings_for: Callable[..., Settings], twenty_samples: list[Pair]
):
    measured = {"held_out": twenty_samples[:2]}
    full = TrialModel(settings_for()).run([], None, 0, measured)
    model = TrialModel(settings_for(trial={"method": "lora", "learning_rate": 0.02}))
    assert model.run([], None, 0, measured).losses == full.losses
    after = model.run(twenty_samples[:2], Work("tokens", 400, 8), 0, measured)
    assert sum(one.nll for one in after.losses["held_out"]) < 0.9 * sum(one.nll for one in full.losses["held_out"])


def test_adapters_without_peft_name_the_extra(settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrialError, match="qaq-pipeline\\[trial\\]"):
        TrialModel(settings_for(trial={"method": "lora"}))


def test_a_training_of_one_step_learns(settings: Settings, twenty_samples: list[Pair]):
    measured, model = {"held_out": twenty_samples[:2]}, TrialModel(settings)
    before, after = (model.run(twenty_samples[:2], work, 0, measured) for work in (None, Work("rows", 2, 1)))
    assert after.num_steps == 1
    assert sum(one.nll for one in after.losses["held_out"]) < 0.99 * sum(one.nll for one in before.losses["held_out"])


def test_a_result_survives_storage(settings: Settings, twenty_samples: list[Pair]):
    found = TrialModel(settings).run([], None, 0, {"held_out": twenty_samples[:2]})
    assert RunResult.of_json(json.loads(json.dumps(found.as_json()))) == found


def test_the_identity_changes_with_what_changes_the_result(settings_for: Callable[..., Settings]):
    def identity(scoring: dict[str, object] | None = None, **trial: object) -> dict[str, object]:
        return TrialModel(settings_for(trial=trial, scoring=scoring or {})).identity

    assert identity() == identity(seeds=7, max_held_out=3, lora_rank=3)
    assert identity() != identity({"too_long": "leave_unscored"})
    assert identity() != identity({"max_tokens": 300})
    assert identity() != identity(learning_rate=0.1)
    assert identity() != identity(method="lora")
    assert identity() != identity(model="strong")


def test_a_batch_that_does_not_fit_is_split_and_a_pair_that_does_not_is_an_error(
    settings: Settings, twenty_samples: list[Pair]
):
    model = TrialModel(settings)
    sequences = [
        sequence for one in model._encoder.encode(twenty_samples, {Quantity.A_GIVEN_Q}) for sequence in one.sequences
    ]
    facts = ScorerFacts("", is_padded=False, shares_prefixes=False, batch_tokens=10_000)

    def score(batch: list[object], most: int) -> list[list[torch.Tensor]]:
        if len(batch) > most:
            raise BatchTooLargeError
        return [[torch.tensor([-1.0, -2.0])] for _ in batch]

    scorer = SimpleNamespace(facts=facts, score=lambda batch: score(batch, 3))
    assert answer_losses._sums(scorer, sequences) == {one.pair_id: 3.0 for one in twenty_samples}
    with pytest.raises(MemoryError, match="does not fit into memory"):
        answer_losses._sums(SimpleNamespace(facts=facts, score=lambda batch: score(batch, 0)), sequences)
