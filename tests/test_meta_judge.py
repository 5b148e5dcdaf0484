"""Tests of the tests: the judge measures what NumPy measures, written down anew from docs/operator.md."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
import torch
from judged_targets import a_case

from fuzz.cases.inputs import Inputs, make_inputs
from fuzz.judging.accuracy import accuracy
from fuzz.judging.call import Outputs
from fuzz.judging.sensitivity import reference

WINDOW = 16


def recurrence(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """docs/operator.md, a sequence, head and token after another, in float64: out [B, T, H, V], state [N, H, V, K]."""
    q, k, v, g, beta = (getattr(inputs, name).double().numpy() for name in ("q", "k", "v", "g", "beta"))
    A_log, dt_bias = inputs.A_log.double().numpy(), inputs.dt_bias.double().numpy()
    _, tokens, heads, width = q.shape
    out, state = np.zeros(v.shape), np.zeros((len(inputs.seq_ranges()), heads, width, width))
    for n, (start, end) in enumerate(inputs.seq_ranges()):
        for h in range(heads):
            S = np.zeros((width, width))
            if inputs.initial_state is not None:
                S = inputs.initial_state[n, h].double().numpy().T
            for row in range(start, end):
                at = row // tokens, row % tokens, h
                unit_q = q[at] / math.sqrt((q[at] ** 2).sum() + 1e-6)
                unit_k = k[at] / math.sqrt((k[at] ** 2).sum() + 1e-6)
                b = 1 / (1 + math.exp(-beta[at]))
                a = inputs.lower_bound / (1 + np.exp(-math.exp(A_log[h]) * (g[at] + dt_bias[h])))
                S = np.exp(a)[:, None] * S
                S = S + b * np.outer(unit_k, v[at] - S.T @ unit_k)
                out[at] = inputs.scale * S.T @ unit_q
            state[n, h] = S.T
    return out, state


def rms(x: np.ndarray) -> float:
    return math.sqrt(np.square(x, dtype=np.float64).sum() / x.size)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.mark.parametrize("seed", range(6))
def test_errors_and_places_are_those_of_numpy(seed):
    """The results are wrong a little everywhere and a lot in one element each, so that every metric says something."""
    draw = random.Random(seed)
    packed = seed % 2 == 0
    lens = [draw.choice((1, 7, 16, 17, 35)) for _ in range(draw.randint(1, 3))]
    lens = [*lens, 0] if packed else lens[:1] * 2
    case = a_case(
        lens,
        draw.randint(1, 3),
        packed=packed,
        layout=draw.choice(("contiguous", "strided")),
        initial_state=draw.choice((None, "bf16", "fp32")),
        final_state=("bf16", "fp32")[seed // 2 % 2],
        lower_bound=-draw.random(),
        seed=seed,
    )
    inputs = make_inputs(case)
    exact_out, exact_state = recurrence(inputs)
    noise = np.random.default_rng(seed)
    wrong_out = exact_out * (1 + 0.05 * noise.standard_normal(exact_out.shape))
    wrong_state = exact_state * (1 + 0.05 * noise.standard_normal(exact_state.shape))
    ranges = inputs.seq_ranges()
    n = draw.choice([n for n, length in enumerate(lens) if length])
    row, h, column, channel = draw.randrange(*ranges[n]), draw.randrange(case.heads), draw.randrange(128), 5
    at = row // inputs.q.shape[1], row % inputs.q.shape[1], h, column
    wrong_out[at] += 300 * rms(exact_out)
    wrong_state[n, h, column, channel] += 3000 * rms(exact_state)
    out = torch.from_numpy(wrong_out).bfloat16()
    state = torch.from_numpy(wrong_state).to(inputs.final_state_dtype)

    check = accuracy(Outputs(out, state), inputs, reference(inputs, "cpu"))
    assert not check.passed
    places = dict(re.findall(r"(\w+) \S+ at ([^;]+), at most \S+ allowed", check.detail))
    assert (
        set(places)
        == set(check.errors)
        == {
            *("out", "out_window", "out_element"),
            *("state", "state_head", "state_element"),
        }
    )

    error_out = out.double().numpy() - exact_out
    error_state = state.double().numpy() - exact_state
    rows = error_out.reshape(-1, case.heads, 128), exact_out.reshape(-1, case.heads, 128)
    start, end = ranges[n]
    first = start + (row - start) // WINDOW * WINDOW
    window = slice(first, min(first + WINDOW, end))
    expected = {
        "out": rms(error_out) / rms(exact_out),
        "out_window": rms(rows[0][window, h]) / rms(rows[1][start:end, h]),
        "out_element": abs(error_out[at]) / rms(rows[1][start:end, h]),
        "state": rms(error_state) / rms(exact_state),
        "state_head": rms(error_state[n, h]) / rms(exact_state[n, h]),
        "state_element": abs(error_state[n, h, column, channel]) / rms(exact_state[n, h]),
    }
    for name, error in expected.items():
        assert check.errors[name] == pytest.approx(error, rel=1e-9), name
    token = row - start
    assert numbers(places["out_window"]) == [n, h, token // WINDOW * WINDOW, token // WINDOW * WINDOW + WINDOW - 1]
    assert numbers(places["out_element"]) == [n, token, h, column]
    assert numbers(places["state_head"]) == [n, h]
    assert numbers(places["state_element"]) == [n, h, column, channel]


@pytest.mark.parametrize("seed", range(3))
def test_what_only_the_last_rounding_made_is_never_beyond_a_bound(seed):
    """NumPy's results, rounded once: no implementation can be nearer."""
    case = a_case((33, 0, 18), 2, final_state=("bf16", "fp32")[seed % 2], lower_bound=-0.5 * seed, seed=seed)
    inputs = make_inputs(case)
    out, state = (torch.from_numpy(x) for x in recurrence(inputs))
    rounded = Outputs(out.bfloat16(), state.to(inputs.final_state_dtype))
    check = accuracy(rounded, inputs, reference(inputs, "cpu"), operands="fp32")
    assert check.passed, check.detail
    assert check.errors["out"] == pytest.approx(rms((rounded.out.double() - out).numpy()) / rms(out.numpy()), rel=1e-6)
