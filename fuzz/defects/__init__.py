"""Planted defects: the operator made wrong in one way each, to know what the harness finds.

Each is a target of its own: `python -m fuzz run --target fuzz.defects:scale_twice`.
"""

from __future__ import annotations


def __getattr__(name: str):
    from fuzz.defects.catalogue import CATALOGUE, target

    if name not in CATALOGUE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return target(CATALOGUE[name])
