"""devices: the choice of device and dtype, the limits of a container, the measured speed, and leases of GPUs.

No tolerances: machines and their limits are simulated, and the measured speed has only a rough range.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from qaq_pipeline.lm import devices
from qaq_pipeline.lm.devices import (
    DeviceBusyError,
    DeviceNotFoundError,
    free_memory,
    lease_devices,
    matmul_flops_per_second,
    peak_flops_per_second,
    resolve_device,
    resolve_dtype,
)
from qaq_pipeline_tests.support.sentences import Check

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- device and dtype ------------------------------------------------------------------------------------------------


def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_missing_device_is_an_error_that_names_the_remedy(
    device: str, monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    no_accelerator(monkeypatch)
    with pytest.raises(DeviceNotFoundError) as error:
        resolve_device(device)
    check_sentence(error.value)


def test_a_gpu_number_that_is_not_there_is_a_missing_device(
    monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(DeviceNotFoundError) as error:
        resolve_device("cuda:2")
    check_sentence(error.value)


def test_device_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    no_accelerator(monkeypatch)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("is_native", "on_cpu", "on_gpu"), [(True, "bfloat16", "mixed"), (False, "float32", "float32")]
)
def test_dtype_auto_is_bfloat16_only_where_it_is_natively_fast(
    is_native: bool, on_cpu: str, on_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: is_native)
    assert resolve_dtype("auto", torch.device("cpu")) == on_cpu
    assert resolve_dtype("auto", torch.device("cuda")) == on_gpu
    assert resolve_dtype("auto", torch.device("mps")) == "float32"
    assert resolve_dtype("float16", torch.device("cpu")) == "float16"


def test_mixed_precision_has_weights_in_bfloat16() -> None:
    names = ("float32", "bfloat16", "float16", "mixed")
    assert [devices.weights_dtype(name) for name in names] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.bfloat16,
    ]


# --- memory and cores ------------------------------------------------------------------------------------------------


def test_memory_for_a_batch_is_less_than_what_is_free() -> None:
    assert 0 < free_memory(CPU) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_where_there_is_no_proc_the_free_memory_is_asked_of_psutil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = free_memory(CPU)
    monkeypatch.setattr(devices, "MEMORY", tmp_path / "meminfo")
    assert free_memory(CPU) == pytest.approx(here, rel=0.5)  # Other processes take and give memory.


@pytest.mark.parametrize(
    ("files_of_the_group", "num_cores", "available"),
    [
        ({}, 6, 8e9),
        ({"cpu.max": "250000 100000", "memory.max": "4000000000", "memory.current": "1500000000"}, 2, 2.5e9),
        ({"cpu.max": "50000 100000", "memory.max": "max", "memory.current": "5"}, 1, 8e9),
        ({"cpu.max": "max 100000", "memory.max": "1000", "memory.current": "5000"}, 6, 0.0),
    ],
)
def test_the_limits_of_a_container_count(
    files_of_the_group: dict[str, str],
    num_cores: int,
    available: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, content in files_of_the_group.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(devices, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(6)), raising=False)
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:       9999999 kB\nMemAvailable:    7812500 kB\nSwapFree:       5 kB\n")
    monkeypatch.setattr(devices, "MEMORY", memory)
    assert devices.num_cores() == num_cores
    assert devices.available_memory() == available


# --- settings of a GPU -----------------------------------------------------------------------------------------------


def test_products_on_a_gpu_are_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # The allocator of this process stays as it is.
    products = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
    torch.backends.cudnn.allow_tf32 = True
    devices.prepare(CPU)
    assert products.allow_tf32
    devices.prepare(torch.device("cuda"))
    assert not products.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not products.allow_bf16_reduced_precision_reduction
    assert not products.allow_fp16_reduced_precision_reduction


def test_a_gpu_is_the_current_one_when_triton_launches_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        devices.prepare(torch.device(name))
    assert current == [torch.device("cuda:1")]


def test_an_environment_that_forces_tf32_is_refused(monkeypatch: pytest.MonkeyPatch, check_sentence: Check) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(DeviceNotFoundError) as error:
        devices.prepare(torch.device("cuda"))
    check_sentence(error.value)


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_blocks_of_a_gpus_memory_can_grow_unless_the_environment_says_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    devices.prepare(torch.device("cuda"))
    assert said == ([] if own else ["expandable_segments:True"])


# --- copies ----------------------------------------------------------------------------------------------------------


def test_arrays_go_to_a_device_together_and_keep_their_shapes() -> None:
    arrays = [torch.arange(6).view(2, 3), torch.empty(0, 4, dtype=torch.long), torch.tensor([7]), torch.arange(3)[None]]
    for there, here in zip(devices.upload(CPU, *arrays), arrays, strict=True):
        assert torch.equal(there, here)


def test_a_copy_has_the_values_of_its_tensor() -> None:
    values = torch.tensor([1.5, -2.0, math.inf])
    assert torch.equal(devices.Copy(values).wait(), values)


# --- speed -----------------------------------------------------------------------------------------------------------


def test_the_speed_of_a_matrix_product_is_measured() -> None:
    assert 1e8 < matmul_flops_per_second(torch.float32, CPU) < 1e14


def test_the_first_products_of_a_gpu_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first product that takes longer than all the time for the measurement would be the only one."""
    slow = iter([0.3, 0.25])
    assert devices._fewest_seconds(lambda: time.sleep(next(slow, 0.01)), devices._WARM_UPS) < 0.2
    warmed: list[int] = []
    monkeypatch.setattr(devices, "_fewest_seconds", lambda _run, warm_ups: warmed.append(warm_ups) or 1.0)
    monkeypatch.setattr(torch, "randn", lambda *_, device: torch.zeros(1, 1))
    for device in (CPU, torch.device("cuda"), torch.device("mps")):
        matmul_flops_per_second(torch.float32, device)
    assert warmed == [0, 2, 2]


def test_it_is_measured_once_in_a_process_for_each_dtype_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(devices, "_measured_once", functools.cache(devices._measured_once.__wrapped__))
    monkeypatch.setattr(devices, "matmul_flops_per_second", lambda dtype, _device: measured.append(dtype) or 1e9)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert peak_flops_per_second(dtype, CPU) == 1e9
    assert measured == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    peak_flops_per_second(torch.float32, CPU)
    assert len(measured) == 3


# --- leases ----------------------------------------------------------------------------------------------------------


GPUS = {"cuda:0": "gpu-a", "cuda:1": "gpu-b"}


def free(directory: Path) -> list[str]:
    """The GPUs that nobody holds."""
    try:
        with lease_devices(GPUS, directory, limit=9, timeout=0) as held:
            return held
    except DeviceBusyError:
        return []


def test_devices_are_held_until_the_context_ends_at_most_so_many(tmp_path: Path, check_sentence: Check) -> None:
    with lease_devices(GPUS, tmp_path, limit=1, timeout=0) as first:
        assert first == ["cuda:0"]
        assert free(tmp_path) == ["cuda:1"]
        with lease_devices(GPUS, tmp_path, limit=9, timeout=0) as second:
            assert second == ["cuda:1"]
            with pytest.raises(DeviceBusyError) as error, lease_devices(GPUS, tmp_path, limit=1, timeout=0.1):
                pass
            check_sentence(error.value)
    assert free(tmp_path) == ["cuda:0", "cuda:1"]


def test_a_step_waits_for_whichever_device_is_free_first(tmp_path: Path) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(lease_devices({"cuda:0": "gpu-a"}, tmp_path, limit=1, timeout=0))
    second.enter_context(lease_devices({"cuda:1": "gpu-b"}, tmp_path, limit=1, timeout=0))
    with first, ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: (time.sleep(0.3), second.close()))
        with lease_devices(GPUS, tmp_path, limit=2, timeout=60) as held:
            assert held == ["cuda:1"]


TAKE = """
import sys, time
from pathlib import Path
from qaq_pipeline.lm.devices import lease_devices

folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    with lease_devices({"cuda:0": "gpu-a", "cuda:1": "gpu-b"}, folder, limit=1, timeout=60) as held:
        (folder / held[0]).touch(exist_ok=False)  # Fails if another holds it now.
        time.sleep(0.01)
        (folder / held[0]).unlink()
"""


@pytest.mark.slow
def test_twenty_simultaneous_starts_of_two_drivers_never_share_a_device(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TAKE, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(20):
        with ExitStack() as ends:
            drivers = [
                ends.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
                )
                for _ in range(2)
            ]
            for driver in drivers:
                assert driver.stdout is not None
                assert driver.stdout.readline() == "ready\n"
            for driver in drivers:
                assert driver.stdin is not None
                driver.stdin.write("\n")
                driver.stdin.flush()
            assert [driver.wait(60) for driver in drivers] == [0, 0]


def test_a_device_is_the_same_whatever_it_is_called(tmp_path: Path) -> None:
    with lease_devices({"cuda:0": "gpu-b"}, tmp_path, limit=1, timeout=0):
        assert free(tmp_path) == ["cuda:0"]  # The device that is called gpu-a elsewhere.


def test_a_device_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from qaq_pipeline.lm.devices import lease_devices\n"
        "with lease_devices({'cuda:0': 'gpu-a', 'cuda:1': 'gpu-b'}, Path(sys.argv[1]), 9, 0): "
        "print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert free(tmp_path) == []
        holder.kill()
    assert free(tmp_path) == ["cuda:0", "cuda:1"]
