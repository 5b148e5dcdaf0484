"""Copies of the chunk form in float64, in each of which operands are rounded on other grids.

A copy rounds operand x of a head to `round(c x) / c`, with a random c in [1, 2) for each operand and head. What is
equal is rounded equally, as on hardware, and copies differ as two implementations do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fuzz.cases.inputs import Inputs
from fuzz.judging.sensitivity import PAIRS_AT_ONCE, Reference, operands

COPIES = 16

OF_COPIES = 6.5
"""Standard deviations, as the copies estimate them. Student's distribution with `COPIES` degrees of freedom exceeds it
with a probability of 4e-6 on either side."""

SEED = 29

BLOCK = 16  # tokens: a smaller triangle is inverted without products of matrices


def errors_of_copies(
    inputs: Inputs, reference: Reference, rounded: Rounding, length: int, kept: Callable = lambda error, right: error
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of copies of a calculation, by chunks of that length, that rounds; of each row what is to be `kept` of it.

    kept: given errors and exact rows, [..., V]. Returns float64 [copies, R, H, ...] of `out` and [copies, N, H, K, ...]
    of the state, which is S [K, V] here.
    """
    inputs = inputs.to(reference.out.device)
    copies = rounded.copies
    *others, a = operands(inputs)
    norms = [x / getattr(inputs, name).double().flatten(0, 1) for name, x in zip("qk", others[:2], strict=True)]
    norms = [x.nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True) for x in norms]
    q, k, v, b, qn, kn = (x.repeat(1, copies, 1) for x in (*others, *norms))  # copies side by side as heads
    exact = reference.out.flatten(0, 1)
    heads, width = v.shape[1], inputs.q.shape[2]
    of_row = kept(v[:1], v[:1]).shape[2:]
    out = v.new_zeros(len(v) + 1, heads, *of_row)  # the last row is for what is no token
    state = v.new_zeros(len(reference.state), heads, k.shape[2], *of_row)
    for group, start, end, lengths in groups(inputs.seq_ranges(), heads, v.device):
        S = v.new_zeros(len(group), heads, k.shape[2], v.shape[2])
        if inputs.initial_state is not None:
            S.copy_(inputs.initial_state[group].mT.repeat(1, copies, 1, 1))
        for first in range(0, lengths[0], length):
            n = sum(each > first for each in lengths)
            rows = start[:n, None] + first + torch.arange(min(length, lengths[0] - first), device=v.device)
            valid = rows < end[:n, None]
            tokens = [x[rows.where(valid, 0)].transpose(1, 2) for x in (q, k, v, b, a, qn, kn)]
            O, S[:n] = chunk(*(x.where(valid[:, None, :, None], 0.0) for x in tokens), S[:n], rounded)
            right = exact[rows.where(valid, 0)].transpose(1, 2).repeat(1, copies, 1, 1)
            out[rows.where(valid, len(v))] = kept(inputs.scale * O - right, right).transpose(1, 2)
        right = reference.state[group].mT.repeat(1, copies, 1, 1)
        state[group] = kept(S - right, right)
    return tuple(x.unflatten(1, (copies, width)).movedim(1, 0) for x in (out[:-1], state))


def groups(rows, heads: int, device) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]]:
    """Sequences in groups, the longest first: their numbers, first rows, last rows + 1, and their lengths."""
    order = sorted(range(len(rows)), key=lambda n: rows[n][0] - rows[n][1])
    at_once = max(1, PAIRS_AT_ONCE // heads)
    for part in (order[i : i + at_once] for i in range(0, len(order), at_once)):
        start, end = torch.tensor([rows[n] for n in part], device=device).unbind(1)
        yield torch.tensor(part, device=device), start, end, [rows[n][1] - rows[n][0] for n in part]


class ExactInverse:
    def inverse(self, L: torch.Tensor) -> torch.Tensor:
        return inverse(L)


class Rounding(ExactInverse):
    """Rounds operands to bf16, on grids that differ by copy, head and name."""

    copies = COPIES
    middle = 0.5  # where in a chunk, by its log-decay, the decay of rows and columns is counted from

    def __init__(self, heads: int, device, seed: int = SEED):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.heads, self.grids = self.copies * heads, {}

    def __call__(self, name: str, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        if name not in self.grids:
            unit = torch.rand((self.heads, 1, 1), generator=self.generator, device=x.device, dtype=torch.float64)
            self.grids[name] = 1 + unit
        return to_bits(x * self.grids[name]) / self.grids[name]


class RoundingAsGiven(ExactInverse):
    """Rounds decayed rows in the first copy and the state in the second, nothing else, on the grids that q, k and the
    initial state are on as given. What has hardly changed is rounded back to what it was, in all elements at once.
    """

    copies = 2
    middle = 0.0  # the first token of a chunk, which decays least

    def __init__(self, bits: int):
        self.bits = bits

    def __call__(self, name: str, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        of_rows, of_state = x.chunk(2, 1)
        if name == "S":
            of_state = to_bits(of_state, self.bits)
        elif norm is not None:
            norm = norm.chunk(2, 1)[0]
            of_rows = to_bits(torch.where(norm > 0, of_rows / norm, 0.0), self.bits) * norm
        return torch.cat([of_rows, of_state], 1)


LENGTHS_OF_INVERSE = (32, 64)
"""Tokens of the triangles that are inverted: where blocks meet is where the errors of merges are."""


def errors_of_inverse(inputs: Inputs, reference: Reference) -> dict[str, torch.Tensor]:
    """Errors of copies that round (I + L)^-1 and its merges to bf16, and nothing else.

    By "out" [copies, R, H, V] and "state" [copies, N, H, V, K], made once for each reference.
    """

    def made() -> dict[str, torch.Tensor]:
        rounded = RoundingOfInverse(inputs.q.shape[2], reference.out.device)
        found = [errors_of_copies(inputs, reference, rounded, length) for length in LENGTHS_OF_INVERSE]
        out, state = (torch.cat(each) for each in zip(*found, strict=True))
        return {"out": out, "state": state.mT}

    return reference.once("inverse", made)


class RoundingOfInverse(Rounding):
    """Rounds (I + L)^-1, and the operands and results of the products that it is merged by, and nothing else."""

    copies = COPIES // len(LENGTHS_OF_INVERSE)

    def __call__(self, name: str, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        return x

    def inverse(self, L: torch.Tensor) -> torch.Tensor:
        """By blocks of 16 tokens, X_ij = -X_ii sum_k L_ik X_kj for i > j; a result of odd copies is (X_ii L_ik) X_kj.

        Operands and X have grids of their own, as if each rounding erred independently of the others. The ones of the
        diagonal are rounded too: a kernel may keep the norm of a key there.
        """
        size = L.shape[-1]
        block = torch.arange(size, device=L.device) // BLOCK
        beside = L.where(block[:, None] != block, 0.0)
        blocks = inverse(L - beside)

        def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
            return super(RoundingOfInverse, self).__call__(name, x)

        diagonal, left = rounded("blocks", blocks), rounded("L of merges", beside)
        product = rounded("X L", diagonal @ left)
        odd = torch.arange(L.shape[1], device=L.device)[:, None, None] // (L.shape[1] // self.copies) % 2 == 1
        X = blocks.clone()
        for first in range(BLOCK, size, BLOCK):
            rows = slice(first, first + BLOCK)
            right = rounded("X of merges", X[..., :first, :first])
            by_left = diagonal[..., rows, rows] @ rounded("L X", left[..., rows, :first] @ right)
            X[..., rows, :first] = -torch.where(odd, product[..., rows, :first] @ right, by_left)
        return rounded("X", X)


def inverse(L: torch.Tensor) -> torch.Tensor:
    """(I + L)^-1 of strictly lower triangular L."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(eye + L, eye.expand_as(L), upper=False, unitriangular=True)


def to_bits(x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """float64 with so many bits of mantissa, to nearest; bf16 has 8. Its exponents stay: decays may leave the range of
    those of bf16.
    """
    below = 53 - bits
    return (x.view(torch.int64) + (1 << below - 1) & -(1 << below)).view(torch.float64)


def chunk(q, k, v, b, a, qn, kn, S, rounded) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk with operands rounded: O without the scale `[n, h, C, V]`, and the state after it `[n, h, K, V]`.

    Shapes and form as in `fuzz.judging.sensitivity.Step.of`, but `a`, which has the heads of one copy. qn, kn: the
    factors that normalise q and k `[n, h, C, 1]`.
    """
    G = a.cumsum(2)
    last = G[:, :, -1:]
    middle = rounded.middle * last

    def decay(x):
        return x.exp().repeat(1, rounded.copies, 1, 1)

    q, k = rounded("q", q), rounded("k", k)
    before, after = decay(G - middle), decay(middle - G)
    k_row, q_row = rounded("k_row", k * before, kn), rounded("q_row", q * before, qn)
    column = rounded("column", k * after, kn)
    before, after = decay(G), decay(last - G)
    K, Q, Kr = rounded("K", k * before, kn), rounded("Q", q * before, qn), rounded("Kr", k * after, kn)
    L = rounded("L", b * (k_row @ column.mT).tril(-1))
    M = rounded("M", (q_row @ column.mT).tril())
    X = rounded.inverse(L)
    Xb, S16 = rounded("X b", X * b.mT), rounded("S", S)
    U = rounded("U", Xb @ v - rounded("W", Xb @ K) @ S16)
    return Q @ S16 + M @ U, decay(last.mT) * S + Kr.mT @ U
