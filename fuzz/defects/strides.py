"""Defects of addresses: strides, offsets, alignment, and inputs that are written to."""

from __future__ import annotations

import torch

from fuzz.defects.defect import Defects, after, argument, before, changed, remembering

STRIDES = Defects("indexing")
add, plant = STRIDES.add, STRIDES.plant

READ_ELSEWHERE = "accuracy written layout"
ELEMENTS_OF_32_BITS = 2**31
FAR = "32-bit element offsets"  # of the known failures

each_token_input = argument("q", "k", "v", "g", "beta")

# -------------------------------------------------------------------------------------------------------------- strides


def as_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The tensor's memory read with the strides of a contiguous one."""
    return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride(), x.storage_offset())


def rows_side_by_side(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided(x.shape, (*x.stride()[:-2], x.shape[-1], 1), x.storage_offset())


add(
    "strides_ignored",
    READ_ELSEWHERE,
    each_token_input(as_if_contiguous),
    "Strided inputs are read as if they were contiguous.",
)
add("stride_of_beta_ignored", READ_ELSEWHERE, changed(beta=as_if_contiguous), "beta is read as if it were contiguous.")
add(
    "strides_of_out_ignored",
    "layout wide_offsets",
    changed(out=as_if_contiguous),
    "out is written as if it were contiguous.",
)
add(
    "head_stride_ignored",
    READ_ELSEWHERE,
    changed(v=rows_side_by_side),
    "v is read as if its heads lay beside each other.",
)
add(
    "stride_of_dt_bias_ignored",
    READ_ELSEWHERE,
    changed(dt_bias=rows_side_by_side),
    "dt_bias is read as if it were contiguous.",
)
add(
    "row_stride_of_states_ignored",
    READ_ELSEWHERE,
    changed(initial_state=rows_side_by_side),
    "Rows of the initial state are read as if they lay beside each other.",
)


@plant("layout", each_token_input)
def stride_of_zero_ignored(x):
    """A stride of 0, that of heads that share memory, is taken for one that was not given."""
    return as_if_contiguous(x) if 0 in x.stride() else x


@plant("accuracy written layout wide_offsets", each_token_input)
def batch_stride_from_the_shape(x):
    """The stride of the batch is taken to be T rows."""
    if x.dim() < 3:
        return x
    return x.as_strided(x.shape, (x.shape[1] * x.stride(1), *x.stride()[1:]), x.storage_offset())


@plant(READ_ELSEWHERE, before())
def key_strides_are_those_of_queries(given) -> None:
    """k is read with the strides of q."""
    x, strides = given.k, given.q.stride()
    # From where k begins, as far as those strides reach; zeros past the end of its storage
    need = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) if x.numel() else 0
    there = x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
    there = torch.cat([there, there.new_zeros(max(0, need - len(there)))])
    given.k = there.as_strided(x.shape, strides)


@plant(READ_ELSEWHERE, argument("A_log", "dt_bias"))
def parameters_from_the_start_of_storage(x):
    """A_log and dt_bias are read from the beginning of their storage."""
    return x.as_strided(x.shape, x.stride(), 0)


@plant(READ_ELSEWHERE, each_token_input)
def address_aligned_down(x):
    """Addresses of inputs are rounded down to 16 bytes."""
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - x.storage_offset() % 8)


# ------------------------------------------------------------------------------------------------------------- far rows


def far(x: torch.Tensor, axis: int) -> torch.Tensor:
    """What lies 2^31 elements or more along an axis."""
    return torch.arange(x.shape[axis]) * x.stride(axis) >= ELEMENTS_OF_32_BITS


def wrapped_along(axis: int):
    """What lies 2^31 elements or more along an axis is read from its start: offsets of elements have 32 bits."""

    def wrap(x):
        beyond = far(x, axis)
        if not beyond.any():
            return x
        near = x.clone(memory_format=torch.contiguous_format)
        before = (slice(None),) * axis
        near[(*before, beyond)] = x[(*before, slice(0, 1))]
        return near

    return wrap


add(
    "offsets_of_32_bits",
    "wide_offsets",
    each_token_input(wrapped_along(1)),
    "Offsets of elements are 32-bit numbers, so that rows beyond 2^31 elements are read elsewhere.",
    FAR,
)
add(
    "batch_offsets_of_32_bits",
    "wide_offsets",
    each_token_input(wrapped_along(0)),
    "The offset of a batch is a 32-bit number.",
    FAR,
)
add(
    "beta_offsets_of_32_bits",
    "wide_offsets",
    changed(beta=wrapped_along(1)),
    "Offsets into beta are 32-bit numbers.",
    FAR,
)


@plant("wide_offsets", remembering, failure=FAR)
def output_offsets_of_32_bits():
    """Offsets into out are 32-bit numbers.

    Rows of out beyond 2^31 elements keep what they held.
    """
    kept = {}

    def look(given):
        kept["far"] = far(given.out, 1)
        kept["held"] = given.out[:, kept["far"]].clone()

    def put_back(given):
        given.out[:, kept["far"]] = kept["held"]

    return look, put_back


# --------------------------------------------------------------------------------------------------------------- inputs


add(
    "inputs_normalised_in_place",
    "inputs_untouched",
    after()(lambda given: given.k.mul_(2)),
    "Keys are scaled where they lie.",
)


@plant("inputs_untouched", after())
def padding_of_inputs_cleared(given) -> None:
    """Padding between the slices of a fused projection is cleared."""
    if not given.q.is_contiguous() and given.q.storage_offset():
        given.q.as_strided((1,), (1,), 0).fill_(0)
