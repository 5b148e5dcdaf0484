"""What a program has set for itself changes nothing of the kernel's model."""

from __future__ import annotations

import pytest
import torch
from test_model import PER_TOKEN, assert_same, inputs, run

import flash_kda


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_default_dtype(dtype):
    expected = run(inputs())
    arguments = inputs()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = run(arguments)
    finally:
        torch.set_default_dtype(before)
    assert_same(found, expected)


def test_default_device():
    arguments = inputs()
    out, state = torch.empty_like(arguments["v"]), torch.empty_like(arguments["initial_state"])
    with torch.device("meta"):
        flash_kda.fwd(**arguments, out=out, final_state=state)
    assert_same((out, state), run(arguments))


def test_autocast():
    expected = run(inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(inputs()), expected)


def test_gradients():
    arguments = inputs()
    wanted = {name: arguments[name].clone().requires_grad_() for name in PER_TOKEN}
    out, state = run({**arguments, **wanted})
    assert_same((out, state), run(arguments))
    assert not out.requires_grad
    assert not state.requires_grad
    with torch.inference_mode():
        assert_same(run(arguments), (out, state))
