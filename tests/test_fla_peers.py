"""fla behind the signature of `flash_kda.fwd`, against the oracle. On a CPU its Triton kernels are interpreted."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from judged_targets import read_by_the_oracle

from fuzz.cases.inputs import make_inputs
from fuzz.cases.plain import PLAIN
from fuzz.judging.call import launch
from fuzz.targets import fla as fla_peers
from oracle import recurrent_kda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(fla_peers.available() is not None, reason=str(fla_peers.available())),
    *([pytest.mark.gpu, pytest.mark.timeout(900)] if DEVICE == "cuda" else []),  # there Triton compiles
]
PEERS = {
    "chunk": (fla_peers.chunk, fla_peers.chunk_reach),
    "recurrent": (fla_peers.recurrent, fla_peers.recurrent_reach),
    "naive": (fla_peers.naive, fla_peers.naive_reach),
}
# Relative RMS error. Everything on a CPU and `naive` anywhere computes in fp32; the kernels on a GPU use bf16 operands,
# with errors of up to 0.019 where keys are alike (docs/numerics.md).
FP32 = 1e-5
BF16 = 2e-2

CASES = {
    "plain": {},
    "one token": {"seq_lens": (1,)},
    "no states": {"initial_state": None, "final_state": None},
    "bf16 final state": {"final_state": "bf16"},
    "bf16 states": {"initial_state": "bf16", "final_state": "bf16"},
    "batch, strided": {"seq_lens": (5, 5), "layout": "strided"},
    "packed, int32": {"seq_lens": (9, 4), "packed": True, "cu_seqlens_dtype": "int32"},
    "two heads, packed, strided": {"seq_lens": (7,), "heads": 2, "packed": True, "layout": "strided"},
    "empty sequences": {"seq_lens": (0, 3, 0, 2, 0), "packed": True},
    "T = 0": {"seq_lens": (0, 0)},
    "T = 0 without a state": {"seq_lens": (0,), "packed": True, "initial_state": None},
    "no decay": {"lower_bound": 0.0},
    "hardly any decay": {"lower_bound": -1e-3},
    "infinite gates": {"gates": "plus_infinity"},
    "gates of minus infinity": {"gates": "minus_infinity"},
    "infinite betas": {"betas": "infinite"},
    "zero rows": {"keys": "zero_rows", "queries": "zero_rows"},
    "values of 1e30": {"values": "huge"},
    "equal keys": {"keys": "equal", "gates": "equal", "betas": "constant_6"},
    "another scale": {"scale": -3.0},
}


@pytest.fixture(scope="module", autouse=True)
def one_configuration():
    """On a GPU every worker would tune all of fla's kernels at once."""
    if DEVICE != "cuda":
        yield
        return
    from triton.runtime.autotuner import Autotuner

    from fuzz.targets.fla_configurations import fix_configurations

    tuned = Autotuner.run
    fix_configurations()
    yield
    Autotuner.run = tuned


def run(fwd, inputs, out_dtype):
    """`(out, final_state)`; both were NaN before the call."""
    final_state = None
    if inputs.final_state_dtype is not None:
        n = len(inputs.seq_ranges())
        shape = (n, *inputs.v.shape[2:], inputs.k.shape[-1])
        final_state = torch.full(shape, math.nan, dtype=inputs.final_state_dtype, device=inputs.v.device)
    out = torch.full(inputs.v.shape, math.nan, dtype=out_dtype, device=inputs.v.device)
    launch(SimpleNamespace(fwd=fwd), inputs, out, final_state)
    return out, final_state


def relative_error(got, wanted):
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name, peer):
    fwd, reach = PEERS[peer]
    case = dataclasses.replace(PLAIN, **CASES[name])
    if peer == "chunk" and (case.initial_state == "bf16" or case.lower_bound == 0):
        assert reach(case) is not None
        return
    assert reach(case) is None
    inputs = make_inputs(case, DEVICE)
    # Into an fp32 `out`, so that the last rounding does not hide how close the peer comes.
    out, final_state = run(fwd, inputs, torch.float32)
    wanted_out, wanted_state = recurrent_kda(**read_by_the_oracle(inputs))
    bound = FP32 if DEVICE == "cpu" or peer == "naive" else BF16
    assert relative_error(out, wanted_out) <= bound
    if final_state is not None:
        bf16_rounding = 2**-8 if final_state.dtype == torch.bfloat16 else 0
        assert relative_error(final_state, wanted_state) <= bound + bf16_rounding


@pytest.mark.parametrize("length", [63, 64, 65, 130])
def test_chunk_agrees_around_its_chunks(length):
    inputs = make_inputs(dataclasses.replace(PLAIN, seq_lens=(length,)), DEVICE)
    for got, wanted in zip(
        run(fla_peers.chunk, inputs, torch.float32), recurrent_kda(**read_by_the_oracle(inputs)), strict=True
    ):
        assert relative_error(got, wanted) <= (FP32 if DEVICE == "cpu" else BF16)


@pytest.mark.parametrize("peer", PEERS)
def test_writes_bf16_rounded_to_nearest(peer):
    inputs = make_inputs(PLAIN, DEVICE)
    out, _ = run(PEERS[peer][0], inputs, torch.bfloat16)
    # Rounding to nearest moves bf16 numbers by 1.7e-3 in relative RMS, cutting off by 3.3e-3.
    assert relative_error(out, recurrent_kda(**read_by_the_oracle(inputs))[0]) <= (
        2e-3 if DEVICE == "cpu" or peer == "naive" else BF16
    )


@pytest.mark.parametrize("peer", PEERS)
def test_updates_a_state_in_place_and_leaves_its_inputs_alone(peer):
    inputs = make_inputs(PLAIN, DEVICE)
    before = {name: x.clone() for name, x in vars(inputs).items() if torch.is_tensor(x)}
    wanted_out, wanted_state = recurrent_kda(**read_by_the_oracle(inputs))
    out = torch.full(inputs.v.shape, math.nan, dtype=torch.float32, device=DEVICE)
    state = inputs.initial_state
    arguments = [getattr(inputs, name) for name in ("q", "k", "v", "g", "beta", "scale")]
    PEERS[peer][0](
        *arguments, out, inputs.A_log, inputs.dt_bias, inputs.lower_bound, initial_state=state, final_state=state
    )
    bound = FP32 if DEVICE == "cpu" or peer == "naive" else BF16
    assert relative_error(out, wanted_out) <= bound
    assert relative_error(state, wanted_state) <= bound
    assert all(torch.equal(getattr(inputs, name), x) for name, x in before.items() if name != "initial_state")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"initial_state": "bf16"}, "initial_state must be in float32"), ({"lower_bound": 0.0}, r"\[-5, 0\)")],
)
def test_what_is_out_of_reach_of_chunk_fla_refuses(change, message):
    case = dataclasses.replace(PLAIN, **change)
    assert fla_peers.chunk_reach(case)
    with pytest.raises((AssertionError, ValueError), match=message):
        run(fla_peers.chunk, make_inputs(case, DEVICE), torch.bfloat16)


@pytest.mark.parametrize("peer", PEERS)
def test_a_large_case_is_out_of_reach_with_a_reason(peer):
    reason = PEERS[peer][1](dataclasses.replace(PLAIN, seq_lens=(8192,) * 4, heads=96))
    if DEVICE == "cpu" or peer == "naive":
        assert f"fla.{peer}" in reason
    else:
        assert reason is None


def python(code):
    """What a fresh interpreter prints, without Triton's switch in its environment."""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_importing_the_module_imports_neither_fla_nor_triton():
    assert python("import sys, fuzz.targets.fla; print(sorted({'fla', 'triton'} & set(sys.modules)))") == "[]"


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted where there is an NVIDIA GPU")
def test_says_so_when_triton_was_imported_as_a_compiler():
    reason = python("import triton; from fuzz.targets import fla as fla_peers; print(fla_peers.available())")
    assert reason.startswith("TRITON_INTERPRET: expected 1 before Triton is imported")


@pytest.mark.parametrize("set_by_a_user", [None, "1"])
def test_fla_does_not_hand_over_in_its_own_calls_and_in_no_others(set_by_a_user, monkeypatch):
    from fla.ops.kda.backends.flash_kda import FlashKDABackend

    monkeypatch.delenv("FLA_FLASH_KDA", raising=False)
    if set_by_a_user is not None:
        monkeypatch.setenv("FLA_FLASH_KDA", set_by_a_user)
    enabled, own = [], fla_peers._fla()
    for name in ("chunk_kda", "fused_recurrent_kda"):
        function = getattr(own, name)

        def asked(*args, function=function, **kwargs):
            enabled.append(FlashKDABackend().is_enabled())
            return function(*args, **kwargs)

        monkeypatch.setattr(own, name, asked)
    one = make_inputs(dataclasses.replace(PLAIN, seq_lens=(1,)), DEVICE)
    for fwd in (fla_peers.chunk, fla_peers.recurrent):
        run(fwd, one, torch.bfloat16)
        assert FlashKDABackend().is_enabled()
        assert os.environ.get("FLA_FLASH_KDA") == set_by_a_user
    assert enabled == [False, False]


def test_chunk_looks_at_the_offsets_of_each_call():
    """fla keeps what follows from `cu_seqlens` by the object, whose contents may have changed since."""
    before, after = (
        make_inputs(dataclasses.replace(PLAIN, seq_lens=lens, packed=True), DEVICE) for lens in ((0, 65), (65, 0))
    )
    fresh = run(fla_peers.chunk, after, torch.float32)
    cu_seqlens = before.cu_seqlens.clone()
    run(fla_peers.chunk, dataclasses.replace(before, cu_seqlens=cu_seqlens), torch.float32)
    cu_seqlens.copy_(after.cu_seqlens)
    again = run(fla_peers.chunk, dataclasses.replace(after, cu_seqlens=cu_seqlens), torch.float32)
    for x, y in zip(again, fresh, strict=True):
        assert torch.equal(x, y)
