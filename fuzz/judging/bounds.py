"""How large an error may be: one table, each number with its reason, and a part that follows the case.

For a place (the whole tensor, a sequence and head, a window of it, or an element) an error may be as large as

    rounding  +  tail x ((arithmetic + per token x tokens) x scale  +  moves)  +  floor

rounding    The error of rounding the exact result to the tensor's dtype in this place. It is computed.
scale       The RMS of the exact result over the sequence and head. So a quiet window is not judged on noise alone.
moves       How far rounding alone moves the result (`fuzz.judging.sensitivity`): one standard deviation, of rounding to
            bf16 every input and both operands of every product. It has the amplification of the case, and the absolute
            size of errors where large terms cancel to a small result. A window has the larger of its own and of its
            sequence and head's. An element has its own plus the larger of the two.
tail        The number of standard deviations that an error may reach. It follows from the number of independent errors
            in the place (`tail`).
floor       The loss by underflow: terms below 2^-126, the least normal number of fp32 and bf16.

An error of standard deviation d before the last rounding becomes at most rounding + 1.16 d in quadratic mean, whatever
the exact result is. Over results spread between the numbers of the format, the squares add, which is less than the sum.
A place without any error passes everywhere, and NaN passes nowhere.

docs/bounds.md derives each number, and shows what is measured beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNDERFLOW = 2.0**-120
"""Of the largest value or state of the sequence and head: 2^-126, and up to 64 such terms in a sum lost together."""

SMALLEST = 2.0**-126
"""Results below it may be flushed to zero."""

DEVIATIONS = 5.61
"""Standard deviations that a normal number exceeds with a probability of 1e-8. A campaign of 50,000 cases has some 10^8
places; in most, an error this large is far less likely, as the moves are an upper estimate."""

ARITHMETIC = 2.0**-14
"""fp32: the log-decays of a chunk add up to 462 in base 2, in 64 sums each rounded to 2^-16 at most. Errors spread
evenly up to that size add up to 8 / sqrt(3) of it, and ln 2 makes them those of a decay: 2^-14.3. Hardware
exponentials and roots, and sums of 128 products, are exact to 2^-20."""

PER_TOKEN = 2.0**-25
"""fp32, token by token: a decay just below 1 is rounded by up to half a unit, 2^-25, and where the gates of a channel
are equal, all its decays are rounded the same way. Counted for every token of the sequence."""


@dataclass(frozen=True)
class Bound:
    """The standard deviation of the error of a metric before its last rounding: `arithmetic` relative to the scale, and
    `operands` relative to `moves`. reason: what in such a place has an independent error of its own; `tail` is given
    the largest share that one of these has.
    """

    reason: str
    arithmetic: float = ARITHMETIC
    operands: float = 1.0


def tail(share: torch.Tensor) -> torch.Tensor:
    """How many standard deviations the RMS error of a place may reach: 6.3 of one error, 2.1 of 16, 1.4 of 128.

    The square of an RMS error is a sum of squares of normal errors, each with a weight: its part of what is expected.
    share: the largest weight, in (0, 1]. No sum with such weights has a longer tail than that of 1 / share equal ones
    (Szekely and Bakirov, Probability Theory and Related Fields 126, 2003): a chi-square of as many degrees of freedom.
    Its quantile by Wilson and Hilferty (PNAS 17, 1931), which is right to 1 % from 16 degrees on, and above it below.
    """
    spread = 2 * share / 9
    return (1 - spread + DEVIATIONS * spread.sqrt()) ** 1.5


TABLE: dict[tuple[str, torch.dtype], Bound] = {
    ("out", torch.bfloat16): Bound(
        "tokens and heads: a token's q^ . k^ is one number for all of its columns, so no more than these are "
        "independent for certain"
    ),
    ("out_window", torch.bfloat16): Bound("tokens, as of out: from 16 of equal weight to one that stands alone"),
    ("out_element", torch.bfloat16): Bound(
        "one error. It may come out twice as large, where it crosses a tie of the last rounding, so its moves count "
        "twice; or those of its sequence and head once, where these are larger, as its own are from few copies"
    ),
    ("state", torch.float32): Bound("channels: those of Kr and of K~ are rounded on their own"),
    ("state_head", torch.float32): Bound("channels: from 128 of equal weight to one that alone keeps its state"),
    ("state_element", torch.float32): Bound("one error, as of out_element; its last rounding is fp32's"),
    ("state", torch.bfloat16): Bound("as in fp32: the bf16 rounding is in the rounding term"),
    ("state_head", torch.bfloat16): Bound("as in fp32"),
    ("state_element", torch.bfloat16): Bound("as in fp32; ties as of out_element"),
}

OPERANDS: dict[str, float] = {"bf16": 1.0, "fp16": 2.0**-3, "fp32": 2.0**-10}
"""The operand format that an implementation claims for its products, and what part of `moves` it is therefore allowed:
8 bits of mantissa in bf16, 11 in fp16 and tf32. fp32 has 24, 2^-16 of bf16's error; sums of 4096 terms in it reach
random to 2^6 times that."""

COARSE = ("bf16", "fp16")
"""Formats of the inverse that have a part of a bound of their own; fp32's is in `ARITHMETIC`."""

WITHOUT_ORACLE = 0.08
"""Relative RMS difference of two runs where no oracle was asked: the largest error measured on the published inputs
with bf16 operands is 0.036 (fla, the state with equal keys); twice that, for two runs."""
