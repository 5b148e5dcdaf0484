"""The catalogue: every planted defect of the operator on a CPU, by name."""

from __future__ import annotations

from fuzz.defects import indexing, numerics, semantics, time
from fuzz.defects.defect import Defect
from fuzz.targets import Target

CATALOGUE: dict[str, Defect] = {
    defect.name: defect for module in (numerics, indexing, semantics, time) for defect in module.DEFECTS
}


def target(defect: Defect) -> Target:
    return Target(f"{PACKAGE}:{defect.name}", defect.make(), "cpu", note=defect.sentence)


PACKAGE = "fuzz.defects"
