"""How far rounding alone moves the results of one input, whatever the implementation: the part of a bound that follows
the case.

Two movements, both the size of one rounding to bf16, are added in squares for every element of `out` and of the state:

- `perturbed`: the oracle's results move when each bf16 input moves by up to half a unit in its last place, at random.
  This sees what the input amplifies over time (collinear keys, slow decay), and needs no idea of an implementation.
- `terms`: the standard deviation of the results when each product that is summed in the chunk form is rounded. This
  sees what moving the inputs cannot. Zeros and the directions of one-hot rows do not move with their last place. And
  where tokens t and t + 1 have the same key the recurrence corrects an error of t at t + 1, while the chunk form
  computes all updates U of a chunk first and rounds them afterwards: their errors add up although they cancel. It is a
  closed formula, so it is also right where a sequence of one token leaves but a few random numbers to average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import oracle

SEED = 20
ROUNDING = 0.0017  # relative RMS error of one rounding to bf16: uniform in half a unit, 2^-9 to 2^-8 of the value
CHUNK = 64  # tokens after which implementations commonly correct their state
COPIES = (2, 4)  # perturbed copies: many where they cost little, to average better
ROWS_OF_COPIES = 2048  # (token, head) pairs over all copies up to which copies are added
ROWS_AT_ONCE = 1 << 18  # (token, head) pairs in one call of the oracle, to bound its memory
PAIRS_AT_ONCE = 256  # (chunk, head) pairs in one pass over the terms, about 1 MB each


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

    def as_heads(x, dim, sum_of_x=None):
        return torch.cat([x.double(), *(move(x, generator, sum_of_x) for _ in range(copies))], dim)

    moved = {name: as_heads(getattr(inputs, name), 2) for name in ("q", "k", "v", "beta")}
    # The gate sees g only in g + dt_bias. Where the two cancel, half a unit of g is much more than rounding explains.
    moved["g"] = as_heads(inputs.g, 2, inputs.g.float() + inputs.dt_bias)
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


def move(x: torch.Tensor, generator: torch.Generator, sum_of_x: torch.Tensor | None = None) -> torch.Tensor:
    """Each element of a bf16 tensor moved by up to half a unit in its last place, uniformly, in float64.

    The unit is that of `sum_of_x` where that is smaller. Zeros, infinities and other dtypes stay as they are.
    """
    exact = x.double()
    if x.dtype != torch.bfloat16:
        return exact
    size = x.float().abs() if sum_of_x is None else torch.minimum(x.float().abs(), sum_of_x.abs())
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 8)
    shift = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) - 0.5
    return (exact + (unit * shift).double()).where(x.isfinite() & (size != 0), exact)


# ------------------------------------------------------------------------------------------------ the terms of the sums


def terms(inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances of `out` [B, T, H, V] and of the state [N, H, V, K] when every product in the chunk form is rounded.

    With d_tj the decay per channel from token j to t (T: the last token, 0: the initial state), per value column, and
    with r = `ROUNDING`. Sums for out are over tokens j of this chunk and of the one before it, for the state over all:

        u_j^2  =  b_j^2 (v_j^2 + p_j^2)                        the terms of the update b (v - S'^T k)
        out_t     (scale r)^2 (sum_j ((q_t . d_tj k_j)^2 + |q_t d_tj k_j|^2) u_j^2  +  sum_c (q_tc d_t0c S0_c)^2)
        state     r^2 sum_j (d_Tj k_j)^2 u_j^2

    p_j, what the state predicts for k_j, has the same parts as out_t: that of S0 (and S0's sum itself), and that of the
    tokens i < j, with b_i v_i for u_i. Their sum_i (k_j . d_ji k_i)^2 (b_i v_i)^2 is not taken for more than the
    largest b v of the column, because the delta rule overwrites and does not pile up.
    """
    q, k, v, b, a = operands(inputs)
    bounds = inputs.seq_bounds()
    heads, columns, channels = v.shape[1], v.shape[2], k.shape[2]
    spans = Spans.of(bounds, q.device)
    # Log-decay from the start of the sequence through each row, with a row of zeros in front.
    total = torch.cat([a.new_zeros(1, heads, channels), a.cumsum(0)])
    out = torch.zeros_like(v)
    state = v.new_zeros(len(bounds), heads, columns, channels)
    step = max(1, PAIRS_AT_ONCE // heads)
    for first in range(0, len(spans.sequence), step):
        s = slice(first, first + step)
        rows, valid, middle, start = spans.rows[s], spans.valid[s], spans.middle[s], spans.start[s]
        mask = valid[:, None, :, None]
        q_s, k_s, v_s, b_s, total_s = (x[rows].transpose(1, 2) for x in (q, k, v, b, total[1:]))
        k_s, v_s = k_s.where(mask, 0.0), v_s.where(mask, 0.0)
        # Anchored between the two chunks, 5 x 64 either way: exp and its square are within the range of float64.
        G = (total_s - total[middle][:, :, None]).where(mask, 0.0)
        k_in, k_out = k_s * (-G).exp(), k_s * G.exp()
        bv = (b_s * v_s).square()
        predicted = torch.minimum((k_out @ k_in.mT).tril(-1).square() @ bv, bv.cummax(2).values)
        predicted = predicted + (k_out.square() @ k_in.square().mT).tril(-1) @ bv
        from_state = 0.0
        if inputs.initial_state is not None:
            S0 = inputs.initial_state[spans.sequence[s]].double()
            whole = (total_s - total[start][:, :, None]).where(mask, 0.0).exp()
            squares = S0.square().mT
            predicted = predicted + ((k_s * whole) @ S0.mT).square() + (k_s * whole).square() @ squares
            from_state = (q_s * whole)[:, :, CHUNK:].square() @ squares
        u = b_s.square() * (v_s.square() + predicted)

        q_out = q_s[:, :, CHUNK:] * G[:, :, CHUNK:].exp()
        weights = (q_out @ k_in.mT).square() + q_out.square() @ k_in.square().mT
        variance = weights.tril(CHUNK) @ u + from_state
        own = valid[:, CHUNK:]
        out[rows[:, CHUNK:][own]] = (inputs.scale * ROUNDING) ** 2 * variance.transpose(1, 2)[own]

        to_end = (total[spans.end[s]][:, :, None] - total_s).where(mask, 0.0)[:, :, CHUNK:]
        k_end = k_s[:, :, CHUNK:] * to_end.exp()
        state.index_add_(0, spans.sequence[s], ROUNDING**2 * (u[:, :, CHUNK:].mT @ k_end.square()))
    return out.view(inputs.v.shape), state


def operands(inputs) -> tuple[torch.Tensor, ...]:
    """Normalised q and k, v, sigmoid of beta [R, H, 1] and log-decay of docs/operator.md: float64, R = B * T rows."""
    names = ("q", "k", "v", "g", "beta")
    q, k, v, g, beta = (getattr(inputs, name).double().flatten(0, 1) for name in names)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    a = inputs.lower_bound * torch.sigmoid(inputs.A_log.double().exp()[:, None] * (g + inputs.dt_bias.double()))
    return q, k, v, torch.sigmoid(beta)[..., None], a


@dataclass(frozen=True)
class Spans:
    """For every chunk of every sequence, its tokens (the second half of a span) and those of the chunk before it."""

    sequence: torch.Tensor  # [n] int64
    rows: torch.Tensor  # [n, 2 * CHUNK] int64, 0 where there is no token
    valid: torch.Tensor  # [n, 2 * CHUNK] bool
    start: torch.Tensor  # [n] row at which the sequence starts
    middle: torch.Tensor  # [n] row at which the chunk starts
    end: torch.Tensor  # [n] one past the last row of the sequence

    @staticmethod
    def of(bounds: list[tuple[int, int]], device: torch.device) -> Spans:
        starts, ends = torch.tensor(bounds, dtype=torch.int64).reshape(-1, 2).unbind(1)
        counts = (ends - starts + CHUNK - 1) // CHUNK
        sequence = torch.repeat_interleave(torch.arange(len(bounds)), counts)
        index = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
        start, end = starts[sequence], ends[sequence]
        middle = start + CHUNK * index
        rows = middle[:, None] + torch.arange(-CHUNK, CHUNK)
        valid = (rows >= start[:, None]) & (rows < end[:, None])
        return Spans(*(x.to(device) for x in (sequence, rows.where(valid, 0), valid, start, middle, end)))
