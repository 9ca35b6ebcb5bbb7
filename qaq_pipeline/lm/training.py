"""Fine-tunes a causal LM on pairs, in steps of equal size, with transformers' trainer and peft.

Belongs here: the device, the model and the trainer. Does not belong here: the steps (`training_steps`), which rows are
trained on (`trial.arms`), how much (`trial.trial`), and the scoring of the result (`causal_lm`).
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from qaq_pipeline.config.settings import ModelSettings, TrialSettings
from qaq_pipeline.lm import causal_lm, devices
from qaq_pipeline.lm.model_files import ModelFiles
from qaq_pipeline.lm.runners import UnsupportedModelError
from qaq_pipeline.lm.training_steps import Example, packed

PACKING_TOLERANCE = 1e-3
"""Largest relative difference between the loss of packed pairs and that of the same pairs alone, in float32."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A training after one of its steps."""

    step: int
    num_steps: int
    loss: float | None
    """Mean loss of the step, in nats per trained token; None: not logged at this step."""
    held_out_loss: float | None = None
    """Loss of the held-out examples, in nats per answer token; None: not measured at this step."""


class _Reporting(TrainerCallback):
    """Passes on what the trainer logs."""

    def __init__(self, on_step: Callable[[Progress], None]) -> None:
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002 - transformers' names.
        """See transformers."""
        logs = others.get("logs") or {}
        if {"loss", "eval_loss"} & logs.keys():
            self._on_step(Progress(state.global_step, state.max_steps, logs.get("loss"), logs.get("eval_loss")))


@contextmanager
def device_for(model: ModelSettings) -> Iterator[torch.device]:
    """The device to train on; a GPU is leased. transformers' trainer uses the first visible GPU only.

    Raises:
        devices.DeviceNotFoundError: this machine does not have the device, or it is another GPU than the first.
        devices.DeviceBusyError: another process holds the GPU.
    """
    device = devices.resolve_device(model.device)
    if device.type != "cuda":
        yield device
        gc.collect()  # The trainer and its model refer to each other.
        return
    if device.index:
        raise devices.DeviceNotFoundError(
            f"device: {device} cannot be trained on: the trainer uses the first visible GPU; set `device: cuda`, and "
            f"CUDA_VISIBLE_DEVICES={device.index} in the environment"
        )
    with devices.lease_gpus(torch.device("cuda:0"), limit=1) as (gpu,):
        yield torch.device(gpu)
        gc.collect()
        torch.cuda.empty_cache()


def load_for_training(files: ModelFiles, seed: int, device: torch.device) -> Any:
    """The model in float32, on the device. Raises `ModelNotFoundError` if its weights cannot be read."""
    torch.manual_seed(seed)
    return causal_lm.load_weights(files, torch.float32, device)


@torch.no_grad()
def check_packing(model: Any, name: str, examples: Sequence[Example]) -> None:
    """Check on some examples that pairs in one step do not see each other.

    Raises:
        UnsupportedModelError: they do: the model's layers do not restart at position 0.
    """

    def loss(step: Sequence[Example]) -> float:
        inputs = {key: tensor[None].to(model.device) for key, tensor in packed(step).items()}
        return float(model(**inputs, use_cache=False).loss) * sum(one.num_trained for one in step)

    alone, together = sum(loss([one]) for one in examples), loss(examples)
    if abs(together - alone) > PACKING_TOLERANCE * alone:
        raise UnsupportedModelError(
            f"{name}: in a step of several pairs, the pairs see each other (loss {together:.4f}, alone {alone:.4f}): "
            "its layers cannot be trained on packed pairs; choose a model with plain or sliding attention"
        )


def _with_adapters(model: Any, rank: int) -> Any:
    """The model wrapped by peft."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def precision(device: torch.device) -> str:
    """The precision of a training's forward and backward passes: bfloat16 where the device has it."""
    return str(devices.weights_dtype(devices.resolve_dtype("auto", device))).removeprefix("torch.")


def train(
    model: Any,
    steps: Sequence[Sequence[Example]],
    trial: TrialSettings,
    seed: int,
    curve: Sequence[Sequence[Example]] = (),
    on_step: Callable[[Progress], None] = lambda _: None,
) -> Any:
    """The model after the steps, without adapters. The learning rate falls linearly to 0.

    Args:
        model: of `load_for_training`; it is changed.
        steps: the examples of each step.
        trial: learning rate and number of points of the curve.
        seed: seed of dropout, if the model has any.
        curve: held-out examples in rows, whose loss is measured `trial.curve_points` times.
        on_step: called with every logged step.

    Raises:
        ImportError: peft is not installed, and `trial.method` is lora.
        MemoryError: a step does not fit into the device's memory.
    """
    device = model.device
    if trial.method == "lora":
        model = _with_adapters(model, trial.lora_rank)
    given = {"train_dataset": steps, "eval_dataset": curve}
    rows: dict[str, Any] = {name: [packed(step) for step in found] for name, found in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            learning_rate=trial.rate,
            lr_scheduler_type="linear",
            bf16=precision(device) == "bfloat16",
            use_cpu=device.type == "cpu",
            seed=seed,
            logging_steps=max(1, len(steps) // 20),
            eval_strategy="steps" if curve else "no",
            eval_steps=max(1, len(steps) // trial.curve_points),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            use_cache=False,  # With a cache, transformers would not mask the attention between pairs.
            dataloader_pin_memory=device.type == "cuda",
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # A row of pairs cannot be split among GPUs.
        trainer = Trainer(
            model=model,
            args=arguments,
            callbacks=[_Reporting(on_step)],
            **rows,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            longest = max(sum(len(one.token_ids) for one in step) for step in steps)
            raise MemoryError(
                f"a step of up to {longest:,} tokens does not fit into memory; set a smaller trial.rows_per_step"
            ) from error
        # accelerate left the forward pass in the precision of the training.
        trained: Any = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return trained.merge_and_unload() if trial.method == "lora" else trained
