"""The same recurrence in PyTorch (CPU or CUDA): all sequences and heads together, one step a token.

On a GPU with Triton, the steps of a group are one launch (`oracle.triton_recurrence`).

A stream is one head of one sequence. Streams share nothing, so they are sorted by length and run in groups small enough
for their states to stay in cache. In a group, the streams still running at step t are always a prefix.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Sizes:
    """How much runs at once. On a CPU a group of 8 states of 128 x 128 (1 MiB) stays in the second-level cache."""

    group_min: int  # streams
    group_max: int  # streams
    rows: int  # rows (tokens of a stream) whose inputs are prepared in float64 together


SIZES = {"cpu": Sizes(8, 64, 4096), "cuda": Sizes(2048, 2048, 65536)}


@torch.no_grad()
def run(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, offsets):
    """The recurrence over a flat token axis of R rows.

    `q`, `k`, `g` [R, H, K]; `v` [R, H, V]; `beta` [R, H]; `A_log` [H]; `dt_bias` [H, K]; `initial_state` [N, H, V, K]
    or None; `offsets` N + 1 row numbers. Returns `out` [R, H, V] and `final_state` [N, H, V, K], float64.
    """
    (R, H, K), V, N = q.shape, v.shape[-1], len(offsets) - 1
    device = q.device
    sizes = SIZES[device.type]
    advance = kernel(device, K, V) or advance_by_launches
    rate = finite_rate(A_log)
    dt_bias = dt_bias.double()
    out = torch.empty(R, H, V, dtype=torch.float64, device=device)
    final_state = torch.empty(N, H, V, K, dtype=torch.float64, device=device)

    offsets = torch.tensor(offsets)
    starts, lengths = offsets[:-1], offsets.diff()
    lengths, by_length = lengths.sort(descending=True, stable=True)

    first = 0
    while first < N * H:
        longest = int(lengths[first // H])
        group = min(max(sizes.rows // max(longest, 1), sizes.group_min), sizes.group_max, N * H - first)
        stream = torch.arange(first, first + group)
        sequence, head = by_length[stream // H], stream % H
        start, length = starts[sequence], lengths[stream // H]
        where = sequence.to(device), head.to(device)
        if initial_state is None:
            S = torch.zeros(group, K, V, dtype=torch.float64, device=device)
        else:
            S = initial_state[where].double().mT.contiguous()

        step = 0
        while step < longest:
            running = int((length > step).sum())
            steps = torch.arange(step, min(step + max(sizes.rows // running, 1), longest))[:, None]
            valid = steps < length[:running]
            # Rows in step order, the running streams of a step side by side, so that a step is a slice.
            token = (start[:running] + steps)[valid].to(device)
            row_head = head[:running].expand_as(valid)[valid].to(device)
            row = token, row_head

            q_hat, k_hat = unit(q[row].double()), unit(k[row].double())
            b = beta[row].double().sigmoid()[:, None]
            a = lower_bound * (rate[row_head, None] * (g[row].double() + dt_bias[row_head])).sigmoid()
            out[row] = advance(S, scale * q_hat, k_hat, v[row].double(), a.exp(), b, valid.sum(1).tolist())
            step += len(steps)

        final_state[where] = S.mT
        first += group
    return out, final_state


def kernel(device: torch.device, K: int, V: int) -> Callable | None:
    """`advance_by_launches` in one launch, where a GPU and Triton have it for states of K x V; None elsewhere."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return in_one_launch(device, K, V)


@cache
def in_one_launch(device: torch.device, K: int, V: int) -> Callable | None:
    """The kernel of `oracle.triton_recurrence`, once it has given what single launches give on a few tokens.

    Warns and returns None where it has not, or where Triton cannot compile here.
    """
    try:
        from oracle import triton_recurrence

        if not triton_recurrence.takes(K, V):
            return None
        generator = torch.Generator(device).manual_seed(0)
        running = [3, 2, 2, 1]
        shapes = ((3, K, V), *[(sum(running), width) for width in (K, K, V, K, 1)])
        S, *rows = (torch.rand(shape, generator=generator, device=device, dtype=torch.float64) for shape in shapes)
        rows[1] = unit(rows[1])  # the keys
        states = S.clone(), S.clone()
        outs = triton_recurrence.advance(states[0], *rows, running), advance_by_launches(states[1], *rows, running)
        for found, expected in (outs, states):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"oracle: Triton is not used, so each token takes three launches: {first}", stacklevel=2)
        return None
    return triton_recurrence.advance


def finite_rate(A_log):
    """exp(A_log), finite and above zero in float64: a sum of gate and bias may be 0 or infinite, and no product NaN."""
    limits = torch.finfo(torch.float64)
    return A_log.double().exp().clamp(limits.tiny, limits.max)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def advance_by_launches(S, q, k, v, decay, b, running):
    """Advance the states `S` [streams, K, V] in place; step i takes the next `running[i]` rows of the other arguments.

    `q` (with the scale), `k` and `decay` [rows, K], `v` [rows, V], `b` [rows, 1]. Returns the outputs [rows, V].

    Each step reads the old state once, for both S'^T q and b S'^T k: with S' = diag(decay) S,
        u   = b (v - S'^T k)
        S  <- S' + k u^T
        o   = S^T q = S'^T q + (k . q) u
    """
    probes = torch.stack([-b * decay * k, decay * q], 1)  # [rows, 2, K]
    answers = torch.stack([b * v, torch.zeros_like(v)], 1)  # [rows, 2, V]; each step makes of its rows u and S'^T q
    steps = zip(
        running,
        probes.split(running),
        answers.split(running),
        answers[:, :1].split(running),
        decay[:, :, None].split(running),
        k[:, :, None].split(running),
        strict=True,
    )
    for n, probe, answer, u_row, decay_t, k_column in steps:
        S_t = S[:n]
        answer.baddbmm_(probe, S_t)
        S_t.mul_(decay_t).addcmul_(k_column, u_row)
    u, recalled = answers.unbind(1)
    return recalled + (k * q).sum(-1, keepdim=True) * u
