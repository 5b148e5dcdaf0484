"""How far rounding alone moves the results of one input, whatever the implementation: the part of a bound that follows
the case.

Two movements are added in squares for every element of `out` and of the state:

- `run_copies`: how far the oracle's results move when each bf16 input moves at random by up to half a unit in its last
  place. An implementation may round normalised rows, or values times beta, to bf16 before the first product. Its
  results move as far.
- `terms`: the standard deviation of the results when both operands of every product of the chunk form are rounded to
  bf16. Moved inputs do not show all errors of such operands:
  - Zeros and the directions of one-hot rows do not change when inputs move in their last place.
  - Where tokens t and t + 1 have the same key, the recurrence corrects an error of t at t + 1. The chunk form computes
    all updates U of a chunk first, and rounds them afterwards. So its errors add up where those of the recurrence
    cancel.
  `terms` is a closed formula. So `terms` is also right for a sequence of one token, where an average over copies would
  have few random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import oracle

SEED = 20
ROUNDING = 0.0017  # relative RMS error of one rounding to bf16: uniform in half a unit, 2^-9 to 2^-8 of the value
LONGEST_CHUNK = (
    64  # tokens after which implementations correct their state at the latest: fla after 64, flash_kda after 32
)
PERTURBED_COPIES = (2, 4)  # perturbed copies: many where they cost little, to average better
ROWS_OF_COPIES = 2048  # (token, head) pairs over all copies up to which copies are added
ROWS_AT_ONCE = 1 << 18  # (token, head) pairs in one call of the oracle, to bound its memory
PAIRS_AT_ONCE = 256  # (sequence, head) pairs in one pass over a chunk form, about 3 MB each
CHUNKS_AT_ONCE = {"cpu": 8, "cuda": PAIRS_AT_ONCE}  # (chunk, head) pairs: on a CPU what the caches hold


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
        """The result of `make`, computed once for all comparisons with this reference. It depends on the case alone."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


@torch.no_grad()
def reference(inputs, device: torch.device | str) -> Reference:
    """The oracle's results for `inputs`, and how far rounding moves them. Deterministic."""
    inputs = inputs.to(device)
    rows, heads = inputs.q.shape[0] * inputs.q.shape[1], inputs.q.shape[2]
    copies = max(PERTURBED_COPIES[0], min(PERTURBED_COPIES[1], ROWS_OF_COPIES // max(rows * heads, 1) - 1))
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
    """The oracle's results for the given inputs (first) and for `copies` moved copies, as heads of one call.

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

    Where |sum_of_x| is smaller than |x|, the unit is that of `sum_of_x`. Zeros, infinities and tensors of other dtypes
    do not move. like: for each row, the number of the row whose random shifts it shares.
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
    """For each row of a bf16 tensor [..., D], the number of the first row with the same absolute values: int64."""
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

    Each rounding of a number x has an independent error of standard deviation r |x|, with r = `ROUNDING`. The error
    moves the results by a linear map. Variances are moved by the squares of the map's elements. The maps use
    E = b (V - K~ S), so that U = X E:

    - An error of X b, which is an operand of both products, moves U by the same fraction of the terms of X E.
    - An error of K~ or L moves E. An error of E moves U by X, O by M X and S' by Kr^T X.
    - An error of W moves U by the same fraction of the terms of W S.
    - An error of the operand S moves O by Q~ - M W. An error of the state itself moves S' by A = D - Kr^T W.
    - V has no error, because V is given in bf16.

    The errors of a chunk's updates lie along the chunk's keys, and the next chunk overwrites the state along keys.
    So errors of updates keep their direction for one chunk: `along` has the directions, `of_update` the variances.
    After that chunk, errors are kept as variances of elements, `apart`. The computed state, which is rounded, contains
    earlier errors. If a large state is overwritten almost exactly, these errors are much larger than the rest of the
    exact state. So the errors count as part of the rounded number.
    """
    q, k, v, b, a = operands(inputs)
    heads, columns, channels = v.shape[1], v.shape[2], k.shape[2]
    ranges = [(n, start, end) for n, (start, end) in enumerate(inputs.seq_ranges())]
    ranges.sort(key=lambda rows: rows[1] - rows[2])  # the longest first
    at_once = max(1, CHUNKS_AT_ONCE[v.device.type] // heads)
    out = v.new_zeros(len(v) + 1, heads, columns)  # the last row is for what is no token
    state = v.new_zeros(len(ranges), heads, columns, channels)
    for part in (ranges[i : i + at_once] for i in range(0, len(ranges), at_once)):
        group, start, end = torch.tensor(part, device=v.device).unbind(1)
        lengths = [end - start for _, start, end in part]
        width = min(LONGEST_CHUNK, lengths[0])
        S = v.new_zeros(len(group), heads, channels, columns)
        if inputs.initial_state is not None:
            S.copy_(inputs.initial_state[group].mT)
        S = S.flatten(0, 1)
        along = None
        moves = v.new_zeros(len(S), channels + 2 * width, columns)  # `apart`, and below it `of_update`
        for chunks in chunks_at_once(lengths, at_once):
            pairs = [(n, first) for first, count in chunks for n in range(count)]
            sequence, first = torch.tensor(pairs).to(v.device).unbind(1)
            rows = (start[sequence] + first)[:, None] + torch.arange(width, device=v.device)
            valid = rows < end[sequence][:, None]
            tokens = (x[rows.where(valid, 0)].transpose(1, 2) for x in (q, k, v, b, a))
            tokens = (x.where(valid[:, None, :, None], 0.0).flatten(0, 1) for x in tokens)
            counts = [count * heads for _, count in chunks]
            maps, along = Maps.of(*tokens, counts, along)
            variance = torch.cat([maps.step(place, S, moves) for place in places(counts)])
            variance = variance.unflatten(0, (-1, heads)).transpose(1, 2)
            out[rows.where(valid, len(v))] = (inputs.scale * ROUNDING) ** 2 * variance
        if along is not None:
            moves = moves[: len(along)]
            of_state = torch.baddbmm(moves[:, :channels], along.square(), moves[:, channels:])
            state[group[: len(along) // heads]] = ROUNDING**2 * of_state.unflatten(0, (-1, heads)).mT
    return out[:-1].view(inputs.v.shape), state


def chunks_at_once(lengths: list[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """Groups of chunks, each chunk as (first token, number of sequences that have it). The numbers of sequences in a
    group sum to at most `most`, except for a group of one chunk.

    lengths: the lengths of the sequences, the longest first.
    """
    part: list[tuple[int, int]] = []
    for first in range(0, lengths[0], LONGEST_CHUNK):
        count = sum(length > first for length in lengths)
        if part and sum(count for _, count in part) + count > most:
            yield part
            part = []
        part.append((first, count))
    if part:
        yield part


def places(counts: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


@dataclass(frozen=True)
class Maps:
    """The linear maps of many chunks, which do not depend on the state: [p, ., .] for p pairs of a chunk and a head.

    The maps of all chunks are computed together. So `step`, which goes from chunk to chunk, has few operations. On a
    GPU the launch of such an operation takes longer than the operation.
    """

    fresh: int  # number of the first pairs, which have no chunk before them
    b: torch.Tensor  # [p, C, 1]
    b2: torch.Tensor  # its squares
    v: torch.Tensor  # [p, C, V]
    Xv: torch.Tensor  # X b V [p, C, V]
    KW: torch.Tensor  # K~ and below it W = X b K~ [p, 2 C, K]
    KW2: torch.Tensor  # its squares
    X2: torch.Tensor  # squares of X [p, C, C]
    of_L: torch.Tensor  # variance of L [p, C, C]
    to_out: torch.Tensor  # to O, from the variances that U sees through X, from those of U, and from U^2 [p, C, 3 C]
    Q2: torch.Tensor  # to O from S^2 [p, C, K]
    onwards: torch.Tensor  # from the moves before the chunk to O and to `apart` [p - fresh, C + K, K + 2 C]
    before2: torch.Tensor  # squares of `along` of the chunk before [p - fresh, K, 2 C]
    KrT: torch.Tensor  # Kr^T [p, K, C]
    Kr2: torch.Tensor  # its squares
    decay: torch.Tensor  # D [p, K, 1]

    @staticmethod
    def of(q, k, v, b, a, counts: list[int], along: torch.Tensor | None) -> tuple[Maps, torch.Tensor]:
        """q, k, a [p, C, K], v [p, C, V], b [p, C, 1], all zero where there is no token.

        counts: the number of pairs of each chunk. The pairs of a chunk are the first pairs of the chunk before. along:
        the directions [most, K, 2 C] of the chunks before the given ones, or None. Returns the maps, and `along` of the
        last chunk of each pair.
        """
        G = a.cumsum(1)
        last = G[:, -1:]
        middle = last / 2  # 32 x 5 either way: exp and its square are within the range of float64
        k_row, q_row, column = k * (G - middle).exp(), q * (G - middle).exp(), k * (middle - G).exp()
        K, Q, KrT = k * G.exp(), q * G.exp(), (k * (last - G).exp()).mT
        L, M = b * (k_row @ column.mT).tril(-1), (q_row @ column.mT).tril()
        eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        X = torch.linalg.solve_triangular(eye + L, eye.expand_as(L), upper=False, unitriangular=True)
        XbKv = X @ (b * torch.cat([K, v], 2))
        W, Xv = XbKv.split([K.shape[2], v.shape[2]], 2)
        Qe, decay = Q - M @ W, last.mT.exp()
        # Of L: both operands of its sums of products, and itself, for errors that all channels have in common.
        b2, M2, column2 = b.square(), M.square(), column.square().mT
        of_L = 2 * b2 * (k_row.square() @ column2).tril(-1) + L.square()
        of_M = 2 * (q_row.square() @ column2).tril() + M2
        now = torch.cat([KrT, KrT @ X], 2)
        here, fresh = places(counts), counts[0] if along is None else 0
        earlier = [] if along is None else [along[: counts[0]]]
        before = torch.cat([*earlier, *(now[each][:n] for each, n in zip(here[:-1], counts[1:], strict=True)), now[:0]])
        along = now[: counts[0]].clone() if along is None else along.clone()
        for each, count in zip(here, counts, strict=True):
            along[:count] = now[each]
        A = decay[fresh:] * torch.eye(K.shape[2], dtype=K.dtype, device=K.device) - KrT[fresh:] @ W[fresh:]
        onwards = torch.cat([Qe[fresh:], A], 1)
        onwards = torch.cat([onwards, onwards @ before], 2).square()
        to_out = torch.cat([(M @ X).square(), M2, of_M], 2)
        KW, Q2 = torch.cat([K, W], 1), Qe.square() + Q.square()
        squares = KW.square(), X.square(), of_L, to_out, Q2, onwards, before.square()
        return Maps(fresh, b, b2, v, Xv, KW, *squares, KrT, KrT.square(), decay), along

    def step(self, place: slice, S: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
        """One chunk of the pairs at `place`: the variances of O / scale [n, C, V], in units of `ROUNDING` squared.

        Updates S [n or more, K, V] and the variances `moves`: those of elements [K, V], and below those of updates
        [2 C, V].
        """
        n, (C, K) = place.stop - place.start, self.Q2.shape[1:]
        S, moves, b2 = S[:n], moves[:n], self.b2[place]
        of_K, of_W = (self.KW[place] @ S).split(C, 1)
        E, U = self.b[place] * (self.v[place] - of_K), self.Xv[place] - of_W
        S2, E2, U2 = S.square(), E.square(), U.square()
        if place.start < self.fresh:
            K2_S2, W2_S2 = (self.KW2[place] @ S2).split(C, 1)
            of_out = of_state = None
        else:
            # The rounded state is the exact state plus an error, and the error may be the larger part.
            later = slice(place.start - self.fresh, place.stop - self.fresh)
            error = ROUNDING**2 * torch.baddbmm(moves[:, :K], self.before2[later], moves[:, K:])
            S2 = S2 + error
            by_K, by_W = (self.KW2[place] @ torch.cat([S2, error], 2)).split(C, 1)
            (K2_S2, K2_error), (W2_S2, W2_error) = (x.split(S.shape[2], 2) for x in (by_K, by_W))
            E2, U2 = E2 + b2 * K2_error, U2 + W2_error
            of_out, of_state = (self.onwards[later] @ moves).split([C, K], 1)
        of_U = torch.baddbmm(W2_S2 + U2, self.X2[place], E2)
        of_S_in_E = b2 * K2_S2
        of_E = torch.baddbmm(of_S_in_E, self.of_L[place], U2)
        out = torch.baddbmm(self.Q2[place] @ S2, self.to_out[place], torch.cat([of_E, of_U, U2], 1))
        of_Kr = self.Kr2[place] @ U2
        moves[:, :K] = of_Kr if of_state is None else of_Kr + of_state
        # An error of the operand S moves all rows of E together, but is counted row by row beside that of the state.
        moves[:, K:] = torch.cat([of_U, of_E + of_S_in_E], 1)
        S.copy_(torch.baddbmm(self.decay[place] * S, self.KrT[place], U))
        return out if of_out is None else out + of_out


def operands(inputs) -> tuple[torch.Tensor, ...]:
    """Normalised q and k, v, sigmoid of beta [R, H, 1] and log-decay of docs/operator.md: float64, R = B * T rows."""
    names = ("q", "k", "v", "g", "beta")
    q, k, v, g, beta = (getattr(inputs, name).double().flatten(0, 1) for name in names)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    limits = torch.finfo(torch.float64)
    rate = inputs.A_log.double().exp().clamp(limits.tiny, limits.max)  # the sum below may be 0 or infinite
    a = inputs.lower_bound * torch.sigmoid(rate[:, None] * (g + inputs.dt_bias.double()))
    return q, k, v, torch.sigmoid(beta)[..., None], a
