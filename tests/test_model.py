"""`flash_kda.fwd` on a CPU, the chunk model: the float64 oracle, the edges and the properties of docs/operator.md."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import flash_kda
from benchmarks.analysis.published import errors_by_head, published_inputs
from fuzz.cases.families import PUBLISHED
from oracle import recurrent_kda

INF = math.inf
BF16_MAX = torch.finfo(torch.bfloat16).max
PER_TOKEN = ("q", "k", "v", "g", "beta")
PEERS = json.loads((Path(__file__).parents[1] / "benchmarks" / "h200_peers.json").read_text())

# Relative RMS error, median over 16 heads: (out, state). What docs/numerics.md measures, and at most a tenth more; the
# rounding of the output to bf16 alone costs 0.00166.
LIMITS = {
    "random": (0.0040, 0.0018),
    "weak": (0.0042, 0.0029),
    "collinear": (0.0051, 0.0039),
    "collinear_strong": (0.0075, 0.0060),
    "equal": (0.0078, 0.0104),
}


def inputs(
    tokens: int = 100, heads: int = 2, *, family: str = "random", sequences: int = 1, seed: int = 0, **changes
) -> dict:
    """Arguments of one call (without outputs), `changes` over those of a family; as many states as `sequences`."""
    drawn = published_inputs(family, seed, tokens=tokens, heads=heads)
    states = torch.randn(sequences, heads, 128, 128, generator=torch.Generator().manual_seed(seed + 1))
    return {**drawn, "initial_state": 0.1 * states, **changes}


def batched(batch: int, tokens: int, heads: int = 2) -> dict:
    given = inputs(batch * tokens, heads, sequences=batch)
    return {**given, **{name: given[name].unflatten(1, (batch, tokens))[0] for name in PER_TOKEN}}


def packed(lengths: tuple[int, ...], heads: int = 2, **changes) -> dict:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return inputs(sum(lengths), heads, sequences=len(lengths), cu_seqlens=offsets, **changes)


def run(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """out and fp32 final_state, both poisoned with NaN before the call and finite after it."""
    out, state = run_unchecked(arguments)
    assert out.isfinite().all()
    assert state.isfinite().all()
    return out, state


def run_unchecked(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    v, offsets = arguments["v"], arguments.get("cu_seqlens")
    sequences = v.shape[0] if offsets is None else len(offsets) - 1
    out = torch.full(v.shape, math.nan, dtype=torch.bfloat16)
    state = torch.full((sequences, v.shape[2], 128, 128), math.nan, dtype=torch.float32)
    flash_kda.fwd(**arguments, out=out, final_state=state)
    return out, state


def tokens_of(arguments: dict, start: int, end: int, **changes) -> dict:
    return {**arguments, **{name: arguments[name][:, start:end] for name in PER_TOKEN}, **changes}


def assert_same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def assert_accurate(arguments: dict, out_limit: float = 0.005, state_limit: float = 0.0035) -> None:
    """The relative RMS error of each head against the oracle is within a limit, unless all of it is below fp32."""
    exact_out, exact_state = recurrent_kda(**arguments)
    out, state = run(arguments)
    for result, exact, axis, limit in ((out, exact_out, 2, out_limit), (state, exact_state, 1, state_limit)):
        visible = exact.movedim(axis, 0).flatten(1).norm(dim=1) > 1e-35
        error = errors_by_head(result, exact, axis)[visible]
        assert (error <= limit).all(), f"relative RMS errors {error.tolist()}"
        assert (result.movedim(axis, 0)[~visible].abs() <= 1e-35).all()


def median_errors(arguments: dict) -> tuple[float, float]:
    """Relative RMS error of out and of the state, the median over the heads."""
    pairs = zip(run(arguments), recurrent_kda(**arguments), (2, 1), strict=True)
    out, state = (errors_by_head(result, exact, axis).median().item() for result, exact, axis in pairs)
    return out, state


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):
        yield


@pytest.mark.parametrize("family", PUBLISHED)
def test_errors_stay_below_the_measured_ones_and_below_fla(family):
    """On the inputs of docs/numerics.md: the heads of two draws together."""
    out_errors, state_errors = [], []
    for drawn in (published_inputs(family, seed) for seed in range(2)):
        pairs = zip(run(drawn), recurrent_kda(**drawn), (2, 1), strict=True)
        for found, pair in zip((out_errors, state_errors), pairs, strict=True):
            found.append(errors_by_head(*pair))
    out_error, state_error = torch.cat(out_errors), torch.cat(state_errors)
    out_limit, state_limit = LIMITS[family]
    assert out_error.median() <= out_limit
    assert state_error.median() <= state_limit
    fla = PEERS["relative_rms_error_vs_fp64"]["fla"][family]
    for errors, measured in ((out_error, fla["out"]), (state_error, fla["state"])):
        assert errors.median() < measured[0]
        assert errors.max() < measured[1]


class TestEdges:
    @pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
    @pytest.mark.parametrize(("family", "limits"), [("random", (0.006, 0.0022)), ("equal", (0.0087, 0.0118))])
    def test_every_tail(self, tokens, family, limits):
        assert_accurate(inputs(tokens, family=family), *limits)

    def test_a_sequence_of_no_tokens_keeps_its_state(self):
        arguments = packed((0, 3, 0, 70, 0))
        _, state = run(arguments)
        assert torch.equal(state[::2], arguments["initial_state"][::2])
        assert_accurate(arguments)
        _, state = run({**arguments, "initial_state": None})
        assert state[::2].abs().max() == 0

    def test_tens_of_thousands_of_sequences(self):
        lengths = [n // 1000 if n % 1000 == 0 else 0 for n in range(30_000)]
        offsets = torch.tensor([0, *itertools.accumulate(lengths)])
        arguments = inputs(sum(lengths), 1, initial_state=None, cu_seqlens=offsets)
        out = torch.full_like(arguments["v"], math.nan)
        flash_kda.fwd(**arguments, out=out)
        expected, _ = run({**arguments, "cu_seqlens": offsets.unique()})
        assert torch.equal(out, expected)

    @pytest.mark.parametrize("lower_bound", [0.0, -0.0, -1e-30, -1e-3, -0.5, -5.0])
    @pytest.mark.parametrize("gate", [-INF, -BF16_MAX, 0.0, 100.0, BF16_MAX, INF])
    def test_gates_at_both_ends(self, lower_bound, gate):
        given = inputs(130, lower_bound=lower_bound)
        assert_accurate({**given, "g": torch.full_like(given["g"], gate)})

    def test_gates_of_both_ends_side_by_side(self):
        given = inputs(130)
        given["g"][..., ::3] = INF
        given["g"][:, ::7] = -INF
        assert_accurate(given)

    @pytest.mark.parametrize("rate", [-INF, -200.0, -100.0, 80.0, 89.0, 300.0])
    @pytest.mark.parametrize("gate", [-INF, 0.0])
    def test_gate_rates_beyond_fp32(self, rate, gate):
        if math.isinf(rate) and math.isinf(gate):
            rate = -700.0  # zero times infinity has no limit
        given = inputs(70)
        given["A_log"].fill_(rate)
        given["dt_bias"].zero_()
        given["g"].fill_(gate)
        assert_accurate(given)

    @pytest.mark.parametrize("logit", [-INF, -BF16_MAX, -20.0, 20.0, BF16_MAX, INF])
    def test_betas_at_both_ends(self, logit):
        given = inputs(130, family="weak")
        given["beta"][:, ::2] = logit
        assert_accurate(given)
        given["beta"].fill_(logit)
        assert_accurate(given)

    def test_no_beta_leaves_the_state_to_decay_only(self):
        given = inputs(100, lower_bound=-0.01)
        given["beta"].fill_(-INF)
        assert_accurate(given, state_limit=1e-5)

    @pytest.mark.parametrize("name", ["q", "k"])
    def test_rows_of_zeros(self, name):
        given = inputs(130)
        given[name][:, 3::5] = 0
        assert_accurate(given)
        out, _ = run(given)
        if name == "q":
            assert out[:, 3::5].abs().max() == 0
        given[name].zero_()
        assert_accurate(given)

    @pytest.mark.parametrize("size", [BF16_MAX, 1e30, 2.0**60, 1e-3, 1e-5, 1e-10, 1e-20, 1e-37])
    @pytest.mark.parametrize("names", ["q", "k", "qk"])
    def test_norms_of_any_size(self, size, names):
        given = inputs(130)
        for name in names:
            given[name] = (given[name].sign() * size).to(torch.bfloat16)
        assert_accurate(given)
        assert_accurate({**given, "initial_state": None})

    @pytest.mark.parametrize("size", [1e30, 1e-30])
    @pytest.mark.parametrize("names", [("v",), ("initial_state",), ("v", "initial_state")], ids="-".join)
    def test_values_and_states_of_any_size(self, size, names):
        given = inputs(130, family="weak")
        for name in names:
            given[name] = given[name] * size
        assert_accurate(given)

    @pytest.mark.parametrize("norm", [2.0**-8, 1.0, 0.0])
    def test_values_as_large_as_rows_allow(self, norm):
        given = inputs(130)
        for name in ("v", "initial_state"):
            given[name] = given[name] * 2.0**117
        for name in ("q", "k"):
            rows = torch.nn.functional.normalize(given[name][:, 3::5].float(), dim=-1)
            given[name][:, 3::5] = (rows * norm).to(torch.bfloat16)
        assert_accurate(given)

    @pytest.mark.parametrize("gate", [INF, 0.0])
    @pytest.mark.parametrize("size", [1.0, 1e10, 1e30])
    def test_a_large_state_is_forgotten(self, gate, size):
        given = inputs(130)
        given["g"].fill_(gate)
        given["initial_state"] *= size
        exact, _ = recurrent_kda(**given)
        out, _ = run(given)
        for start in range(0, 130, 10):  # a window at a time: the first ones would hide the rest
            window = slice(start, start + 10)
            assert errors_by_head(out[:, window], exact[:, window], 2).max() <= 0.0066, start

    def test_value_columns_of_very_different_sizes(self):
        given = inputs(130, family="weak")
        columns = 10.0 ** torch.arange(-30, 31).repeat(3)[:128]
        given["v"] = (given["v"] * columns).to(torch.bfloat16)
        given["initial_state"] = given["initial_state"] * columns[:, None]
        exact, _ = recurrent_kda(**given)
        out, _ = run(given)
        assert errors_by_head(out, exact, 3).max() <= 0.005  # each value column by itself

    @pytest.mark.parametrize("scale", [0.0, -1.0, 1e-30, 1e30])
    def test_scales_of_any_size(self, scale):
        assert_accurate(inputs(scale=scale))

    @pytest.mark.parametrize("family", PUBLISHED)
    def test_errors_do_not_grow_with_length(self, family):
        """Beside a short sequence whose last chunk is as full, which matters with equal keys. Errors of 62 chunks that
        added up in squares would be 3.5 times those of 5.
        """
        short, long = (median_errors(inputs(tokens, 4, family=family)) for tokens in (144, 2000))
        for few, many in zip(short, long, strict=True):
            assert many <= 1.25 * few, (short, long)


class TestProperties:
    @pytest.mark.parametrize(
        "lengths", [(1,), (5, 64, 100, 0, 1, 130), (0, 0, 64), (16, 17, 15, 63, 65, 0), (128, 128)]
    )
    @pytest.mark.parametrize("heads", [1, 3])
    def test_packing(self, lengths, heads):
        arguments = packed(lengths, heads)
        out, state = run(arguments)
        for n, (start, end) in enumerate(itertools.pairwise(arguments["cu_seqlens"].tolist())):
            alone = tokens_of(
                arguments, start, end, cu_seqlens=None, initial_state=arguments["initial_state"][n : n + 1]
            )
            assert_same(run(alone), (out[:, start:end], state[n : n + 1]))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize(("batch", "tokens"), [(1, 100), (2, 65), (5, 130), (3, 0)])
    def test_batch_and_packed_forms_agree(self, batch, tokens, dtype):
        arguments = batched(batch, tokens)
        flat = {name: arguments[name].flatten(0, 1)[None] for name in PER_TOKEN}
        offsets = (torch.arange(batch + 1) * tokens).to(dtype)
        out, state = run({**arguments, **flat, "cu_seqlens": offsets})
        assert_same(run(arguments), (out[0].unflatten(0, (batch, tokens)), state))

    @pytest.mark.parametrize("order", [[2, 0, 1], [1], [2, 1]])
    def test_heads(self, order):
        arguments = packed((100, 70), 3)
        out, state = run(arguments)
        chosen = {name: arguments[name][:, :, order] for name in PER_TOKEN}
        chosen |= {name: arguments[name][order] for name in ("A_log", "dt_bias")}
        chosen["initial_state"] = arguments["initial_state"][:, order]
        assert_same(run({**arguments, **chosen}), (out[:, :, order], state[:, order]))

    @pytest.mark.parametrize("t", [1, 5, 15, 16, 17, 40, 63, 64, 65, 100, 129])
    @pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
    def test_causality(self, t, size):
        arguments = inputs(130)
        before = run(arguments)[0][:, :t]
        generator = torch.Generator().manual_seed(t)
        later = {}
        for name in PER_TOKEN:
            later[name] = arguments[name].clone()
            noise = torch.randn(later[name][:, t:].shape, generator=generator) * size
            later[name][:, t:] = noise.to(torch.bfloat16)
            assert torch.equal(run({**arguments, name: later[name]})[0][:, :t], before), name
        assert torch.equal(run({**arguments, **later})[0][:, :t], before)

    def test_causality_before_the_largest_numbers(self):
        arguments = inputs(130)
        before, _ = run(arguments)
        for t in (7, 40, 100):
            for name in PER_TOKEN:
                changed = arguments[name].clone()
                changed[:, t:] = torch.where(changed[:, t:] > 0, BF16_MAX, -BF16_MAX)
                out, _ = run_unchecked({**arguments, name: changed})  # later values may overflow
                assert torch.equal(out[:, :t], before[:, :t]), name

    @pytest.mark.parametrize("family", PUBLISHED)
    def test_determinism(self, family):
        assert_same(run(inputs(200, family=family)), run(inputs(200, family=family)))

    @pytest.mark.parametrize("lengths", [(1,), (64,), (300,), (1000,), (100,) * 8])
    @pytest.mark.parametrize("heads", [1, 5])
    def test_the_number_of_threads_changes_nothing(self, lengths, heads):
        arguments = packed(lengths, heads)
        expected = run(arguments)
        with torch_threads(2):
            assert_same(run(arguments), expected)

    @pytest.mark.parametrize("family", PUBLISHED)
    def test_continuation_at_chunks_is_bitwise(self, family):
        arguments = inputs(209, family=family)
        whole = run(arguments)
        for t in (0, 32, 64, 96, 160, 192):  # 17 tokens are left: with one less they are a short sequence
            out, state = run(tokens_of(arguments, 0, t))
            more, end = run(tokens_of(arguments, t, 209, initial_state=state))
            assert_same(whole, (torch.cat([out, more], 1), end))

    @pytest.mark.parametrize(
        ("family", "limit"),
        [("random", 0.0055), ("weak", 0.0055), ("collinear", 0.0105), ("collinear_strong", 0.0115), ("equal", 0.0090)],
    )
    def test_continuation_elsewhere_is_within_tolerance(self, family, limit):
        arguments = inputs(150, family=family)
        whole, whole_state = run(arguments)
        for t in (1, 17, 63, 100):
            out, state = run(tokens_of(arguments, 0, t))
            more, end = run(tokens_of(arguments, t, 150, initial_state=state))
            assert errors_by_head(torch.cat([out, more], 1), whole.double(), 2).max() <= limit
            assert errors_by_head(end, whole_state.double(), 1).max() <= limit

    @pytest.mark.parametrize("power", [-90, -60, -1, 1, 7, 60, 90])
    @pytest.mark.parametrize("family", PUBLISHED)
    def test_scaling_by_powers_of_two(self, power, family):
        arguments = inputs(100, family=family)
        out, state = run(arguments)
        factor = 2.0**power
        scaled = {name: arguments[name] * factor for name in ("v", "initial_state")}
        assert_same(run({**arguments, **scaled}), (out * factor, state * factor))

    @pytest.mark.parametrize("tokens", [1, 10, 64, 200])
    @pytest.mark.parametrize("seed", range(3))
    def test_value_columns_are_independent(self, tokens, seed):
        arguments = inputs(tokens, seed=seed)
        out, state = run(arguments)
        order = torch.randperm(128, generator=torch.Generator().manual_seed(seed))
        permuted = {
            "v": arguments["v"][..., order].contiguous(),
            "initial_state": arguments["initial_state"][:, :, order],
        }
        assert_same(run({**arguments, **permuted}), (out[..., order], state[:, :, order]))

    def test_one_value_column_changes_nothing_in_the_others(self):
        arguments = inputs(100)
        out, state = run(arguments)
        loud = {name: arguments[name].clone() for name in ("v", "initial_state")}
        loud["v"][..., 5] *= 2.0**80
        loud["initial_state"][:, :, 5] *= 2.0**80
        loud_out, loud_state = run({**arguments, **loud})
        others = [column for column in range(128) if column != 5]
        assert_same((loud_out[..., others], loud_state[:, :, others]), (out[..., others], state[:, :, others]))

    def test_key_channels(self):
        arguments = inputs(150, family="weak")
        out, state = run(arguments)
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
        permuted = {
            name: arguments[name][..., order].contiguous() for name in ("q", "k", "g", "dt_bias", "initial_state")
        }
        permuted_out, permuted_state = run({**arguments, **permuted})
        assert errors_by_head(permuted_out, out.double(), 2).max() <= 0.001
        assert errors_by_head(permuted_state, state[..., order].double(), 1).max() <= 0.0002

    @pytest.mark.parametrize("heads", [1, 3])
    def test_layout(self, heads):
        arguments = batched(2, 100, heads)
        wide = torch.cat([arguments[name] for name in ("q", "k", "v", "g")], -1)
        strided = dict(zip(("q", "k", "v", "g"), wide.split(128, -1), strict=True))
        strided["beta"] = torch.cat([arguments["beta"]] * 3, -1)[..., heads : 2 * heads]
        strided["dt_bias"] = torch.cat([arguments["dt_bias"]] * 2, -1)[:, :128]
        strided["initial_state"] = arguments["initial_state"].transpose(0, 1).contiguous().transpose(0, 1)
        assert not any(strided[name].is_contiguous() for name in PER_TOKEN)
        assert_same(run({**arguments, **strided}), run(arguments))

    def test_outputs_may_be_strided(self):
        arguments = batched(2, 100)
        out, state = run(arguments)
        wide_out = torch.full((2, 100, 2, 200), math.nan, dtype=torch.bfloat16)
        wide_state = torch.full((2, 2, 128, 150), math.nan)
        flash_kda.fwd(**arguments, out=wide_out[..., 7:135], final_state=wide_state[..., 3:131])
        assert_same((wide_out[..., 7:135], wide_state[..., 3:131]), (out, state))
        assert wide_out[..., :7].isnan().all()
        assert wide_out[..., 135:].isnan().all()
        assert wide_state[..., :3].isnan().all()
        assert wide_state[..., 131:].isnan().all()
