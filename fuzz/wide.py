"""Wide inputs: tensors whose elements lie further apart than 32-bit offsets reach."""

from __future__ import annotations

from dataclasses import replace

import torch

from fuzz.inputs import Inputs
from fuzz.judge import Check, Outputs, copy_inputs
from fuzz.properties import OutOfReach, checked, named, same_bits

BEYOND = 2**31 + 2**20  # elements from the first to the last row of the tokens; and of the states


@checked
def wide_offsets(target, case, inputs: Inputs, outputs: Outputs, reference) -> Check:
    """Inputs that are slices of buffers of more than 2^31 elements give the bits that contiguous ones give.

    Only the rows that the slices cover are ever touched, so on a CPU the buffers cost addresses and hardly any memory.
    """
    reason = target.reach(replace(case, layout="strided"))
    if reason is not None:
        raise OutOfReach(f"the changed case is out of reach: {reason}")
    if inputs.q.shape[0] != 1 or inputs.q.shape[1] == 1:
        raise OutOfReach("it is asked of one row of several tokens")
    dense = {name: getattr(inputs, name).contiguous() for name in ("q", "k", "v", "g")}
    parts = [(dense, 1)]
    if inputs.initial_state is not None and len(inputs.initial_state) > 1:
        parts.append(({"initial_state": inputs.initial_state}, 0))
    pairs, no_room = [], []
    for tensors, dim in parts:  # one after the other: a worker's share of a GPU has no room for both
        try:
            result = run_wide(target, inputs, tensors, dim, outputs.final_state)
        except OutOfReach as reason:
            no_room.append(f"{', '.join(tensors)}: {reason}")
        else:
            pairs += named(f"{', '.join(tensors)} of more than 2^31 elements:", result, outputs)
        if inputs.q.is_cuda:
            torch.cuda.empty_cache()  # the next part, and the other workers of the GPU, need the room
    check = same_bits(pairs)
    if check.passed and no_room:
        raise OutOfReach("; ".join(no_room))
    return check


def run_wide(target, inputs: Inputs, tensors: dict[str, torch.Tensor], dim: int, final_state) -> Outputs:
    """One call with these tensors wide along `dim`, all others copied as they are."""
    given = replace(copy_inputs(inputs), **dict(zip(tensors, slices(list(tensors.values()), dim), strict=True)))
    out = torch.full_like(inputs.v, torch.nan, memory_format=torch.contiguous_format)
    state = None if final_state is None else torch.full_like(final_state, torch.nan)
    target.fwd(
        given.q,
        given.k,
        given.v,
        given.g,
        given.beta,
        given.scale,
        out,
        given.A_log,
        given.dt_bias,
        given.lower_bound,
        initial_state=given.initial_state,
        final_state=state,
        cu_seqlens=given.cu_seqlens,
    )
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return Outputs(out, state)


def slices(tensors: list[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """Copies side by side in one buffer, whose steps along `dim` together go `BEYOND`."""
    first = tensors[0]
    width = first[(slice(None),) * dim + (0,)].numel()
    steps = first.shape[dim] - 1
    stride = -(-BEYOND // steps) // 8 * 8 + 8  # elements, a multiple of 16 bytes
    size = steps * stride + len(tensors) * width
    try:
        buffer = torch.empty(size, dtype=first.dtype, device=first.device)
    except (RuntimeError, MemoryError) as error:
        raise OutOfReach(f"no room for {size * first.element_size() / 2**30:.1f} GiB") from error
    strides = (*first.stride()[:dim], stride, *first.stride()[dim + 1 :])
    return [buffer.as_strided(x.shape, strides, index * width).copy_(x) for index, x in enumerate(tensors)]
