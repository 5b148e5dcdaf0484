"""The kernel in the emulator of tests/emulator, as a target: as it is, or with a mutant."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL
from types import ModuleType

from flash_kda.arguments import check_arguments
from flash_kda.model import SHORT
from flash_kda.workspace import is_reachable
from fuzz.defects import device
from fuzz.defects.defect import Given
from fuzz.mutants.rules import ROOT, Mutant, text_of
from fuzz.targets.registry import Target


def emulator() -> ModuleType:
    """tests/emulated.py, which belongs to a checkout and not to the installation. Raises ValueError without one."""
    path = ROOT / "tests" / "emulated.py"
    if not path.exists():
        raise ValueError(f"{path}: not found; mutants need a checkout of the project")
    if "emulated" not in sys.modules:
        found = importlib.util.spec_from_file_location("emulated", path)
        sys.modules["emulated"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules["emulated"])
    return sys.modules["emulated"]


@contextmanager
def sources_kept(folder: Path) -> Iterator[None]:
    """Inside, the kernel is compiled from a copy in the folder: its sources may be edited while a run goes on."""
    given, copy = emulator().CSRC, folder / "csrc"
    shutil.copytree(given, copy)
    emulator().CSRC = copy
    try:
        yield
    finally:
        emulator().CSRC = given


WITHOUT_EFFECT = ("fence", "warpgroup_arrive", "prefetch", "reg_alloc", "reg_dealloc", "forget")
"""Words in the instructions that do nothing in the emulator: without them the code is the same, on a GPU it is not."""


MOST_ITEMS = 2  # heads of sequences above SHORT tokens in a call that goes through the ring
SLOTS = 7  # places of each in it

declared: list = []  # types of the arguments and of the result, once something has been compiled


def library(folder: Path) -> Path:
    """What `build` compiles into the folder."""
    return folder / "emulated.so"


def gpu_code(folder: Path, mutant: Mutant | None, alive: Callable[[], None] = lambda: None) -> str:
    """A digest of the instructions that nvcc compiles for the GPU: half a minute. alive: called while that goes on.

    Raises fuzz.defects.device.BuildError or ValueError without the tools, and ValueError if it does not compile.
    """
    environment = device.with_tools()
    tools = runpy.run_path(str(ROOT / "build_backend" / "loop_size.py"))["tools"]()
    if tools is None:
        raise ValueError("--gpu-code: expected cuobjdump of the CUDA toolkit or of Triton, got neither")
    found = subprocess.run(
        [sys.executable, ROOT / "build_backend" / "toolchain.py"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    nvcc, _, cutlass = found.stdout.splitlines()[:3]
    shutil.copytree(emulator().CSRC, folder / "csrc")
    if mutant is not None:
        (folder / mutant.file).write_text(mutant.apply(text_of(mutant.file)))
    made = folder / "flash_kda.cubin"
    options = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-cubin"]
    command = [nvcc, *options, f"-I{cutlass}", "-o", made.name, "csrc/flash_kda.cu"]
    compiling = subprocess.Popen(command, cwd=folder, env=environment, stdout=DEVNULL, stderr=DEVNULL)
    while compiling.poll() is None:
        alive()
        time.sleep(1.0)
    if compiling.returncode:
        raise ValueError(f"{mutant}: nvcc does not compile it")
    shown = [shutil.which("cuobjdump", path=tools), "-sass", made]
    shown = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    # Addresses and instructions: names inside differ from one compilation to the next.
    return hashlib.sha256("\n".join(re.findall(r"/\*[0-9a-f]{4,}\*/.*", shown)).encode()).hexdigest()


def build(folder: Path, mutant: Mutant | None):
    """The emulated kernel, compiled unless the folder has it. Raises subprocess.CalledProcessError if it cannot be."""
    if library(folder).exists():
        made = ctypes.CDLL(str(library(folder)))
        made.emulate_forward.argtypes, made.emulate_forward.restype = declared
        return made
    folder.mkdir(parents=True, exist_ok=True)

    def change(copy: Path) -> None:
        if mutant is not None:
            (copy / Path(mutant.file).relative_to("csrc")).write_text(mutant.apply(text_of(mutant.file)))

    made = emulator().build(folder, os.environ.get("CXX", "c++"), change)
    declared[:] = made.emulate_forward.argtypes, made.emulate_forward.restype
    return made


RING_EACH = {True: 2, False: 4}
"""Calls of which one goes through the ring, where the ring's own sources are mutated and where they are not."""


def is_of_ring(mutant: Mutant | None) -> bool:
    return mutant is not None and ("ring" in mutant.file or "apart" in mutant.file)


def target(kernel, ring_each: int = RING_EACH[False]) -> Target:
    """Calls are cut for one to three clusters in turn, with an order of threads of their own each.

    ring_each: of so many calls one goes through a ring, if few clusters do.
    """
    calls = itertools.count()
    return Target("mutant", calling(kernel, lambda: next(calls), ring_each), "cpu")


def calling(kernel, number: Callable[[], int], ring_each: int) -> Callable[..., None]:
    def fwd(*args, **kwargs):
        given = vars(Given.of(*args, **kwargs))
        check_arguments(**given)
        for each in ("q", "k", "v", "g"):  # what the workspace is for
            if not is_reachable(given[each]):
                given[each] = given[each].clone()
        call = number()
        given = {name: x for name, x in given.items() if name not in ("validate", "workspace")}
        offsets = given["cu_seqlens"]
        lengths = given["q"].new_full((len(given["q"]),), given["q"].shape[1]) if offsets is None else offsets.diff()
        items = given["q"].shape[2] * int((lengths > SHORT).sum())
        way = {"clusters": 1 + call % 3}
        if call % ring_each == ring_each - 1 and 0 < items <= MOST_ITEMS:
            way = {"clusters": items + 1 + call % 3 % 2, "ring_slots": SLOTS * items}
        emulator().forward(kernel, **given, **way, seed=call)

    return fwd
