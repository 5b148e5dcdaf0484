"""Wide inputs: tensors whose elements lie further apart than 32-bit offsets reach."""

from __future__ import annotations

from dataclasses import replace

import torch

from fuzz.cases.inputs import Inputs
from fuzz.judging.call import Outputs, copy_inputs, launch
from fuzz.judging.changed_calls import expect_reach
from fuzz.judging.comparison import Unsupported, checked, named, same_bits
from fuzz.judging.verdict import Check

BEYOND = 2**31 + 2**20  # elements from the first to the last step along an axis


@checked
def wide_offsets(target, case, inputs: Inputs, outputs: Outputs, reference) -> Check:
    """Arguments that are slices of buffers of more than 2^31 elements give the bits that contiguous ones give.

    q, k, v and g along each axis in turn, beta, the initial state, and out. Only what the slices cover is ever touched,
    so on a CPU the buffers cost addresses and hardly any memory.
    """
    expect_reach(target, replace(case, layout="strided"))
    dense = {name: getattr(inputs, name).contiguous() for name in ("q", "k", "v", "g")}
    axes = [axis for axis in (1, 0, 2) if inputs.q.shape[axis] > 1]
    parts = [(dense, axis) for axis in axes]
    parts += [({name: x.contiguous()}, axes[0]) for name, x in (("beta", inputs.beta), ("out", inputs.v)) if axes]
    if inputs.initial_state is not None and len(inputs.initial_state) > 1:
        parts.append(({"initial_state": inputs.initial_state.contiguous()}, 0))
    pairs, no_room = [], []
    for tensors, axis in parts:  # one after the other: a worker's share of a GPU has no room for two
        what = f"{', '.join(tensors)} of more than 2^31 elements along axis {axis}:"
        try:
            pairs += named(what, run_wide(target, inputs, tensors, axis, outputs.final_state), outputs)
        except Unsupported as reason:
            no_room.append(f"{what} {reason}")
        if inputs.q.is_cuda:
            torch.cuda.empty_cache()  # the next part, and the other workers of the GPU, need the room
    check = same_bits(pairs)
    if check.passed and no_room:
        raise Unsupported("; ".join(no_room))
    return check


def run_wide(target, inputs: Inputs, tensors: dict[str, torch.Tensor], axis: int, final_state) -> Outputs:
    """One call with these tensors wide along `axis`, all others copied as they are."""
    wide = dict(zip(tensors, slices(list(tensors.values()), axis), strict=True))
    out = wide.pop("out", None)
    given = replace(copy_inputs(inputs), **wide)
    if out is None:
        out = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    out.fill_(torch.nan)
    state = None if final_state is None else torch.full_like(final_state, torch.nan)
    launch(target, given, out, state)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return Outputs(out.contiguous(), None if state is None else state.contiguous())


def slices(tensors: list[torch.Tensor], axis: int) -> list[torch.Tensor]:
    """Copies side by side in one buffer, whose steps along `axis` together go `BEYOND`."""
    first = tensors[0]
    inner = first.select(axis, 0)
    steps = first.shape[axis] - 1
    stride = -(-BEYOND // steps) // 8 * 8 + 8  # elements, a multiple of 16 bytes
    size = steps * stride + len(tensors) * inner.numel()
    try:
        buffer = torch.empty(size, dtype=first.dtype, device=first.device)
    except (RuntimeError, MemoryError) as error:
        raise Unsupported(f"no room for {size * first.element_size() / 2**30:.1f} GiB") from error
    strides = list(torch.empty(inner.shape, device="meta").stride())
    strides.insert(axis, stride)
    return [buffer.as_strided(x.shape, strides, n * inner.numel()).copy_(x) for n, x in enumerate(tensors)]
