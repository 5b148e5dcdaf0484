"""Errors beside their bounds: what is beyond the last rounding, with digits that tell the two apart."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch

from fuzz.cases.inputs import make_inputs
from fuzz.cases.plain import PLAIN
from fuzz.judging.accuracy import accuracy
from fuzz.judging.call import Outputs
from fuzz.judging.sensitivity import reference
from fuzz.judging.verdict import share_of_bound, shares_of_bounds, told_apart


def test_two_numbers_that_differ_are_shown_differently():
    assert told_apart(-0.0362838, -0.0362839, 6) == ("-0.0362838", "-0.0362839")
    assert told_apart(-0.036283999, -0.036284002, 6) == ("-0.036283999", "-0.036284002")
    assert told_apart(0.01204, 0.01196) == ("0.01204", "0.01196")
    assert told_apart(1.0, 1.0) == ("1", "1")
    assert told_apart(1.0, math.nextafter(1.0, 2.0))[0] != told_apart(1.0, math.nextafter(1.0, 2.0))[1]


def test_shares_are_of_what_is_beyond_the_last_rounding():
    assert share_of_bound(0.0017, 0.00177, 0.0016) == pytest.approx(10 / 17)
    assert share_of_bound(0.0015, 0.00177, 0.0016) == 0
    assert share_of_bound(0.0019, 0.00177, 0.0016) > 1
    assert share_of_bound(math.nan, 1.0) == share_of_bound(1.0, math.nan) == share_of_bound(0.1, 0.0) == math.inf
    old = {"errors": {"out": 0.1, "other": 1.0}, "bounds": {"out": 0.4}}
    assert shares_of_bounds(old) == {"out": 0.25}


def test_right_and_wrong_kernels_differ_in_their_share_of_the_bound():
    """The exact result rounded once takes up none of the bound, and one with a small error some of it."""
    case = replace(PLAIN, seq_lens=(70,), heads=2)
    inputs = make_inputs(case)
    exact = reference(inputs, "cpu")
    shares = []
    for noise in (0.0, 2.0**-9, 2.0**-7):
        out = exact.out * (1 + noise * torch.randn(exact.out.shape, generator=torch.Generator().manual_seed(1)))
        outputs = Outputs(out.bfloat16(), exact.state.float())
        shares.append(shares_of_bounds(asdict(accuracy(outputs, inputs, exact)))["out"])
    assert shares[0] < 0.01 and shares[0] < 0.5 * shares[1] and shares[2] > 1.5 * shares[1]
