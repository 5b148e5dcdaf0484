"""The steps of `oracle.torch_recurrence` on a GPU, as one launch: each program keeps some columns of one state.

A launch for each operation of each token would take the host longer than the GPU, and would keep other processes from
it for that time.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

COLUMNS = 16  # of a state of 128 channels, in float64: 16 KB of registers


def takes(K: int, V: int) -> bool:
    """Whether states of these sizes can be cut into tiles."""
    return K & (K - 1) == 0 and V % COLUMNS == 0


@triton.jit
def advance_columns(S, q, k, v, decay, b, out, first_row, steps, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr):
    stream = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    channel = tl.arange(0, K)
    place = S + (stream * K + channel[:, None]) * V + column[None, :]
    state = tl.load(place)
    for step in range(tl.load(steps + stream)):
        row = tl.load(first_row + step) + stream
        k_row = tl.load(k + row * K + channel)[:, None]
        state = state * tl.load(decay + row * K + channel)[:, None]
        u = tl.load(b + row) * (tl.load(v + row * V + column) - tl.sum(state * k_row, 0))
        state = state + k_row * u[None, :]
        tl.store(out + row * V + column, tl.sum(state * tl.load(q + row * K + channel)[:, None], 0))
    tl.store(place, state)


def advance(S, q, k, v, decay, b, running):
    """As `oracle.torch_recurrence.advance_by_launches`, of states that are taken; `S` is contiguous."""
    first_row = torch.tensor([0, *accumulate(running)][:-1])  # of each step
    steps = (torch.tensor(running)[None] > torch.arange(len(S))[:, None]).sum(1)  # of each stream
    arguments = [x.contiguous() for x in (q, k, v, decay, b)]
    out = torch.empty_like(arguments[2])
    first_row, steps = first_row.to(S.device), steps.to(S.device)
    K, V = S.shape[1:]
    with torch.cuda.device_of(S):
        advance_columns[(len(S), V // COLUMNS)](S, *arguments, out, first_row, steps, K, V, COLUMNS)
    return out
