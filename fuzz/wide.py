"""Wide inputs: tensors whose elements lie further apart than 32-bit offsets reach."""

from __future__ import annotations

from dataclasses import replace

import torch

from fuzz.inputs import Inputs
from fuzz.judge import Check, Outputs
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
    wide = dict(zip(dense, slices(list(dense.values()), dim=1), strict=True))
    if inputs.initial_state is not None and len(inputs.initial_state) > 1:
        (wide["initial_state"],) = slices([inputs.initial_state], dim=0)
    out = torch.full_like(inputs.v, torch.nan, memory_format=torch.contiguous_format)
    state = None if outputs.final_state is None else torch.full_like(outputs.final_state, torch.nan)
    given = replace(inputs, **wide)
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
    return same_bits(named("more than 2^31 elements:", Outputs(out, state), outputs))


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
