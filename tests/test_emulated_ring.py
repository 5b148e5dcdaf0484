"""Chunks that pass through the ring, by the source of the CUDA kernel in the emulator: the same bits as in a pair."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import emulated
import pytest
import torch
from test_emulated import (
    NOTICED,
    PACKED,
    SEEDS,
    broken,
    difference,
    from_model,
    kernel,  # noqa: F401
    run,
)

from fuzz.cases.inputs import make_inputs


def through_ring(items: int, slots: int = emulated.LEAST_SLOTS, more: int = 2, seed: int = 0) -> dict:
    return {"clusters": items + more, "ring_slots": slots * items, "seed": seed}


@pytest.mark.parametrize(
    ("changes", "items"),
    [
        ({"seq_lens": (40,)}, 1),
        ({"seq_lens": (33, 17)}, 2),
        ({"seq_lens": (200, 17, 0, 5, 130), "heads": 2}, 6),
        ({"seq_lens": (1, 130, 16, 0, 5, 7), "heads": 2}, 2),  # short sequences have CTAs of their own
        ({"seq_lens": (70, 70), "heads": 2, "packed": False, "layout": "strided"}, 4),
        ({"seq_lens": (100,), "initial_state": None, "gates": "saturated_open", "keys": "equal"}, 1),
        ({"seq_lens": (100,), "initial_state": "bf16", "keys": "huge", "queries": "huge", "values": "large"}, 1),
    ],
    ids=lambda x: ",".join(map(str, x.values())) if isinstance(x, dict) else None,
)
def test_both_ways_give_the_same_bits(kernel, changes, items: int):  # noqa: F811
    inputs = make_inputs(replace(PACKED, **changes))
    pair = run(kernel, inputs)
    for more in (1, 3):
        for one, other in zip(pair, run(kernel, inputs, **through_ring(items, more=more, seed=more)), strict=True):
            assert torch.equal(one, other)


def test_checkpoints_and_pools_pass_through_the_ring(kernel):  # noqa: F811
    inputs = make_inputs(replace(PACKED, seq_lens=(130, 0, 70, 5), heads=2, lower_bound=-0.05))
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "scale", "lower_bound", "cu_seqlens")
    given = {name: getattr(inputs, name) for name in names}
    given |= {
        "state_indices": torch.tensor([3, 0, -1, 5]),
        "checkpoint_offsets": torch.tensor([[16, 80, 128], [1, 2, 3], [48, 64, -1], [5, 0, 0]], dtype=torch.int32),
    }
    results = []
    for way in ({}, through_ring(4)):
        pool = torch.randn(6, 2, 128, 128, generator=torch.Generator().manual_seed(0))
        out, checkpoints = torch.full_like(inputs.v, math.nan), torch.full((4, 3, 2, 128, 128), 7.0)
        emulated.forward(
            kernel, **given, **way, out=out, initial_state=pool, final_state=pool, checkpoint_state=checkpoints
        )
        results.append((out, pool, checkpoints))
    assert not results[0][2].eq(7).all()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_no_order_changes_a_bit_when_places_are_used_again(kernel):  # noqa: F811
    inputs = make_inputs(replace(PACKED, seq_lens=(650,), gates="weak"))
    pair = run(kernel, inputs)
    for seed in range(SEEDS // 2):
        ring = run(kernel, inputs, **through_ring(1, more=1 + seed % 3, seed=seed))
        assert all(torch.equal(x, y) for x, y in zip(pair, ring, strict=True))


def test_a_ring_that_is_too_small_is_not_used(kernel):  # noqa: F811
    """With fewer places the CTAs would wait for one another for ever."""
    inputs = make_inputs(replace(PACKED, seq_lens=(300,)))
    ring = run(kernel, inputs, clusters=2, ring_slots=emulated.LEAST_SLOTS - 1)
    assert all(torch.equal(x, y) for x, y in zip(run(kernel, inputs), ring, strict=True))


# What is taken away, and must be noticed. That both CTAs have taken a chunk is left out: one of them seldom falls
# so far behind the other.
WAITS = {
    "a place is written that is not free": ("ring.h", "      ring.wait_free(place.chunk);\n", ""),
    "a chunk is sent that is not prepared": (
        "ring.h",
        "      Barrier::wait(&s.bar_prepared[own.stage], own.parity);\n",
        "",
    ),
    "a stage is given back before it is read": ("ring.h", "      wait_bulk_read();\n", ""),
    "a chunk is said to be there before it is written": ("ring.h", "      wait_bulk();\n", ""),
    "a stage is loaded over a chunk that is not sent": (
        "ring.h",
        "        Barrier::wait(&s.bar_copied[own.stage], own.parity ^ 1);\n",
        "",
    ),
    "a chunk is fetched that has not come": (
        "ring.h",
        "      if (n == there && !run.chunk.is_end()) there += ring.wait_ready(n);\n",
        "",
    ),
    "a chunk is fetched over what R still reads": (
        "ring.h",
        "        Barrier::wait(&s.bar_used[at.stage], at.parity ^ 1);\n",
        "",
    ),
    "a chunk counts as taken before its copy has ended": (
        "ring.h",
        "ring.say_taken(n - kFetchedStages, rank);",
        "ring.say_taken(n, rank);",
    ),
    "R reads what is not fetched": (
        "recur_apart.h",
        "      Barrier::wait(&s.bar_loaded[stage.stage], stage.parity);\n",
        "",
    ),
    "R gives back what its other warps still read": (
        "ring.h",
        "Barrier::init(&s.bar_used[i], kWarpgroup);",
        "Barrier::init(&s.bar_used[i], kWarpgroup / 2);",
    ),
    "flags stay as they were left": ("forward.h", "p.ring_ready[i] = 0;", ";"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_missing_wait_shows(tmp_path: Path, name: str):
    kernel = broken(tmp_path, *WAITS[name])  # noqa: F811
    inputs = make_inputs(replace(PACKED, seq_lens=(650, 16), gates="weak"))
    expected = from_model(inputs)
    for seed in range(SEEDS):
        try:
            results = run(kernel, inputs, **through_ring(1, more=1 + seed % 3, seed=seed))
        except RuntimeError:
            return
        if not difference(results[0], expected[0]) < NOTICED:
            return
    pytest.fail("nothing was noticed")
