"""The oracle against 50-digit arithmetic, against itself (NumPy and PyTorch), and at the edges of operator.md."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch

from oracle import recurrent_kda, torch_recurrence

INF = math.inf


def problem(lengths, heads=2, K=8, V=6, packed=True, state=True, lower_bound=-5.0, seed=0, **replaced):
    """Arguments of `recurrent_kda` as NumPy arrays, standard normal, bf16-representable or not as drawn."""
    rng = np.random.default_rng(seed)
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    arguments = {
        "q": rng.normal(size=(B, T, heads, K)),
        "k": rng.normal(size=(B, T, heads, K)),
        "v": rng.normal(size=(B, T, heads, V)),
        "g": rng.normal(size=(B, T, heads, K)),
        "beta": rng.normal(size=(B, T, heads)),
        "scale": K**-0.5,
        "A_log": rng.normal(size=heads),
        "dt_bias": rng.normal(size=(heads, K)),
        "lower_bound": lower_bound,
        "initial_state": rng.normal(size=(len(lengths), heads, V, K)) if state else None,
        "cu_seqlens": np.cumsum([0, *lengths]) if packed else None,
    }
    return arguments | replaced


def to_torch(arguments, dtype=torch.float64):
    def convert(x):
        if not isinstance(x, np.ndarray):
            return x
        return torch.from_numpy(x).to(dtype if x.dtype.kind == "f" else torch.int64)

    return {name: convert(x) for name, x in arguments.items()}


def run(arguments, library):
    """`(out, final_state)` as NumPy arrays."""
    if library == "numpy":
        return recurrent_kda(**arguments)
    return tuple(x.numpy() for x in recurrent_kda(**to_torch(arguments)))


def relative_error(got, wanted):
    """Relative RMS error, the worst over the slices of the first axis; 0 where there is nothing to compare."""
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    if got.size == 0:
        return 0.0
    axes = tuple(range(1, got.ndim))
    return float(np.max(np.sqrt(((got - wanted) ** 2).sum(axes) / (wanted**2).sum(axes).clip(1e-300))))


def mpmath_recurrence(arguments):
    """operator.md in 50 digits, one scalar at a time, for one packed row."""
    mp = mpmath.mp
    q, k, v, g, beta = (arguments[name][0] for name in ("q", "k", "v", "g", "beta"))
    scale, lower_bound = mp.mpf(arguments["scale"]), mp.mpf(arguments["lower_bound"])
    T, H, K, V = *q.shape, v.shape[-1]
    offsets = arguments["cu_seqlens"].tolist()
    out = np.zeros((1, T, H, V))
    final_state = np.zeros((len(offsets) - 1, H, V, K))

    def sigmoid(x):
        return 1 / (1 + mp.exp(-x))

    def unit(row):
        row = [mp.mpf(float(x)) for x in row]
        norm = mp.sqrt(mp.fsum(x * x for x in row) + mp.mpf(10) ** -6)
        return [x / norm for x in row]

    for n, (start, end) in enumerate(itertools.pairwise(offsets)):
        for h in range(H):
            rate = mp.exp(mp.mpf(float(arguments["A_log"][h])))
            bias = [mp.mpf(float(x)) for x in arguments["dt_bias"][h]]
            if arguments["initial_state"] is None:
                S = [[mp.mpf(0)] * V for _ in range(K)]
            else:
                S = [[mp.mpf(float(arguments["initial_state"][n, h, j, i])) for j in range(V)] for i in range(K)]
            for t in range(start, end):
                k_hat, q_hat, b = unit(k[t, h]), unit(q[t, h]), sigmoid(mp.mpf(float(beta[t, h])))
                for i in range(K):
                    a = lower_bound * sigmoid(rate * (mp.mpf(float(g[t, h, i])) + bias[i]))
                    S[i] = [mp.exp(a) * x for x in S[i]]
                for j in range(V):
                    recalled = mp.fsum(S[i][j] * k_hat[i] for i in range(K))
                    for i in range(K):
                        S[i][j] += b * k_hat[i] * (mp.mpf(float(v[t, h, j])) - recalled)
                    out[0, t, h, j] = scale * mp.fsum(S[i][j] * q_hat[i] for i in range(K))
            final_state[n, h] = [[S[i][j] for i in range(K)] for j in range(V)]
    return out, final_state


MPMATH_PROBLEMS = {
    "random": problem([9, 0, 3], K=7, V=5),
    "no state, no decay": problem([12], K=6, V=4, state=False, lower_bound=0.0),
    "equal keys, weak decay, beta near 1": problem(
        [24], K=5, V=3, k=np.ones((1, 24, 2, 5)), g=np.full((1, 24, 2, 5), -9.0), beta=np.full((1, 24, 2), 6.0)
    ),
    "saturated gates": problem([10], K=6, V=4, g=40 * np.random.default_rng(1).normal(size=(1, 10, 2, 6))),
    "values of 1e30 over a state of 1": problem([8], K=6, V=4, v=np.full((1, 8, 2, 4), 1e30)),
    "tiny keys, where the 1e-6 shows": problem([8], K=6, V=4, k=1e-3 * np.ones((1, 8, 2, 6))),
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", MPMATH_PROBLEMS)
def test_agrees_with_50_digits(name, library):
    with mpmath.workdps(50):
        wanted = mpmath_recurrence(MPMATH_PROBLEMS[name])
    for got, exact in zip(run(MPMATH_PROBLEMS[name], library), wanted, strict=True):
        assert relative_error(got, exact) <= 1e-13


SHAPES = {
    "one token": {"lengths": [1]},
    "one sequence": {"lengths": [70], "heads": 3},
    "packed": {"lengths": [5, 16, 1, 64, 17], "heads": 3},
    "packed with empty sequences": {"lengths": [0, 3, 0, 0, 7, 0]},
    "all empty": {"lengths": [0, 0, 0]},
    "batch": {"lengths": [20] * 3, "packed": False},
    "batch of T = 0": {"lengths": [0] * 3, "packed": False},
    "V greater than K": {"lengths": [9, 4], "K": 3, "V": 11},
    "K = V = 1": {"lengths": [9, 4], "K": 1, "V": 1},
    "K = V = 128": {"lengths": [30, 50], "heads": 3, "K": 128, "V": 128},
    "no initial state": {"lengths": [30, 2], "state": False},
    "more streams than a group": {"lengths": [2, 3, 1] * 50, "heads": 3, "K": 3, "V": 2},
    "more rows than a block": {"lengths": [3000, 2999], "heads": 1, "K": 3, "V": 2},
    "no decay": {"lengths": [40], "lower_bound": 0.0},
}


@pytest.mark.parametrize("name", SHAPES)
def test_numpy_and_torch_agree(name):
    arguments = problem(**SHAPES[name])
    for got, wanted in zip(run(arguments, "torch"), run(arguments, "numpy"), strict=True):
        assert relative_error(got, wanted) <= 1e-12


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_packed_equals_one_call_per_sequence(library):
    lengths = [4, 0, 9, 1]
    arguments = problem(lengths)
    out, final_state = run(arguments, library)
    offsets = np.cumsum([0, *lengths])
    for n, (start, end) in enumerate(itertools.pairwise(offsets)):
        rows = {name: arguments[name][:, start:end] for name in ("q", "k", "v", "g", "beta")}
        alone = arguments | rows | {"initial_state": arguments["initial_state"][n : n + 1], "cu_seqlens": None}
        out_alone, state_alone = run(alone, library)
        assert relative_error(out[:, start:end], out_alone) <= 1e-14
        assert relative_error(final_state[n : n + 1], state_alone) <= 1e-14


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_outputs_before_a_changed_token_do_not_move(name, library):
    arguments = problem([12])
    changed = arguments[name].copy()
    changed[0, 7] += 1.0
    before, _ = run(arguments, library)
    after, _ = run(arguments | {name: changed}, library)
    assert (before[0, :7] == after[0, :7]).all()
    assert (before[0, 7:] != after[0, 7:]).any()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_continuation_from_the_final_state(library):
    arguments = problem([13])
    out, final_state = run(arguments, library)
    parts = []
    for rows in (slice(0, 5), slice(5, 13)):
        part = {name: arguments[name][:, rows] for name in ("q", "k", "v", "g", "beta")} | {"cu_seqlens": None}
        part_out, state = run(arguments | part, library)
        parts.append(part_out)
        arguments = arguments | {"initial_state": state}
    assert relative_error(np.concatenate(parts, 1), out) <= 1e-14
    assert relative_error(state, final_state) <= 1e-14


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("logit", [-INF, INF])
@pytest.mark.parametrize("name", ["g", "beta"])
def test_infinite_logits_are_the_limits_of_the_sigmoid(name, logit, library):
    arguments = problem([6])
    full = np.full_like(arguments[name], logit)
    near = np.full_like(arguments[name], math.copysign(1e4, logit))
    for got, wanted in zip(run(arguments | {name: full}, library), run(arguments | {name: near}, library), strict=True):
        assert relative_error(got, wanted) <= 1e-14


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_beta_off_leaves_the_state_to_decay_only(library):
    arguments = problem([3], g=np.full((1, 3, 2, 8), INF), beta=np.full((1, 3, 2), -INF), lower_bound=-2.0)
    _, final_state = run(arguments, library)
    assert relative_error(final_state, math.exp(-6.0) * arguments["initial_state"]) <= 1e-14


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_empty_sequence_keeps_its_state(library):
    arguments = problem([0, 4, 0])
    _, final_state = run(arguments, library)
    assert (final_state[[0, 2]] == arguments["initial_state"][[0, 2]]).all()
    _, final_state = run(arguments | {"initial_state": None}, library)
    assert (final_state[[0, 2]] == 0).all()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_zero_rows_and_huge_numbers_stay_finite(library):
    arguments = problem([40], lower_bound=-5.0)
    arguments["k"][0, ::3] = 0
    arguments["q"][0, ::4] = 0
    arguments["q"][0, 1::4] = 1e30
    arguments["k"][0, 1::3] = 1e38
    arguments["v"][0, ::5] = 1e30
    out, final_state = run(arguments, library)
    assert np.isfinite(out).all() and np.isfinite(final_state).all()
    assert (out[0, ::4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_taken_exactly(dtype):
    narrow = to_torch(problem([20, 3]), dtype)
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in narrow.items()}
    for got, wanted in zip(recurrent_kda(**narrow), recurrent_kda(**wide), strict=True):
        assert got.dtype == torch.float64
        assert torch.equal(got, wanted)


def test_strided_inputs_and_gradients_do_not_matter():
    arguments = to_torch(problem([10] * 2, packed=False, V=8))
    fused = torch.cat([arguments[name] for name in ("q", "k", "v", "g")], -1).requires_grad_()
    strided = arguments | dict(zip(("q", "k", "v", "g"), fused.split(8, -1), strict=True))
    for got, wanted in zip(recurrent_kda(**strided), recurrent_kda(**arguments), strict=True):
        assert torch.equal(got, wanted)
        assert not got.requires_grad


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_arguments_are_not_written(library):
    arguments = problem([5, 3]) if library == "numpy" else to_torch(problem([5, 3]))
    copies = {
        name: x.copy() if library == "numpy" else x.clone() for name, x in arguments.items() if hasattr(x, "ndim")
    }
    recurrent_kda(**arguments)
    assert all((arguments[name] == copy).all() for name, copy in copies.items())


IN_ONE_LAUNCH = """
import torch
from oracle.torch_recurrence import advance_by_launches, unit
from oracle.triton_recurrence import advance, takes

generator = torch.Generator().manual_seed(0)
lengths, K, V = (7, 7, 4, 1, 0), 32, 48  # of streams, the longest first
running = [sum(length > step for length in lengths) for step in range(7)]


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


rows = sum(running)
tokens = normal(rows, K), unit(normal(rows, K)), normal(rows, V), normal(rows, K).sigmoid(), normal(rows, 1).sigmoid()
before = normal(len(lengths), K, V)
states = before.clone(), before.clone()
assert takes(K, V) and takes(128, 128) and not takes(24, 48) and not takes(32, 8)
outs = advance_by_launches(states[0], *tokens, running), advance(states[1], *tokens, running)
for expected, found in (outs, states):
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
assert torch.equal(states[1][4], before[4])
"""


def test_steps_in_one_launch_are_those_of_many():
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", IN_ONE_LAUNCH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", ["raises", "gives something else"])
def test_a_kernel_that_does_not_do_here_is_not_used(monkeypatch, fault):
    """No compiler on this machine, or a wrong one: the oracle is as right without it."""
    triton_recurrence = pytest.importorskip("oracle.triton_recurrence")

    def advance(*arguments):
        if fault == "raises":
            raise RuntimeError("no C compiler\nand more")
        return 1.001 * torch_recurrence.advance_by_launches(*arguments)

    find = torch_recurrence.in_one_launch.__wrapped__
    cpu = torch.device("cpu")
    assert find(cpu, 24, 24) is None  # no tiles
    monkeypatch.setattr(triton_recurrence, "advance", torch_recurrence.advance_by_launches)
    assert find(cpu, 32, 48) is torch_recurrence.advance_by_launches
    monkeypatch.setattr(triton_recurrence, "advance", advance)
    with pytest.warns(UserWarning, match="oracle: Triton is not used.*: (no C compiler|Tensor-likes are not close!)$"):
        assert find(cpu, 32, 48) is None


@pytest.mark.gpu
def test_steps_in_one_launch_are_those_of_many_on_a_gpu(monkeypatch):
    """The oracle of 128 x 128 states, of streams of many lengths, and of more rows than are prepared at once."""
    lengths = [2, 0, 1, 700, 33, 64]
    arguments = to_torch(problem(lengths, heads=5, K=128, V=128, lower_bound=-0.01), torch.float32)
    on_gpu = {name: x.cuda() if torch.is_tensor(x) else x for name, x in arguments.items()}
    assert torch_recurrence.kernel(torch.device("cuda"), 128, 128) is not None
    found = recurrent_kda(**on_gpu)
    monkeypatch.setitem(torch_recurrence.SIZES, "cuda", torch_recurrence.Sizes(8, 64, 256))
    in_slabs = recurrent_kda(**on_gpu)
    for got, slab, wanted in zip(found, in_slabs, recurrent_kda(**arguments), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(slab.cpu(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    arguments = to_torch(problem([100, 0, 33], heads=3, K=128, V=128))
    on_gpu = {name: x.cuda() if torch.is_tensor(x) else x for name, x in arguments.items()}
    for got, wanted in zip(recurrent_kda(**on_gpu), recurrent_kda(**arguments), strict=True):
        assert got.is_cuda
        assert relative_error(got.cpu().numpy(), wanted.numpy()) <= 1e-12


ZEROS = np.zeros
BAD_ARGUMENTS = {
    "q: expected shape [B, T, H, K], got [6, 2, 8]": {"q": ZEROS((6, 2, 8))},
    "k: expected shape [B, T, H, K] = [1, 6, 2, 8], got [1, 5, 2, 8]": {"k": ZEROS((1, 5, 2, 8))},
    "v: expected shape [B, T, H, V], got [6, 2, 6]": {"v": ZEROS((6, 2, 6))},
    "v: expected shape [B, T, H, V] = [1, 6, 2, 6], got [1, 6, 3, 6]": {"v": ZEROS((1, 6, 3, 6))},
    "beta: expected shape [B, T, H] = [1, 6, 2], got [1, 6, 2, 1]": {"beta": ZEROS((1, 6, 2, 1))},
    "A_log: expected shape [H] = [2], got [3]": {"A_log": ZEROS(3)},
    "dt_bias: expected shape [H, K] = [2, 8], got [17]": {"dt_bias": ZEROS(17)},
    "initial_state: expected shape [N, H, V, K] = [2, 2, 6, 8], got [2, 2, 8, 6]": {
        "initial_state": ZEROS((2, 2, 8, 6))
    },
    "q: expected a floating dtype, got int64": {"q": ZEROS((1, 6, 2, 8), np.int64)},
    "k: expected a NumPy array (or all PyTorch tensors), got Tensor": {"k": torch.zeros(1, 6, 2, 8)},
    "scale: expected a number, got NoneType": {"scale": None},
    "cu_seqlens: expected int32 or int64, got float64": {"cu_seqlens": np.array([0.0, 6.0])},
    "cu_seqlens: expected a NumPy array or a PyTorch tensor, got list": {"cu_seqlens": [0, 6]},
    "cu_seqlens: expected shape [N + 1] with N >= 1, got [1]": {"cu_seqlens": np.array([0])},
    "cu_seqlens: expected 0 first and at most T = 6 last, got 0 and 7": {"cu_seqlens": np.array([0, 7])},
    "cu_seqlens: expected 0 first and at most T = 6 last, got 1 and 6": {"cu_seqlens": np.array([1, 6])},
    "state_indices: expected shape [N] = [2], got [3]": {"state_indices": np.array([0, 1, 0])},
    "state_indices: expected entries below P = 2, got 2": {"state_indices": np.array([0, 2])},
    "checkpoint_offsets: expected int32 or int64, got float64": {"checkpoint_offsets": ZEROS(2)},
    "checkpoint_offsets: expected shape [N] or [N, C] with N = 2 and C >= 1, got [3]": {
        "checkpoint_offsets": np.array([0, 1, 0])
    },
    "cu_seqlens: expected entries that never decrease, got 4 then 2 at index 1": {"cu_seqlens": np.array([0, 4, 2, 6])},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        recurrent_kda(**problem([4, 2]) | BAD_ARGUMENTS[message])
    assert str(caught.value) == message


def test_packed_needs_a_batch_of_one():
    with pytest.raises(ValueError, match="cu_seqlens: expected q with B = 1, got B = 2"):
        recurrent_kda(**problem([4, 4], packed=False) | {"cu_seqlens": np.array([0, 4])})


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("A_log", "total", "share"),
    [
        (800.0, 0.0, 0.5),
        (math.inf, 0.0, 0.5),
        (-1000.0, -math.inf, 0.0),
        (-math.inf, math.inf, 1.0),
        (800.0, 1e-30, 1.0),
    ],
)
def test_a_rate_beyond_float64_makes_no_nan(A_log, total, share, library):
    """exp(800) times 0 is 0, and exp(-1000) times infinity is infinity: the log-decay is a share of lower_bound."""
    one = np.ones((1, 1, 1, 2))
    state = np.array([[[[2.0, 3.0], [4.0, 5.0]]]])
    arguments = {
        "q": one, "k": one, "v": one, "g": np.full((1, 1, 1, 2), total), "beta": np.full((1, 1, 1), -np.inf),
        "A_log": np.array([A_log]), "dt_bias": np.zeros((1, 2)), "initial_state": state,
    }  # fmt: skip
    if library == "torch":
        arguments = {name: torch.from_numpy(x) for name, x in arguments.items()}
    out, final = recurrent_kda(**arguments, scale=1.0, lower_bound=-3.0)
    np.testing.assert_allclose(np.asarray(final), state * np.exp(-3.0 * share), rtol=1e-12)
    assert np.isfinite(np.asarray(out)).all()
