"""Checks of the oracle's arguments, and the one form in which it sees sequences: offsets into a flat token axis."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch


def check_arguments(
    q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, state_indices, checkpoint_offsets
):
    """Raise TypeError or ValueError for arguments that `oracle.recurrent_kda` cannot run.

    Returns N + 1 offsets, `A_log` [H] and `dt_bias` [H, K]: sequence n is rows `offsets[n]:offsets[n + 1]` of the token
    axis flattened to [B * T].
    """
    arrays = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    if initial_state is not None:
        arrays["initial_state"] = initial_state
    _check_kinds(arrays)
    for name, number in (("scale", scale), ("lower_bound", lower_bound)):
        if not isinstance(number, (int, float, np.number)):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")

    if q.ndim != 4:
        raise ValueError(f"q: expected shape [B, T, H, K], got {list(q.shape)}")
    if v.ndim != 4:
        raise ValueError(f"v: expected shape [B, T, H, V], got {list(v.shape)}")
    B, T, H, K = q.shape
    V = v.shape[-1]
    offsets = [b * T for b in range(B + 1)] if cu_seqlens is None else _packed_offsets(cu_seqlens, B, T)
    N = len(offsets) - 1
    if math.prod(A_log.shape) == H:
        arrays["A_log"] = A_log.reshape(H)
    if tuple(dt_bias.shape) == (H * K,):
        arrays["dt_bias"] = dt_bias.reshape(H, K)
    rows = N
    if state_indices is not None:
        _check_integers("state_indices", state_indices)
        if list(state_indices.shape) != [N]:
            raise ValueError(f"state_indices: expected shape [N] = [{N}], got {list(state_indices.shape)}")
        rows = 0 if initial_state is None else len(initial_state)
        most = max(int(row) for row in state_indices)
        if initial_state is not None and most >= rows:
            raise ValueError(f"state_indices: expected entries below P = {rows}, got {most}")
    if checkpoint_offsets is not None:
        _check_integers("checkpoint_offsets", checkpoint_offsets)
        if (
            checkpoint_offsets.ndim not in (1, 2)
            or checkpoint_offsets.shape[0] != N
            or not checkpoint_offsets.shape[-1]
        ):
            given = list(checkpoint_offsets.shape)
            raise ValueError(f"checkpoint_offsets: expected shape [N] or [N, C] with N = {N} and C >= 1, got {given}")
    shapes = {
        "k": ("[B, T, H, K]", [B, T, H, K]),
        "v": ("[B, T, H, V]", [B, T, H, V]),
        "g": ("[B, T, H, K]", [B, T, H, K]),
        "beta": ("[B, T, H]", [B, T, H]),
        "A_log": ("[H]", [H]),
        "dt_bias": ("[H, K]", [H, K]),
        "initial_state": ("[N, H, V, K]" if state_indices is None else "[P, H, V, K]", [rows, H, V, K]),
    }
    for name, (axes, shape) in shapes.items():
        if name in arrays and list(arrays[name].shape) != shape:
            raise ValueError(f"{name}: expected shape {axes} = {shape}, got {list(arrays[name].shape)}")
    return offsets, arrays["A_log"], arrays["dt_bias"]


def _check_kinds(arrays: dict) -> None:
    kind = torch.Tensor if isinstance(arrays["q"], torch.Tensor) else np.ndarray
    for name, array in arrays.items():
        if not isinstance(array, kind):
            wanted = "a PyTorch tensor, as q is" if kind is torch.Tensor else "a NumPy array (or all PyTorch tensors)"
            raise TypeError(f"{name}: expected {wanted}, got {type(array).__name__}")
        floating = array.is_floating_point() if kind is torch.Tensor else np.issubdtype(array.dtype, np.floating)
        if not floating:
            raise TypeError(f"{name}: expected a floating dtype, got {array.dtype}")
        if kind is torch.Tensor and array.device != arrays["q"].device:
            raise ValueError(
                f"{name}: expected a tensor on {arrays['q'].device}, where q is, got one on {array.device}"
            )


def _packed_offsets(cu_seqlens, B: int, T: int) -> list[int]:
    _check_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"cu_seqlens: expected q with B = 1, got B = {B}")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > T:
        raise ValueError(f"cu_seqlens: expected 0 first and at most T = {T} last, got {offsets[0]} and {offsets[-1]}")
    for n, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise ValueError(f"cu_seqlens: expected entries that never decrease, got {start} then {end} at index {n}")
    return offsets


def _check_integers(name: str, x) -> None:
    if not isinstance(x, (torch.Tensor, np.ndarray)):
        raise TypeError(f"{name}: expected a NumPy array or a PyTorch tensor, got {type(x).__name__}")
    if str(x.dtype).removeprefix("torch.") not in ("int32", "int64"):
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
