"""What a GPU does with the engine: prediction beside result, in modes of a few minutes each.

    python -m bench.gpu_probe env|correct|kernel|memory|speed|workers [--device cuda|cpu] [--tiny] [--json FILE]

    env       versions, the card, and the settings that scores depend on
    correct   tiny models of ten families: fp32 against the CPU, half precision against the model's own logits
    kernel    the kernel of the head against torch's operations: differences, and bytes per second
    memory    what the largest batch takes against the estimate; a batch that does not fit, and the one after it
    speed     tokens per second and share of the matmul peak, with each change that makes a runner faster
    workers   a process for each GPU, none shared; one that is killed; memory that is given back

It needs this directory, torch, transformers, numpy, safetensors and pydantic; triton for `kernel`. Models have random
weights. Rehearse every mode by `--device cpu --tiny`, `kernel` with TRITON_INTERPRET=1 in the environment: then
differences mean something, speeds do not. It exits with 1 if a check fails; a prediction that is missed is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from bench import workload
from bench.workload import PRODUCTION, SHORT
from qaq_pipeline.lm import causal_lm, devices, gpu_speed, lm_head, mixed_precision, runners
from qaq_pipeline.lm.batching import BatchQueue, BatchTooLargeError
from qaq_pipeline.lm.causal_lm import CausalLM, GpuCausalLM
from qaq_pipeline.lm.prompts import Target, TokenSequence
from qaq_pipeline.lm.runners import PackedRunner, PaddedRunner
from qaq_pipeline.lm.workers import Processes, open_processes, score_batches
from qaq_pipeline.schema.vocabularies import Quantity

WINDOW = {"sliding_window": 16}
BOTH_LAYERS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"tie_word_embeddings": True},
    "gemma2": SIZES | BOTH_LAYERS | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": SIZES | BOTH_LAYERS,
    "mistral": SIZES | WINDOW,
    "phi3": SIZES | WINDOW | {"pad_token_id": 0},
    "cohere": WITHOUT_HEAD_DIM | {"logit_scale": 0.25},
    "granite": SIZES | {"logits_scaling": 8.0},
    "gpt2": {
        "vocab_size": 300,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 128,
        "n_positions": 512,
        "initializer_range": 0.15,
    },
}
"""Ten architectures, tiny; their weights are so large that a wrong mask or position changes a score by tenths."""

FP32_TOLERANCE = 1e-4
"""Of a log-probability in fp32 between devices, in nats."""
PREDICTED_SHARES = {"0.6B": (0.22, 0.45), "6.7B": (0.60, 0.70)}
"""Share of the matmul peak before and after the changes, by arithmetic for an H100."""


@dataclass(frozen=True)
class Line:
    """One thing that was predicted and measured."""

    what: str
    predicted: str
    measured: str
    is_wrong: bool = False
    """Whether a check failed."""

    def __str__(self) -> str:
        return f"{'WRONG ' if self.is_wrong else ''}{self.what:<58} {self.predicted:<30} {self.measured}"


@dataclass(frozen=True)
class Probe:
    """The device, and how large the work on it is."""

    device: torch.device
    is_tiny: bool

    @property
    def is_gpu(self) -> bool:
        """Return whether speeds and memory mean something."""
        return self.device.type == "cuda"

    def names(self) -> list[str]:
        """Return the models whose speed and memory are measured."""
        return ["tiny"] if self.is_tiny else ["0.6B", "6.7B"]

    def build(self, name: str, dtype: torch.dtype) -> Any:
        """Return a model of that shape on the device; `tiny`: the first family."""
        if name == "tiny":
            return tiny("llama", dtype).to(self.device)
        return workload.build(name, dtype, str(self.device))

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def tiny(family: str, dtype: torch.dtype) -> Any:
    """Return a tiny model on the CPU, with the same weights each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    return model.eval().requires_grad_(requires_grad=False).to(dtype)


def some_sequences(number: int, num_words: int, longest: int) -> list[TokenSequence]:
    """Return sequences with a shared prefix, all after it a target."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(num_words, (25,), generator=generator).tolist()
    lengths = torch.randint(2, longest, (number,), generator=generator).tolist()
    drawn = [prefix + torch.randint(num_words, (length,), generator=generator).tolist() for length in lengths]
    return [TokenSequence(f"{n:032x}", ids, (Target(Quantity.Q, 25, len(ids)),), 24) for n, ids in enumerate(drawn)]


# --- env -------------------------------------------------------------------------------------------------------------


def env(probe: Probe) -> Iterator[Line]:
    """Return the versions, the card and its settings."""
    for name in ("torch", "transformers", "triton", "numpy", "safetensors", "pydantic", "accelerate"):
        yield Line(name, "", version(name))
    yield Line("python, cores", "3.11 to 3.13", f"{platform.python_version()}, {devices.num_cores()}")
    yield Line("free memory of the machine, GB", "", f"{devices.available_memory() / 1e9:,.1f}")
    products = torch.backends.cuda.matmul
    settings = {
        "TF32": products.allow_tf32,
        "TF32 of cuDNN": torch.backends.cudnn.allow_tf32,
        "bf16 sums in half precision": products.allow_bf16_reduced_precision_reduction,
        "fp16 sums in half precision": products.allow_fp16_reduced_precision_reduction,
    }
    if probe.is_gpu:
        for name, value in settings.items():
            yield Line(name, "False", str(value), is_wrong=bool(value))
        card = torch.cuda.get_device_properties(probe.device)
        yield Line("card", "", f"{card.name}, {card.total_memory / 1e9:.0f} GB, sm_{card.major}{card.minor}")
        yield Line("CUDA of torch, cuDNN", "", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        yield Line("allocator", "expandable_segments", str(torch._C._accelerator_getAllocatorSettings()))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        speed = devices.matmul_flops_per_second(dtype, probe.device)
        yield Line(f"matmul peak, {dtype}, TFLOP/s", "790 in bf16 on an H100", f"{speed / 1e12:,.2f}")


def version(package: str) -> str:
    """Return the installed version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- correct ---------------------------------------------------------------------------------------------------------


def correct(probe: Probe) -> Iterator[Line]:
    """Compare the device with the CPU in fp32, and each runner with the model's own logits in half precision."""
    for family in FAMILIES:
        sequences = some_sequences(12, 300, 200)
        expected = flat(CausalLM(tiny(family, torch.float32), family), sequences)
        scorer = GpuCausalLM(tiny(family, torch.float32).to(probe.device), family)
        difference = float((flat(scorer, sequences) - expected).abs().max())
        yield Line(
            f"{family}, fp32, {scorer.facts.runner}: largest difference",
            f"<= {FP32_TOLERANCE:g}",
            f"{difference:.2g}",
            is_wrong=not difference <= FP32_TOLERANCE,
        )
        for name in ("bfloat16", "mixed", "float16"):
            dtype = devices.weights_dtype(name)
            other, model = (tiny(family, dtype).to(probe.device) for _ in range(2))
            if name == "mixed":
                mixed_precision.use(other)
            own = flat_of(runners.OwnLogitsRunner(other), sequences)
            scorer = GpuCausalLM(model, family, max_tokens=256, is_mixed=name == "mixed")
            difference = float((flat(scorer, sequences) - own).abs().mean())
            bound = runners.MIXED_TOLERANCE if name == "mixed" else runners.SELF_TEST_TOLERANCE[dtype]
            yield Line(
                f"{family}, {name}, {scorer.facts.runner}: mean difference",
                f"<= {bound:g}",
                f"{difference:.2g}",
                is_wrong=not difference <= bound,
            )


def flat(scorer: CausalLM, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Return all log-probabilities, in the order of the sequences; in batches, as scoring does."""
    queue = BatchQueue([sequences], 700, is_padded=scorer.facts.is_padded)
    by_id: dict[str, list[torch.Tensor]] = {}
    for batch, scores in score_batches(scorer, queue):
        for one, values in zip(batch, scores, strict=True):
            by_id[one.pair_id] = [torch.from_numpy(value) for value in values]
    return torch.cat([value for one in sequences for value in by_id[one.pair_id]])


@torch.inference_mode()
def flat_of(runner: runners.Runner, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Return all log-probabilities of one forward pass."""
    return runner.logprobs(sequences).cpu()


# --- kernel ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def kernel(probe: Probe) -> Iterator[Line]:
    """Compare the kernel of the head with torch's operations."""
    from qaq_pipeline.lm import head_kernel

    rows, vocabularies = (8, (300, 5000)) if probe.is_tiny else (lm_head.ROWS_PER_CHUNK_GPU, (32_256, 151_936, 262_144))
    for num_words in vocabularies:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            torch.manual_seed(num_words)
            logits = (torch.randn(rows, num_words, device=probe.device) * 5).to(dtype)
            targets = torch.randint(num_words, (rows, 1), device=probe.device)
            exact = torch.log_softmax(logits.double(), -1).gather(-1, targets)[:, 0]
            seconds = {}
            for name, of in (("torch", lm_head.token_logprobs), ("kernel", head_kernel.token_logprobs)):
                difference = float((of(logits, targets) - exact).abs().max())
                seconds[name] = seconds_of(probe, functools.partial(of, logits, targets))
                num_bytes = logits.numel() * logits.element_size()
                yield Line(
                    f"{name}, {num_words:,} words, {dtype}",
                    "<= 1e-5",
                    f"{difference:.2g}; {num_bytes / seconds[name] / 1e9:,.0f} GB/s of logits",
                    is_wrong=not difference <= 1e-5,
                )
            gain = seconds["torch"] / seconds["kernel"]
            yield Line(f"  gain, {num_words:,} words, {dtype}", "4 to 7", f"{gain:.2f}")


def seconds_of(probe: Probe, run: Callable[[], object], rotations: int = 5) -> float:
    """Return the fewest seconds of a run, after one that warms up."""
    run()
    seconds = []
    for _ in range(1 if probe.is_tiny else rotations):
        probe.wait()
        started = time.perf_counter()
        run()
        probe.wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(probe: Probe) -> Iterator[Line]:
    """Compare what a batch takes with the estimate, and see that a batch too large leaves room for the next."""
    dtype = torch.bfloat16
    for name in probe.names():
        model = probe.build(name, dtype)
        scorer = GpuCausalLM(model, name)
        batch = first_batch(scorer, some_sequences(200, 300, 1500 if probe.is_gpu else 100))
        held = allocated(probe)
        scorer.score(batch)
        taken = (peak_allocated(probe) - held) / sum(len(one.token_ids) for one in batch)
        estimate = causal_lm._bytes_per_token(model)
        is_more = taken > estimate
        yield Line(f"{name}: bytes a token of a batch", f"<= {estimate:,.0f}", f"{taken:,.0f}", is_wrong=is_more)
        expected = scorer.score(batch[:2])
        outcome = refused(probe, scorer, batch)
        yield Line(f"{name}: a batch too large", "refused", outcome, is_wrong=outcome == "it fitted")
        again = scorer.score(batch[:2])
        same = all(
            (a == b).all() for one, other in zip(expected, again, strict=True) for a, b in zip(one, other, strict=True)
        )
        yield Line(f"{name}: the next batch", "the same scores", "the same" if same else "others", is_wrong=not same)
        del model, scorer
        if probe.is_gpu:
            torch.cuda.empty_cache()


def first_batch(scorer: CausalLM, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Return the longest sequences that make one batch."""
    return BatchQueue([sequences], scorer.facts.batch_tokens, is_padded=scorer.facts.is_padded).take()


def allocated(probe: Probe) -> int:
    """Return the bytes of tensors on the device, and forget its peak; 0 on a CPU."""
    if not probe.is_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats(probe.device)
    return torch.cuda.memory_allocated(probe.device)


def peak_allocated(probe: Probe) -> int:
    """Return the peak since `allocated`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(probe.device) if probe.is_gpu else 0


def refused(probe: Probe, scorer: CausalLM, batch: list[TokenSequence]) -> str:
    """Return what happens to a batch for which the device has no memory."""
    if not probe.is_gpu:
        return "not tried: a GPU is needed"
    share = (
        1.02 * torch.cuda.memory_allocated(probe.device) / torch.cuda.get_device_properties(probe.device).total_memory
    )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), probe.device)
    try:
        scorer.score(batch)
    except BatchTooLargeError as error:
        return f"refused: {error}"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, probe.device)
    return "it fitted"


# --- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What makes scoring fast, up to some point."""

    name: str
    runner: type[PackedRunner | PaddedRunner]
    changes: Sequence[str] = ()
    backend: SDPBackend | None = None
    """Of torch's attention; None: as torch chooses."""
    is_mixed: bool = False
    predicted: float = math.nan
    """Share of the matmul peak."""


def speed(probe: Probe) -> Iterator[Line]:
    """Measure scoring with more and more of what makes it fast."""
    dtype = torch.bfloat16
    for name in probe.names():
        number = 12 if probe.is_tiny else {"0.6B": 2048, "6.7B": 256}[name]
        items = workload.draw(SHORT if probe.is_tiny else PRODUCTION, number)
        passes = {
            "four likelihoods": in_words(workload.two_passes(items)),
            "default": in_words(workload.default_passes(items)),
        }
        before, after = PREDICTED_SHARES.get(name, (math.nan, math.nan))
        one, every = list(gpu_speed.CHANGES)[:1], list(gpu_speed.CHANGES)
        stages = [
            Stage("padded", PaddedRunner, predicted=before),
            Stage("padded, flash attention", PaddedRunner, backend=SDPBackend.FLASH_ATTENTION),
            Stage("padded, cuDNN attention", PaddedRunner, backend=SDPBackend.CUDNN_ATTENTION),
            Stage("packed", PackedRunner, predicted=before),
            Stage("packed, kernel", PackedRunner, one),
            Stage("packed, kernel, compiled", PackedRunner, every, predicted=after),
            Stage("the same, mixed", PackedRunner, every, is_mixed=True),
        ]
        for stage in stages if probe.is_gpu else [one for one in stages if one.backend is None]:
            model = probe.build(name, dtype)
            started = time.perf_counter()
            with sdpa_kernel(stage.backend) if stage.backend is not None else contextlib.nullcontext():
                scorer = scorer_of(probe, model, name, stage)
                start = time.perf_counter() - started
                yield from lines_of(probe, scorer, f"{name}, {stage.name}", passes, stage.predicted, start)
            del model, scorer
            if probe.is_gpu:
                torch.cuda.empty_cache()


def lines_of(
    probe: Probe,
    scorer: GpuCausalLM,
    stage: str,
    passes: Mapping[str, Sequence[TokenSequence]],
    predicted: float,
    start: float,
) -> Iterator[Line]:
    """Return the speed of each kind of passes."""
    for what, sequences in passes.items():
        seconds, host = seconds_of_scoring(probe, scorer, sequences)
        num_tokens = sum(len(one.token_ids) for one in sequences)
        share = workload.flops(scorer.facts, sequences) / seconds / scorer.facts.peak_flops_per_second
        yield Line(
            f"{stage} ({scorer.facts.runner}), {what}",
            f"share {predicted:.2f}" if what == "four likelihoods" and not math.isnan(predicted) else "",
            f"share {share:.3f}, {num_tokens / seconds:,.0f} tokens/s, host {host / seconds:.0%}, start {start:.0f} s",
        )


def in_words(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Return the sequences with ids that every model has."""
    return [
        TokenSequence(one.pair_id, [id_ % 300 for id_ in one.token_ids], one.targets, one.num_shared)
        for one in sequences
    ]


def scorer_of(probe: Probe, model: Any, name: str, stage: Stage) -> GpuCausalLM:
    """Return a model with the runner and the changes of a stage, each tested."""
    chosen = {
        change: gpu_speed.CHANGES[change]
        for change in stage.changes
        if probe.is_gpu or gpu_speed.CHANGES[change] is not gpu_speed.use_head_kernel
    }
    choose = functools.partial(runners.choose_runner, wanted=[stage.runner], changes=chosen)
    return GpuCausalLM(model, name, is_mixed=stage.is_mixed, choose=choose)


def seconds_of_scoring(probe: Probe, scorer: GpuCausalLM, sequences: Sequence[TokenSequence]) -> tuple[float, float]:
    """Return the fewest seconds to score the sequences, and the process's own CPU seconds then."""
    found = []
    for _ in range(2 if probe.is_tiny else 3):
        queue = BatchQueue([sequences], scorer.facts.batch_tokens, is_padded=scorer.facts.is_padded)
        probe.wait()
        started, host = time.perf_counter(), time.process_time()
        for _batch, _scores in score_batches(scorer, queue):
            pass
        probe.wait()
        found.append((time.perf_counter() - started, time.process_time() - host))
    return min(found[1:])


# --- workers ---------------------------------------------------------------------------------------------------------


class Worker:
    """Scores chunks of token sequences on one device."""

    def __init__(self, device: str) -> None:
        devices.prepare(torch.device(device))
        self._model = GpuCausalLM(tiny("llama", torch.float32).to(device), "tiny")
        self.facts = self._model.facts

    def score(self, chunk: Sequence[TokenSequence], _note: Callable[[Any], None]) -> tuple[int, float]:
        """Score a chunk; return the process and the sum of all log-probabilities."""
        return os.getpid(), float(flat(self._model, chunk).double().sum())


class Chunks:
    """Chunks of ten sequences."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self._chunks = [list(sequences[start : start + 10]) for start in range(0, len(sequences), 10)]

    def take(self) -> list[TokenSequence]:
        """Return the next chunk; empty if none is left."""
        return self._chunks.pop() if self._chunks else []

    def after_loss(self, chunk: Sequence[TokenSequence]) -> Sequence[TokenSequence]:
        """Return the same again."""
        return chunk


def workers(probe: Probe) -> Iterator[Line]:
    """Score in processes of their own, kill one, and see what the device gets back."""
    sequences = some_sequences(60, 300, 120)
    expected = float(flat(CausalLM(tiny("llama", torch.float32), "tiny"), sequences).double().sum())
    free = free_bytes(probe)
    names = [str(probe.device)] if not probe.is_gpu else [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    if probe.is_gpu:
        with devices.lease_gpus(torch.device("cuda"), len(names)) as held:
            yield (
                Line("GPUs that one process leases", str(len(names)), str(len(held)), is_wrong=len(held) != len(names))
            )
    with open_processes([functools.partial(Worker, name) for name in names]) as processes:
        places = [facts.device for facts in processes.facts]
        expected_runner = ", ".join(["padded", *gpu_speed.CHANGES]) if probe.is_gpu else "packed"
        for facts in processes.facts:
            yield Line(
                f"runner on {facts.device}", expected_runner, facts.runner, is_wrong=facts.runner != expected_runner
            )
        yield (
            Line("devices of the processes", "all different", ", ".join(places), is_wrong=len(set(places)) < len(names))
        )
        total, pid = total_of(processes, sequences, kill=False)
        yield (agreement("log-probabilities of all sequences", expected, total))
        total, _ = total_of(processes, sequences, kill=True, pid=pid)
        yield (agreement("the same, a process killed on the way", expected, total))
        yield Line("processes lost", "1", str(processes.num_lost), is_wrong=processes.num_lost != 1)
    if probe.is_gpu:
        time.sleep(2)
        kept = (free - free_bytes(probe)) / 1e6
        yield Line("memory that the processes keep, MB", "<= 50", f"{kept:,.0f}", is_wrong=kept > 50)


def total_of(
    processes: Processes, sequences: Sequence[TokenSequence], *, kill: bool, pid: int = 0
) -> tuple[float, int]:
    """Return the sum of all log-probabilities and a process; kill that process once a chunk is done."""
    total = 0.0
    for _chunk, result in processes.run(Chunks(sequences)):
        scored_by, value = result
        total += value
        if kill:
            os.kill(pid, signal.SIGKILL)
            kill = False
        pid = scored_by
    return total, pid


def agreement(what: str, expected: float, found: float) -> Line:
    """Return a line that compares sums."""
    difference = abs(found - expected) / abs(expected)
    return Line(what, f"{expected:.4f}", f"{found:.4f}", is_wrong=not difference <= 1e-5)


def free_bytes(probe: Probe) -> int:
    """Return the free memory of the GPU; 0 on a CPU."""
    return torch.cuda.mem_get_info(probe.device)[0] if probe.is_gpu else 0


# --- the command -----------------------------------------------------------------------------------------------------

MODES: dict[str, Callable[[Probe], Iterator[Line]]] = {
    "env": env,
    "correct": correct,
    "kernel": kernel,
    "memory": memory,
    "speed": speed,
    "workers": workers,
}


def main() -> int:
    """Run one mode; return 1 as exit status if a check fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny models, few sequences")
    parser.add_argument("--json", type=Path, help="file to write the lines to")
    arguments = parser.parse_args()
    device = devices.resolve_device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda:0")
    probe = Probe(device, arguments.tiny)
    if arguments.mode == "kernel" and not probe.is_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("without a GPU the kernel is interpreted: set TRITON_INTERPRET=1 in the environment")
    devices.prepare(probe.device)
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if probe.is_gpu and arguments.mode == "speed":
            torch.cuda.set_sync_debug_mode("warn")
        for line in MODES[arguments.mode](probe):
            print(line, flush=True)  # noqa: T201 - at once: what is known if time runs out.
            found.append(line)
    if probe.is_gpu and arguments.mode == "speed":
        waits = [one for one in said if "synchroniz" in str(one.message).lower()]
        places = sorted({f"{Path(one.filename).name}:{one.lineno}" for one in waits})
        found.append(Line("places where the process waits for the GPU", "those of a batch's scores", ", ".join(places)))
        print(found[-1])  # noqa: T201
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(line) for line in found], indent=2) + "\n", encoding="utf-8")
    return 1 if any(line.is_wrong for line in found) else 0


if __name__ == "__main__":
    sys.exit(main())
