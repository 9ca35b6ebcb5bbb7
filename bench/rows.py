"""The rows of the benchmark, each a measurement with its goal.

Belongs here: timing, and one function per group of rows. Does not belong here: the implementations and the workload.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bench import opponents, workload
from bench.opponents import Score
from bench.workload import LONG, SHORT, Mix
from qaq_pipeline.lm import devices
from qaq_pipeline.lm.batching import BatchQueue
from qaq_pipeline.lm.causal_lm import CausalLM, GpuCausalLM
from qaq_pipeline.lm.devices import free_memory, matmul_flops_per_second, prepare
from qaq_pipeline.lm.prompts import TokenSequence
from qaq_pipeline.lm.workers import open_processes, score_batches
from qaq_pipeline.scoring.shards import ShardWriter
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage

Measure = Callable[[int], "list[Row]"]

ENGINE, REFERENCE, LM_EVAL = "engine", "reference loop", "lm-eval engine"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity over the rotations, and its goal."""

    name: str
    values: tuple[float, ...]
    goal: float | None = None
    is_ceiling: bool = False
    """True if the goal is a maximum, false if it is a minimum."""

    @property
    def low(self) -> float:
        """Of the rotations."""
        return min(self.values)

    @property
    def median(self) -> float:
        """Return the median of the rotations, which is compared with the goal."""
        return statistics.median(self.values)

    @property
    def high(self) -> float:
        """Of the rotations."""
        return max(self.values)

    @property
    def goal_text(self) -> str:
        """Return the goal as readable text."""
        return "" if self.goal is None else f"{'<=' if self.is_ceiling else '>='} {self.goal:g}"

    @property
    def is_missed(self) -> bool:
        """Return whether the median misses the goal; NaN does."""
        if self.goal is None:
            return False
        return not (self.median <= self.goal if self.is_ceiling else self.median >= self.goal)

    def as_json(self) -> dict[str, Any]:
        """Return every field, and whether the goal is missed."""
        return asdict(self) | {"median": self.median, "is_missed": self.is_missed}


def for_device(device: str) -> dict[str, Measure]:
    """Return the groups of rows that the device can measure, by name."""
    if device.startswith("cuda"):
        return {f"gpu {name}": functools.partial(gpu_rows, name, device) for name in ("0.6B", "6.7B")}
    return {
        "speed short": functools.partial(speed_rows, SHORT, 2.0),
        "speed long": functools.partial(speed_rows, LONG, 1.5),
        "default": default_rows,
        "accuracy": accuracy_rows,
        "padding": padding_rows,
        "memory": memory_rows,
        "processes": process_rows,
        "shards": shard_rows,
        "ranks": rank_rows,
    }


def machine(device: str) -> str:
    """Return a description of the machine."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = lines[0].partition(": ")[2] if lines else model
    bf16 = "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else "no native bf16"
    return f"{model}, {os.cpu_count()} cores, {bf16}, torch {torch.__version__}"


# --- timing --------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return process seconds on a CPU, unaffected by other load; seconds between CUDA events on a GPU."""
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000


def rotate(
    contestants: Mapping[str, tuple[Callable[[], object], torch.dtype]], rotations: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seconds per contestant and rotation, and the matrix peak; each rotation begins with another contestant."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contestants[name][0]()  # Warm.
    for rotation in range(rotations):
        for name in names[rotation % len(names) :] + names[: rotation % len(names)]:
            work, dtype = contestants[name]
            before = matmul_flops_per_second(dtype, device)
            seconds[name].append(seconds_of(work, device))
            peaks[name].append((before + matmul_flops_per_second(dtype, device)) / 2)
    return seconds, peaks


# --- rows ----------------------------------------------------------------------------------------------------------


def speed_rows(mix: Mix, goal_fp32: float, rotations: int) -> list[Row]:
    """Time four likelihoods per pair, plain frame, prior `bare`, against the reference loop and lm-eval's engine."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    models = {dtype: workload.build("135M", dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)}
    opponents_of = {dtype: workload.build("135M", dtype, "cpu") for dtype in models}
    engines = {dtype: CausalLM(model, "135M") for dtype, model in models.items()}
    sequences = workload.two_passes(workload.draw(mix, mix.pairs_per_block))
    scores: dict[tuple[str, torch.dtype], Score] = {
        (ENGINE, dtype): opponents.engine(engines[dtype]) for dtype in models
    }
    scores |= {(LM_EVAL, dtype): opponents.lm_eval_engine(model) for dtype, model in opponents_of.items()}
    scores |= {(REFERENCE, dtype): opponents.reference_loop(model) for dtype, model in opponents_of.items()}
    contestants = {
        f"{name} {dtype}": (functools.partial(score, sequences), dtype) for (name, dtype), score in scores.items()
    }
    seconds, peaks = rotate(contestants, rotations, device)

    def ratio(other: str, dtype: torch.dtype, other_dtype: torch.dtype) -> tuple[float, ...]:
        ours, theirs = seconds[f"{ENGINE} {dtype}"], seconds[f"{other} {other_dtype}"]
        return tuple(b / a for a, b in zip(ours, theirs, strict=True))

    def share(dtype: torch.dtype) -> tuple[float, ...]:
        work, name = workload.flops(engines[dtype].facts, sequences), f"{ENGINE} {dtype}"
        return tuple(work / s / p for s, p in zip(seconds[name], peaks[name], strict=True))

    fp32, bf16 = torch.float32, torch.bfloat16
    return [
        Row(f"{mix.name}: fp32 against the reference loop", ratio(REFERENCE, fp32, fp32), goal_fp32),
        Row(f"{mix.name}: bf16 against the fp32 reference loop", ratio(REFERENCE, bf16, fp32), 4.2),
        Row(f"{mix.name}: bf16 against the bf16 reference loop", ratio(REFERENCE, bf16, bf16)),
        Row(f"{mix.name}: fp32 against lm-eval's engine", ratio(LM_EVAL, fp32, fp32), 1.6),
        Row(f"{mix.name}: bf16 against lm-eval's engine", ratio(LM_EVAL, bf16, bf16), 1.6),
        Row(f"{mix.name}: share of the matmul peak, fp32", share(fp32), 0.80),
        Row(f"{mix.name}: share of the matmul peak, bf16", share(bf16), 0.75),
    ]


def default_rows(rotations: int) -> list[Row]:
    """Time RMI in bf16, chat frame, prior `null_answer`: with and without shared prefix, and the reference loop."""
    torch.set_num_threads(1)
    device, dtype = torch.device("cpu"), torch.bfloat16
    engine = CausalLM(workload.build("135M", dtype, "cpu"), "135M")
    reference = opponents.reference_loop(workload.build("135M", dtype, "cpu"))
    sequences = workload.default_passes(workload.draw(SHORT, SHORT.pairs_per_block))
    unshared = [TokenSequence(one.pair_id, one.token_ids, one.targets) for one in sequences]
    score = opponents.engine(engine)
    seconds, _ = rotate(
        {
            "shared": (functools.partial(score, sequences), dtype),
            "unshared": (functools.partial(score, unshared), dtype),
            "reference": (functools.partial(reference, sequences), dtype),
        },
        rotations,
        device,
    )
    pairs = {name: zip(seconds["shared"], seconds[name], strict=True) for name in ("unshared", "reference")}
    return [
        Row("default settings: bf16 against the bf16 reference loop", tuple(b / a for a, b in pairs["reference"])),
        Row("default settings: against itself without shared prefixes", tuple(b / a for a, b in pairs["unshared"])),
    ]


def accuracy_rows(rotations: int) -> list[Row]:
    """Measure the largest difference of a mean NLL from the reference loop's, in fp32, both mixes, packed."""
    model = workload.build("135M", torch.float32, "cpu")
    sequences = [one for mix in (SHORT, LONG) for one in workload.two_passes(workload.draw(mix, mix.pairs_per_block))]
    expected = opponents.reference_loop(model)(sequences)
    ours = opponents.engine(CausalLM(model, "135M"))(sequences)
    differences = [
        abs(a - b) / (target.stop - target.start)
        for sequence, one, other in zip(sequences, ours, expected, strict=True)
        for target, a, b in zip(sequence.targets, one, other, strict=True)
    ]
    return [
        Row("largest difference of a mean NLL from the reference, fp32", (max(differences),), 1e-4, is_ceiling=True)
    ]


def padding_rows(rotations: int) -> list[Row]:
    """Measure padded per real tokens of 10,000 pairs in batches of a GPU's budget; packed rows have no padding."""
    sequences = workload.two_passes(workload.draw(workload.PRODUCTION, 10_000))
    queue = BatchQueue([sequences], 32_768, is_padded=True)
    padded = 0
    while batch := queue.take():
        padded += queue.tokens(batch)
    return [
        Row(
            "padded / real tokens, 10,000 pairs",
            (padded / sum(len(s.token_ids) for s in sequences),),
            1.01,
            is_ceiling=True,
        )
    ]


def memory_rows(rotations: int) -> list[Row]:
    """Measure peak extra memory on 4,096-token rows, vocabulary of 151,936 words, as a share of full logits'."""
    ours, theirs = (
        int(
            subprocess.run(
                [sys.executable, "-m", "bench.memory", who], check=True, capture_output=True, text=True
            ).stdout
        )
        for who in (ENGINE, REFERENCE)
    )
    return [Row("extra memory against full logits, 4,096 tokens, 152 K words", (ours / theirs,), 0.1, is_ceiling=True)]


def load(dtype: str, num_threads: int) -> CausalLM:
    """A worker's model."""
    torch.set_num_threads(num_threads)
    return CausalLM(workload.build("135M", getattr(torch, dtype), "cpu"), "135M")


class SequenceChunks:
    """Chunks of token sequences: the work of a process, and a queue of it."""

    def __init__(self, num_chunks: int, sequences: Sequence[TokenSequence]) -> None:
        self._chunks = [list(sequences[number::num_chunks]) for number in range(num_chunks)]

    def take(self) -> list[TokenSequence]:
        """The next chunk; empty if none is left."""
        return self._chunks.pop() if self._chunks else []

    def after_loss(self, chunk: Sequence[TokenSequence]) -> Sequence[TokenSequence]:
        """The same again."""
        return chunk


class SequenceScorer:
    """Scores chunks of token sequences with one thread."""

    def __init__(self) -> None:
        self._model = load(devices.resolve_dtype("auto", torch.device("cpu")), 1)
        self.facts = self._model.facts

    def score(self, chunk: Sequence[TokenSequence], note: Callable[[int], None]) -> None:
        """Score a chunk; note the size of each batch."""
        for batch, _ in score_batches(self._model, BatchQueue([chunk], 1024, is_padded=False)):
            note(len(batch))


def process_rows(rotations: int) -> list[Row]:
    """Time two processes of one thread against one such process, by wall clock: this needs an idle machine."""
    if len(os.sched_getaffinity(0)) < 2:
        return []
    sequences = workload.two_passes(workload.draw(SHORT, 160))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with open_processes([SequenceScorer] * 2) as two, open_processes([SequenceScorer]) as one:
        for _ in range(rotations):
            for number, processes in ((1, one), (2, two)):
                started = time.perf_counter()
                for _chunk in processes.run(SequenceChunks(16, sequences)):
                    pass
                seconds[number].append(time.perf_counter() - started)
    return [Row("two processes against one", tuple(a / b for a, b in zip(seconds[1], seconds[2], strict=True)), 1.8)]


def shard_rows(rotations: int) -> list[Row]:
    """Measure the cost of storing a shard, as a share of the 20 seconds that its 5,000 scores take."""
    identity = ScoreIdentity("m", "r", "t", "h", "bare", "bfloat16", 2048, "truncate_answer")
    sequences = workload.two_passes(workload.draw(SHORT, 1250))
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(
            Storage(folder, Path(folder)), identity, 20.0, scored_with={"libraries": {}, "device": "cpu"}
        )
        for _ in range(rotations):
            started = time.perf_counter()
            for sequence in sequences:
                writer.add(sequence, [np.zeros(t.stop - t.start, np.float32) for t in sequence.targets])
            writer.close()
            shares.append((time.perf_counter() - started) / 20.0)
    return [Row("share of the time that shards take", tuple(shares), 0.005, is_ceiling=True)]


def rank_rows(rotations: int) -> list[Row]:
    """Measure strata, ranks, the gap and one selection, for 310,000 and 10 million rows."""
    rows = []
    for number, goal_seconds in ((310_000, 1.0), (10_000_000, 10.0)):
        command = [sys.executable, "-m", "bench.ranks", str(number)]
        seconds, extra = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        rows.append(Row(f"ranks and selection of {number:,} rows, s", (seconds,), goal_seconds, is_ceiling=True))
        rows.append(Row(f"ranks and selection of {number:,} rows, GB", (extra / 1e9,), 2.0, is_ceiling=True))
    return rows


def gpu_rows(name: str, device: str, rotations: int) -> list[Row]:
    """Measure the share of one GPU's peak, and the opponents, in bf16 with production lengths."""
    dtype, place = torch.bfloat16, torch.device(device)
    prepare(place)
    engine = GpuCausalLM(workload.build(name, dtype, device), name)
    model = workload.build(name, dtype, device)  # Another, since the engine replaces its model's attention.
    sequences = workload.two_passes(workload.draw(workload.PRODUCTION, workload.PRODUCTION.pairs_per_block))
    few = sequences[:256]
    seconds, peaks = rotate(
        {
            ENGINE: (functools.partial(opponents.engine(engine), sequences), dtype),
            LM_EVAL: (functools.partial(opponents.lm_eval_engine(model, fitting_batch(model, few)), few), dtype),
            REFERENCE: (functools.partial(opponents.reference_loop(model), few), dtype),
        },
        rotations,
        place,
    )
    work = workload.flops(engine.facts, sequences)
    all_tokens, few_tokens = (sum(len(one.token_ids) for one in part) for part in (sequences, few))
    scale = few_tokens / all_tokens
    share = tuple(work / s / p for s, p in zip(seconds[ENGINE], peaks[ENGINE], strict=True))
    ratios = {
        other: tuple(theirs / (ours * scale) for ours, theirs in zip(seconds[ENGINE], seconds[other], strict=True))
        for other in (REFERENCE, LM_EVAL)
    }
    return [
        Row(f"{name}: share of the matmul peak", share, {"0.6B": 0.45, "6.7B": 0.70}[name]),
        Row(f"{name}: against the reference loop", ratios[REFERENCE], 15.0),
        Row(f"{name}: against lm-eval's engine", ratios[LM_EVAL], 2.0),
    ]


def fitting_batch(model: Any, sequences: Sequence[TokenSequence]) -> int:
    """Return how many sequences lm-eval may have in a batch: it holds all logits, and their log-softmax in fp32."""
    num_words = model.get_output_embeddings().weight.shape[0]
    longest = max(len(one.token_ids) for one in sequences)
    num_bytes = longest * num_words * (model.dtype.itemsize + 2 * torch.float32.itemsize)
    return max(min(int(free_memory(model.device) / num_bytes), 64), 1)


def peak_extra_memory(work: Callable[[], object]) -> int:
    """Return the bytes by which the work raised the process's high-water mark above its memory before.

    The mark is the process's own: getrusage's is inherited from the parent process.
    """
    held = psutil.Process().memory_info().rss
    work()
    return peak_memory() - held


def peak_memory() -> int:
    """Return the process's high-water mark, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return int(peak) * 1024
