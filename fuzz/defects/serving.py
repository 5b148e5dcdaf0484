"""Defects of what serving engines ask for: checkpoints, pools of states, rows behind the last sequence."""

from __future__ import annotations

import torch

import flash_kda
from flash_kda import arguments
from fuzz.defects.defect import Defect, Given, after, before, kind, unchecked

CHUNK = 64


def offsets_changed(change):
    """The operator with other offsets of checkpoints, where there are any."""

    def changed(given: Given) -> None:
        if given.checkpoint_offsets is not None:
            lengths = torch.tensor([end - start for start, end in given.sequences()])
            lengths = lengths.view(-1, *[1] * (given.checkpoint_offsets.dim() - 1))
            x = given.checkpoint_offsets.clone()
            inside = (x > 0) & (x <= lengths)
            given.checkpoint_offsets = torch.where(inside, change(x, lengths), x).to(x.dtype)

    return before(changed)


def one_step_late(x, lengths):
    """After a block of 16 more, where the sequence has one."""
    return torch.where(x + 16 <= lengths, x + 16, x)


def last_whole_chunk(x, lengths):
    """At the end of the chunk of 64 before, if there is one and no earlier checkpoint is there."""
    whole = torch.where(x >= CHUNK, x // CHUNK * CHUNK, x)
    if x.dim() == 2:
        whole[:, 1:] = torch.where(whole[:, 1:] == whole[:, :-1], x[:, 1:], whole[:, 1:])
    return whole


def none_at_the_end(x, lengths):
    return torch.where(x == lengths, 0, x)


def of_states(change):
    """`change(state)` of each checkpoint that is written."""

    def changed(given: Given) -> None:
        if given.checkpoint_state is not None:
            for index in written(given):
                given.checkpoint_state[index] = change(given.checkpoint_state[index].clone())

    return after(changed)


def written(given: Given) -> list[tuple[int, ...]]:
    """The indices of checkpoints that lie inside their sequences."""
    where = given.checkpoint_offsets
    lengths = torch.tensor([end - start for start, end in given.sequences()])
    inside = (where > 0) & (where <= lengths.view(-1, *[1] * (where.dim() - 1)))
    return [tuple(index) for index in inside.nonzero().tolist()]


def first_column_only(given: Given) -> None:
    """Of several checkpoints of a sequence the first is written."""
    if given.checkpoint_offsets is not None and given.checkpoint_offsets.dim() == 2:
        given.checkpoint_offsets = given.checkpoint_offsets.clone()
        given.checkpoint_offsets[:, 1:] = 0


def stops_at_none(given: Given) -> None:
    """Offsets behind the first one that means none are not looked at."""
    if given.checkpoint_offsets is not None and given.checkpoint_offsets.dim() == 2:
        inside = torch.zeros_like(given.checkpoint_offsets)
        for index in written(given):
            inside[index] = 1
        given.checkpoint_offsets = given.checkpoint_offsets * inside.cumprod(1)


def written_where_none_is(given: Given) -> None:
    """Where an offset means none, the initial state is written."""
    if given.checkpoint_state is not None:
        inside = set(written(given))
        for index in map(tuple, torch.ones_like(given.checkpoint_offsets).nonzero().tolist()):
            if index not in inside:
                given.checkpoint_state[index] = 0


def clamped_to_the_end(given: Given) -> None:
    """An offset past the end is taken for the end."""
    if given.checkpoint_offsets is not None:
        lengths = torch.tensor([end - start for start, end in given.sequences()])
        lengths = lengths.view(-1, *[1] * (given.checkpoint_offsets.dim() - 1))
        given.checkpoint_offsets = (
            given.checkpoint_offsets.minimum(lengths).to(given.checkpoint_offsets.dtype) // 16 * 16
        )


def without_initial_state():
    """Checkpoints are those of a run from zero."""

    def fwd(*args, **kwargs):
        given = Given.of(*args, **kwargs)
        flash_kda.fwd(**vars(given))
        if given.checkpoint_state is not None and given.initial_state is not None and not same(given):
            spare = {"out": torch.empty_like(given.out), "initial_state": None, "final_state": None}
            flash_kda.fwd(**(vars(given) | spare))

    return fwd


def same(given: Given) -> bool:
    return given.final_state is given.initial_state


def negative_is_the_last(given: Given) -> None:
    """A negative index counts from the end of the pool, as in Python."""
    if given.state_indices is not None:
        rows = len(given.initial_state if given.initial_state is not None else given.final_state)
        named = given.state_indices.tolist()
        for n, row in enumerate(named):
            if row < 0 and row % rows not in named:
                named[n] = row % rows
        given.state_indices = torch.tensor(named)


def reading(change):
    """The operator with `change(given)` made before the call, and the final states written where they belong."""

    def make():
        def fwd(*args, **kwargs):
            given = Given.of(*args, **kwargs)
            arguments.check_arguments(**vars(given))
            asked = Given(**vars(given))
            if given.state_indices is not None:
                change(asked)
            flash_kda.fwd(**vars(asked))

        return fwd

    return make


def initial_rows_in_order(given: Given) -> None:
    """The initial state of sequence n is row n of the pool."""
    if given.initial_state is not None:
        pool = given.initial_state.clone()
        for n, row in enumerate(given.state_indices.tolist()):
            if row >= 0:
                pool[row] = given.initial_state[n]
        given.initial_state = pool


def negative_reads_the_first(given: Given) -> None:
    """A negative index is taken for row 0 when reading: two calls, for those with and without one."""
    if given.initial_state is not None:
        pool, rows = given.initial_state, given.state_indices.tolist()
        spare = len(pool)
        given.initial_state = torch.cat([pool, pool[:1].expand(len(rows), *pool.shape[1:])])
        given.state_indices = torch.tensor([row if row >= 0 else spare + n for n, row in enumerate(rows)])
        if given.final_state is not None:
            final = given.final_state
            given.final_state = torch.cat([final, final[:1].expand(len(rows), *final.shape[1:])])
            if len(final) != spare:
                given.state_indices = torch.tensor(rows)
                given.initial_state, given.final_state = pool, final


def pool_cleared(given: Given) -> None:
    """Rows of the pool that no index names are set to zero."""
    if given.state_indices is not None and given.final_state is not None:
        named = given.state_indices[given.state_indices >= 0].long()
        others = torch.ones(len(given.final_state), dtype=torch.bool)
        others[named] = False
        given.final_state[others] = 0


def written_although_negative(given: Given) -> None:
    """A sequence whose index is negative writes its state to row 0, unless another one does."""
    if given.state_indices is not None and given.final_state is not None:
        rows = given.state_indices.tolist()
        if min(rows) < 0 and 0 not in rows:
            given.final_state[0] = 0


def not_in_place(given: Given) -> None:
    """Final states are written in the order of the sequences."""
    if given.state_indices is not None and given.final_state is not None:
        states = [given.final_state[row].clone() if row >= 0 else None for row in given.state_indices.tolist()]
        for n, state in enumerate(states):
            if state is not None:
                given.final_state[n] = state


def rows_behind_written(given: Given) -> None:
    """Rows of out behind the last sequence are set to zero."""
    if given.cu_seqlens is not None:
        given.out[:, int(given.cu_seqlens[-1]) :] = 0


def last_sequence_to_the_end(given: Given) -> None:
    """The last sequence goes on to the last row."""
    if given.cu_seqlens is not None:
        given.cu_seqlens = given.cu_seqlens.clone()
        given.cu_seqlens[-1] = given.q.shape[1]


def tile_behind_read(given: Given) -> None:
    """The last tile of 16 rows is multiplied as a whole: NaN behind the end spreads into the rows before."""
    if given.cu_seqlens is not None:
        end = int(given.cu_seqlens[-1])
        behind = given.v[:, end : -(-end // 16) * 16].float().sum(1, keepdim=True) * 0
        given.out[:, end // 16 * 16 : end] += behind.to(given.out.dtype)


CHECKPOINTS, POOL, BEHIND = ("checkpoints",), ("state_pool",), ("rows_behind",)

DEFECTS = kind(
    "serving",
    Defect("checkpoint_late", "A checkpoint is taken 16 tokens late.", CHECKPOINTS, offsets_changed(one_step_late)),
    Defect(
        "checkpoint_at_whole_chunks",
        "A checkpoint is taken at the last multiple of 64.",
        CHECKPOINTS,
        offsets_changed(last_whole_chunk),
    ),
    Defect(
        "checkpoint_at_the_end_missed",
        "A checkpoint at the end of its sequence is not written.",
        CHECKPOINTS,
        offsets_changed(none_at_the_end),
    ),
    Defect(
        "checkpoint_of_the_next_head",
        "A checkpoint has the state of the next head.",
        CHECKPOINTS,
        of_states(lambda s: s.roll(1, 0)),
    ),
    Defect(
        "checkpoint_transposed", "A checkpoint is written K first.", CHECKPOINTS, of_states(lambda s: s.mT.contiguous())
    ),
    Defect(
        "checkpoint_through_bf16",
        "A checkpoint is rounded to bf16, whatever its dtype.",
        CHECKPOINTS,
        of_states(lambda s: s.bfloat16().to(s.dtype)),
    ),
    Defect(
        "one_checkpoint_a_sequence",
        "Of the checkpoints of a sequence only the first is written.",
        CHECKPOINTS,
        before(first_column_only),
    ),
    Defect(
        "checkpoints_stop_at_none",
        "Offsets behind one that means none are ignored.",
        CHECKPOINTS,
        before(stops_at_none),
    ),
    Defect(
        "checkpoint_written_where_none_is",
        "Where no checkpoint is asked for, zeros are written.",
        CHECKPOINTS,
        after(written_where_none_is),
    ),
    Defect(
        "checkpoint_past_the_end_written",
        "An offset past the end is taken for the last multiple of 16.",
        CHECKPOINTS,
        before(clamped_to_the_end),
    ),
    Defect(
        "checkpoint_without_initial_state",
        "A checkpoint leaves out the initial state.",
        CHECKPOINTS,
        without_initial_state,
    ),
    Defect(
        "checkpoint_offsets_not_checked",
        "The contents of checkpoint_offsets are never checked.",
        ("arguments",),
        unchecked("check_checkpoint_offsets"),
    ),
    Defect(
        "negative_index_is_the_last_row",
        "A negative index counts from the end of the pool.",
        POOL,
        before(negative_is_the_last),
    ),
    Defect(
        "negative_index_reads_row_0",
        "A sequence with a negative index starts from row 0.",
        POOL,
        reading(negative_reads_the_first),
    ),
    Defect(
        "row_written_although_negative",
        "A sequence with a negative index clears row 0.",
        POOL,
        after(written_although_negative),
    ),
    Defect(
        "initial_rows_in_order",
        "Initial states are read in the order of the sequences.",
        POOL,
        reading(initial_rows_in_order),
    ),
    Defect("final_rows_in_order", "Final states are written in the order of the sequences.", POOL, after(not_in_place)),
    Defect("pool_cleared", "Rows that no index names are set to zero.", POOL, after(pool_cleared)),
    Defect(
        "state_indices_not_checked",
        "The contents of state_indices are never checked.",
        ("arguments",),
        unchecked("check_state_indices"),
    ),
    Defect(
        "rows_behind_written",
        "Rows of out behind the last sequence are set to zero.",
        BEHIND,
        after(rows_behind_written),
    ),
    Defect("last_sequence_to_the_end", "The last sequence goes on to row T.", BEHIND, before(last_sequence_to_the_end)),
    Defect(
        "tile_behind_read", "Rows behind the end that share its tile of 16 are read.", BEHIND, after(tile_behind_read)
    ),
)
