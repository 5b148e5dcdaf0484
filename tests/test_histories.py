"""Histories that matter: what came long ago decides the results. Each such regime is drawn, and right targets pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from fuzz.cases.case import Case
from fuzz.cases.drawing import all_cases
from fuzz.cases.inputs import make_inputs
from fuzz.judging.judge import judge
from fuzz.judging.sensitivity import reference
from fuzz.targets.registry import load_target

pytestmark = pytest.mark.usefixtures("one_thread")

WEAK = ("weak_8", "weak_12", "all_but_one_channel", "equal")
FAINT = ("near_zero", "faint")

REGIMES: dict[str, Callable[[Case], bool]] = {
    "a relay over many chunks": lambda c: c.keys == c.gates == "relay" and max(c.seq_lens) > 100,
    "a relay within a chunk": lambda c: c.keys == c.gates == "relay" and 8 < max(c.seq_lens) <= 100,
    "a relay from the initial state": lambda c: c.keys == c.gates == "relay" and c.initial_state is not None,
    "weak decay and small betas over a thousand tokens": lambda c: (
        c.gates in WEAK and c.betas in FAINT and max(c.seq_lens) >= 1000
    ),
    "a state much larger than what follows": lambda c: (
        c.states in ("large", "huge") and c.initial_state is not None and c.values in ("early", "tiny", "zero")
    ),
    "values much larger than what follows": lambda c: c.values == "early" and max(c.seq_lens) >= 64,
    "one slow channel among fast ones": lambda c: c.gates == "slow_channel" and max(c.seq_lens) >= 64,
}


@pytest.fixture(scope="module")
def drawn() -> list[list[Case]]:
    return [list(islice(all_cases("cpu", seed), 500)) for seed in range(5)]


@pytest.mark.parametrize("regime", REGIMES)
def test_each_is_drawn_within_500_cases_of_five_seeds(regime, drawn):
    counts = [sum(map(REGIMES[regime], cases)) for cases in drawn]
    assert min(counts) >= 1, counts


@pytest.mark.parametrize(("target", "format"), [("model", "bf16"), ("fla.naive", "fp32")])
@pytest.mark.parametrize("regime", REGIMES)
def test_right_targets_pass(regime, target, format, drawn):
    found = load_target(target)
    cases = (case for cases in drawn for case in cases if REGIMES[regime](case) and found.reach(case) is None)
    for case in islice(cases, 3):
        inputs = make_inputs(case)
        properties = ("continuation",) if case.tokens > case.n_seqs else ()
        verdict = judge(found, case, inputs, reference(inputs, "cpu"), properties, format)
        assert verdict.passed, (case, [check.detail for check in verdict.failed])
