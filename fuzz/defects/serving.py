"""Defects of what serving engines ask for: checkpoints, pools of states, rows behind the last sequence."""

from __future__ import annotations

import torch

import flash_kda
from fuzz.defects.defect import Defects, Given, after, before, itself, unchecked

SERVING = Defects("serving")
add, plant = SERVING.add, SERVING.plant

# ---------------------------------------------------------------------------------------------------------- checkpoints


def lengths_of(given: Given) -> torch.Tensor:
    """Lengths of the sequences, in a shape that goes with `checkpoint_offsets`."""
    lengths = torch.tensor([end - start for start, end in given.sequences()])
    return lengths.view(-1, *[1] * (given.checkpoint_offsets.dim() - 1))


def inside(given: Given) -> torch.Tensor:
    """Which offsets lie inside their sequences."""
    return (given.checkpoint_offsets > 0) & (given.checkpoint_offsets <= lengths_of(given))


def offsets(change):
    """Offsets inside their sequences are changed: `change` is of them and of the lengths."""

    def changed(given):
        x = given.checkpoint_offsets
        given.checkpoint_offsets = torch.where(inside(given), change(x.clone(), lengths_of(given)), x).to(x.dtype)

    return before("checkpoint_offsets")(changed)


def states(change):
    """`change(state)` of each checkpoint that is written."""

    def changed(given):
        for index in map(tuple, inside(given).nonzero().tolist()):
            given.checkpoint_state[index] = change(given.checkpoint_state[index].clone())

    return after("checkpoint_state")(changed)


def unless_others_between(x, moved):
    """`moved` where no other offset of the row lies between it and x, so that offsets still increase."""
    if x.dim() == 1:
        return moved
    low, high = x.minimum(moved)[:, :, None], x.maximum(moved)[:, :, None]
    others = x[:, None, :]
    return torch.where(((others >= low) & (others <= high) & (others != x[:, :, None])).any(-1), x, moved)


@plant("checkpoints", offsets)
def checkpoint_late(x, lengths):
    """A checkpoint is taken 16 tokens late.

    It is, where the sequence has so many and no other checkpoint is there.
    """
    return unless_others_between(x, torch.where(x + 16 <= lengths, x + 16, x))


@plant("checkpoints", offsets)
def checkpoint_at_whole_chunks(x, lengths):
    """A checkpoint is taken at the last multiple of 64.

    At the end of the chunk of 64 before, if there is one and no earlier checkpoint since then.
    """
    return unless_others_between(x, torch.where(x >= 64, x // 64 * 64, x))


@plant("checkpoints", offsets)
def checkpoint_at_the_end_missed(x, lengths):
    """A checkpoint at the end of its sequence is not written."""
    return torch.where(x == lengths, 0, x)


add(
    "checkpoint_of_the_next_head",
    "checkpoints",
    states(lambda s: s.roll(1, 0)),
    "A checkpoint has the state of the next head.",
)
add("checkpoint_transposed", "checkpoints", states(lambda s: s.mT.contiguous()), "A checkpoint is written K first.")
add(
    "checkpoint_through_bf16",
    "checkpoints",
    states(lambda s: s.bfloat16().to(s.dtype)),
    "A checkpoint is rounded to bf16, whatever its dtype.",
)


@plant("checkpoints", before("checkpoint_offsets"))
def one_checkpoint_a_sequence(given) -> None:
    """Of the checkpoints of a sequence only the first is written."""
    if given.checkpoint_offsets.dim() == 2:
        given.checkpoint_offsets = given.checkpoint_offsets.clone()
        given.checkpoint_offsets[:, 1:] = 0


@plant("checkpoints", before("checkpoint_offsets"))
def checkpoints_stop_at_none(given) -> None:
    """Offsets behind one that means none are ignored."""
    if given.checkpoint_offsets.dim() == 2:
        given.checkpoint_offsets = given.checkpoint_offsets * inside(given).to(given.checkpoint_offsets.dtype).cumprod(
            1
        )


@plant("checkpoints", after("checkpoint_state"))
def checkpoint_written_where_none_is(given) -> None:
    """Where no checkpoint is asked for, zeros are written."""
    given.checkpoint_state[~inside(given)] = 0


@plant("checkpoints", before("checkpoint_offsets"))
def checkpoint_past_the_end_written(given) -> None:
    """An offset past the end is taken for the last multiple of 16."""
    x = given.checkpoint_offsets
    given.checkpoint_offsets = x.minimum(lengths_of(given)).to(x.dtype) // 16 * 16


@plant("checkpoints", itself)
def checkpoint_without_initial_state():
    """A checkpoint leaves out the initial state."""

    def fwd(*args, **kwargs):
        given = Given.of(*args, **kwargs)
        flash_kda.fwd(**vars(given))
        if given.has("checkpoint_state", "initial_state") and given.final_state is not given.initial_state:
            spare = {"out": torch.empty_like(given.out), "initial_state": None, "final_state": None}
            flash_kda.fwd(**(vars(given) | spare))

    return fwd


add(
    "checkpoint_offsets_not_checked",
    "arguments",
    unchecked("check_checkpoint_offsets"),
    "The contents of checkpoint_offsets are never checked.",
)

# ------------------------------------------------------------------------------------------------------ pools of states


@plant("state_pool", before("state_indices"))
def negative_index_is_the_last_row(given) -> None:
    """A negative index counts from the end of the pool.

    It does so in Python.
    """
    rows = len(given.initial_state if given.has("initial_state") else given.final_state)
    named = given.state_indices.tolist()
    for n, row in enumerate(named):
        if row < 0 and row % rows not in named:
            named[n] = row % rows
    given.state_indices = torch.tensor(named)


@plant("state_pool", before("state_indices", "initial_state"))
def negative_index_reads_row_0(given) -> None:
    """A sequence with a negative index starts from row 0.

    Its states are in rows of their own, behind the pool.
    """
    pool, final, rows = given.initial_state, given.final_state, given.state_indices.tolist()
    if final is not None and len(final) != len(pool):
        return
    given.state_indices = torch.tensor([row if row >= 0 else len(pool) + n for n, row in enumerate(rows)])
    given.initial_state = torch.cat([pool, pool[:1].expand(len(rows), *pool.shape[1:])])
    if final is not None:
        given.final_state = torch.cat([final, final[:1].expand(len(rows), *final.shape[1:])])


@plant("state_pool", after("state_indices", "final_state"))
def row_written_although_negative(given) -> None:
    """A sequence with a negative index clears row 0.

    Unless another one writes it.
    """
    rows = given.state_indices.tolist()
    if min(rows) < 0 and 0 not in rows:
        given.final_state[0] = 0


@plant("state_pool", before("state_indices", "initial_state"))
def initial_rows_in_order(given) -> None:
    """Initial states are read in the order of the sequences."""
    pool = given.initial_state.clone()
    for n, row in enumerate(given.state_indices.tolist()):
        if row >= 0:
            pool[row] = given.initial_state[n]
    given.initial_state = pool


@plant("state_pool", after("state_indices", "final_state"))
def final_rows_in_order(given) -> None:
    """Final states are written in the order of the sequences."""
    states = [given.final_state[row].clone() if row >= 0 else None for row in given.state_indices.tolist()]
    for n, state in enumerate(states):
        if state is not None:
            given.final_state[n] = state


@plant("state_pool", after("state_indices", "final_state"))
def pool_cleared(given) -> None:
    """Rows that no index names are set to zero."""
    others = torch.ones(len(given.final_state), dtype=torch.bool)
    others[given.state_indices[given.state_indices >= 0].long()] = False
    given.final_state[others] = 0


add(
    "state_indices_not_checked",
    "arguments",
    unchecked("check_state_indices"),
    "The contents of state_indices are never checked.",
)

# -------------------------------------------------------------------------------------------------- rows behind the end


@plant("rows_behind", after("cu_seqlens"))
def rows_behind_written(given) -> None:
    """Rows of out behind the last sequence are set to zero."""
    given.out[:, int(given.cu_seqlens[-1]) :] = 0


@plant("rows_behind", before("cu_seqlens"))
def last_sequence_to_the_end(given) -> None:
    """The last sequence goes on to row T."""
    given.cu_seqlens = given.cu_seqlens.clone()
    given.cu_seqlens[-1] = given.q.shape[1]


@plant("rows_behind", after("cu_seqlens"))
def tile_behind_read(given) -> None:
    """Rows behind the end that share its tile of 16 are read.

    The tile is multiplied as a whole: NaN behind the end spreads into the rows before.
    """
    end = int(given.cu_seqlens[-1])
    behind = given.v[:, end : -(-end // 16) * 16].float().sum(1, keepdim=True) * 0
    given.out[:, end // 16 * 16 : end] += behind.to(given.out.dtype)
