"""The chunk algorithm of the CUDA kernel in PyTorch: the same stages, with the same roundings, on a CPU.

Per chunk of 64 tokens, with `G_i` the cumulative log-decay inside it (base 2 in the code):

    K~_i = k^_i exp(G_i)      Q~_i = q^_i exp(G_i)      Kr_i = k^_i exp(G_C - G_i)
    L_ij = b_i (k^_i exp(G_i - G_j) . k^_j)   i > j     M_ij = q^_i exp(G_i - G_j) . k^_j   i >= j
    X = (I + L)^-1
    W = b (V - K~ S)          U = X W          O = scale (Q~ S + M U)          S <- diag(exp(G_C)) S + Kr^T U

Preparation (L, M, X and the decayed operands) needs no state and runs over all chunks at once. The recurrence (W, U, O,
S) is serial over the chunks of a sequence and runs over all sequences and heads at once.

What is rounded, and to what, is the contract with the kernel (`docs/numerics.md` has the measurements behind it):

- Accumulation, the state and everything not named here: fp32.
- `K~`, `Q~`, `Kr` and the operands of L and M between different 16-token blocks are at most about 1 in magnitude: fp16.
  Each row leaves out a power of two, see `without_unit`.
- Operands of L and M within a 16-token block span a factor of exp(80): tf32.
- `X`, `W`, `M` and `U`: tf32. A fp16 with a power of two per value column would be as accurate, but the power of two
  would depend on later tokens of the chunk, and causality holds bitwise here.
- Rows of `q` and `k` whose norm is far below 1e-3 are far below 1 even when normalised: a power of two of their own
  (`normalise`) keeps them in the range of fp16, and comes back in where the row does.
- The state as an operand: fp16, scaled by a power of two per value column that follows from the state alone.
- `U` as an operand of the state update: fp16, scaled by a power of two per value column that follows from `U` of the
  whole chunk. Only later chunks see the result, so causality is untouched.

Both scales are functions of the data of the chunk alone, never of history: a run continued from its fp32 state at a
chunk boundary gives the same bits, and values scaled by a power of two give results scaled by it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from flash_kda.formats import Format, Formats

CHUNK = 64
BLOCK = 16
BLOCKS = CHUNK // BLOCK
LOG2_E = math.log2(math.e)
NORM_EPSILON = 1e-6
MAX_RISE = 116  # of the exponent of a tiny row: 1e3 * 2^116 stays in fp32
FORMATS = Formats()
_SCALE_EXPONENT = 14  # scaled operands lie below 2^(14 + 1), half of the fp16 range
_HEADS_TIMES_CHUNKS = 256  # prepared at once: 8 MiB a tensor, which bounds memory and stays near the caches


@torch.autocast("cpu", enabled=False)  # the roundings below are the only ones
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KDA forward by chunks, shapes as in `flash_kda.fwd`.

    Returns `out`, bf16 `[B, T, H, V]`, and the final state, fp32 `[N, H, V, K]`.
    """
    batch, tokens, heads, _ = q.shape
    if cu_seqlens is None:
        bounds = [(row * tokens, (row + 1) * tokens) for row in range(batch)]
    else:
        offsets = cu_seqlens.tolist()
        bounds = list(itertools.pairwise(offsets))
    out = torch.empty(batch * tokens, heads, v.shape[-1], dtype=torch.bfloat16, device=q.device)
    state = torch.zeros(len(bounds), heads, v.shape[-1], q.shape[-1], dtype=torch.float32, device=q.device)
    if initial_state is not None:
        state.copy_(initial_state)
    for n in _sequence_groups(bounds):
        chunks = Chunks.of(bounds[n], q.device)
        rows = chunks.rows[chunks.valid]
        group = max(1, _HEADS_TIMES_CHUNKS // max(1, chunks.count))
        for first in range(0, heads, group):
            h = slice(first, first + group)
            gathered = [chunks.gather(x[:, :, h]) for x in (q, k, v, g, beta)]
            prepared = prepare(*gathered, A_log[h], dt_bias[h], lower_bound, chunks.valid)
            o = recur(prepared, state[n, h], chunks)
            out[rows, h] = (o.transpose(1, 2)[chunks.valid] * scale).to(torch.bfloat16)
    return out.view(v.shape), state


def _sequence_groups(bounds: list[tuple[int, int]]) -> Iterator[slice]:
    """Runs of sequences with few enough chunks to be prepared at once, so that memory stays bounded."""
    first, count = 0, 0
    for n, (start, end) in enumerate(bounds):
        chunks = -(-(end - start) // CHUNK)
        if n > first and count + chunks > _HEADS_TIMES_CHUNKS:
            yield slice(first, n)
            first, count = n, 0
        count += chunks
    if bounds:
        yield slice(first, len(bounds))


@dataclass(frozen=True)
class Chunks:
    """How the tokens of all sequences fall into chunks of 64; the last one of a sequence may be short.

    rows: `[count, 64]` int64, row in the flattened `[B * T]` axis; 0 where there is no token.
    valid: `[count, 64]` bool, whether there is a token.
    steps: for the c-th chunk of every sequence that has one: (sequences, chunks), int64 vectors of equal length.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    steps: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @staticmethod
    def of(bounds: list[tuple[int, int]], device: torch.device) -> Chunks:
        start, end = torch.tensor(bounds, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
        counts = (end - start + CHUNK - 1) // CHUNK
        sequence = torch.repeat_interleave(torch.arange(len(bounds), device=device), counts)
        first_chunk = counts.cumsum(0) - counts
        position = torch.arange(len(sequence), device=device) - first_chunk[sequence]
        rows = (start[sequence] + CHUNK * position)[:, None] + torch.arange(CHUNK, device=device)
        valid = rows < end[sequence][:, None]
        steps = []
        for c in range(int(counts.max()) if len(bounds) else 0):
            active = (counts > c).nonzero()[:, 0]
            steps.append((active, first_chunk[active] + c))
        return Chunks(rows.where(valid, 0), valid, steps)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, H, ...]` to fp32 `[count, H, 64, ...]`; zero where there is no token, whatever lies there."""
        rows = x.reshape(-1, *x.shape[2:])[self.rows].float()
        mask = self.valid.view(*self.valid.shape, *[1] * (x.dim() - 2))
        return rows.where(mask, 0.0).transpose(1, 2)


@dataclass(frozen=True)
class Prepared:
    """What the recurrence needs of each chunk: operands rounded as the MMAs take them; `n` chunks, `h` heads."""

    K: torch.Tensor  # K~ [n, h, 64, K]
    Q: torch.Tensor  # Q~ [n, h, 64, K]
    Kr: torch.Tensor  # [n, h, 64, K]
    X: torch.Tensor  # [n, h, 64, 64]
    M: torch.Tensor  # [n, h, 64, 64]
    V: torch.Tensor  # [n, h, 64, V], as given
    b: torch.Tensor  # sigmoid(beta) [n, h, 64]
    # Powers of two that the operands leave out, `[n, h, 64, 1]`, see `normalise` and `without_unit`
    q_unit: torch.Tensor  # the rows of both Q~ and M
    Q_unit: torch.Tensor  # Q~ alone
    K_unit: torch.Tensor
    Kr_unit: torch.Tensor
    decay: torch.Tensor  # exp(G_C) [n, h, K]


def prepare(q, k, v, g, beta, A_log, dt_bias, lower_bound, valid) -> Prepared:
    """Everything that needs no state, for `n` chunks at once.

    Shapes: q, k, v, g `[n, h, 64, D]` and beta `[n, h, 64]` in fp32, zero where `valid` (`[n, 64]`) is False;
    A_log `[h]`, dt_bias `[h, K]`.
    """
    a = log_decay(g, A_log, dt_bias, lower_bound).where(valid[:, None, :, None], 0.0)
    b = through_fp64(torch.sigmoid, beta).where(valid[:, None], 0.0)
    d = Decays.of(a)
    (q, q_unit), (k, k_unit) = normalise(q), normalise(k)
    q, k, k_blocks_unit = to_blocks(q), to_blocks(k), to_blocks(k_unit)

    def whole(x):
        return x.flatten(2, 3)

    k_row, k_row_unit = without_unit(k * d.from_start)
    q_row, q_row_unit = without_unit(q * d.from_start)
    k_end, k_end_unit = without_unit(k * d.to_end)
    columns = Operand(k / d.from_start, k_end, k_blocks_unit, k_blocks_unit * k_end_unit)
    k_rows = Operand(k_row, k_row, k_row_unit, k_row_unit)
    q_rows = Operand(q_row, q_row, q_row_unit, q_row_unit)
    L = b[..., None] * k_unit * stage_L(k_rows, columns, d.block)
    K, K_unit = without_unit(k_row * d.before)
    Q, Q_unit = without_unit(q_row * d.before)
    Kr, Kr_unit = without_unit(k_end * d.after)
    return Prepared(
        K=whole(FORMATS.K(K)),
        Q=whole(FORMATS.Q(Q)),
        Kr=whole(FORMATS.Kr(Kr)),
        X=FORMATS.X(stage_X(L)),
        M=FORMATS.M(stage_M(q_rows, columns, d.block)),
        V=v,
        b=b,
        q_unit=q_unit,
        Q_unit=whole(q_row_unit * Q_unit),
        K_unit=k_unit * whole(k_row_unit * K_unit),
        Kr_unit=whole(columns.end_unit * Kr_unit),
        decay=d.chunk,
    )


def log_decay(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, lower_bound: float) -> torch.Tensor:
    """Log-decay of each token and channel in base 2, `[n, h, 64, K]`, in `[lower_bound * log2(e), 0]`."""
    # exp(A_log) kept finite and above zero: the sum is 0 or -inf where the gate says so, and neither may become NaN.
    rate = through_fp64(torch.exp, A_log).clamp(2.0**-126, torch.finfo(torch.float32).max)[:, None, None]
    return (lower_bound * LOG2_E) * through_fp64(torch.sigmoid, rate * (g + dt_bias[:, None]))


def normalise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x^ = x / sqrt(sum(x^2) + 1e-6) over the last dimension, as `(rows, unit)` with x^ = rows * unit.

    `unit`, `[..., 1]`, is 1 unless |x^| is below 2^-4: then it is the power of two that brings the row to about unit
    length, so that rows whose norm is far below 1e-3 keep their precision as fp16 operands. Squares that would
    overflow are taken of x * 2^-72, those that would underflow of x * 2^72.
    """
    squares = (x * x).sum(-1, keepdim=True)
    shift = torch.where(squares < 2.0**-60, 72, torch.where(squares < 2.0**120, 0, -72))
    x = torch.ldexp(x, shift)
    squares = torch.where(shift == 0, squares, (x * x).sum(-1, keepdim=True))
    inverse = torch.rsqrt(torch.where(shift < 0, squares, torch.ldexp(squares, -2 * shift.clamp_min(0)) + NORM_EPSILON))
    exponent = torch.frexp(squares * inverse * inverse).exponent - 1  # of |x^|^2, times 2^(2 shift)
    rise = torch.where(shift > 0, shift, 0) - exponent.div(2, rounding_mode="floor")
    rise = rise.clamp(0, MAX_RISE).where((squares > 0) & (exponent < -8 + 2 * shift.clamp_min(0)), 0)
    one = torch.ones_like(squares)
    return x * torch.ldexp(inverse, rise - shift.clamp_min(0)), torch.ldexp(one, -rise)


@dataclass(frozen=True)
class Decays:
    """Decay factors of each chunk; `I` runs over its four 16-token blocks. All in (0, 1] up to rounding."""

    from_start: torch.Tensor  # [n, h, 4, 16, K]: from the start of the block through the token
    to_end: torch.Tensor  # [n, h, 4, 16, K]: from after the token to the end of the block
    block: torch.Tensor  # [n, h, 4, K]: over the whole block
    before: torch.Tensor  # [n, h, 4, 1, K]: from the start of the chunk to the start of the block
    after: torch.Tensor  # [n, h, 4, 1, K]: from the end of the block to the end of the chunk
    chunk: torch.Tensor  # [n, h, K]: over the whole chunk

    @staticmethod
    def of(a: torch.Tensor) -> Decays:
        """From the log-decays `a` `[n, h, 64, K]` (base 2). 16 tokens decay by 2^-115 at most: products stay normal."""
        a = to_blocks(a)
        from_start = through_fp64(torch.exp2, a).cumprod(3)
        # The last token of a block stands for all of it, and goes into the state: taken from the sum, so that the
        # rounding of 16 factors does not add up over long sequences.
        from_start[:, :, :, -1] = through_fp64(torch.exp2, a.sum(3))
        block = from_start[:, :, :, -1]
        one = torch.ones_like(block[:, :, :1])
        before = torch.cat([one, block[:, :, :-1].cumprod(2)], 2)[:, :, :, None]
        after = torch.cat([block[:, :, 1:].flip(2).cumprod(2).flip(2), one], 2)[:, :, :, None]
        return Decays(from_start, block[:, :, :, None] / from_start, block, before, after, block.prod(2))


def without_unit(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows / unit, unit) for a power of two `unit`, `[..., 1]`: the one at or below the largest element of the row.

    So an fp16 operand keeps its precision where it has decayed far: beside a large state even that counts.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    # Where everything has decayed to zero the unit has to say so: it scales what an operand is multiplied with.
    exponent = torch.frexp(largest).exponent.where(largest > 0, -MAX_RISE).clamp_min(-MAX_RISE)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 1)
    return rows / unit, unit


def stage_L(rows: Operand, columns: Operand, block: torch.Tensor) -> torch.Tensor:
    """Strictly lower triangle of k^_i exp(G_i - G_j) . k^_j, `[n, h, 64, 64]`, before the multiplication by b_i."""
    return decayed_products(rows, columns, block).tril(-1)


def stage_M(rows: Operand, columns: Operand, block: torch.Tensor) -> torch.Tensor:
    """Lower triangle of q^_i exp(G_i - G_j) . k^_j, `[n, h, 64, 64]`."""
    return decayed_products(rows, columns, block).tril()


@dataclass(frozen=True)
class Operand:
    """Rows or columns of L and M, `[n, h, 4, 16, K]`, and the powers of two they leave out, `[n, h, 4, 16, 1]`.

    start: anchored at the start of their own block, for products inside it.
    end: anchored at the boundary between the two blocks, for products with another block.
    """

    start: torch.Tensor
    end: torch.Tensor
    start_unit: torch.Tensor
    end_unit: torch.Tensor


def decayed_products(rows: Operand, columns: Operand, block: torch.Tensor) -> torch.Tensor:
    """Products of decayed rows and columns as `[n, h, 64, 64]`; blocks above the diagonal are zero.

    On a diagonal block both sides are anchored at its start, because its end lies in the future of its rows. Between
    blocks J < I the columns are anchored at the end of block J, and the rows take on the decay of the blocks in
    between: every factor is at most 1 and depends on tokens up to the row alone.
    """
    n, h, _, _, _ = rows.start.shape
    result = rows.start.new_zeros(n, h, CHUNK, CHUNK)
    columns16 = FORMATS.between(columns.end)
    diagonal = FORMATS.diagonal(rows.start) @ FORMATS.diagonal(columns.start).mT
    diagonal = diagonal * rows.start_unit * columns.start_unit.mT
    for i in range(BLOCKS):
        i_rows = slice(BLOCK * i, BLOCK * (i + 1))
        result[:, :, i_rows, i_rows] = diagonal[:, :, i]
        anchored = rows.end[:, :, i]
        for j in reversed(range(i)):
            row, unit = without_unit(anchored)
            product = (FORMATS.between(row) @ columns16[:, :, j].mT) * unit
            product = product * rows.end_unit[:, :, i] * columns.end_unit[:, :, j].mT
            result[:, :, i_rows, BLOCK * j : BLOCK * (j + 1)] = product
            anchored = anchored * block[:, :, j : j + 1]
    return result


def stage_X(L: torch.Tensor) -> torch.Tensor:
    """X = (I + L)^-1 for strictly lower triangular L `[n, h, 64, 64]`.

    16 x 16 diagonal blocks by forward substitution in fp32; blocks below by X21 = -(X22 L21) X11, first in pairs of
    16, then of 32, with tf32 operands. Never by a power series: its terms explode and cancel on equal keys.
    """
    n, h, _, _ = L.shape
    X = L.new_zeros(n, h, CHUNK, CHUNK)
    blocks = L.unflatten(-1, (BLOCKS, BLOCK)).unflatten(2, (BLOCKS, BLOCK)).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    inverse = torch.eye(BLOCK, dtype=L.dtype, device=L.device).expand(n, h, BLOCKS, BLOCK, BLOCK).clone()
    for i in range(1, BLOCK):
        inverse[:, :, :, i] -= (blocks[:, :, :, i, :i, None] * inverse[:, :, :, :i]).sum(3)
    for i in range(BLOCKS):
        rows = slice(BLOCK * i, BLOCK * (i + 1))
        X[:, :, rows, rows] = inverse[:, :, i]
    for size in (BLOCK, 2 * BLOCK):
        for first in range(0, CHUNK, 2 * size):
            upper, lower = slice(first, first + size), slice(first + size, first + 2 * size)
            product = FORMATS.merge(X[:, :, lower, lower]) @ FORMATS.merge(L[:, :, lower, upper])
            X[:, :, lower, upper] = -(FORMATS.merge(product) @ FORMATS.merge(X[:, :, upper, upper]))
    return X


def recur(prepared: Prepared, state: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """The serial part. Updates `state`, fp32 `[N, h, V, K]`; returns O before `scale`, fp32 `[n, h, 64, V]`."""
    O = torch.empty_like(prepared.V)
    for sequences, now in chunks.steps:
        S = state[sequences]
        S16, S_unit = scaled(S, S.abs().sum(-1, keepdim=True), FORMATS.S)
        W = stage_W(prepared.V[now], prepared.b[now], prepared.K[now], S16, prepared.K_unit[now] * S_unit.mT)
        U = stage_U(prepared.X[now], W)
        from_state = (prepared.Q[now] @ S16.mT) * (prepared.Q_unit[now] * S_unit.mT)
        O[now] = prepared.q_unit[now] * (from_state + prepared.M[now] @ FORMATS.U(U))
        update = prepared.Kr_unit[now] * U
        U16, U_unit = scaled(update, update.abs().amax(-2, keepdim=True), FORMATS.U_update)
        state[sequences] = S * prepared.decay[now][:, :, None] + (U16.mT @ prepared.Kr[now]) * U_unit.mT
    return O


def stage_W(V: torch.Tensor, b: torch.Tensor, K: torch.Tensor, S16: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """W = b (V - K~ S), `[n, h, 64, V]`; K~ S is `unit` times the product of the operands."""
    return b[..., None] * (V - (K @ S16.mT) * unit)


def stage_U(X: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """U = X W, `[n, h, 64, V]`."""
    return X @ FORMATS.W(W)


def scaled(x: torch.Tensor, size: torch.Tensor, rounded: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / unit in a narrow format, unit), `unit` a power of two for which `size / unit` is in [2^14, 2^15).

    `size` bounds `|x|` and broadcasts against it. Exact under scaling by powers of two.
    """
    exponent = torch.frexp(size).exponent.clamp(-110, 127) - 1
    exponent = exponent.where(size > 0, 0)
    unit = torch.ldexp(torch.ones_like(size), exponent - _SCALE_EXPONENT)
    return rounded(x / unit), unit


def through_fp64(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function(x)` rounded once. PyTorch's own fp32 versions differ in the last bit between the vectorised part of a
    tensor and its remainder: a head alone and the same head among others would not agree.
    """
    return function(x.double()).float()


def to_blocks(x: torch.Tensor) -> torch.Tensor:
    """`[n, h, 64, K]` as `[n, h, 4, 16, K]`."""
    return x.unflatten(2, (BLOCKS, BLOCK))
