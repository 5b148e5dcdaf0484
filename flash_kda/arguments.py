"""What `flash_kda.fwd` accepts. Everything is checked here, once, before anything is written or launched."""

from __future__ import annotations

import math
import numbers
import os
from dataclasses import dataclass

import numpy as np
import torch

HEAD_DIM = 128  # K and V
MIN_LOWER_BOUND = -5.0
STATE_DTYPES = (torch.bfloat16, torch.float32)
CU_SEQLENS_DTYPES = (torch.int32, torch.int64)
DEVICE_TYPES = ("cpu", "cuda")
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Problem:
    """The sizes of one checked call: `batch` rows of `tokens` tokens and `heads` heads, `sequences` sequences."""

    batch: int
    tokens: int
    heads: int
    sequences: int
    device: torch.device


def check_arguments(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate=None
) -> Problem:
    """Check the arguments of `flash_kda.fwd` (see there for shapes and dtypes).

    Raises TypeError for a wrong dtype or a non-tensor, and ValueError for a wrong shape, device, stride or value; the
    message names the argument, what was given and what is accepted.
    """
    _check_tensor("q", q, (torch.bfloat16,))
    if q.dim() != 4 or q.shape[-1] != HEAD_DIM:
        raise ValueError(f"q: shape {_shape(q)} was given; accepted is [B, T, H, {HEAD_DIM}]")
    if q.device.type not in DEVICE_TYPES:
        raise ValueError(f"q: is on {q.device}; accepted are {' and '.join(DEVICE_TYPES)} tensors")
    batch, tokens, heads, _ = q.shape

    sequences = batch
    if cu_seqlens is not None:
        _check_tensor("cu_seqlens", cu_seqlens, CU_SEQLENS_DTYPES, q.device)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seqlens: shape {_shape(cu_seqlens)} was given; accepted is [N + 1] with at least 2 entries"
            )
        if batch != 1:
            raise ValueError(f"cu_seqlens: given with a batch of B = {batch}; accepted with B = 1 only")
        _check_stride("cu_seqlens", cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1

    row = (batch, tokens, heads)
    state = (sequences, heads, HEAD_DIM, HEAD_DIM)
    expected = {
        "q": (q, (torch.bfloat16,), (*row, HEAD_DIM)),
        "k": (k, (torch.bfloat16,), (*row, HEAD_DIM)),
        "v": (v, (torch.bfloat16,), (*row, HEAD_DIM)),
        "g": (g, (torch.bfloat16,), (*row, HEAD_DIM)),
        "beta": (beta, (torch.bfloat16,), row),
        "out": (out, (torch.bfloat16,), (*row, HEAD_DIM)),
        "A_log": (A_log, (torch.float32,), (heads,)),
        "dt_bias": (dt_bias, (torch.float32,), (heads, HEAD_DIM)),
    }
    if initial_state is not None:
        expected["initial_state"] = (initial_state, STATE_DTYPES, state)
    if final_state is not None:
        expected["final_state"] = (final_state, STATE_DTYPES, state)
    for name, (tensor, dtypes, shape) in expected.items():
        _check_tensor(name, tensor, dtypes, q.device)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {_shape(tensor)} was given; accepted is {list(shape)}")
        _check_stride(name, tensor)

    _check_number("scale", scale)
    _check_number("lower_bound", lower_bound, MIN_LOWER_BOUND, 0.0)

    inputs = {name: tensor for name, (tensor, _, _) in expected.items() if name not in ("out", "final_state")}
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = cu_seqlens
    _check_written("out", out, inputs)
    if final_state is not None:
        if initial_state is not None and _same_memory(final_state, initial_state):
            del inputs["initial_state"]
        _check_written("final_state", final_state, {**inputs, "out": out})

    if cu_seqlens is not None and (q.device.type == "cpu" or _wants_validation(validate)):
        check_cu_seqlens(cu_seqlens, tokens)
    return Problem(batch, tokens, heads, sequences, q.device)


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Raise ValueError naming the first wrong entry of `cu_seqlens` (`[N + 1]`) for `tokens` rows. Synchronises."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens: entry 0 is {offsets[0]}; accepted is 0")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(
                f"cu_seqlens: entry {i} is {offsets[i]}, below entry {i - 1}, {offsets[i - 1]}; "
                "accepted are entries that never decrease"
            )
        if offsets[i] > tokens:
            raise ValueError(f"cu_seqlens: entry {i} is {offsets[i]}, past the end; accepted is at most T = {tokens}")
    if offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens: the last entry, {len(offsets) - 1}, is {offsets[-1]}; accepted is T = {tokens}")


def _wants_validation(validate: bool | None) -> bool:
    return os.environ.get("FLASH_KDA_VALIDATE", "0") not in ("", "0") if validate is None else bool(validate)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _check_tensor(name: str, value, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> None:
    accepted = " or ".join(str(dtype) for dtype in dtypes)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: {type(value).__name__} was given; accepted is a torch.Tensor of {accepted}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {value.dtype} was given; accepted is {accepted}")
    if value.layout != torch.strided or value.is_nested:
        given = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{name}: {given} was given; accepted is torch.strided")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: is on {value.device}; accepted is {device}, where q is")


def _check_stride(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        raise ValueError(
            f"{name}: stride {tensor.stride(-1)} of the last dimension was given; accepted is 1 "
            f"(all strides: {tensor.stride()})"
        )


def _check_number(name: str, value, low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX) -> None:
    accepted = "a number that is finite in fp32" if high == FLOAT32_MAX else f"a number in [{low:g}, {high:g}]"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: {type(value).__name__} was given; accepted is {accepted}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:  # NaN fails too
        raise ValueError(f"{name}: {number} was given; accepted is {accepted}")


def _check_written(name: str, tensor: torch.Tensor, others: dict[str, torch.Tensor]) -> None:
    """A tensor that is written may overlap neither another argument nor itself."""
    if _overlaps_itself(tensor):
        raise ValueError(
            f"{name}: shape {_shape(tensor)} with strides {tensor.stride()} lets elements share memory; "
            "accepted are strides that give each element a place of its own"
        )
    for other_name, other in others.items():
        if _overlap(tensor, other):
            raise ValueError(f"{name}: overlaps {other_name} in memory; accepted is memory of its own")


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same elements in the same order."""
    same_strides = all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)
    return a.data_ptr() == b.data_ptr() and same_strides and a.dtype == b.dtype


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether a step along a dimension can land inside what the dimensions of smaller stride cover."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    a_end, b_end = (x.data_ptr() + _extent(x) for x in (a, b))
    if a_end <= b.data_ptr() or b_end <= a.data_ptr():
        return False
    # The address ranges meet, but slices of one buffer may interleave without sharing an element. NumPy decides that
    # from addresses and strides alone (nothing is read, so GPU addresses serve as well).
    try:
        return np.shares_memory(_as_addresses(a), _as_addresses(b), max_work=100_000)
    except np.exceptions.TooHardError:
        return True


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to one past the last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _as_addresses(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.element_size()

    class Addresses:
        __array_interface__ = {  # noqa: RUF012 (read by NumPy, never changed)
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"|V{size}",
        }

    return np.asarray(Addresses())
