"""Right kernels that promise less than everything, each with its promises declared."""

from __future__ import annotations

import torch

from fuzz.cases.inputs import sequence_ranges
from fuzz.targets.adapter import writing
from fuzz.targets.promises import Promises


def operands(q, k, v, g, beta, A_log, dt_bias, lower_bound) -> tuple[torch.Tensor, ...]:
    """Normalised q and k, v, sigmoid of beta and decay, one row for each token, in float64."""
    q, k, v, g, beta = (x.flatten(0, 1).double() for x in (q, k, v, g, beta))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    decay = (lower_bound * torch.sigmoid(A_log.double().exp()[:, None] * (g + dt_bias))).exp()
    return q, k, v, torch.sigmoid(beta)[..., None], decay


def plain_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def step(S, q, k, v, b, decay, total, rounded) -> tuple[torch.Tensor, torch.Tensor]:
    """The state [..., V, K] after one token, and what it gives.

    total: the sum over channels. rounded: what becomes of the update.
    """
    S = S * decay[..., None, :]
    S = S + rounded(b * (v - total(S * k[..., None, :])))[..., None] * k[..., None, :]
    return S, total(S * q[..., None, :])


def of_states(S, initial_state, dtype):
    return S if initial_state is None else S.copy_(initial_state.to(dtype))


def recurrence(dtype: torch.dtype, total=plain_sum, rounded=as_it_is, queries=as_it_is):
    """The recurrence of docs/operator.md with everything after the activations in this dtype."""

    def compute(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens):
        shape, ranges = v.shape, sequence_ranges(q, cu_seqlens)
        q, k, v, b, decay = (x.to(dtype) for x in operands(q, k, v, g, beta, A_log, dt_bias, lower_bound))
        out = torch.empty(v.shape, dtype=dtype)
        states = torch.zeros(len(ranges), v.shape[1], v.shape[2], k.shape[2], dtype=dtype)
        of_states(states, initial_state, dtype)
        for n, (start, end) in enumerate(ranges):
            S = states[n]
            for t in range(start, end):
                S, y = step(S, queries(q[t]), k[t], v[t], b[t], decay[t], total, rounded)
                out[t] = scale * y
            states[n] = S
        return out.view(shape), states

    return compute


float64 = writing(recurrence(torch.float64))
float64.__doc__ = "Float64 throughout, and between chunks a state of 64 bits."
float64.promises = Promises(state="float64", operands="fp32", arguments=False)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """The sum over channels, of each head from another channel on, one after the other in blocks of 16."""
    turned = torch.stack([head.roll(37 * n, -1) for n, head in enumerate(x.unbind(-3))], -3)
    total = turned[..., :16]
    for block in turned.split(16, -1)[1:]:
        total = total + block
    return total.sum(-1)


heads_differ = writing(recurrence(torch.float32, rotated))
heads_differ.__doc__ = "Adds the channels of each head in another order."
heads_differ.promises = {"heads": False, "operands": "fp32", "arguments": False}


def packed_int64(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
):
    """Takes packed calls with int64 offsets and fp32 states, and looks at no argument."""
    assert cu_seqlens.dtype == torch.int64
    assert {x.dtype for x in (initial_state, final_state) if x is not None} <= {torch.float32}
    compute = recurrence(torch.float32)
    result, state = compute(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
    out.copy_(result)
    if final_state is not None:
        final_state.copy_(state)


packed_int64.promises = {
    "arguments": False,
    "reach": {
        "packed": True,
        "cu_seqlens_dtype": "int64",
        "initial_state": (None, "fp32"),
        "final_state": (None, "fp32"),
    },
}


FP32 = {"operands": "fp32", "chunk": None, "arguments": False}

fp32 = writing(recurrence(torch.float32))
fp32.promises = FP32

# Wrong, though not by more than bf16 operands are: what is found once they are declared to be fp32
wrong_u_in_bf16 = writing(recurrence(torch.float32, rounded=lambda x: x.bfloat16().float()))
wrong_u_in_bf16.promises = FP32
wrong_q_too_large = writing(recurrence(torch.float32, queries=lambda x: 1.003 * x))
wrong_q_too_large.promises = FP32
