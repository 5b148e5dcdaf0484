"""What defects of addresses change: tails, heads, sequences, states, strides, and what is written where."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

import flash_kda
from flash_kda import model
from fuzz.defects.defect import Given, after, before

TOKENS = ("q", "k", "v", "g", "beta")

ELEMENTS_OF_32_BITS = 2**31


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)


def each_token_input(change):
    return before(lambda given: [setattr(given, name, change(getattr(given, name))) for name in TOKENS])


def last_row_of_odd_lengths(fill: float):
    def change(given):
        for start, end in given.sequences():
            if end - start > 2 and (end - start) % 2:
                rows(given.out)[end - 1] = fill

    return after(change)


def tail_over_next(given: Given) -> None:
    """A tile of 16 rows is stored whole: its last rows, zero, lie over the first ones of the next sequence."""
    for start, end in given.sequences():
        rest = -(end - start) % 16 if end > start else 0
        rows(given.out)[end : end + rest] = 0


def tail_not_masked(original, chunks, x):
    """The last chunk of a sequence reads on, into the next one; at the end of the tensor, its last row."""
    last = x.shape[0] * x.shape[1] - 1
    beyond = (chunks.rows[:, :1] + torch.arange(model.CHUNK)).clamp(max=last)
    return original(replace(chunks, rows=beyond, valid=torch.ones_like(chunks.valid)), x)


def tail_times_zero(original, chunks, x):
    """The same, and what is not its own is multiplied by zero, which leaves NaN what it is."""
    valid = chunks.valid.view(len(chunks.valid), 1, model.CHUNK, *[1] * (x.dim() - 3))
    return tail_not_masked(original, chunks, x) * valid


def all_valid(original, *args):
    *inputs, valid = args
    return original(*inputs, torch.ones_like(valid))


def last_full_chunk_missed(original, bounds, device):
    chunks = original(bounds, device)
    full = torch.tensor([end > start and (end - start) % model.CHUNK == 0 for start, end in bounds])
    counts = torch.tensor([-(-(end - start) // model.CHUNK) for start, end in bounds])
    steps = []
    for c, (sequences, now) in enumerate(chunks.steps):
        keep = ~(full[sequences] & (counts[sequences] == c + 1))
        steps.append((sequences[keep], now[keep]))
    return replace(chunks, steps=steps)


def short_state_of_head_before(original, *args):
    return original(*args).roll(1, 1)


def short_state_without_last_token(original, *args):
    *inputs, state, bounds, out = args
    original(*inputs, state, bounds, out)
    kept = [n for n, (start, end) in enumerate(bounds) if end - start > 1]
    if kept:
        before = [(start, end - 1) for start, end in (bounds[n] for n in kept)]
        state[kept] = original(*inputs, state[kept], before, out.clone())
    return state


def state_without_tail(original, prepared, state, chunks):
    """The tail's update is taken back."""
    result, kept = torch.empty_like(prepared.V), []
    for sequences, now in chunks.steps:
        short = sequences[~chunks.valid[now].all(1)]
        kept.append((short, state[short]))
        result[now] = original(prepared, state, replace(chunks, steps=[(sequences, now)]))[now]
    for sequences, before_tail in kept:
        state[sequences] = before_tail
    return result


def first_head_for_all(x):
    return x[:1].expand_as(x).contiguous()


def last_head_as_before(given: Given) -> None:
    """With an odd number of heads above one, the last head gets the outputs of the one before it."""
    heads = given.out.shape[2]
    if heads > 1 and heads % 2:
        given.out[:, :, -1] = given.out[:, :, -2]


def one_sequence_for_all(given: Given) -> None:
    """cu_seqlens keeps its first and last entry only."""
    if given.cu_seqlens is None:
        return
    given.cu_seqlens = given.cu_seqlens[[0, -1]]
    if given.initial_state is not None:
        given.initial_state = given.initial_state[:1].clone()
    if given.final_state is not None:
        given.final_state = given.final_state[:1]


def empty_loses_its_state(given: Given) -> None:
    if given.final_state is not None:
        for n, (start, end) in enumerate(given.sequences()):
            if start == end:
                given.final_state[n] = 0


def beyond_32_sequences(given: Given) -> None:
    """One warp looks at the offsets, a lane at each."""
    if given.final_state is not None and given.final_state.shape[0] > 32:
        given.final_state[32:] = given.final_state[31]


def search_off_by_one(given: Given) -> None:
    out = rows(given.out)
    for start, end in given.sequences():
        if end > start > 0:
            out[start] = out[start - 1]


def written_one_further(given: Given) -> None:
    if given.final_state is not None:
        given.final_state.copy_(given.final_state.roll(1, 0))


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous()


def transposed_when_written(given: Given) -> None:
    if given.final_state is not None:
        given.final_state.copy_(given.final_state.mT.clone())


def clear_final_state(given: Given) -> None:
    if given.final_state is not None:
        given.final_state.zero_()


def halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if x.dtype == torch.bfloat16 else x


def as_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The tensor's memory read with the strides of a contiguous one."""
    return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride(), x.storage_offset())


def not_expanded(x: torch.Tensor) -> torch.Tensor:
    return as_if_contiguous(x) if 0 in x.stride() else x


def aligned_down(x: torch.Tensor) -> torch.Tensor:
    """Read from an address rounded down to 16 bytes."""
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - x.storage_offset() % 8)


def heads_side_by_side(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided(x.shape, (*x.stride()[:2], x.shape[3], 1), x.storage_offset())


def wrapped_along(axis: int):
    """What lies 2^31 elements or more along an axis is read from its start: offsets of elements have 32 bits."""

    def wrap(x):
        far = torch.arange(x.shape[axis]) * x.stride(axis) >= ELEMENTS_OF_32_BITS
        if not far.any():
            return x
        near = x.clone(memory_format=torch.contiguous_format)
        before = (slice(None),) * axis
        near[(*before, far)] = x[(*before, slice(0, 1))]
        return near

    return wrap


def row_too_many(given: Given) -> None:
    out = given.out
    if out.numel():
        out.as_strided((128,), (1,), out.storage_offset() + out.numel()).fill_(0)


def between_slices(given: Given) -> None:
    """Zeros a row of padding of a strided input."""
    if not given.q.is_contiguous() and given.q.storage_offset():
        given.q.as_strided((1,), (1,), 0).fill_(0)


def last_element_kept():
    kept = {}

    def look(given):
        kept["last"] = given.out[-1:, -1:, -1:, -1:].clone()

    def put_back(given):
        if given.out.shape[2] > 1:
            given.out[-1:, -1:, -1:, -1:] = kept["last"]

    return look, put_back


def batch_stride_from_the_shape(x):
    if x.dim() < 3:
        return x
    return x.as_strided(x.shape, (x.shape[1] * x.stride(1), *x.stride()[1:]), x.storage_offset())


def strides_of_another(name: str, other: str):
    def change(given):
        x, strides = getattr(given, name), getattr(given, other).stride()
        # From where x begins, as far as those strides reach; zeros past the end of its storage
        need = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) if x.numel() else 0
        there = x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
        there = torch.cat([there, there.new_zeros(max(0, need - len(there)))])
        setattr(given, name, there.as_strided(x.shape, strides))

    return before(change)


def rows_side_by_side(x):
    return x.as_strided(x.shape, (*x.stride()[:-2], x.shape[-1], 1), x.storage_offset())


def from_the_start_of_storage(x):
    return x.as_strided(x.shape, x.stride(), 0)


def far_rows_of_out():
    """Rows of out beyond 2^31 elements keep what they held."""
    kept = {}

    def look(given):
        kept["far"] = torch.arange(given.out.shape[1]) * given.out.stride(1) >= ELEMENTS_OF_32_BITS
        kept["held"] = given.out[:, kept["far"]].clone()

    def put_back(given):
        given.out[:, kept["far"]] = kept["held"]

    return look, put_back


def later_batches(given: Given) -> None:
    if given.cu_seqlens is None:
        given.out[1:, model.CHUNK :] *= 0.5


def parameters_of_four_heads(x):
    return x[torch.arange(len(x)) % 4]


def states_beyond_64_sequences(given: Given) -> None:
    if given.final_state is not None:
        given.final_state[64:] = 0


def outputs_beyond_512_tokens(given: Given) -> None:
    for start, end in given.sequences():
        rows(given.out)[start + 512 : end] *= 0.5


def first_32_offsets(cu_seqlens, tokens):
    offsets = cu_seqlens.tolist()
    if offsets[0] or offsets[-1] != tokens or any(x > y or y > tokens for x, y in itertools.pairwise(offsets[:33])):
        raise ValueError(f"cu_seqlens: {offsets[:33]} was given; accepted are offsets from 0 to {tokens}")


def first_of_a_larger_pool():
    """An initial state of more sequences is accepted; the first ones are taken."""

    def fwd(*args, **kwargs):
        given = Given.of(*args, **kwargs)
        counted = given.q if given.cu_seqlens is None else given.cu_seqlens[1:]
        if isinstance(given.initial_state, torch.Tensor) and given.initial_state is not given.final_state:
            given.initial_state = given.initial_state[: len(counted)]
        flash_kda.fwd(**vars(given))

    return fwd
