"""Inputs on a GPU, calls of the kernel, and what its results are held to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judged_targets import read_by_the_oracle

import flash_kda
from flash_kda import model
from fuzz.cases.inputs import Inputs, make_inputs
from fuzz.cases.plain import PLAIN
from oracle import recurrent_kda

MIXED = replace(PLAIN, seq_lens=(100, 0, 5, 64, 129), heads=3, packed=True)


@pytest.fixture(autouse=True)
def hopper(monkeypatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.delenv("FLASH_KDA_VALIDATE", raising=False)  # a user's own choice


def on_gpu(**changes) -> Inputs:
    return make_inputs(replace(MIXED, **changes)).to("cuda")


def outputs_for(inputs: Inputs) -> dict[str, torch.Tensor | None]:
    """Outputs full of NaN, as the case asks for them."""
    batch, _, heads, dim = inputs.v.shape
    sequences = batch if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    final = None
    if inputs.in_place:
        final = inputs.initial_state
    elif inputs.final_state_dtype is not None:
        final = torch.full((sequences, heads, dim, dim), torch.nan, dtype=inputs.final_state_dtype, device="cuda")
    return {"out": torch.full(inputs.v.shape, torch.nan, dtype=torch.bfloat16, device="cuda"), "final_state": final}


def arguments_of(inputs: Inputs, **changes) -> dict:
    read = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
    written = {} if {"out", "final_state"} <= changes.keys() else outputs_for(inputs)
    return {name: getattr(inputs, name) for name in read} | written | changes


def run(inputs: Inputs, **changes) -> tuple[torch.Tensor, torch.Tensor | None]:
    arguments = arguments_of(inputs, **changes)
    options = {name: arguments.pop(name) for name in ("validate", "workspace") if name in arguments}
    flash_kda.fwd(**arguments, **options)
    return arguments["out"], arguments["final_state"]


def assert_same_bits(mine, other) -> None:
    for x, y in zip(mine, other, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative RMS; NaN stays NaN, which is below nothing."""
    exact = exact.double().cpu()
    return ((x.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-300)).item() if x.numel() else 0.0


def assert_as_right_as_the_model(inputs: Inputs, out, final_state) -> None:
    """Against the float64 oracle, no worse than the model with the same roundings, but for the order of additions."""
    exact = recurrent_kda(**read_by_the_oracle(inputs))
    modelled = model.forward(**read_by_the_oracle(inputs.to("cpu")))
    assert error(out, exact[0]) <= 1.2 * error(modelled[0], exact[0]) + 1e-4
    if final_state is not None:
        assert error(final_state, exact[1]) <= 1.2 * error(modelled[1].to(final_state.dtype), exact[1]) + 1e-4


def spread(x: torch.Tensor, offset: int, gap: int, guard: int = 16) -> torch.Tensor:
    """The numbers of x in memory of its own: `offset` elements in, `gap` between rows, `guard` after the last one."""
    shape, strides = x.shape, [1]
    for i in reversed(range(x.dim() - 1)):
        strides.insert(0, strides[0] * shape[i + 1] + (gap if i == x.dim() - 2 else 0))
    memory = torch.full((offset + shape[0] * strides[0] + guard,), 77.0, dtype=x.dtype, device=x.device)
    return memory.as_strided(shape, strides, offset).copy_(x)
