"""Rates that fp32 cannot hold: docs/operator.md says that they count as finite and above zero. No family draws them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import emulated
import pytest
import torch
from judged_targets import a_case

from fuzz.cases.inputs import make_inputs
from fuzz.judging.judge import judge
from fuzz.judging.sensitivity import reference
from fuzz.targets.registry import Target, load_target

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("lengths", [(40, 9), (100,)])
@pytest.mark.parametrize("name", ["model", "emulated"])
def test_a_gate_is_half_open_at_zero_and_open_at_minus_infinity(name, lengths):
    if name == "emulated" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    target = load_target("model") if name == "model" else Target("emulated", emulated.fwd, "cpu")
    inputs = make_inputs(a_case(lengths, 2, gates="centred", seed=3))
    g = inputs.g.clone()
    g[:, 1::3], g[:, 2::3] = 0.0, -torch.inf
    rates, biases = torch.tensor([200.0, -200.0]), torch.zeros_like(inputs.dt_bias)  # e^200 and e^-200
    inputs = replace(inputs, g=g, A_log=rates, dt_bias=biases)
    exact = reference(inputs, "cpu")
    assert exact.out.isfinite().all()
    verdict = judge(target, None, inputs, exact, ())
    assert verdict.passed, [check.detail for check in verdict.failed]
