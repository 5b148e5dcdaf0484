"""The metrics and bounds of the judge, and the reference they are relative to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from judged_targets import a_case, read_by_the_oracle
from test_judge import exact

import oracle
from fuzz.cases.families import PUBLISHED
from fuzz.cases.inputs import make_inputs
from fuzz.judging import bounds, errors
from fuzz.judging.accuracy import accuracy
from fuzz.judging.call import Outputs
from fuzz.judging.sensitivity import reference


def test_metrics_match_an_independent_computation():
    case = a_case((35, 0, 17), 2)
    inputs = make_inputs(case)
    ref, right = reference(inputs, "cpu"), exact(inputs)
    noise = torch.Generator().manual_seed(3)
    out = (right.out + 0.1 * right.out.std() * torch.randn(right.out.shape, generator=noise)).bfloat16()
    state = right.final_state * (1 + 0.1 * torch.randn(right.final_state.shape, generator=noise))
    found = accuracy(Outputs(out, state), inputs, ref).errors

    e, o = (out.double() - ref.out).numpy()[0], ref.out.numpy()[0]
    assert found["out"] == pytest.approx(np.sqrt((e**2).sum() / (o**2).sum()))
    windows = []
    for start, end in ((0, 35), (35, 35), (35, 52)):
        for first in range(start, end, 16):
            part = slice(first, min(first + 16, end))
            for h in range(2):
                windows.append(np.sqrt((e[part, h] ** 2).mean() / (o[start:end, h] ** 2).mean()))
    assert any(found["out_window"] == pytest.approx(window) for window in windows)
    assert found["out_window"] >= np.median(windows)
    e, S = (state.double() - ref.state).numpy(), ref.state.numpy()
    assert found["state"] == pytest.approx(np.sqrt((e**2).sum() / (S**2).sum()))
    per_head = np.sqrt((e**2).mean((2, 3)) / (S**2).mean((2, 3)))
    assert np.isclose(per_head, found["state_head"]).any()


def test_windows_start_with_their_sequence():
    grid = errors.Grid.of([(0, 20), (20, 20), (20, 25)])
    assert (grid.sequences, grid.windows) == (3, 3)
    assert grid.window_of_row.tolist() == [0] * 16 + [1] * 4 + [2] * 5
    assert grid.sequence_of_window.tolist() == [0, 0, 2]


def test_reference_is_the_oracle_and_repeatable():
    inputs = make_inputs(a_case((20, 0, 70), 2, initial_state="bf16", layout="strided"))
    first, second = reference(inputs, "cpu"), reference(inputs, "cpu")
    out, state = oracle.recurrent_kda(**read_by_the_oracle(inputs))
    torch.testing.assert_close(first.out, out, rtol=1e-12, atol=0)
    torch.testing.assert_close(first.state, state, rtol=1e-12, atol=0)
    assert torch.equal(first.out_moves, second.out_moves) and torch.equal(first.state_moves, second.state_moves)
    assert (first.out_moves > 0).all()


def test_moves_follow_what_the_input_amplifies():
    def relative(name):
        ref = reference(make_inputs(a_case((256,), 2, **PUBLISHED[name])), "cpu")
        return float(errors.rms(ref.out_moves) / errors.rms(ref.out))

    random_keys, equal_keys = relative("random"), relative("equal")
    assert 0.003 < random_keys < 0.005
    assert equal_keys > 5 * random_keys


def test_inputs_move_by_half_a_unit_at_most():
    from fuzz.judging.sensitivity import move

    x = torch.tensor([1.0, 1.9921875, -3.0, 2.0**-130, 0.0, torch.inf]).bfloat16()
    for _ in range(50):
        moved = move(x, 1, torch.Generator().manual_seed(_))[0] - x.double()
        assert (moved[:4].abs() <= torch.tensor([2.0**-8, 2.0**-8, 2.0**-7, 2.0**-138])).all()
        assert moved[4] == 0 and moved[:3].abs().min() > 0
    assert torch.equal(move(x.float(), 1, torch.Generator())[0], x.double())


def test_every_bound_says_why():
    for metric in ("out", "out_window", "out_element"):
        assert bounds.TABLE[metric, torch.bfloat16].reason
    for metric in ("state", "state_head", "state_element"):
        for dtype in (torch.bfloat16, torch.float32):
            assert bounds.TABLE[metric, dtype].reason


def test_finer_operands_are_allowed_less():
    inputs = make_inputs(a_case((100,), 2))
    ref, right = reference(inputs, "cpu"), exact(inputs)
    allowed = {name: accuracy(right, inputs, ref, operands=name).bounds["out"] for name in bounds.OPERANDS}
    assert allowed["bf16"] > 2 * allowed["fp16"] > 2 * 0.0016
    assert accuracy(right, inputs, ref, operands="fp32").passed
