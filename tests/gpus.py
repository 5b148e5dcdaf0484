"""How the workers of `pytest -n auto` share the GPUs of a machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from fuzz.campaign.worker_process import device_error

WORKERS_ON_ONE = 16  # each has a CUDA context of half a gigabyte, and a few of data
PATIENCE = 120.0  # seconds that a test waits for memory which other workers hold
KNOWN = "FLASH_KDA_TEST_GPUS"  # an environment variable: what the first process found, for its workers


def visible() -> list[str]:
    """The GPUs that CUDA will see, as CUDA_VISIBLE_DEVICES names them, found without starting CUDA."""
    if KNOWN not in os.environ:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ[KNOWN] = ",".join(map(str, range(_count()))) if named is None else named
    return [name for name in os.environ[KNOWN].split(",") if name.strip()]


def _count() -> int:
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    listed = subprocess.run([command, "--list-gpus"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def take_turn() -> None:
    """In a worker of pytest-xdist: puts a GPU of its own in front, before CUDA starts. The others stay visible.

    Processes that a test starts inherit the choice.
    """
    names, worker = visible(), os.environ.get("PYTEST_XDIST_WORKER", "")
    if names and worker.startswith("gw"):
        first = int(worker.removeprefix("gw")) % len(names)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[first:] + names[:first])


@contextmanager
def hidden() -> Iterator[None]:
    """A machine without a GPU, for this process as far as it asks PyTorch, and for those that it starts."""
    import torch  # after `take_turn`

    without = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, without), mock.patch.object(torch.cuda, "is_available", lambda: False):
        yield


def context_is_lost() -> bool:
    """Whether a test of this worker of pytest-xdist has left CUDA in a state in which all later calls fail."""
    return "PYTEST_XDIST_WORKER" in os.environ and device_error() is not None


def most_workers(cores: int) -> int:
    """As many as there are cores, but no more than fit on the GPUs."""
    gpus = len(visible())
    return min(cores, WORKERS_ON_ONE * gpus) if gpus else cores


@contextmanager
def memory(gib: float, free_bytes) -> Iterator[bool]:
    """Waits until the GPU has `gib` GiB free, one waiting process at a time; whether it has them then."""
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").partition(",")[0]
    with Path(tempfile.gettempdir(), f"flash_kda-tests-gpu-{gpu}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end = time.monotonic() + PATIENCE
        while free_bytes() < gib * 2**30 and time.monotonic() < end:
            time.sleep(0.5)
        yield free_bytes() >= gib * 2**30
