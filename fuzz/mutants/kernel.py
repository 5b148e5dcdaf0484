"""The kernel in the emulator of tests/emulator, as a target: as it is, or with a mutant."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from flash_kda.arguments import check_arguments
from flash_kda.workspace import is_reachable
from fuzz.defects.defect import Given
from fuzz.mutants.rules import ROOT, Mutant
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


WITHOUT_EFFECT = ("fence", "warpgroup_arrive", "prefetch", "reg_alloc", "reg_dealloc", "forget")
"""Words in the instructions that do nothing in the emulator: without them the code is the same, on a GPU it is not."""


declared: list = []  # types of the arguments and of the result, once something has been compiled


def library(folder: Path) -> Path:
    """What `build` compiles into the folder."""
    return folder / "emulated.so"


def build(folder: Path, mutant: Mutant | None):
    """The emulated kernel, compiled unless the folder has it. Raises subprocess.CalledProcessError if it cannot be."""
    if library(folder).exists():
        made = ctypes.CDLL(str(library(folder)))
        made.emulate_forward.argtypes, made.emulate_forward.restype = declared
        return made
    folder.mkdir(parents=True, exist_ok=True)

    def change(copy: Path) -> None:
        if mutant is not None:
            path = copy / Path(mutant.file).relative_to("csrc")
            path.write_text(mutant.apply(path.read_text()))

    made = emulator().build(folder, os.environ.get("CXX", "c++"), change)
    declared[:] = made.emulate_forward.argtypes, made.emulate_forward.restype
    return made


def target(name: str, kernel) -> Target:
    """Calls are cut for one to three clusters in turn, with an order of threads of their own each."""
    calls = itertools.count()
    return Target(name, calling(kernel, lambda: next(calls)), "cpu")


def calling(kernel, number: Callable[[], int]) -> Callable[..., None]:
    def fwd(*args, **kwargs):
        given = vars(Given.of(*args, **kwargs))
        check_arguments(**given)
        for each in ("q", "k", "v", "g"):  # what the workspace is for
            if not is_reachable(given[each]):
                given[each] = given[each].clone()
        call = number()
        given = {name: x for name, x in given.items() if name not in ("validate", "workspace")}
        emulator().forward(kernel, **given, clusters=1 + call % 3, seed=call)

    return fwd
