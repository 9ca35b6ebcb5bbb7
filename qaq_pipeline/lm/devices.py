"""Devices: the choice of device and dtype, its free memory and peak speed, and the lease of a GPU.

Belongs here: everything about the machine that does not depend on the model.
Does not belong here: the memory that a model's batch takes (`causal_lm`), and scoring processes (`workers`).
"""

from __future__ import annotations

import functools
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from qaq_pipeline.lm.model_error import ModelError

_PEAK_SECONDS = 0.2
_WARM_UPS = 2
"""Products of a GPU before those that are measured: it loads its kernels and raises its clock in them."""

MEMORY = Path("/proc/meminfo")

FREE_SHARE = 0.7
"""Largest share of free memory that a batch may use: estimates are inexact, and other processes need memory too."""

LEASES = Path(tempfile.gettempdir()) / f"qaq_pipeline-{os.getuid() if hasattr(os, 'getuid') else 0}"
"""Folder of the lock files of this user's GPUs: one scoring process per GPU, across all homes."""
LEASE_SECONDS = 60.0
"""Time to wait for a GPU while other processes hold all of them."""
_LEASE_POLL_SECONDS = 0.05

CONTROL_GROUP = Path("/sys/fs/cgroup")


class DeviceNotFoundError(ModelError):
    """The configured device does not exist on this machine. The text names it and the remedy."""


class DeviceBusyError(RuntimeError):
    """Another process scores on the device. The text names the device and the remedy."""


@contextmanager
def lease_devices(locks: Mapping[str, str], directory: Path, limit: int, timeout: float) -> Iterator[list[str]]:
    """Hold at least one and at most `limit` of the free devices until the context ends.

    A device has one holder at a time, through a lock file that the kernel releases when its holder dies.

    Args:
        locks: lock name by device. The name identifies the hardware, whatever number it has here.
        directory: folder of the lock files; processes that use the same folder share the devices.
        limit: largest number of devices.
        timeout: seconds to wait for any device if all are held.

    Raises:
        DeviceBusyError: all devices are still held after that time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with ExitStack() as leases:
        held: list[str] = []
        while not held:  # Whichever becomes free first.
            for device, name in locks.items():
                with suppress(Timeout):
                    if len(held) < limit:
                        leases.enter_context(FileLock(directory / f"{name}.lock", timeout=0))
                        held.append(device)
            if not held:
                if time.monotonic() >= deadline:
                    raise DeviceBusyError(
                        f"{', '.join(locks)}: in use by other scoring processes, which hold locks in {directory} ; "
                        "wait for one to end, or set another `device`"
                    )
                time.sleep(_LEASE_POLL_SECONDS)
        yield held


@contextmanager
def lease_gpus(device: torch.device, limit: int) -> Iterator[list[str]]:
    """Hold at least one and at most `limit` of this machine's free GPUs, or the GPU of that index, as `cuda:N`.

    Raises:
        DeviceBusyError: other processes hold them.
    """
    indices = range(torch.cuda.device_count()) if device.index is None else [device.index]
    locks = {f"cuda:{index}": f"gpu-{torch.cuda.get_device_properties(index).uuid}" for index in indices}
    with lease_devices(locks, LEASES, limit, LEASE_SECONDS) as gpus:
        yield gpus


def prepare(device: torch.device) -> None:
    """Before the first tensor on a GPU: it is the current one, its products are in full precision, and blocks of its
    memory can grow.

    Raises:
        DeviceNotFoundError: the environment forces products of fp32 into TF32, which rounds to 10 bits.
    """
    if device.type != "cuda":
        return
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise DeviceNotFoundError("NVIDIA_TF32_OVERRIDE=1 rounds products of fp32 to 10 bits; unset it")
    if device.index is not None:
        torch.cuda.set_device(device)  # Triton launches its kernels on the current device.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def upload(device: torch.device, *arrays: torch.Tensor) -> list[torch.Tensor]:
    """Arrays of one dtype on a device. They go there in one copy, for which the process does not wait on a GPU."""
    together = torch.cat([array.flatten() for array in arrays])
    together = together.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else together.to(device)
    parts = together.split([array.numel() for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class Copy:
    """The copy of a tensor to the CPU. From a GPU it is made there once the tensor is computed; nobody waits for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy, self._done = tensor, None
        if tensor.device.type == "cuda":
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event(blocking=True)  # Whoever waits for it leaves the core to others.
            self._done.record(torch.cuda.current_stream(tensor.device))
        else:
            self._copy = tensor.cpu()

    def wait(self) -> torch.Tensor:
        """The copy, once it is made."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


_SAYS_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_SAYS_DEVICE_FAILED = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on the device or on the CPU."""
    is_said = any(words in str(error) for words in _SAYS_OUT_OF_MEMORY)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_said


def has_failed(error: BaseException) -> bool:
    """Whether a device failed: every later operation of this process on it would fail, too."""
    is_said = any(words in str(error) for words in _SAYS_DEVICE_FAILED)
    return (isinstance(error, torch.AcceleratorError) or is_said) and not is_out_of_memory(error)


def is_of_machine(error: BaseException) -> bool:
    """Whether the error says nothing about what was computed: memory has run out, or a device has failed."""
    return is_out_of_memory(error) or has_failed(error)


def name_of(device: torch.device) -> str:
    """The device for people: `cpu`, or `cuda:0 (NVIDIA H100)`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def resolve_device(device: str) -> torch.device:
    """The named device; for `auto`, a GPU if there is one.

    Raises:
        DeviceNotFoundError: this machine does not have the named device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    has_gpu = torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count()
    available = {"cpu": True, "cuda": has_gpu, "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        raise DeviceNotFoundError(
            f"this machine has no device {device!r}; set `device: auto` or `cpu`, or name the model's dtype too where "
            "another machine scores (runtime.submit_to)"
        )
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The named dtype; for `auto`: mixed on a GPU and bfloat16 on a CPU that has native bfloat16, else float32.

    On a CPU the logits of `mixed` would take longer than all the rest.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def weights_dtype(dtype: str) -> torch.dtype:
    """The dtype of the weights, and of the products with them."""
    return torch.bfloat16 if dtype == "mixed" else getattr(torch, dtype)


def free_memory(device: torch.device, num_processes: int = 1) -> float:
    """Memory that a batch may use, in bytes: `FREE_SHARE` of the device's free memory.

    Args:
        device: device of the model.
        num_processes: number of processes that share a CPU's memory.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + cached)
    return FREE_SHARE * available_memory() / num_processes


def available_memory() -> float:
    """Free memory in bytes: of the machine, or of the container if that is less."""
    available = _free_of_machine()
    limit, used = (_control_group(f"memory.{name}") for name in ("max", "current"))
    return available if limit is None or used is None else min(available, max(limit - used, 0.0))


def _free_of_machine() -> float:
    if not MEMORY.exists():  # Not Linux.
        import psutil

        return float(psutil.virtual_memory().available)
    (kilobytes,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", MEMORY.read_text(encoding="ascii"), flags=re.MULTILINE)
    return 1024.0 * int(kilobytes)


def num_cores() -> int:
    """Number of cores that this process may use: by its affinity, or by the container's quota if that is less."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group("cpu.max")
    return number if quota is None else max(1, min(number, math.floor(quota)))


def _control_group(name: str) -> float | None:
    """A limit of this process's container, or None: `cpu.max` in cores, others unchanged."""
    file = CONTROL_GROUP / name
    if not file.exists():
        return None
    value, *period = file.read_text(encoding="ascii").split()
    return None if value == "max" else float(value) / (float(period[0]) if period else 1.0)


def peak_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """`matmul_flops_per_second`, measured once per process, since a driver loads models for every batch."""
    return _measured_once(dtype, device, torch.get_num_threads())


@functools.cache
def _measured_once(dtype: torch.dtype, device: torch.device, _num_threads: int) -> float:
    return matmul_flops_per_second(dtype, device)


@torch.inference_mode()
def matmul_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Speed of a large matrix product with this process's threads."""
    size = 1024 if device.type == "cpu" else 8192
    one = torch.randn(size, size, device=device).to(dtype)
    warm_ups = 0 if device.type == "cpu" else _WARM_UPS
    return 2 * size**3 / _fewest_seconds(lambda: float((one @ one)[0, 0]), warm_ups)  # Which waits for the device.


def _fewest_seconds(run: Callable[[], object], warm_ups: int) -> float:
    """Of the runs within 0.2 seconds, after so many that count for nothing."""
    for _ in range(warm_ups):
        run()
    seconds: list[float] = []
    while sum(seconds) < _PEAK_SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
