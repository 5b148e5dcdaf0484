"""The comparison of a call's results with the oracle's, by the metrics and bounds of `fuzz.judging.bounds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fuzz.cases.inputs import Inputs
from fuzz.judging import bounds, errors
from fuzz.judging.bounds import OPERANDS, TABLE
from fuzz.judging.call import Outputs, true_keys
from fuzz.judging.copies import OF_COPIES, errors_of_inverse
from fuzz.judging.errors import Grid
from fuzz.judging.sensitivity import Reference
from fuzz.judging.verdict import Check, told_apart


def written(outputs: Outputs, reference: Reference, name: str = "written") -> Check:
    """Every element is finite where the oracle's is. The outputs were poisoned, so unwritten ones are NaN."""
    lines = []
    found = {what: (result, exact) for what, result, exact in results(outputs, reference)}
    bad = {what: errors.not_written(result, exact) for what, (result, exact) in found.items()}
    failed = true_keys({what: places.any() for what, places in bad.items()})
    for what in (what for what in found if what in failed):
        index = tuple(bad[what].nonzero()[0].tolist())
        result, exact = (x[index].item() for x in found[what])
        lines.append(
            f"{what}: {int(bad[what].sum())} of {bad[what].numel()} elements are not finite, the first at {index}: "
            f"{result:g} where {exact:.4g} is right"
        )
    return Check(name, not lines, detail="; ".join(lines))


def results(outputs: Outputs, reference: Reference) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    pairs = [("out", outputs.out.to(reference.out.device), reference.out)]
    if outputs.final_state is not None:
        pairs.append(("state", outputs.final_state.to(reference.out.device), reference.state))
    return pairs


def accuracy(
    outputs: Outputs,
    inputs: Inputs,
    reference: Reference,
    name: str = "accuracy",
    operands: str = "bf16",
    inverse: str = "fp32",
) -> Check:
    """Compares with the oracle, by the metrics and bounds of `bounds.TABLE`.

    Of each metric the place is reported whose error is the largest part of what it may be. operands, inverse: the
    formats that `fuzz.targets.promises.Promises` has. What a coarse inverse costs takes longer to compute than all
    else, so it is added where an error is above the bound without it.
    """
    places = measure(outputs, inputs, reference, operands)
    found = worst(places)
    failed = [metric for metric in found if not metric.error <= metric.bound]
    if failed and inverse in bounds.COARSE:
        found = worst([widened(each, inputs, reference, inverse) for each in places])
        failed = [metric for metric in found if not metric.error <= metric.bound]
    return Check(
        name,
        not failed,
        {metric.name: metric.error for metric in found},
        {metric.name: metric.bound for metric in found},
        "; ".join(beyond(m.name, m.error, m.bound, m.place()) for m in failed),
        {metric.name: metric.rounding for metric in found},
    )


def beyond(name: str, error: float, bound: float, place: str) -> str:
    """A sentence about an error that is larger than its bound."""
    error_shown, bound_shown = told_apart(error, bound)
    return f"{name} {error_shown} at {place}, at most {bound_shown} allowed"


@dataclass(frozen=True)
class Metric:
    """The place of one metric where the error is the largest share of its bound. Both leave out the last rounding.

    rounding: part of error and bound that is the last rounding of the exact result.
    place: gives the name of the place. It takes time, so only failures ask for it.
    """

    name: str
    error: float
    bound: float
    rounding: float
    place: Callable[[], str]


@dataclass(frozen=True)
class Limits:
    """The bounds of all places of one metric: tensors of one shape, or broadcast to it. See `fuzz.judging.bounds`.

    They follow from the reference alone, which keeps them for all results that are compared with it.

    size: from the errors of elements to those of places.
    rounding: part of an error that is the last rounding's.
    deviation: standard deviation of the rest.
    share: that of the largest independent error.
    unit: errors are shown relative to it.
    where: from indices to the name of the place.
    """

    name: str
    size: Callable[[torch.Tensor], torch.Tensor]
    rounding: torch.Tensor
    deviation: torch.Tensor
    share: torch.Tensor
    floor: torch.Tensor
    room: torch.Tensor  # what is allowed beyond the last rounding, greater than 0
    allowed: torch.Tensor
    unit: torch.Tensor
    where: Callable[..., str]


@dataclass(frozen=True)
class Places(Limits):
    """The errors of one result beside their limits."""

    error: torch.Tensor


def measure(outputs: Outputs, inputs: Inputs, reference: Reference, operands: str = "bf16") -> list[Places]:
    """The errors and what they may be, by the metrics of `bounds.TABLE`; none of a tensor without elements.

    inputs: those of the reference.
    """
    found = []
    for what, result, exact in results(outputs, reference):
        if result.numel():
            difference = errors.difference(result, exact)
            if what == "out":
                difference = difference.flatten(0, 1)
            for limits in limits_of(what, result.dtype, inputs, reference, operands):
                found.append(Places(**vars(limits), error=limits.size(difference)))
    return found


def widened(places: Places, inputs: Inputs, reference: Reference, inverse: str) -> Places:
    """With room for what rounding of the inverse makes: the mean error of the copies and `OF_COPIES` times its spread.

    Copies of equal rows err alike, so no number of independent errors is counted.
    """
    copies = errors_of_inverse(inputs, reference)["out" if places.name.startswith("out") else "state"]
    sizes = torch.stack([places.size(copy) for copy in copies])
    more = bounds.OPERANDS[inverse] * (sizes.mean(0) + OF_COPIES * sizes.std(0))
    return replace(places, room=places.room + more, allowed=places.allowed + more)


def limits_of(what: str, dtype: torch.dtype, inputs: Inputs, reference: Reference, operands: str) -> list[Limits]:
    function = limits_of_out if what == "out" else limits_of_state
    return reference.once((what, dtype, operands), lambda: function(dtype, inputs, reference, OPERANDS[operands]))


def limits_of_out(dtype: torch.dtype, inputs: Inputs, reference: Reference, part: float) -> list[Limits]:
    rows = inputs.seq_ranges()
    grid = grid_of(inputs, reference)
    exact, moves = reference.out.flatten(0, 1), reference.out_moves.flatten(0, 1)
    rounding = errors.difference(exact.to(dtype), exact)

    def by_head(x):
        return errors.pool(x, grid.sequence_of_row, grid.rows_of_sequence)

    def by_window(x):
        return errors.pool(x, grid.window_of_row, grid.rows_of_window)

    scale, head_moves = by_head(exact), by_head(moves)
    floor = bounds.SMALLEST + bounds.UNDERFLOW * abs(inputs.scale) * magnitude(inputs, reference)
    n = grid.sequence_of_window
    row = grid.sequence_of_row
    tokens = grid.rows_of_sequence.to(exact)

    def where_window(w, h):
        first = int(grid.window_of_row.eq(w).nonzero()[0])
        start = rows[int(n[w])][0]
        return f"sequence {int(n[w])}, head {h}, tokens {first - start} to {first - start + errors.WINDOW - 1}"

    def where_element(r, h, v):
        return f"sequence {int(row[r])}, token {r - rows[int(row[r])][0]}, head {h}, column {v}"

    def metric(name, *sizes):
        return limited(name, TABLE[name, dtype], part, *sizes)

    # Squares, relative to the largest so that they do not underflow.
    by_token = (moves / moves.amax().clamp_min(bounds.SMALLEST)).square().sum(-1)
    window = grid.window_of_row[:, None].expand_as(by_token)
    empty = by_token.new_zeros(grid.windows, by_token.shape[1])
    share = largest_share(empty.scatter_reduce(0, window, by_token, "amax"), empty.scatter_add(0, window, by_token))
    return [
        metric(
            "out",
            whole_tensor,
            errors.rms,
            tokens.max(),
            *map(errors.rms, (rounding, exact, moves)),
            floor.max(),
            largest_share(by_token.amax(), by_token.sum()),
        ),
        metric(
            "out_window",
            where_window,
            by_window,
            tokens[n][:, None],
            by_window(rounding),
            scale[n],
            torch.maximum(by_window(moves), head_moves[n]),
            floor[n],
            share,
        ),
        metric(
            "out_element",
            where_element,
            torch.abs,
            tokens[row][:, None, None],
            rounding.abs(),
            scale[row][..., None],
            moves + torch.maximum(moves, head_moves[row][..., None]),
            floor[row][..., None],
            torch.ones_like(scale[:1, :1, None]),
        ),
    ]


def limits_of_state(dtype: torch.dtype, inputs: Inputs, reference: Reference, part: float) -> list[Limits]:
    exact, moves = reference.state, reference.state_moves
    rounding = errors.difference(exact.to(dtype), exact)

    def by_head(x):
        return x.square().mean((2, 3)).sqrt()

    scale, head_moves = by_head(exact), by_head(moves)
    floor = bounds.SMALLEST + bounds.UNDERFLOW * magnitude(inputs, reference)
    tokens = grid_of(inputs, reference).rows_of_sequence.to(exact)

    def metric(name, *sizes):
        return limited(name, TABLE[name, dtype], part, *sizes)

    by_channel = (moves / moves.amax().clamp_min(bounds.SMALLEST)).square().sum(2)
    return [
        metric(
            "state",
            whole_tensor,
            errors.rms,
            tokens.max(),
            *map(errors.rms, (rounding, exact, moves)),
            floor.max(),
            largest_share(by_channel.amax(), by_channel.sum()),
        ),
        metric(
            "state_head",
            "sequence {}, head {}".format,
            by_head,
            tokens[:, None],
            by_head(rounding),
            scale,
            head_moves,
            floor,
            largest_share(by_channel.amax(-1), by_channel.sum(-1)),
        ),
        metric(
            "state_element",
            "sequence {}, head {}, column {}, channel {}".format,
            torch.abs,
            tokens[:, None, None, None],
            rounding.abs(),
            scale[:, :, None, None],
            moves + torch.maximum(moves, head_moves[:, :, None, None]),
            floor[:, :, None, None],
            torch.ones_like(scale[:1, :1, None, None]),
        ),
    ]


def largest_share(largest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """What part of a sum its largest term is; all of it where the sum is zero."""
    return torch.where(total > 0, largest / total, 1.0)


def whole_tensor() -> str:
    return "the whole tensor"


def limited(name, bound, part, where, size, tokens, rounding, scale, moves, floor, share) -> Limits:
    deviation = (bound.arithmetic + bounds.PER_TOKEN * tokens) * scale + bound.operands * part * moves
    room = bounds.tail(share) * deviation + floor
    allowed = rounding + room
    unit = torch.maximum(scale, floor).expand_as(allowed)
    return Limits(name, size, rounding, deviation, share, floor, room, allowed, unit, where)


def worst(measured: Sequence[Places]) -> list[Metric]:
    """The worst place of each metric. The device is waited for once for all of them."""
    if not measured:
        return []
    numbers = []
    for places in measured:
        index = ((places.error - places.rounding) / places.room).argmax()
        of_place = (places.error, places.allowed, places.rounding.expand_as(places.allowed), places.unit)
        numbers += [x.take(index) for x in of_place] + [index.double()]
    found = []
    for places, row in zip(measured, torch.stack(numbers).view(-1, 5).tolist(), strict=True):
        error, allowed, rounding, unit, index = row
        place = partial(place_of, places, int(index))
        found.append(Metric(places.name, error / unit, allowed / unit, rounding / unit, place))
    return found


def place_of(places: Places, index: int) -> str:
    shape = places.error.shape
    indices = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)] if shape else []
    return places.where(*indices)


def grid_of(inputs: Inputs, reference: Reference) -> Grid:
    return reference.once("grid", lambda: Grid.of(inputs.seq_ranges(), reference.out.device))


def magnitude(inputs: Inputs, reference: Reference) -> torch.Tensor:
    """The largest |v| and |initial state| of each sequence and head together, float64 [N, H]."""

    def largest():
        device, grid = reference.out.device, grid_of(inputs, reference)
        rows = inputs.v.to(device).flatten(0, 1).abs().amax(-1).double()
        size = rows.new_zeros(grid.sequences, rows.shape[1])
        size.scatter_reduce_(0, grid.sequence_of_row[:, None].expand_as(rows), rows, "amax")
        if inputs.initial_state is not None:
            size += inputs.initial_state.to(device).abs().amax((2, 3)).double()
        return size

    return reference.once("magnitude", largest)
