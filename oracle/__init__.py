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
) -> tuple[Array, Array]:
    """Run the recurrence of docs/operator.md one token at a time in float64.

    Shapes, for any K and V: `q`, `k`, `g` [B, T, H, K]; `v` [B, T, H, V]; `beta` [B, T, H], logits; `A_log` [H];
    `dt_bias` [H, K]; `initial_state` [N, H, V, K] or None for zero; `cu_seqlens` [N + 1] or None, and then N = B.
    Any floating dtype is taken as exactly the number it holds. `lower_bound` is in natural logarithms per token.

    Returns `(out, final_state)`, float64, [B, T, H, V] and [N, H, V, K]: NumPy arrays for NumPy arrays, and tensors on
    the same device for PyTorch tensors. Nothing is written to the arguments. Raises TypeError for a wrong kind or
    dtype, ValueError for a wrong shape, device or `cu_seqlens`.
    """
    offsets = check_arguments(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
    batch, tokens = q.shape[:2]
    recurrence = torch_recurrence if isinstance(q, torch.Tensor) else numpy_recurrence
    q, k, v, g, beta = (x.reshape(batch * tokens, *x.shape[2:]) for x in (q, k, v, g, beta))
    out, final_state = recurrence.run(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, offsets)
    return out.reshape(batch, tokens, *out.shape[1:]), final_state
