"""The gain: one number for an error that all elements share, and that no single element shows.

The signed least-squares gain of a result over a set of rows (tokens of heads, or channels of states) is

    gain = sum w (result - exact) . exact  /  sum w exact . exact

with w the inverse of the variance that `fuzz.judging.sensitivity` gives a row. A scale that is 0.1 % too large has a
gain of 0.001, far below the rounding of one element of bf16. Errors of rounding have both signs: the gain that they
make falls with the root of their number. How many are independent depends on the case, as roundings of equal rows
repeat. So the chunk form is computed 16 times, with every operand rounded to bf16 on a grid of its own in each copy
(`fuzz.judging.copies`). The gains of the copies are a sample of what rounding alone makes. The copies take longer than
all other checks of a case. So they are computed only for a gain that is not small beside what rounding of independent
rows makes. docs/bounds.md has the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from fuzz.cases.inputs import Inputs
from fuzz.judging import bounds, errors
from fuzz.judging.accuracy import grid_of, magnitude, results
from fuzz.judging.call import Outputs, true_keys
from fuzz.judging.copies import COPIES, OF_COPIES, SEED, Rounding, RoundingAsGiven, errors_of_copies, errors_of_inverse
from fuzz.judging.sensitivity import LONGEST_CHUNK, ROUNDING, Reference, operands
from fuzz.judging.verdict import Check, share_of_bound

OF_ROWS = bounds.DEVIATIONS
"""Standard deviations if the errors of rows are independent: that is known from hundreds of numbers, not from 16."""

MORE = 4
"""How many times 16 copies are computed again for a gain that 16 do not explain."""

OF_MORE = 5.6
"""Standard deviations, as all 80 copies estimate them. Student's distribution with 80 degrees of freedom exceeds it
with a probability of 1.5e-7 on either side, where 16 copies and `OF_COPIES` have 4e-6."""

LENGTHS = (16, 32, 64)
UNDONE = 1.5
"""What rounding as given may make, of what it makes with the chunks of `LENGTHS`: others begin elsewhere."""

OF_ROW = 0.004
"""Relative error of a row from bf16 operands: about six roundings of `sensitivity.ROUNDING`, added in squares."""

SMALL = 0.5
"""A gain up to this part of what rounding of independent rows makes passes without copies. The bound from copies was
above it in all sets of 175 of 234 results."""

SHARP = 1000
"""Rows of `out` from which a gain of 0.1 % is looked for, however few of the rows have most of the weight."""

SOUGHT = 0.001 - SMALL * OF_ROWS * OF_ROW / SHARP**0.5
"""0.1 %, less what rounding of so many independent rows may hide of it: 0.065 %."""

PER_TOKEN = 2 * bounds.PER_TOKEN
"""fp32, token by token, where all err the same way: as much again for the product of the state and a decay just below
1. A decay of 1 - 2^-24 takes a whole unit off each element: on average 1.44 times what it should take."""

FEWEST = 128  # rows, that is tokens times heads: of fewer, the bounds of elements and windows are as sharp
EXTREME = 8  # one in so many tokens, or channels, counts as extreme


@dataclass(frozen=True)
class Rows:
    """Weighted products of each exact row with something: `[R, H]` tokens of heads or `[N, H K]` channels of states.

    weight: of the products. size: with itself. alone: the standard deviation of that with its error, if the errors of
    a row have one sign. last: with what the last rounding adds. ties: the variance of the last rounding, element by
    element. same_way: the largest that fp32 and underflow add. sets: names of sets of rows. chosen: 1 for the rows that
    each has, 0 for the others, [sets, rows]. sums: over each set, of ones and of what a gain is held to.
    """

    weight: torch.Tensor
    size: torch.Tensor
    alone: torch.Tensor
    last: torch.Tensor
    ties: torch.Tensor
    same_way: torch.Tensor
    sets: tuple[str, ...]
    chosen: torch.Tensor
    sums: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        ones = torch.ones_like(self.size)
        each = (ones, self.size, self.last, self.same_way, self.alone.square(), self.ties)
        object.__setattr__(self, "sums", torch.stack([x.flatten() for x in each]) @ self.chosen.mT)


def gain(
    outputs: Outputs,
    inputs: Inputs,
    reference: Reference,
    format: str = "bf16",
    name: str = "gain",
    *,
    inverse: str = "fp32",
) -> Check:
    """Whether the gains of `out` and of the state are what rounding explains: over all, over each head, and over tokens
    and channels where beta, the decay or a norm is extreme.

    format: of operands, and inverse: of X and its merges, as `fuzz.targets.promises.Promises` has them.
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
        if beyond(numbers):
            copies = rows.weight * reference.once("copies", lambda: copies_of_operands(inputs, reference))[what]
            numbers = gains_over(rows, shared, part, copies)
        if beyond(numbers):  # what takes several times as long as these copies
            more = rows.weight * reference.once("more copies", lambda: more_copies(inputs, reference))[what]
            copies = torch.cat([copies, more])
            make = partial(copies_as_given, inputs, reference, part)
            undone = rows.weight * reference.once(("undone", part), make)[what]
            of_inverse = None
            if inverse in bounds.COARSE:
                each = products_of_copies(what, errors_of_inverse(inputs, reference)[what], exact)
                of_inverse = bounds.OPERANDS[inverse] * rows.weight * each
            numbers = gains_over(rows, shared, part, copies, undone, of_inverse)
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
    found = rows.chosen @ shared.flatten()
    count, size, last, same_way, alone, ties = rows.sums
    size = size.clamp_min(bounds.SMALLEST)
    allowed = OF_ROWS * (part**2 * alone + ties).sqrt() + last.abs() + same_way
    most = most * (rows.size.numel() / count.clamp_min(1)).sqrt()
    return torch.stack([found / size, torch.minimum(SMALL * allowed / size, most)], 1).tolist()


def beyond(numbers: list[list[float]]) -> bool:
    """Whether a gain is larger than what is allowed, or no number."""
    return any(not abs(found) <= allowed for found, allowed in numbers)


def gains_over(
    rows: Rows,
    shared: torch.Tensor,
    part: float,
    copies: torch.Tensor,
    undone: torch.Tensor | None = None,
    of_inverse: torch.Tensor | None = None,
) -> list[list[float]]:
    """For each set of rows its gain, and the largest that is allowed.

    copies: weighted `copies_of_operands`. undone: weighted `copies_as_given`, which allow more. of_inverse: those that
    round the inverse, where it is coarse.
    """
    _, size, last, same_way, _, ties = rows.sums
    random = (part * spread(copies, rows)).square() + OF_ROWS**2 * ties
    if of_inverse is not None:
        random = random + spread(of_inverse, rows).square()
    allowed = random.sqrt() + last.abs() + same_way
    if undone is not None:
        of_lengths = (rows.chosen @ undone.flatten(1).mT).abs().unflatten(1, (len(LENGTHS), -1))
        allowed = allowed + UNDONE * of_lengths.amax(1).sum(1)
    found = rows.chosen @ shared.flatten()
    return (torch.stack([found, allowed], 1) / size.clamp_min(bounds.SMALLEST)[:, None]).tolist()


def spread(copies: torch.Tensor, rows: Rows) -> torch.Tensor:
    """How large the sum over each set of rows may be, of which copies [copies, ., .] are a sample."""
    deviations = OF_COPIES if len(copies) <= COPIES else OF_MORE
    of_copies = deviations * (rows.chosen @ copies.flatten(1).mT).square().mean(1).sqrt()
    of_rows = OF_ROWS * (rows.chosen @ copies.square().mean(0).flatten()).sqrt()
    return torch.maximum(of_copies, of_rows)


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
        sets, width = sets_of_heads(head, heads) | extremes({"channels where the decay": decay}), exact.shape[2]
    size = products(what, exact, exact)
    weight = 1 / (products(what, moves, moves) + width * (bounds.ARITHMETIC * scale + floor).square())
    weight = weight.where(size > 0, 0.0)
    alone = torch.minimum(products(what, moves, exact.abs()), OF_ROW * size)
    last = products(what, errors.difference(exact.to(dtype), exact), exact)
    ties = products(what, exact.square(), exact.square()) * (ROUNDING * torch.finfo(dtype).eps * 2**7) ** 2
    # fp32 errs in one direction where gates repeat: its errors add up, and each counts in full. An error of a decay is
    # a part of the row itself, which may be most of the state.
    arithmetic = (bounds.ARITHMETIC / 2 + PER_TOKEN * tokens) * torch.maximum(scale, (size / width).sqrt())
    same_way = (arithmetic + floor) * (width * size).sqrt()
    chosen = torch.stack([each.flatten() for each in sets.values()]).to(exact)
    weighted = (weight * x for x in (size, alone, last))
    return Rows(weight, *weighted, weight.square() * ties, weight * same_way, tuple(sets), chosen)


def products(what: str, difference: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Products of rows, `[R, H]` of `out` `[B, T, H, V]`, or `[N, H K]` of states `[N, H, V, K]`."""
    return (difference * exact).sum(-1).flatten(0, 1) if what == "out" else (difference * exact).sum(2).flatten(1)


def products_of_copies(what: str, difference: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """`products` of differences of copies, `[copies, R, H, V]` of `out`, or `[copies, N, H, V, K]` of states."""
    exact = exact.flatten(0, 1) if what == "out" else exact
    return (difference * exact).sum(-1) if what == "out" else (difference * exact).sum(3).flatten(2)


def sets_of_tokens(inputs: Inputs, a: torch.Tensor) -> dict[str, torch.Tensor]:
    beta, q, k = (getattr(inputs, name).to(a.device).double().flatten(0, 1) for name in ("beta", "q", "k"))
    head = torch.arange(beta.shape[1], device=a.device).expand_as(beta)
    by_token = {"beta": beta, "the decay": a.sum(-1), "the norm of q": q.norm(dim=-1), "the norm of k": k.norm(dim=-1)}
    sets = sets_of_heads(head, beta.shape[1])
    return sets | extremes({f"tokens where {what}": x for what, x in by_token.items()})


def sets_of_heads(head: torch.Tensor, heads: int) -> dict[str, torch.Tensor]:
    sets = {"the whole tensor": torch.ones_like(head, dtype=torch.bool)}
    return sets | ({f"head {h}": head == h for h in range(heads)} if heads > 1 else {})


def extremes(by_name: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows where each x is smallest and where it is largest; none where too many are equal for that to mean
    anything. The device is waited for once for all of them.
    """
    sets: dict[str, torch.Tensor] = {}
    for what, x in by_name.items():
        count = max(1, x.numel() // EXTREME)
        ordered = x.flatten().sort().values
        sets |= {f"{what} is small": x <= ordered[count - 1], f"{what} is large": x >= ordered[-count]}
    few = true_keys({name: 2 * chosen.sum() <= chosen.numel() for name, chosen in sets.items()})
    return {name: chosen for name, chosen in sets.items() if name in few}


# -------------------------------------------------------------------------------------- copies with other roundings


def copies_of_operands(inputs: Inputs, reference: Reference, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Copies with all operands rounded."""
    rounded = Rounding(inputs.q.shape[2], reference.out.device, seed)
    return rounded_copies(inputs, reference, rounded, LONGEST_CHUNK)


def more_copies(inputs: Inputs, reference: Reference) -> dict[str, torch.Tensor]:
    """`MORE` times as many copies again."""
    return together(copies_of_operands(inputs, reference, SEED + 1 + n) for n in range(MORE))


def copies_as_given(inputs: Inputs, reference: Reference, part: float) -> dict[str, torch.Tensor]:
    """Two copies for each length in `LENGTHS`: with decayed rows rounded, and with the state, to the format of that
    part of the errors.
    """
    rounded = RoundingAsGiven(8 - round(math.log2(part)))
    return together(rounded_copies(inputs, reference, rounded, length) for length in LENGTHS)


def together(copies: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    copies = tuple(copies)
    return {what: torch.cat([each[what] for each in copies]) for what in copies[0]}


def rounded_copies(inputs: Inputs, reference: Reference, rounded: Rounding, length: int) -> dict[str, torch.Tensor]:
    """Products of the exact rows with the errors of copies of a calculation, by chunks of that length, that rounds.

    By "out" and "state", float64 `[copies, R, H]` and `[copies, N, H K]`.
    """

    def product(error: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (error * right).sum(-1)

    out, state = errors_of_copies(inputs, reference, rounded, length, product)
    return {"out": out, "state": state.flatten(2)}
