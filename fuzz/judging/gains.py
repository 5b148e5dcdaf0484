"""The gain: one number for an error that all elements share, and that no single element shows.

The signed least-squares gain of a result over a set of rows (tokens of heads, or channels of states) is

    gain = sum w (result - exact) . exact  /  sum w exact . exact

with w the inverse of the variance that `fuzz.judging.sensitivity` gives a row. A scale that is 0.1 % too large has a
gain of 0.001, far below the rounding of one element of bf16. Errors of rounding have both signs: the gain that they
make falls with the root of their number. How many are independent depends on the case, as roundings of equal rows
repeat. So the chunk form is computed `COPIES` times, with every operand rounded to bf16 on a grid of its own in each
copy: `round(c x) / c` with a random c in [1, 2) for each operand and head. What is equal is rounded equally, as on
hardware, and copies differ as two implementations do. The gains of the copies are a sample of what rounding alone
makes. The copies take longer than all other checks of a case. So they are computed only for a gain that is not small
beside what rounding of independent rows makes. docs/bounds.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fuzz.cases.inputs import Inputs
from fuzz.judging import bounds, errors
from fuzz.judging.accuracy import grid_of, magnitude, results
from fuzz.judging.call import Outputs
from fuzz.judging.sensitivity import LONGEST_CHUNK, PAIRS_AT_ONCE, ROUNDING, Reference, operands
from fuzz.judging.verdict import Check, share_of_bound

COPIES = 16

OF_COPIES = 6.5
"""Standard deviations, as the copies estimate them. Student's distribution with `COPIES` degrees of freedom exceeds it
with a probability of 4e-6 on either side."""

OF_ROWS = bounds.DEVIATIONS
"""Standard deviations if the errors of rows are independent: that is known from hundreds of numbers, not from 16."""

LENGTHS = (16, 32, 64)
UNDONE = 1.5
"""What rounding of decayed rows may make, of what it makes with the chunks of `LENGTHS`: others begin elsewhere."""

OF_ROW = 0.004
"""Relative error of a row from bf16 operands: about six roundings of `sensitivity.ROUNDING`, added in squares."""

SMALL = 0.5
"""A gain up to this part of what rounding of independent rows makes passes without copies. The bound from copies was
above it in all sets of 235 of 274 results."""

SHARP = 1000
"""Rows of `out` from which a gain of 0.1 % is looked for, however few of the rows have most of the weight."""

SOUGHT = 0.001 - SMALL * OF_ROWS * OF_ROW / SHARP**0.5
"""0.1 %, less what rounding of so many independent rows may hide of it: 0.065 %."""

FEWEST = 128  # rows, that is tokens times heads: of fewer, the bounds of elements and windows are as sharp
EXTREME = 8  # one in so many tokens, or channels, counts as extreme
SEED = 29


@dataclass(frozen=True)
class Rows:
    """Weighted products of each exact row with something: `[R, H]` tokens of heads or `[N, H K]` channels of states.

    weight: of the products. size: with itself. alone: the standard deviation of that with its error, if the errors of
    a row have one sign. last: with what the last rounding adds. ties: the variance of the last rounding, element by
    element. same_way: the largest that fp32 and underflow add. sets: of rows, bool, by name.
    """

    weight: torch.Tensor
    size: torch.Tensor
    alone: torch.Tensor
    last: torch.Tensor
    ties: torch.Tensor
    same_way: torch.Tensor
    sets: dict[str, torch.Tensor]


def gain(outputs: Outputs, inputs: Inputs, reference: Reference, format: str = "bf16", name: str = "gain") -> Check:
    """Whether the gains of `out` and of the state are what rounding explains: over all, over each head, and over tokens
    and channels where beta, the decay or a norm is extreme.
    """
    if inputs.q.shape[:3].numel() < FEWEST:
        return Check(name, True)
    part, worst, lines = bounds.OPERANDS[format], {}, []  # lines: the worst first
    for what, result, exact in results(outputs, reference):
        make = partial(rows_of, what, result.dtype, inputs, reference)
        rows = reference.once(("gain", what, result.dtype), make)
        shared = products(what, errors.difference(result, exact), exact) * rows.weight
        # Where rounding changes little of what has most weight, copies leave far less room than independent rows.
        most = SOUGHT if inputs.q.shape[:3].numel() >= SHARP else 1.0
        numbers = small_gains(rows, shared, part, most)
        if any(not abs(found) <= allowed for found, allowed in numbers):
            both = reference.once("copies", lambda: all_copies(inputs, reference))
            copies = [rows.weight * each[what] for each in both]
            found = [torch.stack(gain_over(chosen, rows, copies, shared, part)) for chosen in rows.sets.values()]
            numbers = torch.stack(found).tolist()
        for where, (found, allowed) in zip(rows.sets, numbers, strict=True):
            share = share_of_bound(abs(found), allowed)
            if not abs(found) <= allowed:
                line = f"{what} has a gain of {found:+.3%} over {where}, at most {allowed:.3%} allowed"
                lines.append((-share, line))
            if what not in worst or share > worst[what][0]:
                worst[what] = share, abs(found), allowed
    return Check(
        name,
        not lines,
        {f"{what}_gain": found for what, (_, found, _) in worst.items()},
        {f"{what}_gain": allowed for what, (_, _, allowed) in worst.items()},
        "; ".join(line for _, line in sorted(lines)[:4]),
    )


def small_gains(rows: Rows, shared: torch.Tensor, part: float, most: float) -> list[list[float]]:
    """For each set of rows its gain, and the largest that needs no copies to be explained.

    most: the largest over all rows. Over fewer rows it grows with the root of their number.
    """
    each = [shared, rows.size, rows.last, rows.same_way, rows.alone.square(), rows.ties]
    each = torch.stack([x.flatten() for x in each])
    sums = torch.stack([each @ chosen.flatten().to(each) for chosen in rows.sets.values()], 1)
    found, size, last, same_way, alone, ties = sums
    size = size.clamp_min(bounds.SMALLEST)
    allowed = OF_ROWS * (part**2 * alone + ties).sqrt() + last.abs() + same_way
    count = torch.stack([chosen.sum() for chosen in rows.sets.values()]).clamp_min(1)
    most = most * (rows.size.numel() / count).sqrt()
    return torch.stack([found / size, torch.minimum(SMALL * allowed / size, most)], 1).tolist()


def gain_over(
    chosen: torch.Tensor, rows: Rows, copies: Sequence[torch.Tensor], shared: torch.Tensor, part: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gain over a set of rows, and the largest that is allowed: scalar tensors. copies: weighted `all_copies`."""
    size = (rows.size * chosen).sum().clamp_min(bounds.SMALLEST)
    rounded, undone = (each * chosen for each in copies)
    of_copies = OF_COPIES * rounded.sum((1, 2)).square().mean().sqrt()
    of_rows = OF_ROWS * rounded.square().mean(0).sum().sqrt()
    ties = OF_ROWS * (rows.ties * chosen).sum().sqrt()
    random = ((part * torch.maximum(of_copies, of_rows)).square() + ties.square()).sqrt()
    undone = part * UNDONE * undone.sum((1, 2)).abs().amax()
    same_way = undone + (rows.last * chosen).sum().abs() + (rows.same_way * chosen).sum()
    return (shared * chosen).sum() / size, (random + same_way) / size


def rows_of(what: str, dtype: torch.dtype, inputs: Inputs, reference: Reference) -> Rows:
    exact, moves = {"out": (reference.out, reference.out_moves), "state": (reference.state, reference.state_moves)}[
        what
    ]
    inputs = inputs.to(exact.device)
    heads, channels = inputs.k.shape[2:]
    a = reference.once("log-decay", lambda: operands(inputs)[-1])
    grid = grid_of(inputs, reference)
    lost = magnitude(inputs, reference) * bounds.UNDERFLOW
    tokens = grid.rows_of_sequence.to(exact)[:, None]
    if what == "out":
        row = grid.sequence_of_row
        scale = errors.pool(exact.flatten(0, 1), row, grid.rows_of_sequence)[row]
        floor, tokens = (bounds.SMALLEST + abs(inputs.scale) * lost)[row], tokens[row]
        sets, width = sets_of_tokens(inputs, a), exact.shape[-1]
    else:
        scale = exact.square().mean((2, 3)).sqrt().repeat_interleave(channels, 1)
        floor = (bounds.SMALLEST + lost).repeat_interleave(channels, 1)
        head = torch.arange(heads, device=exact.device).repeat_interleave(channels).expand(len(exact), -1)
        decay = a.new_zeros(grid.sequences, heads, channels).index_add_(0, grid.sequence_of_row, a).flatten(1)
        sets, width = sets_of_heads(head, heads) | extremes("channels where the decay", decay), exact.shape[2]
    size = products(what, exact, exact)
    weight = 1 / (products(what, moves, moves) + width * (bounds.ARITHMETIC * scale + floor).square())
    weight = weight.where(size > 0, 0.0)
    alone = torch.minimum(products(what, moves, exact.abs()), OF_ROW * size)
    last = products(what, errors.difference(exact.to(dtype), exact), exact)
    ties = products(what, exact.square(), exact.square()) * (ROUNDING * torch.finfo(dtype).eps * 2**7) ** 2
    # fp32 errs in one direction where gates repeat: its errors add up, and each counts in full.
    arithmetic = (bounds.ARITHMETIC + bounds.PER_TOKEN * tokens) / 2 * scale
    same_way = (arithmetic + floor) * (width * size).sqrt()
    return Rows(weight, weight * size, weight * alone, weight * last, weight.square() * ties, weight * same_way, sets)


def products(what: str, difference: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Products of rows, `[R, H]` of `out` `[B, T, H, V]`, or `[N, H K]` of states `[N, H, V, K]`."""
    return (difference * exact).sum(-1).flatten(0, 1) if what == "out" else (difference * exact).sum(2).flatten(1)


def sets_of_tokens(inputs: Inputs, a: torch.Tensor) -> dict[str, torch.Tensor]:
    beta, q, k = (getattr(inputs, name).to(a.device).double().flatten(0, 1) for name in ("beta", "q", "k"))
    head = torch.arange(beta.shape[1], device=a.device).expand_as(beta)
    by_token = {"beta": beta, "the decay": a.sum(-1), "the norm of q": q.norm(dim=-1), "the norm of k": k.norm(dim=-1)}
    sets = sets_of_heads(head, beta.shape[1])
    for what, x in by_token.items():
        sets |= extremes(f"tokens where {what}", x)
    return sets


def sets_of_heads(head: torch.Tensor, heads: int) -> dict[str, torch.Tensor]:
    sets = {"the whole tensor": torch.ones_like(head, dtype=torch.bool)}
    return sets | ({f"head {h}": head == h for h in range(heads)} if heads > 1 else {})


def extremes(what: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows where x is smallest and where it is largest. None where too many are equal for that to mean anything."""
    count = max(1, x.numel() // EXTREME)
    low, high = x.flatten().kthvalue(count).values, x.flatten().kthvalue(x.numel() + 1 - count).values
    sets = {f"{what} is small": x <= low, f"{what} is large": x >= high}
    return {name: chosen for name, chosen in sets.items() if 2 * int(chosen.sum()) <= x.numel()}


# -------------------------------------------------------------------------------------- copies with other roundings


def all_copies(inputs: Inputs, reference: Reference) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies with all operands rounded, and one for each length in `LENGTHS` with decayed rows rounded."""
    copies = rounded_copies(inputs, reference, Rounding(inputs.q.shape[2], reference.out.device), LONGEST_CHUNK)
    rows = [rounded_copies(inputs, reference, RoundingOfRows(), length) for length in LENGTHS]
    return copies, {what: torch.cat([each[what] for each in rows]) for what in copies}


def rounded_copies(inputs: Inputs, reference: Reference, rounded: Rounding, length: int) -> dict[str, torch.Tensor]:
    """Products of the exact rows with the errors of copies of a calculation, by chunks of that length, that rounds.

    By "out" and "state", float64 `[copies, R, H]` and `[copies, N, H K]`.
    """
    copies = rounded.copies
    *others, a = operands(inputs)
    norms = [x / getattr(inputs, name).double().flatten(0, 1) for name, x in zip("qk", others[:2], strict=True)]
    norms = [x.nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True) for x in norms]
    q, k, v, b, qn, kn = (x.repeat(1, copies, 1) for x in (*others, *norms))  # copies side by side as heads
    exact = reference.out.flatten(0, 1)
    heads, width = v.shape[1], inputs.q.shape[2]
    out = v.new_zeros(len(v) + 1, heads)  # the last row is for what is no token
    state = v.new_zeros(len(reference.state), heads, k.shape[2])
    for group, start, end, longest in groups(inputs.seq_bounds(), heads, v.device):
        S = v.new_zeros(len(group), heads, k.shape[2], v.shape[2])
        if inputs.initial_state is not None:
            S.copy_(inputs.initial_state[group].mT.repeat(1, copies, 1, 1))
        for first in range(0, longest, length):
            n = int((end - start > first).sum())
            rows = start[:n, None] + first + torch.arange(min(length, longest - first), device=v.device)
            valid = rows < end[:n, None]
            tokens = [x[rows.where(valid, 0)].transpose(1, 2) for x in (q, k, v, b, a, qn, kn)]
            O, S[:n] = chunk(*(x.where(valid[:, None, :, None], 0.0) for x in tokens), S[:n], rounded)
            right = exact[rows.where(valid, 0)].transpose(1, 2).repeat(1, copies, 1, 1)
            out[rows.where(valid, len(v))] = ((inputs.scale * O - right) * right).sum(-1).transpose(1, 2)
        right = reference.state[group].mT.repeat(1, copies, 1, 1)
        state[group] = ((S - right) * right).sum(-1)
    by_copy = out[:-1].unflatten(1, (copies, width)).movedim(1, 0)
    return {"out": by_copy, "state": state.unflatten(1, (copies, width)).movedim(1, 0).flatten(2)}


def groups(rows, heads: int, device) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Sequences in groups, the longest first: their numbers, first rows, last rows + 1, and the longest length."""
    order = sorted(range(len(rows)), key=lambda n: rows[n][0] - rows[n][1])
    at_once = max(1, PAIRS_AT_ONCE // heads)
    for part in (order[i : i + at_once] for i in range(0, len(order), at_once)):
        start, end = torch.tensor([rows[n] for n in part], device=device).unbind(1)
        yield torch.tensor(part, device=device), start, end, rows[part[0]][1] - rows[part[0]][0]


class Rounding:
    """Rounds operands to bf16, on grids that differ by copy, head and name."""

    copies = COPIES

    def __init__(self, heads: int, device):
        self.generator = torch.Generator(device).manual_seed(SEED)
        self.heads, self.grids = self.copies * heads, {}

    def __call__(self, name: str, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        if name not in self.grids:
            unit = torch.rand((self.heads, 1, 1), generator=self.generator, device=x.device, dtype=torch.float64)
            self.grids[name] = 1 + unit
        return to_8_bits(x * self.grids[name]) / self.grids[name]


class RoundingOfRows:
    """Rounds decayed rows alone, on the grid that q and k as given are on: a decay near 1 is undone in all of them."""

    copies = 1

    def __call__(self, name: str, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        if norm is None:
            return x
        return to_8_bits(torch.where(norm > 0, x / norm, 0.0)) * norm


def to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """float64 with 8 bits of mantissa, to nearest. Its exponents stay: decays may leave the range of those of bf16."""
    below = 52 - 7
    return (x.view(torch.int64) + (1 << below - 1) & -(1 << below)).view(torch.float64)


def chunk(q, k, v, b, a, qn, kn, S, rounded) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk with operands rounded: O without the scale `[n, h, C, V]`, and the state after it `[n, h, K, V]`.

    Shapes and form as in `fuzz.judging.sensitivity.Step.of`, but `a`, which has the heads of one copy. qn, kn: the
    factors that normalise q and k `[n, h, C, 1]`.
    """
    G = a.cumsum(2)
    last = G[:, :, -1:]
    middle = last / 2

    def decay(x):
        return x.exp().repeat(1, rounded.copies, 1, 1)

    if rounded.copies > 1:
        q, k = rounded("q", q), rounded("k", k)
    else:
        middle = torch.zeros_like(middle)  # as the first token of a chunk has it, which decays least
    before, after = decay(G - middle), decay(middle - G)
    k_row, q_row = rounded("k_row", k * before, kn), rounded("q_row", q * before, qn)
    column = rounded("column", k * after, kn)
    before, after = decay(G), decay(last - G)
    K, Q, Kr = rounded("K", k * before, kn), rounded("Q", q * before, qn), rounded("Kr", k * after, kn)
    L = rounded("L", b * (k_row @ column.mT).tril(-1))
    M = rounded("M", (q_row @ column.mT).tril())
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    X = torch.linalg.solve_triangular(eye + L, eye.expand_as(L), upper=False, unitriangular=True)
    Xb, S16 = rounded("X b", X * b.mT), rounded("S", S)
    U = rounded("U", Xb @ v - rounded("W", Xb @ K) @ S16)
    return Q @ S16 + M @ U, decay(last.mT) * S + Kr.mT @ U
