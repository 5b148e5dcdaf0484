"""Defects of time: results that depend on chance, on earlier calls, on memory that nobody wrote, or on company."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

import flash_kda
from flash_kda import arguments
from fuzz.defects.defect import Defects, after, before, itself, remembering, replaced, stage

TIME = Defects("time")
plant = TIME.plant


def nudge(x: torch.Tensor) -> None:
    """Moves every element by one unit in its last place, as sums in another order do."""
    x.copy_(x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()]).add(1).view(x.dtype).view(x.shape))


def every(calls: int, change):
    """`change` after one call of so many."""
    made = 0

    def after_some(given):
        nonlocal made
        made += 1
        if made % calls == 0:
            change(given)

    return None, after_some


# ---------------------------------------------------------------------------------------------------- chance and memory


@plant("determinism", remembering)
def order_of_sums():
    """Sums are added up in an order left to chance: last bits of some rows differ in one call of three."""
    return every(3, lambda given: nudge(given.rows()[::7]))


@plant("determinism", remembering, failure="Missing proxy fence")
def race_on_a_tile():
    """One tile in one call of eleven is read before it is written."""
    return every(11, lambda given: given.rows()[-16:, -1].mul_(0.5))


@plant("determinism", after())
def clock_in_the_rounding(given) -> None:
    """The clock decides how the last element is rounded."""
    if given.out.numel() and time.perf_counter_ns() // 1000 % 2:
        nudge(given.out[-1, -1, -1, -1:])


@plant("determinism", stage("Decays.of"))
def default_dtype_for_scratch(original, a):
    """Log-decays are kept in PyTorch's default dtype, whatever a program has set it to."""
    return original(a.to(torch.get_default_dtype()).float())


@plant("determinism", stage("recur"))
def scratch_not_cleared(original, prepared, state, chunks):
    """Scratch memory is read that nobody wrote."""
    O = original(prepared, state, chunks)
    scratch = torch.empty_like(O)
    return torch.where(scratch.isnan(), scratch, O)


@plant("written", remembering)
def output_added_to():
    """Results are added to what out holds."""
    held = []

    def look(given):
        held[:] = [given.out.clone()]

    return look, lambda given: given.out.add_(held[0])


# --------------------------------------------------------------------------------------------- earlier calls and chunks


@plant("arguments", itself, failure="`cu_seqlens` contents never checked")
def cu_seqlens_checked_once():
    """Contents of cu_seqlens are checked once for each address and size, whatever lies there by now."""
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


@plant("determinism", remembering)
def offsets_kept_by_address():
    """What follows from cu_seqlens is kept by its address and size, whatever it holds by now."""
    known = {}

    def change(given):
        if given.has("cu_seqlens"):
            key = given.cu_seqlens.data_ptr(), given.cu_seqlens.shape, given.q.shape[1]
            given.cu_seqlens = known.setdefault(key, given.cu_seqlens.clone())

    return change, None


@plant("determinism", remembering)
def state_leaks_between_calls():
    """A thousandth of the last call's final state is in this one's."""
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


@plant("accuracy", remembering)
def parameters_of_an_earlier_call():
    """A_log is that of the first call with as many heads."""
    cache = {}

    def change(given):
        given.A_log = cache.setdefault(given.A_log.shape[0], given.A_log.clone())

    return change, None


@plant("accuracy written", stage("recur"))
def stale_pipeline_stage(original, prepared, state, chunks):
    """From the third chunk on, M is that of two chunks before."""
    M = prepared.M.clone()
    for _, now in chunks.steps[2:]:
        M[now] = prepared.M[now - 2]
    return original(replace(prepared, M=M), state, chunks)


@plant("accuracy", before())
def phase_wrong_in_chunk_16(given) -> None:
    """In chunk 16 the right half of v is that of four chunks before."""
    v = given.v.clone(memory_format=torch.contiguous_format)
    for start, end in given.sequences():
        late = torch.arange(start + 1024, max(start + 1024, min(end, start + 1088)))
        v.flatten(0, 1)[late, :, 64:] = given.v.flatten(0, 1)[late - 256, :, 64:]
    given.v = v


# -------------------------------------------------------------------------------------------------------------- company


@plant("packing chunk_continuation", after())
def depends_on_the_length_of_the_call(given) -> None:
    """Calls of more than 128 tokens add up in another order."""
    if len(given.rows()) > 128:
        nudge(given.out)


@plant("heads", after())
def depends_on_the_number_of_heads(given) -> None:
    """The last of three or more heads is added up in another order."""
    if given.out.shape[2] > 2:
        nudge(given.out[:, :, -1])


@plant("batch_form", after("cu_seqlens"))
def depends_on_packing(given) -> None:
    """Packed calls add up in another order."""
    nudge(given.out)


@plant("value_columns", after())
def depends_on_the_column(given) -> None:
    """The last eight value columns are added up in another order."""
    nudge(given.out[..., 120:])


@plant("layout", after())
def depends_on_the_address(given) -> None:
    """Strided or unaligned inputs are added up in another order."""
    if given.q.data_ptr() % 16 or not given.q.is_contiguous():
        nudge(given.out)
