"""The judge: runs a target, compares its results with the oracle's and checks properties, and says what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch

from fuzz.cases.inputs import TENSORS, Inputs
from fuzz.judging import bounds, errors
from fuzz.judging.bounds import OPERANDS, TABLE
from fuzz.judging.errors import Grid
from fuzz.judging.sensitivity import Reference, reference

__all__ = ["Check", "Outputs", "Reference", "Verdict", "accuracy", "judge", "reference", "run_target"]

GUARD = 64 * 128  # elements of NaN on either side of every written tensor: one chunk of one head
NOT_CHECKED = "not checked: "  # how the detail of a check begins that had nothing to say about this target and case


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
    """Runs `target` on `inputs` (on its device), checks it and each of `properties` (names in `fuzz.judging.checks`).

    reference: None where the oracle is too slow; then only the properties are checked. operands: one of
    `bounds.OPERANDS`, the format that the target claims for its products. What the target raises passes through.
    """
    from fuzz.judging.checks import CHECKS

    outputs = run_target(target, inputs)
    checks = [untouched(outputs), within(outputs)]
    if reference is not None:
        checks += [written(outputs, reference), accuracy(outputs, inputs, reference, operands=operands)]
    for name in properties:
        try:
            checks.append(CHECKS[name](target, case, inputs, outputs, reference))
        except Exception as error:
            # Without this a case too large for a property would hide what was found before.
            if not out_of_memory(error) or all(check.passed for check in checks):
                raise
            checks.append(Check(name, True, detail=f"{NOT_CHECKED}out of memory"))
    return Verdict(tuple(checks))


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory left: the driver's, PyTorch's, or that of a library's first call."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    messages = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    first_call = ("cublasCreate", "cusolverDnCreate")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages + first_call)


# --------------------------------------------------------------------------------------------------------- the one call


def run_target(
    target, inputs: Inputs, before: Inputs | None = None, places: Mapping[str, torch.Tensor] | None = None
) -> Outputs:
    """One call of `target.fwd` on copies of the inputs, strides and offsets kept, with outputs poisoned by NaN.

    before: other contents of the same tensors, with which the target is called first, in the same places.
    places: "out" and, where it is one of its own, "final_state": NaN, where to write them, slices of larger tensors,
    perhaps of one that inputs are slices of too. Without, they are contiguous.
    """
    given = inputs.to(target.device)
    asked = tensors_of(given) | dict(places or {})
    copied = copies_of(asked)
    copies = replace(given, **{name: copied[name] for name in tensors_of(given)})
    around_out, around_state = None, None
    out, final_state = copied.get("out"), copied.get("final_state")
    if out is None:
        out, around_out = poisoned(given.v.shape, torch.bfloat16, target.device)
    if given.in_place:
        final_state = copies.initial_state
    elif final_state is None and given.final_state_dtype is not None:
        heads, (columns, channels) = given.v.shape[2], (given.v.shape[3], given.k.shape[3])
        shape = (sequences(given), heads, columns, channels)
        final_state, around_state = poisoned(shape, given.final_state_dtype, target.device)

    if before is not None:
        put(before, copies)
        launch(target, copies, out, final_state)
        put(given, copies)
        for x in (out, None if given.in_place else final_state):
            if x is not None:
                x.fill_(torch.nan)
    launch(target, copies, out, final_state)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    if places:  # put back, so that what lies around them can be compared
        out = out.clone()
        final_state = final_state.clone() if "final_state" in places else final_state
        for name, place in places.items():
            copied[name].copy_(place)
    storages = {name: storage(x) for name, x in asked.items() if not (given.in_place and name == "initial_state")}
    changed: dict[object, torch.Tensor] = {}
    for name, key in storages.items():
        if key not in changed:
            changed[key] = differ(whole(asked[name]), whole(copied[name]))
    for name, guards in (("out", around_out), ("final_state", around_state)):
        if guards is not None:
            changed[name] = guards.eq(guards).any()  # NaN does not equal itself
    found = those(changed)
    found |= {name for name, key in storages.items() if key in found}
    touched, overrun = (tuple(name for name in names if name in found) for names in (TENSORS, ("out", "final_state")))
    return Outputs(out, final_state, touched, overrun)


def launch(target, inputs: Inputs, out: torch.Tensor, final_state: torch.Tensor | None) -> None:
    """The target on these very tensors. A GPU is not waited for."""
    target.fwd(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.g,
        inputs.beta,
        inputs.scale,
        out,
        inputs.A_log,
        inputs.dt_bias,
        inputs.lower_bound,
        initial_state=inputs.initial_state,
        final_state=final_state,
        cu_seqlens=inputs.cu_seqlens,
    )


def sequences(inputs: Inputs) -> int:
    """How many there are; the device is not asked."""
    return len(inputs.v) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1


def tensors_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: x for name in TENSORS if (x := getattr(inputs, name)) is not None}


def copy_inputs(inputs: Inputs) -> Inputs:
    return replace(inputs, **copies_of(tensors_of(inputs)))


def copies_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of whole storages, so that slices of one tensor stay slices of one tensor, at the same offsets."""
    wholes: dict[tuple, torch.Tensor] = {}
    copies = {}
    for name, x in tensors.items():
        key = storage(x)
        if key not in wholes:
            wholes[key] = whole(x).clone()
        copies[name] = wholes[key].as_strided(x.shape, x.stride(), x.storage_offset())
    return copies


def put(contents: Inputs, places: Inputs) -> None:
    """Overwrites tensors with the contents of others, which may have other strides."""
    for name in TENSORS:
        if getattr(places, name) is not None:
            getattr(places, name).copy_(getattr(contents, name))


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def storage(x: torch.Tensor) -> tuple:
    """What tensors have in common that are slices of one tensor."""
    return x.untyped_storage().data_ptr(), x.dtype, x.numel() == 0


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether any bit differs: a bool tensor, so that the device need not be waited for."""
    return (bits(a) != bits(b)).any()


def those(flags: Mapping) -> set:
    """The keys of the flags, scalar tensors, that are not zero. The device is waited for once for all of them."""
    if not flags:
        return set()
    device = next(iter(flags.values())).device
    answers = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    return {key for key, answer in zip(flags, answers, strict=True) if answer}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def poisoned(shape, dtype: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN, contiguous, and the guards of NaN before and after it: two rows of one tensor."""
    size = torch.Size(shape).numel()
    buffer = torch.full((GUARD + size + GUARD,), torch.nan, dtype=dtype, device=device)
    return buffer[GUARD : GUARD + size].view(shape), buffer.as_strided((2, GUARD), (GUARD + size, 1))


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
    found = {what: (result, exact) for what, result, exact in results(outputs, reference)}
    bad = {what: errors.not_written(result, exact) for what, (result, exact) in found.items()}
    failed = those({what: places.any() for what, places in bad.items()})
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
    outputs: Outputs, inputs: Inputs, reference: Reference, name: str = "accuracy", operands: str = "bf16"
) -> Check:
    """Compares with the oracle, by the metrics and bounds of `bounds.TABLE`.

    Of each metric the place is reported whose error is the largest part of what it may be.
    """
    found = worst(measure(outputs, inputs, reference, operands))
    failed = [metric for metric in found if not metric.error <= metric.bound]
    return Check(
        name,
        not failed,
        {metric.name: metric.error for metric in found},
        {metric.name: metric.bound for metric in found},
        "; ".join(f"{m.name} {m.error:.3g} at {m.place()}, at most {m.bound:.3g} allowed" for m in failed),
    )


@dataclass(frozen=True)
class Metric:
    """Of one metric the place where the error is the largest part of what it may be. place: to be asked for its name,
    which is only worth it for what failed.
    """

    name: str
    error: float
    bound: float
    place: Callable[[], str]


@dataclass(frozen=True)
class Limits:
    """What every place of one metric may have: tensors of one shape, or broadcast to it. `fuzz.judging.bounds` says
    what they mean. They follow from the reference alone, which keeps them for all that is compared with it.

    size: from the errors of elements to those of places. rounding: the part of an error that is the last rounding's.
    deviation: the standard deviation of the rest. share: of the largest independent error. unit: what errors are shown
    relative to. where: from indices to the place's name.
    """

    name: str
    size: Callable[[torch.Tensor], torch.Tensor]
    rounding: torch.Tensor
    deviation: torch.Tensor
    share: torch.Tensor
    floor: torch.Tensor
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


def limits_of(what: str, dtype: torch.dtype, inputs: Inputs, reference: Reference, operands: str) -> list[Limits]:
    function = limits_of_out if what == "out" else limits_of_state
    return reference.once((what, dtype, operands), lambda: function(dtype, inputs, reference, OPERANDS[operands]))


def limits_of_out(dtype: torch.dtype, inputs: Inputs, reference: Reference, part: float) -> list[Limits]:
    rows = inputs.seq_bounds()
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
    allowed = rounding + bounds.tail(share) * deviation + floor
    unit = torch.maximum(scale, floor).expand_as(allowed)
    return Limits(name, size, rounding, deviation, share, floor, allowed, unit, where)


def worst(measured: Sequence[Places]) -> list[Metric]:
    """The worst place of each metric. The device is waited for once for all of them."""
    if not measured:
        return []
    numbers = []
    for places in measured:
        index = (places.error / places.allowed).argmax()
        numbers += [x.take(index) for x in (places.error, places.allowed, places.unit)] + [index.double()]
    found = []
    for places, (error, allowed, unit, index) in zip(measured, torch.stack(numbers).view(-1, 4).tolist(), strict=True):
        place = partial(place_of, places, int(index))
        found.append(Metric(places.name, error / unit, allowed / unit, place))
    return found


def place_of(places: Places, index: int) -> str:
    shape = places.error.shape
    indices = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)] if shape else []
    return places.where(*indices)


def grid_of(inputs: Inputs, reference: Reference) -> Grid:
    return reference.once("grid", lambda: Grid.of(inputs.seq_bounds(), reference.out.device))


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
