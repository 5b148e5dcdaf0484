"""Coverage: the aspects of a case, and the class of each in which the case counts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES

LENGTH_CLASSES = {
    "0": 0, "1": 1, "2 to 15": 15, "16": 16, "17 to 63": 63, "64": 64, "65 to 127": 127, "128 to 511": 511,
    "512 to 2047": 2047, "2048 and more": math.inf,
}  # fmt: skip

COUNT_CLASSES = {"1": 1, "2 to 4": 4, "5 to 16": 16, "17 to 64": 64, "65 and more": math.inf}

DECAYS = {"-5": -5.0, "above -5, to -3": -3.0, "above -3, to -1": -1.0, "between -1 and 0": math.nextafter(0.0, -1.0),
          "0": 0.0}  # fmt: skip

TAILS = {0: "a multiple of 64", 1: "one more", 63: "one less", 16: "a multiple of 16", 32: "a multiple of 16",
         48: "a multiple of 16"}  # fmt: skip

STATE_CLASSES = ("none", "bf16", "fp32")

ASPECTS: dict[str, tuple[str, ...]] = {
    "Length of a sequence, tokens": tuple(LENGTH_CLASSES),
    "Length against chunks of 64": (*dict.fromkeys(TAILS.values()), "another tail"),
    "Sequences": tuple(COUNT_CLASSES),
    "Heads": tuple(COUNT_CLASSES),
    "lower_bound": tuple(DECAYS),
    "Form": ("batch of one", "batch of several", "packed, int32", "packed, int64"),
    "Layout": ("contiguous", "strided"),
    "State, initial to final": (*(f"{a} to {b}" for a in STATE_CLASSES for b in STATE_CLASSES), "in place"),
    **{name.capitalize(): families for name, families in FAMILIES.items()},
}
"""What a case can have, and in which classes it is counted; a class that no case reached is shown too."""


def aspects(case: Case) -> Iterator[tuple[str, str]]:
    """Every (aspect, class) of a case, each once."""
    yield from {("Length of a sequence, tokens", _class(LENGTH_CLASSES, length)) for length in case.seq_lens}
    yield from {("Length against chunks of 64", TAILS.get(length % 64, "another tail")) for length in case.seq_lens}
    yield "Sequences", _class(COUNT_CLASSES, case.n_seqs)
    yield "Heads", _class(COUNT_CLASSES, case.heads)
    yield "lower_bound", _class(DECAYS, case.lower_bound)
    if case.packed:
        yield "Form", f"packed, {case.cu_seqlens_dtype}"
    else:
        yield "Form", "batch of one" if case.n_seqs == 1 else "batch of several"
    yield "Layout", case.layout
    yield "State, initial to final", f"{case.initial_state or 'none'} to {case.final_state or 'none'}"
    if case.in_place:
        yield "State, initial to final", "in place"
    for name in FAMILIES:
        yield name.capitalize(), getattr(case, name)


def _class(classes: dict[str, float], value: float) -> str:
    """The name of the first class whose greatest value is not below `value`."""
    return next(name for name, greatest in classes.items() if value <= greatest)
