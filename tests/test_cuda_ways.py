"""Both ways of the kernel on the same inputs: chunks prepared by a pair for itself, and chunks through the ring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from on_gpu import (
    arguments_of,
    assert_as_right_as_the_model,
    assert_same_bits,
    hopper,  # noqa: F401 - a fixture of every test
    on_gpu,
    outputs_for,
    run,
)

import flash_kda
from flash_kda import library

pytestmark = pytest.mark.gpu

ANY, PAIR, RING = range(3)  # as in csrc/flash_kda.h


@contextmanager
def way(number: int) -> Iterator[None]:
    library.load().flash_kda_use_way(number)
    try:
        yield
    finally:
        library.load().flash_kda_use_way(ANY)


def by(number: int, inputs, **changes):
    with way(number):
        results = run(inputs, **outputs_for(inputs), **changes)
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_lens": (17,), "heads": 1},
        {"seq_lens": (700,), "heads": 12},
        {"seq_lens": (2100,), "heads": 1},  # each place of the ring is used several times
        {"seq_lens": (2100,), "heads": 40},
        {"seq_lens": (300, 0, 16, 900, 1, 33), "heads": 3},
        {"seq_lens": (400,) * 3, "heads": 4, "packed": False, "layout": "strided"},
        {"seq_lens": (1000,), "heads": 2, "initial_state": None},
        {"seq_lens": (1000,), "heads": 2, "initial_state": "bf16", "final_state": "bf16"},
        {"seq_lens": (800,), "heads": 2, "keys": "equal", "gates": "saturated_open"},
        {"seq_lens": (800,), "heads": 2, "keys": "relay"},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_both_ways_give_the_same_bits(changes):
    inputs = on_gpu(**changes)
    pair = by(PAIR, inputs)
    for _ in range(5):
        assert_same_bits(by(RING, inputs), pair)
    assert_same_bits(by(ANY, inputs), pair)


def test_the_ring_is_right():
    inputs = on_gpu(seq_lens=(900, 300), heads=3)
    assert_as_right_as_the_model(inputs, *by(RING, inputs))


def test_calls_side_by_side():
    """Each launch needs all multiprocessors at once: those of several streams take turns, and none waits for ever."""
    inputs = [on_gpu(seq_lens=(1500,), heads=12, seed=seed) for seed in range(4)]
    expected = [by(PAIR, each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    calls = [arguments_of(each) for each in inputs]
    torch.cuda.synchronize()
    with way(RING):
        for _ in range(20):
            for stream, call in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    flash_kda.fwd(**call)
    torch.cuda.synchronize()
    for call, results in zip(calls, expected, strict=True):
        assert_same_bits((call["out"], call["final_state"]), results)


def test_beside_other_work():
    """A matrix product of another stream holds multiprocessors for a while."""
    inputs = on_gpu(seq_lens=(1500,), heads=12)
    expected = by(PAIR, inputs)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with way(RING):
        for _ in range(10):
            with torch.cuda.stream(other):
                x @ x
            assert_same_bits(run(inputs), expected)


def test_a_captured_call_goes_through_the_ring():
    inputs = on_gpu(seq_lens=(1500,), heads=12)
    expected = by(PAIR, inputs)
    call = arguments_of(inputs)
    graph = torch.cuda.CUDAGraph()
    with way(RING):
        flash_kda.fwd(**call)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            flash_kda.fwd(**call)
    for _ in range(3):
        call["out"].fill_(torch.nan), call["final_state"].fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits((call["out"], call["final_state"]), expected)
