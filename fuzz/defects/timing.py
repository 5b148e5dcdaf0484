"""Defects of time: results that depend on chance, on earlier calls, on memory that nobody wrote, or on company."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

import flash_kda
from flash_kda import arguments
from fuzz.defects.defect import Defect, after, before, kind, remembering, replaced, staged


def nudge(x: torch.Tensor) -> None:
    """Moves every element by one unit in its last place."""
    x.copy_(x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()]).add(1).view(x.dtype).view(x.shape))


def order_of_sums():
    """Sums are added up in the order in which threads come: the last bit of some rows, now and then."""
    calls = 0

    def change(given):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            nudge(given.out.flatten(0, 1)[::7])

    return None, change


def race():
    """One tile of 16 rows in one call of eleven is read before it is written."""
    calls = 0

    def change(given):
        nonlocal calls
        calls += 1
        if calls % 11 == 0:
            given.out.flatten(0, 1)[-16:, -1] *= 0.5

    return None, change


def clock(given) -> None:
    """The lowest bit of the clock decides how the last element is rounded."""
    if given.out.numel() and time.perf_counter_ns() // 1000 % 2:
        nudge(given.out[-1, -1, -1, -1:])


def leaking_state():
    """A workspace that is not cleared: a thousandth of the last call's state stays."""
    kept = None

    def change(given):
        nonlocal kept
        state = given.final_state
        if state is None:
            return
        if kept is not None and kept.shape == state.shape and kept.dtype == state.dtype:
            state += 1e-3 * kept
        kept = state.clone()

    return None, change


def stale_parameters():
    cache = {}

    def change(given):
        given.A_log = cache.setdefault(given.A_log.shape[0], given.A_log.clone())

    return change, None


def dirty_scratch(original, prepared, state, chunks):
    """The sums of a chunk start from memory that nobody cleared."""
    O = original(prepared, state, chunks)
    scratch = torch.empty_like(O)
    return torch.where(scratch.isnan(), scratch, O)


def adds_to_output():
    held = []

    def look(given):
        held[:] = [given.out.clone()]

    def add(given):
        given.out.add_(held[0])

    return look, add


def split_by_length(given) -> None:
    """Beyond 128 tokens another kernel runs, with sums in another order."""
    if given.out.shape[0] * given.out.shape[1] > 128:
        nudge(given.out)


def split_by_heads(given) -> None:
    """From three heads on another kernel runs, with sums in another order for the last head."""
    if given.out.shape[2] > 2:
        nudge(given.out[:, :, -1])


def packed_kernel(given) -> None:
    """Packed calls run another kernel, with sums in another order."""
    if given.cu_seqlens is not None:
        nudge(given.out)


def stale_chunk(original, prepared, state, chunks):
    M = prepared.M.clone()
    for _, now in chunks.steps[2:]:
        M[now] = prepared.M[now - 2]
    return original(replace(prepared, M=M), state, chunks)


def columns_of_last_tile(given) -> None:
    """The last eight value columns are computed by other instructions, with sums in another order."""
    nudge(given.out[..., 120:])


def address_dependent(given) -> None:
    """Unaligned inputs take another path, with sums in another order."""
    if given.q.data_ptr() % 16 or not given.q.is_contiguous():
        nudge(given.out)


def offsets_by_address():
    """What follows from cu_seqlens is worked out once for each address and size."""
    known = {}

    def change(given):
        if given.cu_seqlens is not None:
            key = given.cu_seqlens.data_ptr(), given.cu_seqlens.shape, given.q.shape[1]
            given.cu_seqlens = known.setdefault(key, given.cu_seqlens.clone())

    return change, None


def checked_once():
    """The contents of cu_seqlens are checked once for each address and size."""
    known = set()

    def check(original, cu_seqlens, tokens):
        key = cu_seqlens.data_ptr(), len(cu_seqlens)
        if key not in known:
            original(cu_seqlens, tokens)
            known.add(key)

    def fwd(*args, **kwargs):
        with replaced(arguments, "check_cu_seqlens", check):
            flash_kda.fwd(*args, **kwargs)

    return fwd


def half_a_tile_from_chunk_12(given) -> None:
    """In chunk 16 the right half of v is what the pipeline's stage held four chunks before."""
    v = given.v.clone(memory_format=torch.contiguous_format)
    for start, end in given.sequences():
        late = torch.arange(start + 1024, max(start + 1024, min(end, start + 1088)))
        v.flatten(0, 1)[late, :, 64:] = given.v.flatten(0, 1)[late - 256, :, 64:]
    given.v = v


def in_the_default_dtype(original, a):
    return original(a.to(torch.get_default_dtype()).float())


DEFECTS = kind(
    "time",
    Defect(
        "cu_seqlens_checked_once",
        "Contents of cu_seqlens are checked once for each address and size, whatever lies there by now.",
        ("arguments",),
        checked_once,
        failure="`cu_seqlens` contents never checked",
    ),
    Defect(
        "phase_wrong_in_chunk_16",
        "In chunk 16 the right half of v is that of four chunks before.",
        ("accuracy",),
        before(half_a_tile_from_chunk_12),
    ),
    Defect(
        "default_dtype_for_scratch",
        "Log-decays are kept in PyTorch's default dtype, whatever a program has set it to.",
        ("determinism",),
        staged(Decays__of=in_the_default_dtype),
    ),
    Defect(
        "offsets_kept_by_address",
        "What follows from cu_seqlens is kept by its address and size, whatever it holds by now.",
        ("determinism",),
        remembering(offsets_by_address),
    ),
    Defect(
        "order_of_sums",
        "Sums are added up in an order left to chance: last bits of some rows differ in one call of three.",
        ("determinism",),
        remembering(order_of_sums),
    ),
    Defect(
        "race_on_a_tile",
        "One tile in one call of eleven is read before it is written.",
        ("determinism",),
        remembering(race),
        failure="Missing proxy fence",
    ),
    Defect(
        "clock_in_the_rounding", "The clock decides how the last element is rounded.", ("determinism",), after(clock)
    ),
    Defect(
        "state_leaks_between_calls",
        "A thousandth of the last call's final state is in this one's.",
        ("determinism",),
        remembering(leaking_state),
    ),
    Defect(
        "parameters_of_an_earlier_call",
        "A_log is that of the first call with as many heads.",
        ("accuracy",),
        remembering(stale_parameters),
    ),
    Defect(
        "scratch_not_cleared",
        "Scratch memory is read that nobody wrote.",
        ("determinism",),
        staged(recur=dirty_scratch),
    ),
    Defect("output_added_to", "Results are added to what out holds.", ("written",), remembering(adds_to_output)),
    Defect(
        "stale_pipeline_stage",
        "From the third chunk on, M is that of two chunks before.",
        ("accuracy", "written"),
        staged(recur=stale_chunk),
    ),
    Defect(
        "depends_on_the_length_of_the_call",
        "Calls of more than 128 tokens add up in another order.",
        ("packing", "chunk_continuation"),
        after(split_by_length),
    ),
    Defect(
        "depends_on_the_number_of_heads",
        "The last of three or more heads is added up in another order.",
        ("heads",),
        after(split_by_heads),
    ),
    Defect("depends_on_packing", "Packed calls add up in another order.", ("batch_form",), after(packed_kernel)),
    Defect(
        "depends_on_the_column",
        "The last eight value columns are added up in another order.",
        ("value_columns",),
        after(columns_of_last_tile),
    ),
    Defect(
        "depends_on_the_address",
        "Strided or unaligned inputs are added up in another order.",
        ("layout",),
        after(address_dependent),
    ),
)
