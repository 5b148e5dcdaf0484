"""The relay hands a state from channel to channel: each channel decays to nothing, and the state is still there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judged_targets import a_case

from fuzz.cases.inputs import make_inputs
from fuzz.cases.relay import RINGS, RUN_LENGTHS
from fuzz.defects.catalogue import CATALOGUE, target
from fuzz.judging.judge import judge
from fuzz.judging.sensitivity import operands, reference
from fuzz.targets.registry import load_target

pytestmark = pytest.mark.usefixtures("one_thread")

RELAY = a_case((130,), 1, keys="relay", gates="relay", betas="plus_infinity", values="zero", states="random", scale=1.0)


def relayed(run: int, **changes):
    """A case whose runs have that many tokens: the first seed with it."""
    from fuzz.cases.noise import Noise

    for seed in range(1000):
        if Noise(seed, RELAY.seq_lens, 1).choice("relay.run", RUN_LENGTHS) == run:
            return replace(RELAY, seed=seed, **changes)
    raise AssertionError(run)


@pytest.mark.parametrize("run", [8, 16, 20])
def test_the_state_outlives_every_channel(run):
    """A rule that adds up the decay of each channel drops it. The rule that holds does not."""
    case = relayed(run)
    tokens = 3 * run
    inputs = make_inputs(replace(case, seq_lens=(tokens,)))
    a = operands(inputs)[4] / torch.tensor(2.0).log()
    assert a.sum(0).amax() < -7 * run  # of each channel: 7.2 binary digits a token of at least one other run
    assert a.amax(-1).sum() > -1e-3
    before, after = inputs.initial_state.double(), reference(inputs, "cpu").state
    rows = before.norm(dim=2).amax()  # of one channel
    assert after.norm() > rows * 2.0**-4


@pytest.mark.parametrize("run", RUN_LENGTHS)
def test_right_implementations_pass(run):
    for changes in ({}, {"values": "random"}, {"values": "early", "initial_state": None}):
        case = relayed(run, **changes)
        inputs = make_inputs(case)
        for name, format in (("model", "bf16"), ("fla.naive", "fp32")):
            verdict = judge(load_target(name), case, inputs, reference(inputs, "cpu"), ("continuation",), format)
            assert verdict.passed, (name, changes, [check.detail for check in verdict.failed])


@pytest.mark.parametrize("name", [name for name in CATALOGUE if "dropped_below" in name or "in_a_chunk_below" in name])
def test_dropped_history_is_found(name):
    case = relayed(8 if "in_a_chunk" in name else 20, values="random")
    inputs = make_inputs(case)
    verdict = judge(target(CATALOGUE[name]), case, inputs, reference(inputs, "cpu"), ("continuation",))
    assert "accuracy" in {check.name for check in verdict.failed}


def test_the_rings_are_of_distinct_channels():
    from fuzz.cases.relay import CHANNEL_STEP

    for ring in RINGS:
        assert len({CHANNEL_STEP * number % 128 for number in range(ring)}) == ring
