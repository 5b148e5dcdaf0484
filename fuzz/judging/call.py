"""One call of a target on copies of its inputs, with poisoned and guarded outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fuzz.cases.inputs import TENSORS, Inputs, storage, whole
from fuzz.judging.verdict import Check
from fuzz.text import text_of

LEAD = 64  # elements: alignments stay
GUARD = 64 * 128  # elements of NaN on either side of every written tensor: 64 tokens of one head


@dataclass(frozen=True)
class Outputs:
    """What one call wrote: `out` [B, T, H, V], `final_state` [N, H, V, K] or None.

    touched: inputs that the call changed. overrun: written tensors around which it wrote as well.
    """

    out: torch.Tensor
    final_state: torch.Tensor | None
    touched: tuple[str, ...] = ()
    overrun: tuple[str, ...] = ()


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory left: the driver's, PyTorch's, or that of a library's first call."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    messages = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    first_call = ("cublasCreate", "cusolverDnCreate")
    return isinstance(error, RuntimeError) and any(message in text_of(error) for message in messages + first_call)


def run_target(
    target, inputs: Inputs, before: Sequence[Inputs] = (), places: Mapping[str, torch.Tensor] | None = None
) -> Outputs:
    """One call of `target.fwd` on copies of the inputs, strides and offsets kept, with outputs poisoned by NaN.

    before: other contents of the same tensors, with which the target is called first, one after the other, in the same
    places, where no call without them has been. The tensors stay the same objects, with the same addresses and
    versions: PyTorch does not know that their contents change.
    places: "out" and, where it is one of its own, "final_state": NaN, where to write them, slices of larger tensors,
    perhaps of one that inputs are slices of too. Without, they are contiguous.
    """
    given = inputs.to(target.device)
    asked = tensors_of(given) | dict(places or {})
    lead = LEAD if before else 0
    copied = copies_of(asked, lead)
    copies = replace(given, **{name: copied[name] for name in tensors_of(given)})
    around_out, around_state = None, None
    out, final_state = copied.get("out"), copied.get("final_state")
    if out is None:
        out, around_out = poisoned(given.v.shape, torch.bfloat16, target.device)
    if given.in_place:
        final_state = copies.initial_state
    elif final_state is None and given.final_state_dtype is not None:
        final_state, around_state = poisoned(given.state_shape, given.final_state_dtype, target.device)

    for other in before:
        put(other, copies)
        launch(target, copies, out, final_state)
    if before:
        put(given, copies)
        for x in (out, None if given.in_place else final_state):
            if x is not None:
                x.data.fill_(torch.nan)
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
            changed[key] = differ(whole(asked[name]), whole(copied[name])[lead:])
    for name, guards in (("out", around_out), ("final_state", around_state)):
        if guards is not None:
            changed[name] = guards.eq(guards).any()  # NaN does not equal itself
    found = true_keys(changed)
    found |= {name for name, key in storages.items() if key in found}
    touched, overrun = (tuple(name for name in names if name in found) for names in (TENSORS, ("out", "final_state")))
    return Outputs(out, final_state, touched, overrun)


def takes(function, name: str) -> bool:
    """Whether a function has an argument of that name, as far as it can be told."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())


def launch(target, inputs: Inputs, out: torch.Tensor, final_state: torch.Tensor | None, **serving) -> None:
    """The target on these very tensors, and what serving engines pass besides. A GPU is not waited for."""
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
        **serving,
    )


def tensors_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: x for name in TENSORS if (x := getattr(inputs, name)) is not None}


def copy_inputs(inputs: Inputs) -> Inputs:
    return replace(inputs, **copies_of(tensors_of(inputs)))


def copies_of(tensors: Mapping[str, torch.Tensor], lead: int = 0) -> dict[str, torch.Tensor]:
    """Copies of whole storages, so that slices of one tensor stay slices of one tensor, at the same offsets.

    lead: elements in front of each copy, which so has an address that a copy without them would not have.
    """
    wholes: dict[tuple, torch.Tensor] = {}
    copies = {}
    for name, x in tensors.items():
        key = storage(x)
        if key not in wholes:
            wholes[key] = torch.cat([x.new_zeros(lead), whole(x)])
        copies[name] = wholes[key].as_strided(x.shape, x.stride(), lead + x.storage_offset())
    return copies


def put(contents: Inputs, places: Inputs) -> None:
    """Overwrites tensors with the contents of others, which may have other strides. Their versions stay the same, as
    when another library or another kernel writes to them.
    """
    for name in TENSORS:
        if getattr(places, name) is not None:
            getattr(places, name).data.copy_(getattr(contents, name))


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether any bit differs: a bool tensor, so that the device need not be waited for."""
    return (bits(a) != bits(b)).any()


def true_keys(flags: Mapping) -> set:
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
