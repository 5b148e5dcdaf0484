"""The catalogue: every planted defect of the operator on a CPU, by name, and the target that each one makes."""

from __future__ import annotations

from fuzz.defects.defect import Defect
from fuzz.defects.history import HISTORY, STORAGE
from fuzz.defects.indexing import INDEXING
from fuzz.defects.numerics import NUMERICS
from fuzz.defects.semantics import SEMANTICS
from fuzz.defects.serving import SERVING
from fuzz.defects.strides import STRIDES
from fuzz.defects.timing import TIME
from fuzz.targets.registry import Target

CATALOGUE: dict[str, Defect] = NUMERICS | INDEXING | STRIDES | SEMANTICS | SERVING | HISTORY | TIME | STORAGE


def spec(name: str) -> str:
    """What `--target` and a worker call the target of a defect."""
    return f"{__package__}:{name}"


def target(defect: Defect) -> Target:
    return Target(spec(defect.name), defect.make(), "cuda" if defect.kind == "device" else "cpu", note=defect.sentence)
