"""flash-linear-attention's KDA behind the signature of `flash_kda.fwd`.

On a GPU these are fla's Triton kernels as fla runs them. fla tunes them, except for the targets of the fuzzer, where
`fuzz/targets/fla_configurations.py` fixes the configuration. Without a GPU they run through Triton's interpreter
(`fuzz/targets/triton_interpreter.py`), on small cases only. What the interpreter cannot do in bf16 is widened to fp32
before the call, exactly. `naive` is fla's own PyTorch reference, in fp32 anywhere.

fla is imported by the first call only: it takes seconds.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import torch

from fuzz.cases.case import Case
from fuzz.targets.adapter import writing
from fuzz.targets.triton_interpreter import help_fla, ignore_overflow, interpret_triton

# What a call may cost, so that it stays near 0.3 s on one core. Interpreted, `chunk` takes 0.12 s for a tile of up to
# 64 tokens of one head, and an eighth of that for a sequence of one head, even an empty one; `recurrent` takes 9 ms
# for a token or for a sequence of one head. `naive` steps over the tokens of a sequence, in 12 us for each head that
# steps along and as much as for 4 heads besides. On a GPU each of its steps is ten launches, whatever the heads.
CHUNK_TILES = 3
RECURRENT_TOKENS = 32
NAIVE_HEAD_STEPS = 20_000
NAIVE_STEPS_ON_GPU = 128

SWITCH = "FLA_FLASH_KDA"  # the environment variable that fla reads in each call


def on_gpu() -> bool:
    return torch.cuda.is_available()


def available() -> str | None:
    """Why fla cannot run here, or None."""
    missing = [name for name in ("fla", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if not on_gpu():
        try:
            interpret_triton()
        except RuntimeError as error:
            return str(error)
    return None


def chunk_reach(case: Case) -> str | None:
    """Why `chunk` does not take the case: what fla-core 0.6.0 refuses and, interpreted, what is too slow; or None."""
    if case.initial_state == "bf16":
        return "fla.chunk takes fp32 initial states only"
    if not -5 <= case.lower_bound < 0:
        return "fla.chunk takes lower_bound in [-5, 0) only"
    tiles = case.heads * (sum(-(-length // 64) for length in case.seq_lens) + case.n_seqs / 8)
    if not on_gpu() and tiles > CHUNK_TILES:
        return "too large for fla.chunk in Triton's interpreter"
    return None


def recurrent_reach(case: Case) -> str | None:
    """Why `recurrent` does not take the case, or None. It is only ever too slow, and only interpreted."""
    if not on_gpu() and case.heads * (case.tokens + case.n_seqs) > RECURRENT_TOKENS:
        return "too large for fla.recurrent in Triton's interpreter"
    return None


def naive_reach(case: Case) -> str | None:
    """Why `naive` does not take the case, or None. It is only ever too slow."""
    if case.packed:
        steps, abreast = case.tokens + case.n_seqs, case.heads
    else:
        steps, abreast = case.seq_lens[0], case.heads * case.n_seqs
    on_cpu_too_large = steps * (abreast + 4) > NAIVE_HEAD_STEPS
    on_gpu_too_large = case.tokens + case.n_seqs > NAIVE_STEPS_ON_GPU
    if on_gpu_too_large if on_gpu() else on_cpu_too_large:
        return "too large for fla.naive, a loop over tokens"
    return None


@contextmanager
def own_path() -> Iterator[None]:
    """Around a call of fla's, which otherwise hands over to whatever package is called flash_kda."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


@writing
def chunk(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens):
    """`chunk_kda` below, in fp32 on a CPU. Arguments as `flash_kda.fwd`."""
    if not q.is_cuda:  # the interpreter's tl.dot would read bf16 operands as integers
        q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if cu_seqlens is not None:  # fla keeps what follows from it for as long as it is the same object, whatever it holds
        cu_seqlens = cu_seqlens.clone()
    return chunk_kda(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)


def chunk_kda(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state=None, cu_seqlens=None):
    """`fla.ops.kda.chunk_kda`, its Triton path, as fla returns it: (out, final_state)."""
    with torch.no_grad(), ignore_overflow(), own_path():
        return _fla().chunk_kda(
            q, k, v, g, beta, safe_gate=True, **_options(scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
        )


@writing
def recurrent(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens):
    """`fla.ops.kda.fused_recurrent_kda`. Arguments as `flash_kda.fwd`."""
    if not q.is_cuda:  # its output has the dtype of v, and the interpreter stores bf16 without rounding to nearest
        v = v.float()
    with torch.no_grad(), ignore_overflow(), own_path():
        return _fla().fused_recurrent_kda(
            q, k, v, g, beta, **_options(scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
        )


def naive(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
):
    """`fla.ops.kda.naive.naive_recurrent_kda` after fla's own reference of the gate. Arguments as `flash_kda.fwd`.

    fla has no PyTorch reference of the L2 norm, and applies the sigmoid in its kernels. Both are written out here, in
    float64. PyTorch's fp32 sigmoid depends on an element's place in the tensor. The reference knows no packed
    sequences, and PyTorch adds in another order for another number of them: so it runs once for each. Its state is K
    first.
    """
    fla = _fla()
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))  # cuBLAS chooses its algorithm by strides as well
    if cu_seqlens is None:
        sequences = [(slice(n, n + 1), slice(None)) for n in range(q.shape[0])]
    else:
        sequences = [(slice(None), slice(start, end)) for start, end in itertools.pairwise(cu_seqlens.tolist())]
    for n, place in enumerate(sequences):
        unit_q, unit_k = (normalised(x[place]) for x in (q, k))
        a = fla.naive_kda_lowerbound_gate(g[place], A_log, dt_bias.flatten(), lower_bound)
        b = beta[place].double().sigmoid()
        state = None if initial_state is None else initial_state[n : n + 1].mT
        result, state = fla.naive_recurrent_kda(
            unit_q, unit_k, v[place].float(), a, b, scale, state, output_final_state=True
        )
        _write(out[place], result, None if final_state is None else final_state[n : n + 1], state.mT)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension, in float64."""
    x = x.double()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _options(scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens) -> dict:
    """The keywords of fla's two kernels under which they compute operator.md from its raw inputs."""
    return {
        "scale": scale,
        "A_log": A_log,
        "dt_bias": dt_bias.flatten(),
        "lower_bound": lower_bound,
        "initial_state": initial_state,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long(),  # fla documents int64
        "output_final_state": True,
        "state_v_first": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
    }


def _write(out, result, final_state, state) -> None:
    out.copy_(result)
    if final_state is not None:
        final_state.copy_(state)


@cache
def _fla() -> SimpleNamespace:
    """fla's functions, imported for the device of this machine."""
    if not on_gpu():
        interpret_triton()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla says that it falls back to the CPU, which is meant
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
        from fla.ops.kda.gate import naive_kda_lowerbound_gate
        from fla.ops.kda.naive import naive_recurrent_kda
    if not on_gpu():
        help_fla()
    return SimpleNamespace(
        chunk_kda=chunk_kda,
        fused_recurrent_kda=fused_recurrent_kda,
        naive_recurrent_kda=naive_recurrent_kda,
        naive_kda_lowerbound_gate=naive_kda_lowerbound_gate,
    )
