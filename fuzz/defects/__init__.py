"""Planted defects: the operator with one mistake each, to measure the harness.

Each is a target of its own: `python -m fuzz run --target fuzz.defects:scale_twice`.
"""

from __future__ import annotations


def __getattr__(name: str):
    """The target of a planted defect, or of a size of noise."""
    from fuzz.defects.catalogue import CATALOGUE, target
    from fuzz.defects.device import DEVICE
    from fuzz.defects.noise import NOISE

    defect = CATALOGUE.get(name) or DEVICE.get(name) or NOISE.get(name)
    if defect is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return target(defect)
