"""The definition of docs/operator.md in NumPy, to be read beside it line by line. Slow; torch_recurrence.py is fast."""

from __future__ import annotations

import numpy as np


def run(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, offsets):
    """The recurrence over a flat token axis of R rows.

    `q`, `k`, `g` [R, H, K]; `v` [R, H, V]; `beta` [R, H]; `A_log` [H]; `dt_bias` [H, K]; `initial_state` [N, H, V, K]
    or None; `offsets` N + 1 row numbers. Returns `out` [R, H, V] and `final_state` [N, H, V, K], float64.
    """
    q, k, v, g, beta, A_log, dt_bias = (x.astype(np.float64) for x in (q, k, v, g, beta, A_log, dt_bias))
    H, K = dt_bias.shape
    V = v.shape[-1]
    N = len(offsets) - 1

    q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6)
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    b = sigmoid(beta)
    with np.errstate(over="ignore"):  # a rate is finite and above zero, the sum below may be 0 or infinite
        rate = np.clip(np.exp(A_log), np.finfo(np.float64).tiny, np.finfo(np.float64).max)
        a = lower_bound * sigmoid(rate[:, None] * (g + dt_bias))

    out = np.empty(v.shape)
    final_state = np.empty((N, H, V, K))
    for n in range(N):
        S = np.zeros((H, K, V)) if initial_state is None else initial_state[n].astype(np.float64).swapaxes(1, 2)
        for t in range(offsets[n], offsets[n + 1]):
            S = np.exp(a[t])[:, :, None] * S
            error = v[t] - (S * k[t][:, :, None]).sum(1)
            S = S + (b[t][:, None] * k[t])[:, :, None] * error[:, None, :]
            out[t] = scale * (S * q[t][:, :, None]).sum(1)
        final_state[n] = S.swapaxes(1, 2)
    return out, final_state


def sigmoid(x):
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return 1 / (1 + np.exp(-x))
