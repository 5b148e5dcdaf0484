"""The chunk algorithm of the CUDA kernel in PyTorch: the same stages, with the same roundings, on a CPU.

Per chunk of 32 tokens, with `G_i` the cumulative log-decay inside it (base 2 in the code):

    K~_i = k^_i exp(G_i)      Q~_i = q^_i exp(G_i)      Kr_i = k^_i exp(G_C - G_i)
    L_ij = b_i (k^_i exp(G_i - G_j) . k^_j)   i > j     M_ij = q^_i exp(G_i - G_j) . k^_j   i >= j
    X = (I + L)^-1            W = X diag(b) K~
    U = X diag(b) V - W S     O = scale (Q~ S + M U)    S <- diag(exp(G_C)) S + Kr^T U

Preparation (L, M, X, W and the decayed operands) needs no state and runs over all chunks at once. The recurrence (U, O,
S) is serial over the chunks of a sequence and runs over all sequences and heads at once.

Few operands are normalised: with k^ = kn k and q^ = qn q, the factors of the rows multiply results instead. In the code
Q~, Kr, L and M are those of k and q as given, or times a power of two (see `normalise`). In L, `kn_i` joins `b_i`. The
factor `kn` of the columns of L and M and of Kr is in the rows of X (see `stage_X`), so in those of W and U; `qn` joins
`scale`. K~ alone is that of k^.

Sequences of up to 16 tokens are computed token by token in fp32, as the definition has it (`recur_by_tokens`). Nothing
but the length of the sequence decides.

What is rounded, and to what, is the contract with the kernel (`docs/numerics.md` has the measurements behind it):

- Accumulation, the state and everything not named here: fp32.
- Decayed rows and columns, `M`, `W`, `U` and the state as an operand: bf16, rounded once. Decays inside a block span a
  factor of exp(80), and values have any size; bf16 has the exponents of fp32, so no operand needs a scale.
- `X`, and the operands of the products that merge its blocks: tf32, because their sums nearly cancel on similar keys.
- `X diag(b)`, which multiplies K~ and V: the sum of two numbers of bf16, 16 bits of mantissa, for the same reason. So
  both products are those of bf16 operands, and values are exact.

No rounding depends on later tokens, on other value columns or on history: causality holds bitwise, a run continued from
its fp32 state at a chunk boundary gives the same bits if both parts have more than 16 tokens, and values times a power
of two give results times it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from flash_kda.formats import Formats, two_tf32

CHUNK = 32
BLOCK = 16
BLOCKS = CHUNK // BLOCK
SHORT = 16  # tokens of the longest sequence that is computed token by token
LOG2_E = math.log2(math.e)
NORM_EPSILON = 1e-6
FORMATS = Formats()
_HEADS_TIMES_CHUNKS = 512  # prepared at once: 8 MiB a tensor, which bounds memory and stays near the caches


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
    """KDA forward by chunks, or by tokens where a sequence is short; shapes as in `flash_kda.fwd`.

    Returns `out`, bf16 `[B, T, H, V]`, and the final state, fp32 `[N, H, V, K]`. Rows of `out` that belong to no
    sequence hold anything.
    """
    ranges = _ranges(q, cu_seqlens)
    state = q.new_zeros(len(ranges), q.shape[2], v.shape[-1], q.shape[-1], dtype=torch.float32)
    if initial_state is not None:
        state.copy_(initial_state)
    return _run(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, state, ranges), state


@torch.autocast("cpu", enabled=False)
def checkpoints(
    q, k, v, g, beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, checkpoint_offsets
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """States inside sequences, arguments as in `flash_kda.fwd`: each is the final state of a call on the prefix.

    Returns an index of `checkpoint_offsets` (int64 vectors, one for each axis) and the states there, fp32
    `[M, H, V, K]`. It leaves out offsets that lie outside their sequence.
    """
    starts, ends = torch.tensor(_ranges(q, cu_seqlens), device=q.device).reshape(-1, 2).unbind(1)
    by_sequence = (-1, *[1] * (checkpoint_offsets.dim() - 1))
    inside = (checkpoint_offsets > 0) & (checkpoint_offsets <= (ends - starts).view(by_sequence))
    index = inside.nonzero().unbind(1)
    start = starts[index[0]]
    ranges = list(zip(start.tolist(), (start + checkpoint_offsets[index]).tolist(), strict=True))
    state = q.new_zeros(len(ranges), q.shape[2], v.shape[-1], q.shape[-1], dtype=torch.float32)
    if initial_state is not None:
        state.copy_(initial_state[index[0]])
    _run(q, k, v, g, beta, 1.0, A_log, dt_bias, lower_bound, state, ranges)
    return index, state


def _ranges(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int]]:
    """First row and last row + 1 of each sequence, in the flattened `[B * T]` axis."""
    batch, tokens = q.shape[:2]
    offsets = [row * tokens for row in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    return list(itertools.pairwise(offsets))


def _run(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, state, ranges) -> torch.Tensor:
    """Runs sequences with these ranges, which may share rows, and updates `state`, fp32 `[N, H, V, K]`.

    Returns `out`; rows of no sequence are left as they were allocated.
    """
    batch, tokens, heads, _ = q.shape
    A_log, dt_bias = A_log.reshape(heads), dt_bias.reshape(heads, q.shape[-1])
    out = torch.empty(batch * tokens, heads, v.shape[-1], dtype=torch.bfloat16, device=q.device)
    for n in _sequence_groups(ranges):
        chunks = Chunks.of(ranges[n], q.device)
        rows = chunks.rows[chunks.valid]
        group = max(1, _HEADS_TIMES_CHUNKS // max(1, chunks.count))
        for first in range(0, heads, group):
            h = slice(first, first + group)
            gathered = [chunks.gather(x[:, :, h]) for x in (q, k, v, g, beta)]
            prepared = prepare(*gathered, A_log[h], dt_bias[h], lower_bound, chunks.valid)
            o = recur(prepared, state[n, h], chunks) * (scale * prepared.qn)
            out[rows, h] = o.transpose(1, 2)[chunks.valid].to(torch.bfloat16)
    short = [n for n, (start, end) in enumerate(ranges) if 0 < end - start <= SHORT]
    group = max(1, _HEADS_TIMES_CHUNKS // max(1, heads))
    for n in (short[first : first + group] for first in range(0, len(short), group)):
        of_n = [ranges[each] for each in n]
        state[n] = recur_by_tokens(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, state[n], of_n, out)
    return out.view(v.shape)


def _sequence_groups(ranges: list[tuple[int, int]]) -> Iterator[slice]:
    """Runs of sequences with few enough chunks to be prepared at once, so that memory stays bounded."""
    first, count = 0, 0
    for n, (start, end) in enumerate(ranges):
        chunks = -(-(end - start) // CHUNK) if end - start > SHORT else 0
        if n > first and count + chunks > _HEADS_TIMES_CHUNKS:
            yield slice(first, n)
            first, count = n, 0
        count += chunks
    if ranges:
        yield slice(first, len(ranges))


@dataclass(frozen=True)
class Chunks:
    """How the tokens of all sequences fall into chunks of 32; the last one of a sequence may have fewer.

    Short sequences have no chunks.

    rows: `[count, 32]` int64, row in the flattened `[B * T]` axis; 0 where there is no token.
    valid: `[count, 32]` bool, whether there is a token.
    steps: for the c-th chunk of every sequence that has one: (sequences, chunks), int64 vectors of equal length.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    steps: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @staticmethod
    def of(ranges: list[tuple[int, int]], device: torch.device) -> Chunks:
        start, end = torch.tensor(ranges, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
        counts = ((end - start + CHUNK - 1) // CHUNK).where(end - start > SHORT, 0)
        sequence = torch.repeat_interleave(torch.arange(len(ranges), device=device), counts)
        first_chunk = counts.cumsum(0) - counts
        position = torch.arange(len(sequence), device=device) - first_chunk[sequence]
        rows = (start[sequence] + CHUNK * position)[:, None] + torch.arange(CHUNK, device=device)
        valid = rows < end[sequence][:, None]
        steps = []
        for c in range(int(counts.max()) if len(ranges) else 0):
            active = (counts > c).nonzero()[:, 0]
            steps.append((active, first_chunk[active] + c))
        return Chunks(rows.where(valid, 0), valid, steps)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, H, ...]` to fp32 `[count, H, 32, ...]`; zero where there is no token, whatever lies there."""
        rows = x.flatten(0, 1)[self.rows].float()
        mask = self.valid.view(*self.valid.shape, *[1] * (x.dim() - 2))
        return rows.where(mask, 0.0).transpose(1, 2)


@dataclass(frozen=True)
class Prepared:
    """What the recurrence needs of each chunk: operands rounded as the MMAs take them; `n` chunks, `h` heads."""

    W: torch.Tensor  # [n, h, 32, K]
    Q: torch.Tensor  # Q~ [n, h, 32, K]
    Kr: torch.Tensor  # [n, h, 32, K]
    Xb: torch.Tensor  # X diag(b) [n, h, 32, 32]
    M: torch.Tensor  # [n, h, 32, 32]
    V: torch.Tensor  # [n, h, 32, V], as given
    qn: torch.Tensor  # what q has to be multiplied by to be normalised [n, h, 32, 1]
    decay: torch.Tensor  # exp(G_C) [n, h, K]


def prepare(q, k, v, g, beta, A_log, dt_bias, lower_bound, valid) -> Prepared:
    """Everything that needs no state, for `n` chunks at once.

    Shapes: q, k, v, g `[n, h, 32, D]` and beta `[n, h, 32]` in fp32, zero where `valid` (`[n, 32]`) is False;
    A_log `[h]`, dt_bias `[h, K]`.
    """
    a = log_decay(g, A_log, dt_bias, lower_bound).where(valid[:, None, :, None], 0.0)
    b = through_fp64(torch.sigmoid, beta).where(valid[:, None], 0.0)[..., None]
    d = Decays.of(a)
    (q, qn), (k, kn) = normalise(q), normalise(k)
    q_rows, k_rows = to_blocks(q) * d.from_start, to_blocks(k) * d.from_start
    columns = to_blocks(k) * d.inverse
    X = FORMATS.X(stage_X(b * kn * stage_L(k_rows, columns, d.block), kn))
    Xb = FORMATS.Xb(X * b.mT)
    K = FORMATS.K(k_rows * d.before * to_blocks(kn)).flatten(2, 3)
    return Prepared(
        W=FORMATS.W(stage_W(Xb, K)),
        Q=FORMATS.Q(q_rows * d.before).flatten(2, 3),
        Kr=FORMATS.Kr(columns * d.block * d.after).flatten(2, 3),
        Xb=Xb,
        M=FORMATS.M(stage_M(q_rows, columns, d.block)),
        V=v,
        qn=qn,
        decay=d.chunk,
    )


def log_decay(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, lower_bound: float) -> torch.Tensor:
    """Log-decay of each token and channel in base 2, `[n, h, 32, K]`, in `[lower_bound * log2(e), 0]`.

    Each sigmoid is the sum of two numbers of tf32: 22 bits at least. The kernel has as many, in two numbers of fp16.
    """
    # exp(A_log) kept finite and above zero: the sum is 0 or -inf where the gate says so, and neither may become NaN.
    rate = through_fp64(torch.exp, A_log).clamp(2.0**-126, torch.finfo(torch.float32).max)[:, None, None]
    return (lower_bound * LOG2_E) * two_tf32(through_fp64(torch.sigmoid, rate * (g + dt_bias[:, None])))


def normalise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x^ = x / sqrt(sum(x^2) + 1e-6) over the last dimension, as `(rows, factor)` with x^ = rows * factor.

    `rows` is x itself where its norm is in [2^-8, 2^8], else x times the power of two that brings the norm to [1, 2):
    products of decayed rows then stay far from both ends of the range of fp32. `factor` is `[..., 1]`; for a row of
    zeros it is 0, where 1e3 would only take range from the values.
    """
    squares = x.double().square().sum(-1, keepdim=True)
    exponent = (torch.frexp(squares).exponent - 1).div(2, rounding_mode="floor")  # of the norm
    exponent = exponent.where((squares < 2.0**-16) | (squares > 2.0**16), 0).clamp(-116, 116)
    unit = torch.exp2(exponent.double())
    return (x / unit).float(), (unit * torch.rsqrt(squares + NORM_EPSILON)).where(squares > 0, 0.0).float()


@dataclass(frozen=True)
class Decays:
    """Decay factors of each chunk by its two 16-token blocks. All but `inverse` are in (0, 1] up to rounding."""

    from_start: torch.Tensor  # [n, h, 2, 16, K]: from the start of the block through the token
    inverse: torch.Tensor  # [n, h, 2, 16, K]: 1 / from_start, at most exp(80)
    block: torch.Tensor  # [n, h, 2, 1, K]: over the whole block
    before: torch.Tensor  # [n, h, 2, 1, K]: from the start of the chunk to the start of the block
    after: torch.Tensor  # [n, h, 2, 1, K]: from the end of the block to the end of the chunk
    chunk: torch.Tensor  # [n, h, K]: over the whole chunk

    @staticmethod
    def of(a: torch.Tensor) -> Decays:
        """From the log-decays `a` `[n, h, 32, K]` (base 2)."""
        # One after the other in fp32, as the kernel does; PyTorch's cumsum would sum in fp64.
        G = torch.stack(list(itertools.accumulate(to_blocks(a).unbind(3))), 3)
        from_start = through_fp64(torch.exp2, G)
        block = from_start[:, :, :, -1:]
        one, *before, chunk = itertools.accumulate((torch.ones_like(block[:, :, 0]), *block.unbind(2)), torch.mul)
        after = itertools.accumulate((one, *block.flip(2)[:, :, :-1].unbind(2)), torch.mul)
        return Decays(
            from_start=from_start,
            inverse=through_fp64(torch.exp2, -G),
            block=block,
            before=torch.stack([one, *before], 2),
            after=torch.stack(list(after), 2).flip(2),
            chunk=chunk.squeeze(2),
        )


def stage_L(rows: torch.Tensor, columns: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Strictly lower triangle of k_i exp(G_i - G_j) . k_j, `[n, h, 32, 32]`, before the factors b_i and kn_i."""
    return decayed_products(rows, columns, block).tril(-1)


def stage_M(rows: torch.Tensor, columns: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Lower triangle of q_i exp(G_i - G_j) . k_j, `[n, h, 32, 32]`, without the factors of the norms."""
    return decayed_products(rows, columns, block).tril()


def decayed_products(rows: torch.Tensor, columns: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Products of decayed rows and columns as `[n, h, 32, 32]`; blocks above the diagonal are zero.

    rows and columns: `[n, h, 2, 16, K]` with the decay from the start of their own block and its inverse, in fp32.
    block: `[n, h, 2, 1, K]`, the decay over each block.

    Both sides of a product have their decay counted from the same token, which no row may lie before: the start of the
    block on the diagonal, the boundary between the blocks below it. But for the columns on the diagonal, every decay is
    at most 1.
    """
    n, h, _, _, _ = rows.shape
    product = rows.new_zeros(n, h, BLOCKS, BLOCK, BLOCKS, BLOCK)
    diagonal = FORMATS.diagonal(rows) @ FORMATS.diagonal(columns).mT
    for i in range(BLOCKS):
        product[:, :, i, :, i] = diagonal[:, :, i]
    columns = columns * block
    product[:, :, 1, :, 0] = FORMATS.between(rows[:, :, 1]) @ FORMATS.between(columns[:, :, 0]).mT
    return product.flatten(4, 5).flatten(2, 3)


def stage_X(L: torch.Tensor, kn: torch.Tensor) -> torch.Tensor:
    """X = (diag(1 / kn) + L)^-1 for strictly lower triangular L `[n, h, 32, 32]` and kn `[n, h, 32, 1]`.

    With L still without the factors kn_j of its columns, this is diag(kn) (I + L diag(kn))^-1. So the rows of W and U
    carry the factor kn_j, which multiplies them wherever U is used, in M U and in Kr^T U: here it costs nothing.

    16 x 16 diagonal blocks by forward substitution in fp32; the block below by X21 = -(X22 L21) X11, with operands in
    tf32. Never by a power series: its terms explode and cancel on equal keys.
    """
    n, h, _, _ = L.shape
    X = L.new_zeros(n, h, CHUNK, CHUNK)
    blocks = L.unflatten(-1, (BLOCKS, BLOCK)).unflatten(2, (BLOCKS, BLOCK)).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    inverse = torch.eye(BLOCK, dtype=L.dtype, device=L.device).expand(n, h, BLOCKS, BLOCK, BLOCK).clone()
    for i in range(BLOCK):
        inverse[:, :, :, i] -= (blocks[:, :, :, i, :i, None] * inverse[:, :, :, :i]).sum(3)
        inverse[:, :, :, i] *= to_blocks(kn)[:, :, :, i]
    for i in range(BLOCKS):
        rows = slice(BLOCK * i, BLOCK * (i + 1))
        X[:, :, rows, rows] = inverse[:, :, i]
    upper, lower = slice(0, BLOCK), slice(BLOCK, CHUNK)
    product = FORMATS.merge(X[:, :, lower, lower]) @ FORMATS.merge(L[:, :, lower, upper])
    X[:, :, lower, upper] = -(FORMATS.merge(product) @ FORMATS.merge(X[:, :, upper, upper]))
    return X


def recur(prepared: Prepared, state: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """The serial part. Updates `state`, fp32 `[N, h, V, K]`; returns O over `scale qn`, fp32 `[n, h, 32, V]`."""
    p = prepared
    O = torch.empty_like(p.V)
    for sequences, now in chunks.steps:
        S = state[sequences]
        S16 = FORMATS.S(S)
        U = FORMATS.U(stage_U(p.Xb[now], p.V[now], p.W[now], S16))
        O[now] = p.Q[now] @ S16.mT + p.M[now] @ U
        state[sequences] = S * p.decay[now][:, :, None] + U.mT @ p.Kr[now]
    return O


def recur_by_tokens(
    q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, state, ranges: list[tuple[int, int]], out: torch.Tensor
) -> torch.Tensor:
    """The definition in fp32 for short sequences, side by side. Returns their final states, fp32 `[n, h, V, K]`.

    Inputs as in `forward`; `state` is that of these sequences before, and `ranges` are theirs. Their rows of `out`,
    `[B * T, h, V]`, are written.
    """
    start, end = torch.tensor(ranges, dtype=torch.int64, device=q.device).unbind(1)
    S = state.clone()
    for t in range(int((end - start).max())):
        now = (start + t < end).nonzero()[:, 0]
        rows = (start + t)[now]
        q_t, k_t, v_t, g_t, beta_t = (x.flatten(0, 1)[rows].float() for x in (q, k, v, g, beta))
        q_t, k_t = (row * factor for row, factor in (normalise(q_t), normalise(k_t)))
        b = through_fp64(torch.sigmoid, beta_t)[..., None]
        decay = through_fp64(torch.exp2, log_decay(g_t[:, :, None], A_log, dt_bias, lower_bound))
        S_t = S[now] * decay
        u = b * (v_t - sum_of_channels(S_t * k_t[:, :, None]))
        S[now] = S_t = S_t + u[..., None] * k_t[:, :, None]
        out[rows] = (scale * sum_of_channels(S_t * q_t[:, :, None])).to(torch.bfloat16)
    return S


def sum_of_channels(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, a power of two, in an order that does not depend on the other ones."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def stage_W(Xb: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    """W = X diag(b) K~, `[n, h, 32, K]`."""
    return Xb @ K


def stage_U(Xb: torch.Tensor, V: torch.Tensor, W: torch.Tensor, S16: torch.Tensor) -> torch.Tensor:
    """U = X diag(b) V - W S, `[n, h, 32, V]`."""
    return Xb @ V - W @ S16.mT


def through_fp64(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function(x)` rounded once. PyTorch's own fp32 versions differ in the last bit between the vectorised part of a
    tensor and its remainder: a head alone and the same head among others would not agree.
    """
    return function(x.double()).float()


def to_blocks(x: torch.Tensor) -> torch.Tensor:
    """`[n, h, 32, K]` as `[n, h, 2, 16, K]`."""
    return x.unflatten(2, (BLOCKS, BLOCK))
