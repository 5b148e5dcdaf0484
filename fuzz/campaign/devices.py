"""Devices: the GPUs of this machine, and the distribution of workers over them.

The driver answers, not PyTorch: the campaign's own process does not import it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

SPARED = 2  # cores left to the campaign itself and to the worker that shrinks, where there are many
MOST_ON_A_GPU = 16  # workers; they take turns on it, and more of them only wait
SHARE = 0.9  # of a GPU's memory that its workers may take together, their contexts included
CONTEXT = 0.6  # GiB of a GPU that each process takes which uses it
OTHERS = 2  # processes beside the workers: the one that shrinks and the one that replays


@dataclass(frozen=True)
class Gpu:
    """name: what CUDA_VISIBLE_DEVICES is to be for a process that uses this one alone. memory: GiB."""

    name: str
    memory: float


@dataclass(frozen=True)
class Seat:
    """Where one worker runs: `gpu` as in `Gpu.name` and its share of the memory, or None for both on a CPU."""

    gpu: str | None = None
    memory: float | None = None

    @property
    def place(self) -> str:
        return "cpu" if self.gpu is None else f"gpu {self.gpu}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that PyTorch would see, none where PyTorch is built without CUDA or there is no driver."""
    if importlib.util.find_spec("torch") is None or "+cpu" in importlib.metadata.version("torch"):
        return []
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():  # hidden since the driver was first asked, in this process
        return []
    names = [str(i) for i in range(count.value)] if visible is None else [name.strip() for name in visible.split(",")]
    found = []
    for index, name in zip(range(count.value), names, strict=False):
        device, size = ctypes.c_int(), ctypes.c_size_t()
        if not driver.cuDeviceGet(ctypes.byref(device), index):
            driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            found.append(Gpu(name, size.value / 2**30))
    return found


def default_jobs(found: list[Gpu], memory: float, cores: int) -> int:
    """How many workers: one for each core, or as many as the GPUs have room for. memory: GiB that each may need."""
    free = cores - SPARED if cores > 2 * SPARED else cores
    if not found:
        return cores
    room = sum(max(1, min(MOST_ON_A_GPU, int(_for_data(gpu, 0) / (memory + CONTEXT)))) for gpu in found)
    return max(1, len(found), min(free, room))


def seats(found: list[Gpu], jobs: int) -> list[Seat]:
    """One for each of `jobs` workers, the GPUs in turn."""
    if not found:
        return [Seat()] * jobs
    on_each = -(-jobs // len(found))
    chosen = (found[i % len(found)] for i in range(jobs))
    return [Seat(gpu.name, _for_data(gpu, on_each) / gpu.memory / on_each) for gpu in chosen]


def _for_data(gpu: Gpu, workers: int) -> float:
    """GiB that so many workers may allocate together, at least a tenth of all."""
    return max(SHARE * gpu.memory - CONTEXT * (workers + OTHERS), 0.1 * gpu.memory)
