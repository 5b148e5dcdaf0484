"""Noise: results off by a known amount, to measure the smallest error that the judge still sees."""

from __future__ import annotations

import torch

from fuzz.defects.defect import Defects, Make, stage

EXPONENTS = range(3, 10)  # of the sizes, 2^-3 to 2^-9


def noisy(x: torch.Tensor, size: float) -> torch.Tensor:
    """x (1 + size n), with n normal and the same in every call of one shape."""
    return x * (1 + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))


def in_out(size: float) -> Make:
    def recur(original, *args):
        return noisy(original(*args), size)

    return stage("recur")(recur)


def in_state(size: float) -> Make:
    def recur(original, prepared, state, chunks):
        O = original(prepared, state, chunks)
        state.copy_(noisy(state, size))
        return O

    return stage("recur")(recur)


def name(where: str, exponent: int) -> str:
    return f"noise_{exponent}_{where}"


NOISE = Defects("noise")
for where, what, make in (
    ("out", "outputs, before they are rounded,", in_out),
    ("state", "final state", in_state),
):
    for exponent in EXPONENTS:
        sentence = f"The {what} are off by a normal error of 2^-{exponent} of each element."
        NOISE.add(name(where, exponent), "accuracy", make(2.0**-exponent), sentence)
