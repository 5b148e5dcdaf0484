"""The CUDA kernel on a CPU: csrc/sm90 compiled by the C++ compiler against tests/emulator, and called like the library.

Right for what the language says: indices, layouts, roundings, barriers, the order of asynchronous copies (random, by
seed). Not for what only hardware shows: memory proxies, registers, time.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from flash_kda import library
from flash_kda.arguments import check_arguments

CSRC = Path(__file__).parents[1] / "csrc"
EMULATOR = Path(__file__).parent / "emulator"
LEAST_SLOTS = 7  # of the ring for each head of a sequence; with fewer the kernel does not use the ring
SHARED_MEMORY = re.compile(r"extern __shared__ .*memory\[\];")


UNWRITTEN = "-ftrivial-auto-var-init=pattern"
"""Local variables begin as -1.7e38, not as whatever lies there: a register that nothing is written to shows."""

MISALIGNED = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
"""A pair of floats at an address that a GPU refuses ends the process."""

AS_WRITTEN = ["-fno-aggressive-loop-optimizations"]
"""A loop that is one step too long is run, and not taken for one that ends in time."""


@functools.cache
def takes(compiler: str, option: str) -> bool:
    """Whether the compiler knows an option: this one is of GCC 12 and Clang 16."""
    command = [compiler, option, "-x", "c++", "-E", "-o", os.devnull, os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def build(folder: Path, compiler: str, change: Callable[[Path], None] = lambda sources: None) -> ctypes.CDLL:
    """Compile into an empty `folder`. `change` may edit its copy of csrc before."""
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    change(sources)
    shutil.copy(EMULATOR / "ptx.h", sources / "sm90" / "ptx.h")
    for name in ("cuda.h", "fragments.h", "emulator.h", "emulator.cpp"):
        shutil.copy(EMULATOR / name, sources / name)
    kernel = sources / "sm90" / "forward.h"
    text, found = SHARED_MEMORY.subn("unsigned char* memory = emulator::shared_memory();", kernel.read_text())
    if found != 1:
        raise ValueError(f"{kernel}: {found} lines declare the shared memory; expected is one")
    kernel.write_text(text)
    options = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-w", "-fPIC", "-shared", "-I", str(sources)]
    options += [UNWRITTEN] * takes(compiler, UNWRITTEN)
    options += MISALIGNED + AS_WRITTEN
    made = folder / "emulated.so"
    subprocess.run([compiler, *options, "-o", str(made), str(sources / "emulator.cpp")], check=True)
    emulated = ctypes.CDLL(str(made))
    emulated.emulate_forward.argtypes = [
        ctypes.POINTER(library.Arguments), ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint
    ]  # fmt: skip
    emulated.emulate_forward.restype = ctypes.c_char_p
    return emulated


def forward(
    emulated: ctypes.CDLL,
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None,
    *, state_indices=None, checkpoint_state=None, checkpoint_offsets=None, clusters: int = 1, seed: int = 0,
    ring_slots: int | None = None,
) -> None:  # fmt: skip
    """`flash_kda.fwd` on CPU tensors whose strides TMA could take. Raises RuntimeError on a deadlock.

    With `ring_slots`, chunks pass through a ring of so many places. Needs more clusters than there are heads of long
    sequences, and LEAST_SLOTS for each of those.
    """
    scratch = torch.zeros(64, dtype=torch.uint8)  # the emulator has its own
    tensors = (q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
    serving = (state_indices, checkpoint_state, checkpoint_offsets)
    way = (1, 1) if ring_slots is None else (2, ring_slots)
    error = emulated.emulate_forward(ctypes.byref(library.pack(*tensors, scratch, *serving)), clusters, *way, seed)
    if error:
        raise RuntimeError(error.decode())


@functools.cache
def built() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="emulated") as folder:  # what is loaded needs no file any more
        return build(Path(folder), os.environ.get("CXX", "c++"))


def fwd(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None,
    **serving
) -> None:  # fmt: skip
    """A target of the fuzzer: `PYTHONPATH=tests python -m fuzz run --target emulated:fwd`."""
    tensors = (q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
    check_arguments(*tensors, None, None, **serving)
    forward(built(), *tensors, clusters=2, **serving)
