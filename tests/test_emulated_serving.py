"""Checkpoints, pools of states and rows behind the end, by the source of the CUDA kernel in the emulator."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import emulated
import pytest
import torch
from test_emulated import kernel  # noqa: F401

from fuzz.cases.inputs import Inputs, make_inputs
from fuzz.cases.plain import PLAIN

LENS = (130, 0, 70, 33, 48)
CASE = replace(PLAIN, seq_lens=LENS, packed=True, heads=2, lower_bound=-0.05, seed=3)
OFFSETS = [[16, 64, 80], [16, 0, -1], [48, 64, 80], [0, -1, 32], [16, 2**30, 48]]
D = 128


def call(built, inputs: Inputs, tokens=slice(None), clusters: int = 1, seed: int = 0, **changes) -> dict:
    given = {name: getattr(inputs, name)[:, tokens] for name in ("q", "k", "v", "g", "beta")}
    given |= {name: getattr(inputs, name) for name in ("A_log", "dt_bias", "scale", "lower_bound", "initial_state")}
    sequences = len(inputs.cu_seqlens) - 1
    given |= {"out": torch.full_like(given["v"], math.nan), "final_state": states(sequences)}
    given |= {"cu_seqlens": inputs.cu_seqlens}
    given |= changes
    emulated.forward(built, **given, clusters=clusters, seed=seed)
    return given


def states(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.full((*shape, 2, D, D), 7.0, dtype=dtype)


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_are_final_states_of_prefixes_and_change_nothing_else(kernel, clusters, dtype):  # noqa: F811
    """However the work is cut, also between a part of a chunk and the whole one."""
    inputs = make_inputs(CASE)
    offsets = torch.tensor(OFFSETS, dtype=(torch.int32, torch.int64)[clusters % 2])
    memory = states(5, 4, dtype=dtype)
    checkpoints = memory[:, 1:]  # strided
    result = call(
        kernel, inputs, clusters=clusters, seed=clusters, checkpoint_state=checkpoints, checkpoint_offsets=offsets
    )
    plain = call(kernel, inputs)
    assert torch.equal(result["out"], plain["out"]) and torch.equal(result["final_state"], plain["final_state"])
    assert memory[:, 0].eq(7).all()
    for n, start in enumerate(inputs.cu_seqlens[:-1].tolist()):
        for c, offset in enumerate(OFFSETS[n]):
            if not 0 < offset <= LENS[n]:
                assert checkpoints[n, c].eq(7).all()
                continue
            alone = replace(inputs, cu_seqlens=torch.tensor([0, offset]))
            initial = {"initial_state": inputs.initial_state[n : n + 1], "final_state": states(1, dtype=dtype)}
            prefix = call(kernel, alone, slice(start, start + offset), **initial)
            assert torch.equal(checkpoints[n, c], prefix["final_state"][0]), (n, c)


def test_offsets_that_mean_nothing_touch_nothing_else(kernel):  # noqa: F811
    """No multiples of 16, none that increase, duplicates: every offset is passed over or taken, nowhere else."""
    inputs = make_inputs(CASE)
    plain = call(kernel, inputs)
    wild = torch.tensor([[5, 5, 3], [1, 1, 1], [70, 69, 2**40], [-(2**40), 33, 34], [31, 17, 47]])
    for clusters in (1, 3):
        memory = states(7, 3)
        result = call(kernel, inputs, clusters=clusters, checkpoint_state=memory[1:6], checkpoint_offsets=wild)
        assert torch.equal(result["out"], plain["out"]) and torch.equal(result["final_state"], plain["final_state"])
        written = memory.ne(7).flatten(2).any(-1).nonzero().tolist()
        assert written == [[3, 0], [4, 1], [5, 0], [5, 2]]


def inside(x: torch.Tensor, axis: int, filled: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory full of that value, and in the middle of it, along an axis, a tensor with the numbers of x."""
    shape = [n + 140 * (i == axis) for i, n in enumerate(x.shape)]
    memory = torch.full(shape, filled, dtype=x.dtype)
    return memory, memory.narrow(axis, 70, x.shape[axis]).copy_(x)


@pytest.mark.parametrize("seed", range(6))
def test_wrong_contents_touch_nothing_outside(kernel, seed):  # noqa: F811
    """Any numbers: what lies around the tensors keeps its bits, and is not read, for then NaN would come of it."""
    draw = random.Random(seed)
    inputs, dtype, rows = make_inputs(CASE), (torch.int32, torch.int64)[seed % 2], 7

    def numbers(*shape: int) -> torch.Tensor:
        bits = draw.choices((5, 9, 30, torch.iinfo(dtype).bits), k=math.prod(shape))
        values = [draw.randint(-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in bits]
        return torch.tensor(values, dtype=dtype).view(shape)

    given = {name: inside(getattr(inputs, name), 1, math.nan)[1] for name in ("q", "k", "v", "g", "beta")}
    around, given["out"] = inside(torch.full_like(inputs.v, 7.0), 1, 7.0)
    pool = inputs.initial_state[torch.arange(rows) % len(LENS)]
    given["initial_state"] = inside(pool, 0, math.nan)[1]
    others, given["final_state"] = inside(torch.full_like(pool, 7.0), 0, 7.0)
    beside, given["checkpoint_state"] = inside(states(5, 4), 1, 7.0)
    given |= {"state_indices": numbers(5), "checkpoint_offsets": numbers(5, 4)}
    if seed >= 4:
        given["cu_seqlens"] = numbers(6)
    call(kernel, inputs, clusters=1 + seed % 3, seed=seed, **given)
    written = around.ne(7).flatten(2).any(2)[0].nonzero().flatten().tolist()
    assert given["out"].isfinite().all() and all(70 <= n < 70 + sum(LENS) for n in written)
    written = others.ne(7).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(written) <= {70 + n for n in given["state_indices"].tolist() if 0 <= n < rows}
    assert given["final_state"].isfinite().all() and given["checkpoint_state"].isfinite().all()
    for n, c in beside.ne(7).flatten(2).any(2).nonzero().tolist():
        assert 70 <= c < 74
        assert given["checkpoint_offsets"][n, c - 70] > 0
        assert seed >= 4 or given["checkpoint_offsets"][n, c - 70] <= LENS[n]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_pool(kernel, dtype, odd):  # noqa: F811
    """In place, in a layer of a larger pool; at odd strides each element is read and written alone."""
    inputs = make_inputs(CASE)
    layers = torch.randn(9, 2, 2, D, D + (5 if odd else 4)).to(dtype)[..., 1 if odd else 4 :][..., :D]
    pool, before, other = layers[:, 1], layers[:, 1].clone(), layers[:, 0].clone()
    rows = torch.tensor([[8, 1], [-1, 1], [0, 1], [5, 1], [2**31 - 1, 1]])[:, 0]  # strided; the last one is wrong
    result = call(kernel, inputs, clusters=2, initial_state=pool, final_state=pool, state_indices=rows)
    named = [8, None, 0, 5, None]
    initial = torch.stack([torch.zeros_like(before[0]) if n is None else before[n] for n in named])
    plain = call(kernel, inputs, initial_state=initial, final_state=states(5, dtype=dtype))
    assert torch.equal(result["out"], plain["out"])
    expected = before.clone()
    for n, row in enumerate(named):
        if row is not None:
            expected[row] = plain["final_state"][n]
    assert torch.equal(pool, expected) and torch.equal(layers[:, 0], other)


def test_rows_behind_the_end(kernel):  # noqa: F811
    inputs = make_inputs(CASE)
    end = 250
    ends = inputs.cu_seqlens.clamp(max=end)
    beyond = replace(inputs, cu_seqlens=ends)
    for name in ("q", "k", "v", "g", "beta"):
        x = getattr(inputs, name).clone()
        x[:, end:] = math.nan
        setattr(beyond, name, x)
    mine = call(kernel, beyond, clusters=2, out=torch.full_like(inputs.v, 7.0))
    plain = call(kernel, replace(inputs, cu_seqlens=ends), slice(end))
    assert mine["out"][:, end:].eq(7).all()
    assert torch.equal(mine["out"][:, :end], plain["out"]) and torch.equal(mine["final_state"], plain["final_state"])
