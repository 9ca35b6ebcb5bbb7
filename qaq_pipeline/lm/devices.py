"""Devices: which one scores, in which dtype, with how much memory, at which peak speed (torch)."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from pathlib import Path

import psutil
import torch

from qaq_pipeline.lm.runners import UnsupportedModelError

_PEAK_SECONDS = 0.2

FREE_SHARE = 0.7
"""Of free memory, what a batch is planned to take at most: its estimate may be off, and others live here too."""

LEASES = Path(tempfile.gettempdir()) / f"qaq_pipeline-{os.getuid() if hasattr(os, 'getuid') else 0}"
"""Locks of this user's GPUs: one scoring process a GPU, whatever its QAQ_HOME."""
LEASE_SECONDS = 60.0

CONTROL_GROUP = Path("/sys/fs/cgroup")


def resolve_device(device: str) -> torch.device:
    """The device that `auto` stands for: a GPU where there is one.

    Raises:
        UnsupportedModelError: the named device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    has_gpu = torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count()
    available = {"cpu": True, "cuda": has_gpu, "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        raise UnsupportedModelError(f"device {device!r} is not on this machine; set `device: auto` or `cpu`")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that `auto` stands for: bfloat16 on GPUs and on CPUs with native bfloat16, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def free_memory(device: torch.device, num_processes: int = 1) -> float:
    """Bytes that a batch may take: of the device's free memory the part that stays clear of its end.

    Args:
        device: whose memory.
        num_processes: that take of it at once.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + cached)
    return FREE_SHARE * available_memory() / num_processes


def available_memory() -> float:
    """Bytes of memory that processes may still take: of the machine, or of the container where that is less."""
    available = float(psutil.virtual_memory().available)
    limit, used = (_control_group(f"memory.{name}") for name in ("max", "current"))
    return available if limit is None or used is None else min(available, max(limit - used, 0.0))


def num_cores() -> int:
    """Cores that this process may use: by its affinity, or by the container's quota where that is less."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group("cpu.max")
    return number if quota is None else max(1, min(number, math.floor(quota)))


def _control_group(name: str) -> float | None:
    """A limit of the container this process is in, where it has one: cpu.max as cores, others as they are."""
    file = CONTROL_GROUP / name
    if not file.exists():
        return None
    value, *period = file.read_text(encoding="ascii").split()
    return None if value == "max" else float(value) / (float(period[0]) if period else 1.0)


def peak_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """`matmul_flops_per_second`, measured once in a process: a driver loads models batch by batch."""
    return _measured_once(dtype, device, torch.get_num_threads())


@functools.cache
def _measured_once(dtype: torch.dtype, device: torch.device, _num_threads: int) -> float:
    return matmul_flops_per_second(dtype, device)


@torch.inference_mode()
def matmul_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """What a large matrix product reaches, with as many threads as scoring has: the best of those of 0.2 seconds."""
    size = 1024 if device.type == "cpu" else 8192
    one = torch.randn(size, size, device=device).to(dtype)
    seconds: list[float] = []
    while sum(seconds) < _PEAK_SECONDS:
        started = time.perf_counter()
        float((one @ one)[0, 0])  # Waits for the device.
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
