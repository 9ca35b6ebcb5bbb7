"""One training of a trial: a fresh model, its training on some rows, and its likelihoods of the measured answers.

Belongs here: the step from settings and rows to the result of a training. Does not belong here: the training itself
(`lm.training`), the measuring (`answer_losses`), which rows an arm has (`arms`), and the comparison (`verdict`).
torch and transformers load on first use.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm import model_files
from qaq_pipeline.lm.prompts import Pair, PairEncoder
from qaq_pipeline.lm.workers import ScorerFacts
from qaq_pipeline.trial.answer_losses import AnswerLoss, answer_losses
from qaq_pipeline.trial.arms import TrialError

if TYPE_CHECKING:
    from qaq_pipeline.lm.training import Progress
    from qaq_pipeline.lm.training_steps import Example, Work

CODE_VERSION = "1"
"""Version of what determines the result of a training. Results of another version are not used again."""

LIBRARIES = ("torch", "transformers", "accelerate", "peft")
"""Libraries on which the result of a training depends; the last one for adapters only."""

CHECKED = 3
"""Examples that check whether packed pairs see each other."""

CURVE_PAIRS = 40
"""Held-out pairs of the learning curve, which is measured often, in the training of the first seed only."""

Measured = Mapping[str, Sequence[Pair]]
"""Pairs whose answers are measured, by the name of the measure."""


@dataclass(frozen=True)
class RunResult:
    """The result of one training of an arm."""

    num_rows: int
    """Distinct rows that it was trained on."""
    num_tokens: int
    """Tokens with a loss, repetitions included."""
    num_steps: int
    seconds: float
    """Time of training and measuring."""
    losses: dict[str, list[AnswerLoss]]
    """By measure, in the order of its pairs."""
    curve: list[dict[str, float]]
    """`step`, with `loss` of the training rows or `held_out_loss`, in nats per token."""

    def as_json(self) -> dict[str, Any]:
        """The result as a JSON value."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Self:
        """The result from its JSON value."""
        read = cls(**value)
        losses = {name: [AnswerLoss(**one) for one in found] for name, found in value["losses"].items()}
        return replace(read, losses=losses)


class TrialModel:
    """The model that a trial trains, from the settings.

    Raises:
        TrialError: peft is not installed, and `trial.method` is lora.
        model_files.ModelNotFoundError: the model's files are missing or cannot be read.
        chat_frame.TemplateUnusableError: the prompts cannot be expressed for the model.
    """

    def __init__(self, settings: Settings) -> None:
        from qaq_pipeline.lm import causal_lm
        from qaq_pipeline.lm.tokenizer import load_tokenizer

        if settings.trial.method == "lora" and importlib.util.find_spec("peft") is None:
            raise TrialError("trial.method: lora needs peft: pip install 'qaq-pipeline[trial]'")
        self._settings = settings
        self._model = settings.models[settings.trial.model]
        self._files = model_files.locate(self._model, settings.model_cache_dir)
        tokenizer = load_tokenizer(self._model, self._files, settings.model_cache_dir)
        self._encoder = PairEncoder(tokenizer, self._model, settings.scoring, self._files.num_embeddings())
        self._sample_ids = tokenizer.encode_markup(causal_lm.SAMPLE_TEXT)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The facts of the model, the settings and the machine that determine the result of a training."""
        from qaq_pipeline.lm import devices, training

        trial, scoring = self._settings.trial, self._settings.scoring
        device = devices.resolve_device(self._model.device)
        libraries = LIBRARIES if trial.method == "lora" else LIBRARIES[:-1]
        return {
            "code_version": CODE_VERSION,
            "model": self._files.name,
            "revision": self._files.revision,
            "tokenizer_hash": self._files.tokenizer_hash(),
            "template_hash": self._encoder.template_hash(),
            "max_tokens": scoring.max_tokens,
            "too_long": scoring.too_long,
            "method": trial.method,
            "lora_rank": trial.lora_rank if trial.method == "lora" else None,
            "learning_rate": trial.rate,
            "curve_points": trial.curve_points,
            "device": device.type,
            "precision": training.precision(device),
            "libraries": {name: importlib.metadata.version(name) for name in libraries},
        }

    def examples(self, pairs: Sequence[Pair]) -> list[Example]:
        """The pairs as training examples; a pair that exceeds the window is left out, or its answer truncated."""
        from qaq_pipeline.lm import training_steps

        return training_steps.encode(self._encoder, pairs)

    def speed(self) -> ScorerFacts:
        """The model's operations per token, and the machine's speed, without its weights."""
        from qaq_pipeline.lm import causal_lm, devices

        device = devices.resolve_device(self._model.device)
        dtype = devices.weights_dtype(devices.resolve_dtype("auto", device))
        return causal_lm.unloaded_facts(self._files, dtype, device)

    def run(
        self,
        pairs: Sequence[Pair],
        work: Work | None,
        seed: int,
        measured: Measured,
        on_step: Callable[[Progress], None] = lambda _: None,
    ) -> RunResult:
        """Train a fresh model on the pairs, and measure it.

        Args:
            pairs: rows of the arm.
            work: the amount of training; None: the model is measured as it is.
            seed: seed of the order of the rows.
            measured: pairs to measure. The learning curve of seed 0 uses the first ones of the first measure.
            on_step: called with every logged step.

        Raises:
            ValueError: no pair can be trained on.
            runners.UnsupportedModelError: the model cannot be trained or scored correctly.
            MemoryError: a step or a pair does not fit into memory.
        """
        from qaq_pipeline.lm import causal_lm, training
        from qaq_pipeline.lm.training_steps import draw, split

        started, curve = time.monotonic(), []

        def logged(one: Progress) -> None:
            values = {"loss": one.loss, "held_out_loss": one.held_out_loss}
            curve.append({"step": one.step} | {name: value for name, value in values.items() if value is not None})
            on_step(one)

        trial, max_tokens = self._settings.trial, self._settings.scoring.max_tokens
        steps = [] if work is None else split(draw(self.examples, pairs, work, seed), work)
        curve_pairs = next(iter(measured.values()), ())[: CURVE_PAIRS if seed == 0 else 0]
        with training.device_for(self._model) as device:
            model = training.load_for_training(self._files, seed, device)
            if steps:
                training.check_packing(model, self._files.name, [one for step in steps for one in step][:CHECKED])
                held_out = [[one] for one in self.examples(curve_pairs)]
                model = training.train(model, steps, trial, seed, held_out, logged)
            scorer = causal_lm.CausalLM(model, self._files.name, self._sample_ids, max_tokens)
            losses = {name: answer_losses(scorer, self._encoder, found) for name, found in measured.items()}
        trained = [one for step in steps for one in step]
        return RunResult(
            num_rows=len({one.pair_id for one in trained}),
            num_tokens=sum(one.num_trained for one in trained),
            num_steps=len(steps),
            seconds=time.monotonic() - started,
            losses=losses,
            curve=curve,
        )
