"""How large an error may be: one table, each number with its reason, and a part that follows the case.

For a place (the whole tensor, a sequence and head, a window of it, or an element) an error may be as large as

    rounding  +  arithmetic x scale  +  factor x moves  +  floor

rounding    the error that rounding the exact result to the tensor's dtype makes in this place, computed, not assumed.
scale       the RMS of the exact result over the sequence and head, so that a quiet window is not judged on noise alone.
moves       how far rounding alone moves the result (`fuzz.sensitivity`): the size of one rounding to bf16 of every
            input and of every product. It carries the amplification of the case, and the absolute size of errors where
            large terms cancel to a small result. Of a window, the larger of its own and of its sequence and head's.
floor       what underflow may lose: terms below 2^-126, the least normal number of fp32 and bf16.

An implementation whose results before the last rounding are off by d errs by at most rounding + 2 d: either the last
rounding gives the same number, or d crosses a tie, and then it is at least the distance to it. So a factor of 2 allows
a true error of one `moves`. A place without any error passes everywhere, and NaN passes nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNDERFLOW = 2.0**-120
"""Of the largest value or state of the sequence and head: 2^-126, and up to 64 such terms in a sum lost together."""

SMALLEST = 2.0**-126
"""Results below it may be flushed to zero."""


@dataclass(frozen=True)
class Bound:
    """arithmetic: relative error of fp32 arithmetic. factor: how many `moves`. reason: why these."""

    arithmetic: float
    factor: float
    reason: str


TABLE: dict[tuple[str, torch.dtype], Bound] = {
    ("out", torch.bfloat16): Bound(
        2.0**-12,
        2.0,
        "fp32: log-decays of a chunk reach 460 in base 2, rounded to 2^-16; a hardware exponential or root is right "
        "to 2^-21; 2^-12 leaves a factor of 16. Moves: bf16 operands measure 1.0 to 1.3 of them",
    ),
    ("out_window", torch.bfloat16): Bound(
        2.0**-12,
        3.0,
        "as out; a window has few tokens, so the worst of hundreds lies higher: bf16 operands measure up to 2.2 moves",
    ),
    ("out_element", torch.bfloat16): Bound(
        2.0**-11,
        8.0,
        "fp32: log-decays of a chunk reach 460 in base 2 as a sum of 64, rounded to 2^-16 each time: one element is "
        "off by 2^-14 (a standard deviation), and the worst of 10^8 lies at 5.7 of them. Moves: those of the element "
        "and of its sequence and head together are a standard deviation, or more; "
        "the worst of 10^8 normal errors lies at 5.7 of them",
    ),
    ("state", torch.float32): Bound(
        2.0**-12,
        2.0,
        "as out; the last rounding is fp32's and vanishes: bf16 operands measure up to 1.3 moves",
    ),
    ("state_head", torch.float32): Bound(2.0**-12, 2.5, "as state; the worst of many heads lies higher"),
    ("state_element", torch.float32): Bound(2.0**-11, 8.0, "as out_element"),
    ("state", torch.bfloat16): Bound(2.0**-12, 2.0, "as in fp32: the bf16 rounding is in the rounding term"),
    ("state_head", torch.bfloat16): Bound(2.0**-12, 2.5, "as in fp32"),
    ("state_element", torch.bfloat16): Bound(2.0**-11, 8.0, "as in fp32"),
}

OPERANDS: dict[str, float] = {"bf16": 1.0, "fp16": 2.0**-3, "fp32": 2.0**-10}
"""The operand format that an implementation claims for its products, and what part of `moves` it is therefore allowed:
8 bits of mantissa in bf16, 11 in fp16 and tf32. fp32 has 24, but sums of thousands of terms cost some of them."""

WITHOUT_ORACLE = 0.08
"""Relative RMS difference of two runs where no oracle was asked: the largest error measured on the published inputs
with bf16 operands is 0.036 (fla, the state with equal keys); twice that, for two runs."""
