"""The kernel in the emulator of tests/emulator, as a target: as it is, or with a mutant."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from flash_kda.arguments import check_arguments
from flash_kda.workspace import TOKENS_ALIGNMENT, is_reachable
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


def build(folder: Path, mutant: Mutant | None):
    """The emulated kernel. Raises subprocess.CalledProcessError if the mutant does not compile."""

    def change(copy: Path) -> None:
        if mutant is not None:
            path = copy / Path(mutant.file).relative_to("csrc")
            path.write_text(mutant.apply(path.read_text()))

    return emulator().build(folder, os.environ.get("CXX", "c++"), change)


def target(name: str, kernel) -> Target:
    """Calls are cut for one to three clusters in turn, with an order of threads of their own each."""
    calls = itertools.count()
    return Target(name, calling(kernel, lambda: next(calls)), "cpu")


def calling(kernel, number: Callable[[], int]) -> Callable[..., None]:
    def fwd(*args, **kwargs):
        given = vars(Given.of(*args, **kwargs))
        check_arguments(**given)
        for each in ("q", "k", "v", "g"):  # what the workspace is for
            if not is_reachable(given[each], TOKENS_ALIGNMENT):
                given[each] = given[each].clone()
        call = number()
        given = {name: x for name, x in given.items() if name not in ("validate", "workspace")}
        emulator().forward(kernel, **given, clusters=1 + call % 3, seed=call)

    return fwd
