"""The float64 KDA recurrence, against which every implementation is judged."""

from __future__ import annotations

import numpy as np
import torch

from oracle import numpy_recurrence, torch_recurrence
from oracle.arguments import check_arguments

__all__ = ["recurrent_kda"]

Array = np.ndarray | torch.Tensor


def recurrent_kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    scale: float,
    A_log: Array,
    dt_bias: Array,
    lower_bound: float,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    state_indices: Array | None = None,
    checkpoint_offsets: Array | None = None,
) -> tuple[Array, ...]:
    """Run the recurrence of docs/operator.md one token at a time in float64.

    Shapes, for any K and V: `q`, `k`, `g` [B, T, H, K]; `v` [B, T, H, V]; `beta` [B, T, H], logits; `A_log` [H], or any
    other with H elements; `dt_bias` [H, K] or [H * K]; `initial_state` [N, H, V, K] or None for zero; `cu_seqlens`
    [N + 1] or None, and then N = B. Any floating dtype is taken as exactly the number it holds. `lower_bound` is in
    natural logarithms per token.

    `state_indices` [N]: `initial_state` is a pool [P, H, V, K], of which sequence n has row `state_indices[n]`, or zero
    if that is negative. `checkpoint_offsets` [N] or [N, C]: tokens after which the state of a sequence is asked for.

    Returns `(out, final_state)`, float64, [B, T, H, V] and [N, H, V, K] (never a pool): NumPy arrays for NumPy arrays,
    and tensors on the same device for PyTorch tensors. Rows of `out` that belong to no sequence are NaN. With
    `checkpoint_offsets` it returns a third, the states there: [N, H, V, K] or [N, C, H, V, K], NaN where an offset is
    0 or less, or past the end of its sequence. Nothing is written to the arguments. Raises TypeError for a wrong kind
    or dtype, ValueError for a wrong shape, device, `cu_seqlens` or row of the pool.
    """
    offsets, A_log, dt_bias = check_arguments(
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, state_indices,
        checkpoint_offsets
    )  # fmt: skip
    batch, tokens = q.shape[:2]
    xp = torch if isinstance(q, torch.Tensor) else np
    recurrence = torch_recurrence if xp is torch else numpy_recurrence
    if initial_state is not None and state_indices is not None:
        rows = [int(row) for row in state_indices]
        initial_state = initial_state[[max(row, 0) for row in rows]]
        for n, row in enumerate(rows):
            if row < 0:
                initial_state[n] = 0
    q, k, v, g, beta = (x.reshape(batch * tokens, *x.shape[2:]) for x in (q, k, v, g, beta))

    def run(rows, offsets, initial_state):
        of_tokens = (x[rows] for x in (q, k, v, g, beta))
        return recurrence.run(*of_tokens, scale, A_log, dt_bias, lower_bound, initial_state, offsets)

    out = xp.full_like(v, np.nan, dtype=xp.float64)
    out[: offsets[-1]], final_state = run(slice(offsets[-1]), offsets, initial_state)
    out = out.reshape(batch, tokens, *out.shape[1:])
    if checkpoint_offsets is None:
        return out, final_state

    several = checkpoint_offsets if checkpoint_offsets.ndim == 2 else checkpoint_offsets[:, None]
    checkpoints = xp.stack([xp.full_like(final_state, np.nan)] * several.shape[1], 1)
    for c in range(several.shape[1]):  # a checkpoint is the final state of the sequence's first tokens
        after = [int(n) for n in several[:, c]]
        inside = [n for n, tokens in enumerate(after) if 0 < tokens <= offsets[n + 1] - offsets[n]]
        if inside:
            rows = np.concatenate([np.arange(offsets[n], offsets[n] + after[n]) for n in inside])
            ends = [0, *np.cumsum([after[n] for n in inside]).tolist()]
            checkpoints[inside, c] = run(rows, ends, None if initial_state is None else initial_state[inside])[1]
    return out, final_state, checkpoints if checkpoint_offsets.ndim == 2 else checkpoints[:, 0]
