"""Defects of indices: tails, heads, sequences and states."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

import flash_kda
from flash_kda import arguments, model
from fuzz.defects.defect import (
    Defects,
    Given,
    after,
    argument,
    before,
    changed,
    constant,
    itself,
    remembering,
    stage,
    staged,
    unchecked,
)

INDEXING = Defects("indexing")
add, plant = INDEXING.add, INDEXING.plant

# ---------------------------------------------------------------------------------------------------------------- tails


def last_row_of_odd_lengths(fill: float):
    def change(given):
        for start, end in given.sequences():
            if end - start > 2 and (end - start) % 2:
                given.rows()[end - 1] = fill

    return after()(change)


add(
    "tail_row_zero",
    "accuracy",
    last_row_of_odd_lengths(0.0),
    "The last row of a sequence of odd length is stored as zero.",
)
add(
    "tail_row_not_written",
    "written",
    last_row_of_odd_lengths(torch.nan),
    "The last row of a sequence of odd length is not written.",
)


@plant("accuracy outputs_within packing", after(), failure="Tail rows of one sequence")
def tail_over_next_sequence(given) -> None:
    """Tiles are stored whole: rows beyond the end of a sequence lie over the next one.

    The last rows of a tile of 16 are zero.
    """
    for start, end in given.sequences():
        rest = -(end - start) % 16 if end > start else 0
        given.rows()[end : end + rest] = 0


def read_on(original, chunks, x):
    """The last chunk of a sequence reads on, into the next one; at the end of the tensor, its last row."""
    last = x.shape[0] * x.shape[1] - 1
    beyond = (chunks.rows[:, :1] + torch.arange(model.CHUNK)).clamp(max=last)
    return original(replace(chunks, rows=beyond, valid=torch.ones_like(chunks.valid)), x)


def all_valid(original, *args):
    *inputs, valid = args
    return original(*inputs, torch.ones_like(valid))


add(
    "tail_not_masked",
    "accuracy packing",
    staged({"Chunks.gather": read_on, "prepare": all_valid}),
    "Rows beyond the end of a sequence take part in its state.",
)


@plant("packing", stage("Chunks.gather"))
def tail_times_zero(original, chunks, x):
    """Rows beyond the end of a sequence are multiplied by zero, so NaN of the next sequence comes through."""
    valid = chunks.valid.view(len(chunks.valid), 1, model.CHUNK, *[1] * (x.dim() - 3))
    return read_on(original, chunks, x) * valid


@plant("accuracy written chunk_continuation", stage("Chunks.of"))
def last_full_chunk_missed(original, ranges, device):
    """A sequence of whole chunks is ended one chunk too early."""
    chunks = original(ranges, device)
    full = torch.tensor([end > start and (end - start) % model.CHUNK == 0 for start, end in ranges])
    counts = torch.tensor([-(-(end - start) // model.CHUNK) for start, end in ranges])
    steps = []
    for c, (sequences, now) in enumerate(chunks.steps):
        keep = ~(full[sequences] & (counts[sequences] == c + 1))
        steps.append((sequences[keep], now[keep]))
    return replace(chunks, steps=steps)


@plant("accuracy continuation beta_off", stage("recur"), failure="State checkpoint")
def state_of_the_last_full_chunk(original, prepared, state, chunks):
    """The final state is that after the last full chunk, not after the last token."""
    result, kept = torch.empty_like(prepared.V), []
    for sequences, now in chunks.steps:
        short = sequences[~chunks.valid[now].all(1)]
        kept.append((short, state[short]))
        result[now] = original(prepared, state, replace(chunks, steps=[(sequences, now)]))[now]
    for sequences, before_tail in kept:
        state[sequences] = before_tail
    return result


@plant("accuracy heads", stage("recur_by_tokens"))
def short_state_of_head_before(original, *args):
    """The final state of a sequence of up to 16 tokens is that of the head before."""
    return original(*args).roll(1, 1)


@plant("accuracy continuation beta_off", stage("recur_by_tokens"))
def short_state_without_last_token(original, *args):
    """The final state of a sequence of up to 16 tokens is that before its last token."""
    *inputs, state, ranges, out = args
    original(*inputs, state, ranges, out)
    kept = [n for n, (start, end) in enumerate(ranges) if end - start > 1]
    if kept:
        shorter = [(start, end - 1) for start, end in (ranges[n] for n in kept)]
        state[kept] = original(*inputs, state[kept], shorter, out.clone())
    return state


@plant("accuracy packing chunk_continuation continuation", after())
def at_most_512_tokens(given) -> None:
    """Outputs from token 512 of a sequence on are halved."""
    for start, end in given.sequences():
        given.rows()[start + 512 : end] *= 0.5


@plant("accuracy batch_form packing", after())
def later_batches_end_early(given) -> None:
    """From the second batch on, the outputs of all chunks but the first are halved."""
    if not given.has("cu_seqlens"):
        given.out[1:, model.CHUNK :] *= 0.5


@plant("written", remembering)
def one_element_not_written():
    """The last element of out is not written when there are several heads."""
    kept = {}

    def look(given):
        kept["last"] = given.out[-1:, -1:, -1:, -1:].clone()

    def put_back(given):
        if given.out.shape[2] > 1:
            given.out[-1:, -1:, -1:, -1:] = kept["last"]

    return look, put_back


@plant("outputs_within", after())
def row_too_many(given) -> None:
    """A row beyond the end of out is written."""
    out = given.out
    if out.numel():
        out.as_strided((128,), (1,), out.storage_offset() + out.numel()).fill_(0)


# ---------------------------------------------------------------------------------------------------------------- heads


add("gate_rate_of_next_head", "accuracy heads", changed(A_log=lambda x: x.roll(-1)), "A_log is read one head further.")


@plant("accuracy heads", argument("dt_bias"))
def gate_bias_of_first_head(x):
    """All heads use the dt_bias of the first."""
    return x[:1].expand_as(x).contiguous()


@plant("accuracy heads", argument("A_log", "dt_bias"))
def parameters_of_four_heads(x):
    """A_log and dt_bias are those of the first four heads, over and over."""
    return x[torch.arange(len(x)) % 4]


@plant("accuracy heads", after())
def last_odd_head_missed(given) -> None:
    """Heads are taken in pairs, and the last of an odd number gets the outputs of its neighbour."""
    heads = given.out.shape[2]
    if heads > 1 and heads % 2:
        given.out[:, :, -1] = given.out[:, :, -2]


# ------------------------------------------------------------------------------------------------------------ sequences


@plant("accuracy written packing", before("cu_seqlens"))
def packed_as_one_sequence(given) -> None:
    """All packed sequences are one: nothing starts anew between them."""
    given.cu_seqlens = given.cu_seqlens[[0, -1]]
    if given.has("initial_state"):
        given.initial_state = given.initial_state[:1].clone()
    if given.has("final_state"):
        given.final_state = given.final_state[:1]


@plant("accuracy packing", after())
def sequence_search_off_by_one(given) -> None:
    """The first row of a sequence is taken for one of the sequence before."""
    out = given.rows()
    for start, end in given.sequences():
        if end > start > 0:
            out[start] = out[start - 1]


add(
    "cu_seqlens_not_checked",
    "arguments",
    unchecked("check_cu_seqlens"),
    "The contents of cu_seqlens are never checked.",
    "`cu_seqlens` contents never checked",
)


def first_32_offsets(cu_seqlens, tokens):
    offsets = cu_seqlens.tolist()
    descends = any(x > y or y > tokens for x, y in itertools.pairwise(offsets[:33]))
    if offsets[0] or offsets[-1] != tokens or descends:
        raise ValueError(f"cu_seqlens: expected offsets from 0 to {tokens}, got {offsets[:33]}")


add(
    "first_32_offsets_checked",
    "arguments",
    constant(arguments, check_cu_seqlens=first_32_offsets),
    "Of the contents of cu_seqlens the first 32 are checked, and the last.",
    "`cu_seqlens` contents never checked",
)

# --------------------------------------------------------------------------------------------------------------- states


@plant("arguments", itself)
def larger_pool_of_states_accepted():
    """An initial state of more sequences than there are is accepted.

    The first ones are taken.
    """

    def fwd(*args, **kwargs):
        given = Given.of(*args, **kwargs)
        counted = given.q if given.cu_seqlens is None else given.cu_seqlens[1:]
        if isinstance(given.initial_state, torch.Tensor) and given.initial_state is not given.final_state:
            given.initial_state = given.initial_state[: len(counted)]
        flash_kda.fwd(**vars(given))

    return fwd


@plant("accuracy packing", after("final_state"))
def at_most_64_sequences(given) -> None:
    """Final states from the 65th sequence on are zero."""
    given.final_state[64:] = 0


@plant("accuracy packing", after("final_state"))
def at_most_32_sequences(given) -> None:
    """Final states from the 33rd sequence on are that of the 32nd.

    One warp looks at the offsets, a lane at each.
    """
    if given.final_state.shape[0] > 32:
        given.final_state[32:] = given.final_state[31]


@plant("accuracy", after("final_state"))
def empty_sequence_loses_its_state(given) -> None:
    """The final state of a sequence without tokens is zero."""
    for n, (start, end) in enumerate(given.sequences()):
        if start == end:
            given.final_state[n] = 0


add(
    "initial_state_of_another_sequence",
    "accuracy packing",
    changed(initial_state=lambda x: x.roll(1, 0)),
    "The initial state is that of the sequence before.",
)


@plant("accuracy packing", after("final_state"))
def final_state_of_another_sequence(given) -> None:
    """Final states are stored one sequence further."""
    given.final_state.copy_(given.final_state.roll(1, 0))


add(
    "state_transposed_on_reading",
    "accuracy",
    changed(initial_state=lambda x: x.mT.contiguous()),
    "The initial state is read as [K, V].",
    "State read as",
)


@plant("accuracy", after("final_state"), failure="State read as")
def state_transposed_on_writing(given) -> None:
    """The final state is written as [K, V]."""
    given.final_state.copy_(given.final_state.mT.clone())


@plant("accuracy", argument("initial_state"))
def bf16_state_halves_swapped(x):
    """The two halves of a word of a bf16 state are mistaken for each other."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if x.dtype == torch.bfloat16 else x


@plant("accuracy in_place", before("final_state"))
def final_state_cleared_first(given) -> None:
    """The final state is cleared before the initial state, which may be the same memory, is read."""
    given.final_state.zero_()


add(
    "in_place_by_the_address",
    "arguments",
    constant(arguments, _same_memory=lambda a, b: a.data_ptr() == b.data_ptr()),
    "A final state that begins where the initial one does counts as in place, whatever its dtype or strides.",
)
