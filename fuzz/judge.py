"""The judge: runs a target, compares its results with the oracle's and checks properties, and says what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from fuzz import bounds, errors
from fuzz.bounds import OPERANDS, TABLE
from fuzz.errors import Grid
from fuzz.inputs import TENSORS, Inputs
from fuzz.sensitivity import Reference, reference

__all__ = ["Check", "Outputs", "Reference", "Verdict", "accuracy", "judge", "reference", "run_target"]

GUARD = 64 * 128  # elements of NaN on either side of every written tensor: one chunk of one head


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    errors and bounds: by metric, relative to the RMS of the sequence and head (of the whole tensor for `out` and
    `state`); always finite. detail: for a person, what differs, by how much, where, and what was allowed.
    """

    name: str
    passed: bool
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict:
        """For JSON."""
        return {"checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_dict(cls, data: Mapping) -> Verdict:
        return cls(tuple(Check(**check) for check in data["checks"]))


@dataclass(frozen=True)
class Outputs:
    """What one call wrote: `out` [B, T, H, V], `final_state` [N, H, V, K] or None.

    touched: inputs that the call changed. overrun: written tensors around which it wrote as well.
    """

    out: torch.Tensor
    final_state: torch.Tensor | None
    touched: tuple[str, ...] = ()
    overrun: tuple[str, ...] = ()


def judge(
    target, case, inputs: Inputs, reference: Reference | None, properties: Sequence[str], operands: str = "bf16"
) -> Verdict:
    """Runs `target` on `inputs` (on its device) and checks it, then each of `properties` (names in `fuzz.checks`).

    reference: None where the oracle is too slow; then only the properties are checked. operands: one of
    `bounds.OPERANDS`, the format that the target claims for its products. What the target raises passes through.
    """
    from fuzz.checks import CHECKS

    outputs = run_target(target, inputs)
    checks = [untouched(outputs), within(outputs)]
    if reference is not None:
        checks += [written(outputs, reference), accuracy(outputs, inputs, reference, operands=operands)]
    checks += [CHECKS[name](target, case, inputs, outputs, reference) for name in properties]
    return Verdict(tuple(checks))


# --------------------------------------------------------------------------------------------------------- the one call


def run_target(target, inputs: Inputs) -> Outputs:
    """One call of `target.fwd` on copies of the inputs, strides and offsets kept, with outputs poisoned by NaN."""
    given = inputs.to(target.device)
    copies = copy_inputs(given)
    out, around_out = poisoned(given.v.shape, torch.bfloat16, target.device)
    final_state, around_state = None, None
    if given.in_place:
        final_state = copies.initial_state
    elif given.final_state_dtype is not None:
        heads, (columns, channels) = given.v.shape[2], (given.v.shape[3], given.k.shape[3])
        shape = (len(given.seq_bounds()), heads, columns, channels)
        final_state, around_state = poisoned(shape, given.final_state_dtype, target.device)
    target.fwd(
        copies.q,
        copies.k,
        copies.v,
        copies.g,
        copies.beta,
        copies.scale,
        out,
        copies.A_log,
        copies.dt_bias,
        copies.lower_bound,
        initial_state=copies.initial_state,
        final_state=final_state,
        cu_seqlens=copies.cu_seqlens,
    )
    if torch.device(target.device).type == "cuda":
        torch.cuda.synchronize(target.device)
    names = [name for name in TENSORS if not (given.in_place and name == "initial_state")]
    touched = [name for name in names if not same_storage(getattr(given, name), getattr(copies, name))]
    around = {"out": around_out, "final_state": around_state}
    overrun = [
        name for name, guards in around.items() if guards is not None and not all(x.isnan().all() for x in guards)
    ]
    return Outputs(out, final_state, tuple(touched), tuple(overrun))


def copy_inputs(inputs: Inputs) -> Inputs:
    """Copies of whole storages, so that slices of one tensor stay slices of one tensor, at the same offsets."""
    wholes: dict[tuple, torch.Tensor] = {}
    copies = {}
    for name in TENSORS:
        x = getattr(inputs, name)
        if x is not None:
            key = x.untyped_storage().data_ptr(), x.dtype, x.numel() == 0
            if key not in wholes:
                wholes[key] = whole(x).clone()
            copies[name] = wholes[key].as_strided(x.shape, x.stride(), x.storage_offset())
    return replace(inputs, **copies)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def same_storage(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or torch.equal(bits(whole(a)), bits(whole(b)))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def poisoned(shape, dtype: torch.dtype, device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor of NaN, contiguous, and the guards of NaN before and after it."""
    size = torch.Size(shape).numel()
    buffer = torch.full((GUARD + size + GUARD,), torch.nan, dtype=dtype, device=device)
    return buffer[GUARD : GUARD + size].view(shape), [buffer[:GUARD], buffer[GUARD + size :]]


def untouched(outputs: Outputs) -> Check:
    detail = f"the call changed {', '.join(outputs.touched)}" if outputs.touched else ""
    return Check("inputs_untouched", not outputs.touched, detail=detail)


def within(outputs: Outputs) -> Check:
    detail = f"the call wrote outside of {', '.join(outputs.overrun)}" if outputs.overrun else ""
    return Check("outputs_within", not outputs.overrun, detail=detail)


# ----------------------------------------------------------------------------------------------- against the reference


def written(outputs: Outputs, reference: Reference, name: str = "written") -> Check:
    """Every element is finite where the oracle's is. The outputs were poisoned, so unwritten ones are NaN."""
    lines = []
    for what, result, exact in results(outputs, reference):
        bad = errors.not_written(result, exact)
        count = int(bad.sum())
        if count:
            index = tuple(bad.nonzero()[0].tolist())
            lines.append(
                f"{what}: {count} of {bad.numel()} elements are not finite, the first at {index}: "
                f"{result[index].item():g} where {exact[index].item():.4g} is right"
            )
    return Check(name, not lines, detail="; ".join(lines))


def results(outputs: Outputs, reference: Reference) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    pairs = [("out", outputs.out.to(reference.out.device), reference.out)]
    if outputs.final_state is not None:
        pairs.append(("state", outputs.final_state.to(reference.out.device), reference.state))
    return pairs


def accuracy(
    outputs: Outputs, inputs: Inputs, reference: Reference, name: str = "accuracy", operands: str = "bf16"
) -> Check:
    """Compares with the oracle, by the metrics and bounds of `bounds.TABLE`.

    Of each metric the place is reported whose error is the largest part of what it may be.
    """
    found = [worst(places) for places in measure(outputs, inputs, reference, operands)]
    failed = [metric for metric in found if not metric.error <= metric.bound]
    return Check(
        name,
        not failed,
        {metric.name: metric.error for metric in found},
        {metric.name: metric.bound for metric in found},
        "; ".join(f"{m.name} {m.error:.3g} at {m.place}, at most {m.bound:.3g} allowed" for m in failed),
    )


@dataclass(frozen=True)
class Metric:
    name: str
    error: float
    bound: float
    place: str


@dataclass(frozen=True)
class Places:
    """Every place of one metric: tensors of one shape, or broadcast to it. `fuzz.bounds` says what they mean.

    rounding: the part of `error` that is the last rounding's. deviation: the standard deviation of the rest. share: of
    the largest independent error. unit: what errors are shown relative to. where: from indices to the place's name.
    """

    name: str
    error: torch.Tensor
    rounding: torch.Tensor
    deviation: torch.Tensor
    share: torch.Tensor
    floor: torch.Tensor
    unit: torch.Tensor
    where: Callable[..., str]

    @property
    def allowed(self) -> torch.Tensor:
        return self.rounding + bounds.tail(self.share) * self.deviation + self.floor


def measure(outputs: Outputs, inputs: Inputs, reference: Reference, operands: str = "bf16") -> list[Places]:
    """The errors and what they may be, by the metrics of `bounds.TABLE`; none of a tensor without elements."""
    found = []
    for what, result, exact in results(outputs, reference):
        if result.numel():
            function = measure_out if what == "out" else measure_state
            found += function(result, exact, reference, inputs, OPERANDS[operands])
    return found


def measure_out(out, exact, reference: Reference, inputs: Inputs, part: float) -> list[Places]:
    sequences = inputs.seq_bounds()
    grid = Grid.of(sequences, exact.device)
    heads, columns = exact.shape[2:]
    error, rounding, moves, exact = (
        x.reshape(-1, heads, columns)
        for x in (
            errors.difference(out, exact),
            errors.difference(exact.to(out.dtype), exact),
            reference.out_moves,
            exact,
        )
    )

    def by_head(x):
        return errors.pool(x, grid.sequence_of_row, grid.sequences)

    def by_window(x):
        return errors.pool(x, grid.window_of_row, grid.windows)

    scale, head_moves = by_head(exact), by_head(moves)
    floor = bounds.SMALLEST + bounds.UNDERFLOW * abs(inputs.scale) * magnitude(inputs, grid)
    n = grid.sequence_of_window
    row = grid.sequence_of_row

    def where_window(w, h):
        first = int(grid.window_of_row.eq(w).nonzero()[0])
        start = sequences[int(n[w])][0]
        return f"sequence {int(n[w])}, head {h}, tokens {first - start} to {first - start + errors.WINDOW - 1}"

    def where_element(r, h, v):
        return f"sequence {int(row[r])}, token {r - sequences[int(row[r])][0]}, head {h}, column {v}"

    def metric(name, place, *sizes):
        return judged(name, TABLE[name, out.dtype], part, place, *sizes)

    # Squares, relative to the largest so that they do not underflow.
    by_token = (moves / moves.amax().clamp_min(bounds.SMALLEST)).square().sum(-1)
    window = grid.window_of_row[:, None].expand_as(by_token)
    empty = by_token.new_zeros(grid.windows, heads)
    share = largest_share(empty.scatter_reduce(0, window, by_token, "amax"), empty.scatter_add(0, window, by_token))
    return [
        metric(
            "out",
            whole_tensor,
            *map(errors.rms, (error, rounding, exact, moves)),
            floor.max(),
            largest_share(by_token.amax(), by_token.sum()),
        ),
        metric(
            "out_window",
            where_window,
            by_window(error),
            by_window(rounding),
            scale[n],
            torch.maximum(by_window(moves), head_moves[n]),
            floor[n],
            share,
        ),
        metric(
            "out_element",
            where_element,
            error.abs(),
            rounding.abs(),
            scale[row][..., None].expand_as(error),
            moves + torch.maximum(moves, head_moves[row][..., None]),
            floor[row][..., None].expand_as(error),
            torch.ones_like(scale[:1, :1, None]),
        ),
    ]


def measure_state(state, exact, reference: Reference, inputs: Inputs, part: float) -> list[Places]:
    error, moves = errors.difference(state, exact), reference.state_moves
    rounding = errors.difference(exact.to(state.dtype), exact)

    def by_head(x):
        return x.square().mean((2, 3)).sqrt()

    scale, head_moves = by_head(exact), by_head(moves)
    grid = Grid.of(inputs.seq_bounds(), exact.device)
    floor = bounds.SMALLEST + bounds.UNDERFLOW * magnitude(inputs, grid)

    def spread(x):
        return x[:, :, None, None].expand_as(error)

    def metric(name, place, *sizes):
        return judged(name, TABLE[name, state.dtype], part, place, *sizes)

    by_channel = (moves / moves.amax().clamp_min(bounds.SMALLEST)).square().sum(2)
    return [
        metric(
            "state",
            whole_tensor,
            *map(errors.rms, (error, rounding, exact, moves)),
            floor.max(),
            largest_share(by_channel.amax(), by_channel.sum()),
        ),
        metric(
            "state_head",
            "sequence {}, head {}".format,
            *map(by_head, (error, rounding, exact, moves)),
            floor,
            largest_share(by_channel.amax(-1), by_channel.sum(-1)),
        ),
        metric(
            "state_element",
            "sequence {}, head {}, column {}, channel {}".format,
            error.abs(),
            rounding.abs(),
            spread(scale),
            moves + torch.maximum(moves, spread(head_moves)),
            spread(floor),
            torch.ones_like(spread(scale)[:1, :1, :1, :1]),
        ),
    ]


def largest_share(largest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """What part of a sum its largest term is; all of it where the sum is zero."""
    return torch.where(total > 0, largest / total, 1.0)


def whole_tensor() -> str:
    return "the whole tensor"


def judged(name, bound, part, where, error, rounding, scale, moves, floor, share) -> Places:
    deviation = bound.arithmetic * scale + bound.operands * part * moves
    return Places(name, error, rounding, deviation, share, floor, torch.maximum(scale, floor), where)


def worst(places: Places) -> Metric:
    """The place where the error is the largest part of what it may be."""
    allowed = places.allowed
    index = int((places.error / allowed).argmax())
    unit = places.unit.reshape(-1)[index]
    error, allowed = (float(x.reshape(-1)[index] / unit) for x in (places.error, allowed))
    shape = places.error.shape
    indices = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)] if shape else []
    return Metric(places.name, error, allowed, places.where(*indices))


def magnitude(inputs: Inputs, grid: Grid) -> torch.Tensor:
    """The largest |v| and |initial state| of each sequence and head together, float64 [N, H]."""
    device = grid.sequence_of_row.device
    rows = inputs.v.to(device).flatten(0, 1).abs().amax(-1).double()
    size = rows.new_zeros(grid.sequences, rows.shape[1])
    size.scatter_reduce_(0, grid.sequence_of_row[:, None].expand_as(rows), rows, "amax")
    if inputs.initial_state is not None:
        size += inputs.initial_state.to(device).abs().amax((2, 3)).double()
    return size
