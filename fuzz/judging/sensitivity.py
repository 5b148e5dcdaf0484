"""How far rounding alone moves the results of one input, whatever the implementation: the part of a bound that follows
the case.

Two movements are added in squares for every element of `out` and of the state:

- `perturbed`: the oracle's results move when each bf16 input moves by up to half a unit in its last place, at random.
  So does what an implementation computes that rounds normalised rows, or values times beta, to bf16 before it begins.
- `terms`: the standard deviation of the results when both operands of every product of the chunk form are rounded to
  bf16. This sees what moving the inputs cannot. Zeros and the directions of one-hot rows do not move with their last
  place. And where tokens t and t + 1 have the same key the recurrence corrects an error of t at t + 1, while the chunk
  form computes all updates U of a chunk first and rounds them afterwards: their errors add up although they cancel. It
  is a closed formula, so it is also right where a sequence of one token leaves but a few random numbers to average.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

import oracle

SEED = 20
ROUNDING = 0.0017  # relative RMS error of one rounding to bf16: uniform in half a unit, 2^-9 to 2^-8 of the value
LONGEST_CHUNK = (
    64  # tokens after which implementations correct their state at the latest: fla after 64, flash_kda after 32
)
COPIES = (2, 4)  # perturbed copies: many where they cost little, to average better
ROWS_OF_COPIES = 2048  # (token, head) pairs over all copies up to which copies are added
ROWS_AT_ONCE = 1 << 18  # (token, head) pairs in one call of the oracle, to bound its memory
PAIRS_AT_ONCE = 256  # (sequence, head) pairs in one pass over the terms, about 3 MB each


@dataclass(frozen=True)
class Reference:
    """What a target's results are compared with, all float64 on one device.

    out: [B, T, H, V] and state: [N, H, V, K], the oracle's.
    out_moves, state_moves: of the same shapes, how far each element moves by rounding alone (one standard deviation).
    """

    out: torch.Tensor
    state: torch.Tensor
    out_moves: torch.Tensor
    state_moves: torch.Tensor
    kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, which follows from the case alone: kept for all that is compared with this reference."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


@torch.no_grad()
def reference(inputs, device: torch.device | str) -> Reference:
    """The oracle's results for `inputs`, and how far rounding moves them. Deterministic."""
    inputs = inputs.to(device)
    rows, heads = inputs.q.shape[0] * inputs.q.shape[1], inputs.q.shape[2]
    copies = max(COPIES[0], min(COPIES[1], ROWS_OF_COPIES // max(rows * heads, 1) - 1))
    generator = torch.Generator(device).manual_seed(SEED)
    out = state = None
    out_squares, state_squares = terms(inputs)
    group = max(1, ROWS_AT_ONCE // max(rows * heads, 1) - 1)
    for first in range(0, copies, group):
        n = min(group, copies - first)
        outs, states = run_copies(inputs, n, generator)
        if out is None:
            out, state = outs[0], states[0]
        out_squares += (outs[1:] - out).square().sum(0) / copies
        state_squares += (states[1:] - state).square().sum(0) / copies
    return Reference(out, state, out_squares.sqrt_(), state_squares.sqrt_())


def run_copies(inputs, copies: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle on the inputs as given (first) and on `copies` moved ones, side by side as heads of one call.

    Returns outs [1 + copies, B, T, H, V] and states [1 + copies, N, H, V, K].
    """

    def as_heads(x, dim, **how):
        moved = move(x, copies, generator, **how)
        return torch.cat([x.double()[None], moved]).movedim(0, dim).flatten(dim, dim + 1)

    moved = {name: as_heads(getattr(inputs, name), 2) for name in ("q", "v", "beta")}
    # Equal keys are rounded equally, whatever rounds them; moved apart, they would be another input.
    moved["k"] = as_heads(inputs.k, 2, like=equal_rows(inputs.k))
    # The gate sees g only in g + dt_bias. Where the two cancel, half a unit of g is much more than rounding explains.
    moved["g"] = as_heads(inputs.g, 2, sum_of_x=inputs.g.float() + inputs.dt_bias)
    initial_state = inputs.initial_state
    outs, states = oracle.recurrent_kda(
        **moved,
        scale=inputs.scale,
        A_log=inputs.A_log.repeat(1 + copies),
        dt_bias=inputs.dt_bias.repeat(1 + copies, 1),
        lower_bound=inputs.lower_bound,
        initial_state=None if initial_state is None else as_heads(initial_state, 1),
        cu_seqlens=inputs.cu_seqlens,
    )
    heads = inputs.q.shape[2]
    outs = outs.unflatten(2, (1 + copies, heads)).movedim(2, 0)
    states = states.unflatten(1, (1 + copies, heads)).movedim(1, 0)
    return outs, states


def move(
    x: torch.Tensor,
    copies: int,
    generator: torch.Generator,
    *,
    sum_of_x: torch.Tensor | None = None,
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """Copies of a bf16 tensor, side by side on a new first axis, in float64: each element moved by up to half a unit in
    its last place, uniformly.

    The unit is that of `sum_of_x` where that is smaller. Zeros, infinities and other dtypes stay as they are. like: for
    each row, the number of the row that it moves with.
    """
    exact = x.double()
    if x.dtype != torch.bfloat16:
        return exact.expand(copies, *x.shape)
    size = x.float().abs() if sum_of_x is None else torch.minimum(x.float().abs(), sum_of_x.abs())
    unit = (power_of_two(size) * 2.0**-7).where(x.isfinite(), 0.0)  # the same for all copies
    shift = torch.rand((copies, *x.shape), generator=generator, device=x.device, dtype=torch.float32) - 0.5
    if like is not None:
        shift = shift.flatten(1, -2)[:, like].view(shift.shape)
        unit = unit * x.double().sign()
    return torch.addcmul(exact, unit, shift.double())


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is not above each |x|, in float64; zero for zero. x: fp32, whose subnormal numbers
    are normal ones of float64.
    """
    exponent = 0x7FF0000000000000  # these bits of a float64
    return x.double().view(torch.int64).bitwise_and(exponent).view(torch.float64)


def equal_rows(x: torch.Tensor) -> torch.Tensor:
    """For each row of a bf16 tensor [..., D], rows counted through, the first one that equals it up to signs: int64."""
    rows = x.abs().contiguous().view(torch.int16).flatten(0, -2).long()
    # A product with odd random numbers modulo 2^64 tells rows apart, but for one pair in 2^60 or so.
    key = torch.randint(-(2**62), 2**62, rows.shape[-1:], generator=torch.Generator().manual_seed(SEED)).to(x.device)
    _, number = torch.unique((rows * (2 * key + 1)).sum(-1), return_inverse=True)
    index = torch.arange(len(number), device=x.device)
    return torch.empty_like(index).scatter_reduce_(0, number, index, "amin", include_self=False)[number]


# ------------------------------------------------------------------------------------------------ the terms of the sums


def terms(inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances of `out` [B, T, H, V] and of the state [N, H, V, K] when every operand of the chunk form is rounded.

    The chunk form is that of docs/numerics.md, with the state as S [K, V]: per chunk of 64 tokens,

        X = (I + L)^-1    W = X b K~    U = X b V - W S    O = scale (Q~ S + M U)    S' = D S + Kr^T U

    Each rounding errs by r = `ROUNDING` of what it rounds, independently, and moves the results by a linear map, whose
    elements are squared here. With E = b (V - K~ S) is U = X E: so an error of X b, one operand of both products, moves
    U by as much of X E, and one of K~ or L moves E, and by it U by X, O by M X and S' by Kr^T X. One of W moves U by as
    much of W S. One of the operand S moves O by Q~ - M W and one of the state itself moves S' by A = D - Kr^T W. V is
    bf16 as it is given. The errors of a chunk's updates lie along its keys, which is where the next chunk overwrites
    them: so these keep their direction for one chunk, as `along` with the variances `of_update`. What remains after it
    is kept as variances of elements, `apart`. Errors are rounded, too: a large state that is overwritten all but
    exactly leaves an error much larger than what exactly remains of it.
    """
    q, k, v, b, a = operands(inputs)
    heads, columns, channels = v.shape[1], v.shape[2], k.shape[2]
    bounds = [(n, start, end) for n, (start, end) in enumerate(inputs.seq_bounds())]
    bounds.sort(key=lambda bound: bound[1] - bound[2])  # the longest first
    at_once = max(1, PAIRS_AT_ONCE // heads)
    out = v.new_zeros(len(v) + 1, heads, columns)  # the last row is for what is no token
    state = v.new_zeros(len(bounds), heads, columns, channels)
    for part in (bounds[i : i + at_once] for i in range(0, len(bounds), at_once)):
        group, start, end = torch.tensor(part, device=v.device).unbind(1)
        lengths = [end - start for _, start, end in part]
        S = v.new_zeros(len(group), heads, channels, columns)
        if inputs.initial_state is not None:
            S.copy_(inputs.initial_state[group].mT)
        apart = torch.zeros_like(S)
        along = v.new_zeros(len(group), heads, channels, 2 * LONGEST_CHUNK)
        of_update = v.new_zeros(len(group), heads, 2 * LONGEST_CHUNK, columns)
        for first in range(0, lengths[0], LONGEST_CHUNK):
            n, width = sum(length > first for length in lengths), min(LONGEST_CHUNK, lengths[0] - first)
            rows = start[:n, None] + first + torch.arange(width, device=v.device)
            valid = rows < end[:n, None]
            tokens = (x[rows.where(valid, 0)].transpose(1, 2) for x in (q, k, v, b, a))
            of_S = apart[:n] + along[:n].square() @ of_update[:n]
            step = Step.of(*(x.where(valid[:, None, :, None], 0.0) for x in tokens), S[:n], ROUNDING**2 * of_S)
            variance = step.of_out
            if first:
                variance = variance + step.Qe.square() @ apart[:n] + (step.Qe @ along[:n]).square() @ of_update[:n]
                A = torch.diag_embed(step.decay) - step.Kr.mT @ step.W
                apart[:n] = A.square() @ apart[:n] + (A @ along[:n]).square() @ of_update[:n]
            apart[:n] += step.Kr.square().mT @ step.U2
            S[:n] = step.decay[..., None] * S[:n] + step.Kr.mT @ step.U
            along[:n], of_update[:n] = 0.0, 0.0
            along[:n, :, :, :width], of_update[:n, :, :width] = step.Kr.mT, step.of_U
            (
                along[:n, :, :, LONGEST_CHUNK : LONGEST_CHUNK + width],
                of_update[:n, :, LONGEST_CHUNK : LONGEST_CHUNK + width],
            ) = step.R, step.of_E
            out[rows.where(valid, len(v))] = (inputs.scale * ROUNDING) ** 2 * variance.transpose(1, 2)
        state[group] = ROUNDING**2 * (apart + along.square() @ of_update).mT
    return out[:-1].view(inputs.v.shape), state


@dataclass(frozen=True)
class Step:
    """One chunk of n sequences and h heads: its linear maps, and variances in units of one squared rounding."""

    U: torch.Tensor  # [n, h, C, V]
    U2: torch.Tensor  # square of U and of the error it has from that of S, in quadratic mean
    Kr: torch.Tensor  # [n, h, C, K]
    W: torch.Tensor  # X b K~ [n, h, C, K]
    Qe: torch.Tensor  # Q~ - M W [n, h, C, K]
    R: torch.Tensor  # Kr^T X [n, h, K, C]
    decay: torch.Tensor  # D [n, h, K]
    of_E: torch.Tensor  # of the roundings that U sees through X [n, h, C, V]
    of_U: torch.Tensor  # of U's own rounding and of those of X b and W
    of_out: torch.Tensor  # of everything that the chunk itself rounds

    @staticmethod
    def of(q, k, v, b, a, S, error) -> Step:
        """q, k, a [n, h, C, K], v [n, h, C, V], b [n, h, C, 1], all zero where there is no token; S [n, h, K, V], and
        the variance of its error.
        """
        G = a.cumsum(2)
        last = G[:, :, -1:]
        middle = last / 2  # 32 x 5 either way: exp and its square are within the range of float64
        k_row, q_row, column = k * (G - middle).exp(), q * (G - middle).exp(), k * (middle - G).exp()
        K, Q, Kr = k * G.exp(), q * G.exp(), k * (last - G).exp()
        L, M = b * (k_row @ column.mT).tril(-1), (q_row @ column.mT).tril()
        eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        X = torch.linalg.solve_triangular(eye + L, eye.expand_as(L), upper=False, unitriangular=True)
        E = b * (v - K @ S)
        U = X @ E
        W = X @ (b * K)
        # What is rounded is not the exact state but one with an error, which may be the larger part of it.
        S2, U2, M2 = S.square() + error, U.square() + W.square() @ error, M.square()
        E2 = E.square() + b.square() * (K.square() @ error)
        of_U = X.square() @ E2 + W.square() @ S2 + U2
        # Of L: both operands of its sums of products, and itself, for errors that all channels have in common.
        of_L = 2 * b.square() * (k_row.square() @ column.square().mT).tril(-1) + L.square()
        of_E = b.square() * (K.square() @ S2) + of_L @ U2
        of_M = 2 * (q_row.square() @ column.square().mT).tril() + M2
        Qe = Q - M @ W
        of_out = (M @ X).square() @ of_E + M2 @ of_U + of_M @ U2 + (Qe.square() + Q.square()) @ S2
        # The state as an operand moves all rows of E together; beside the state itself that is taken row by row.
        of_E_and_S = of_E + b.square() * (K.square() @ S2)
        return Step(U, U2, Kr, W, Qe, Kr.mT @ X, last[:, :, 0].exp(), of_E_and_S, of_U, of_out)


def operands(inputs) -> tuple[torch.Tensor, ...]:
    """Normalised q and k, v, sigmoid of beta [R, H, 1] and log-decay of docs/operator.md: float64, R = B * T rows."""
    names = ("q", "k", "v", "g", "beta")
    q, k, v, g, beta = (getattr(inputs, name).double().flatten(0, 1) for name in names)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    limits = torch.finfo(torch.float64)
    rate = inputs.A_log.double().exp().clamp(limits.tiny, limits.max)  # the sum below may be 0 or infinite
    a = inputs.lower_bound * torch.sigmoid(rate[:, None] * (g + inputs.dt_bias.double()))
    return q, k, v, torch.sigmoid(beta)[..., None], a
