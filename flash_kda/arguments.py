"""What `flash_kda.fwd` accepts. All arguments are checked here before anything is written or launched.

A message reads `NAME: expected X, got Y.` and says what to do. `flash_kda.ordinary` decides the usual call faster.
"""

from __future__ import annotations

import math
import numbers
import os
from typing import NamedTuple

import numpy as np
import torch

from flash_kda.library import WAY_OUT, get_workspace_size

HEAD_DIM = 128  # K and V
MIN_LOWER_BOUND = -5.0
BF16 = (torch.bfloat16,)
FP32 = (torch.float32,)
STATE_DTYPES = (torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
DEVICE_TYPES = ("cpu", "cuda")
WRITTEN = ("out", "final_state", "checkpoint_state")
CHECKPOINT_STEP = 16  # tokens: offsets of checkpoints are multiples
MAX_CHECKPOINTS = 2**18 - 1  # of one sequence: the kernel numbers them in 18 bits
WORKSPACE_ALIGNMENT = 16  # bytes
FLOAT32_MAX = torch.finfo(torch.float32).max
_OFFSETS = "Pass offsets from 0 to T that never decrease."


def check_arguments(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate=None,
    workspace=None, state_indices=None, checkpoint_state=None, checkpoint_offsets=None
) -> None:  # fmt: skip
    """Check the arguments of `flash_kda.fwd` (see there for shapes and dtypes).

    Raises:
        TypeError: an argument is no tensor or no number, or has a wrong dtype.
        ValueError: an argument has a wrong shape, device, layout, stride, address or value.
    """
    try:
        _check_arguments(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
            workspace, state_indices, checkpoint_state, checkpoint_offsets
        )  # fmt: skip
    except (TypeError, ValueError) as error:  # fla dispatches without looking at most arguments
        error.args = (f"{error} {WAY_OUT}",)
        raise


def _check_arguments(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
    workspace, state_indices, checkpoint_state, checkpoint_offsets
) -> None:  # fmt: skip
    _check_tensor("q", q, BF16)
    if q.dim() != 4 or q.shape[-1] != HEAD_DIM:
        raise ValueError(f"q: expected shape [B, T, H, {HEAD_DIM}], got {_shape(q)}. Reshape it.")
    device = q.device
    if device.type not in DEVICE_TYPES:
        raise ValueError(f"q: expected a tensor on {' or '.join(DEVICE_TYPES)}, got one on {device}. Move it there.")
    batch, tokens, heads, _ = shape = q.shape

    sequences = batch
    if cu_seqlens is not None:
        _check_tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES, device)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seqlens: expected shape [N + 1] with at least 2 entries, got {_shape(cu_seqlens)}. "
                "Pass the offset of each sequence and the end of the last."
            )
        if batch != 1:
            raise ValueError(
                f"cu_seqlens: expected B = 1, got B = {batch}. Pack the batch into one row, or leave cu_seqlens out."
            )
        _check_stride("cu_seqlens", cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1

    of_head = (heads, HEAD_DIM, HEAD_DIM)
    if state_indices is not None:
        _check_tensor("state_indices", state_indices, INDEX_DTYPES, device)
        if state_indices.shape != (sequences,):
            raise ValueError(
                f"state_indices: expected shape {[sequences]}, a row for each sequence, got {_shape(state_indices)}. "
                "Resize it."
            )
    expected = [
        ("q", q, BF16, shape),
        ("k", k, BF16, shape),
        ("v", v, BF16, shape),
        ("g", g, BF16, shape),
        ("beta", beta, BF16, (batch, tokens, heads)),
        ("out", out, BF16, shape),
        ("A_log", A_log, FP32, (heads,)),
        ("dt_bias", dt_bias, FP32, (heads, HEAD_DIM)),
    ]
    for name, x in (("initial_state", initial_state), ("final_state", final_state)):
        if x is not None:
            pool = state_indices is not None and isinstance(x, torch.Tensor)
            if pool and x.dim() != 4:
                raise ValueError(
                    f"{name}: expected shape [P, {heads}, {HEAD_DIM}, {HEAD_DIM}], a pool for state_indices, got "
                    f"{_shape(x)}. Reshape it."
                )
            expected.append((name, x, STATE_DTYPES, (x.shape[0] if pool else sequences, *of_head)))
    if checkpoint_state is not None or checkpoint_offsets is not None:
        _check_tensor("checkpoint_offsets", checkpoint_offsets, INDEX_DTYPES, device)
        if checkpoint_offsets.dim() not in (1, 2) or checkpoint_offsets.shape[0] != sequences:
            raise ValueError(
                f"checkpoint_offsets: expected shape [N] or [N, C] with N = {sequences}, got "
                f"{_shape(checkpoint_offsets)}. Pass the offsets of each sequence."
            )
        if checkpoint_offsets.dim() == 2 and checkpoint_offsets.shape[1] > MAX_CHECKPOINTS:
            raise ValueError(
                f"checkpoint_offsets: expected at most {MAX_CHECKPOINTS} for each sequence, got "
                f"{checkpoint_offsets.shape[1]}. Ask for fewer."
            )
        shape_of_states = (*checkpoint_offsets.shape, *of_head)
        expected.append(("checkpoint_state", checkpoint_state, STATE_DTYPES, shape_of_states))
    for name, tensor, dtypes, accepted in expected:
        if _is_plain(tensor, dtypes, accepted, device):
            continue
        _check_tensor(name, tensor, dtypes, device)
        if tensor.shape != accepted and not _is_of_the_heads(name, tensor, heads):
            raise ValueError(
                f"{name}: expected shape {_accepted(name, accepted)}, got {_given(name, tensor)}. "
                "The sizes follow from q and cu_seqlens: resize one of them."
            )
        if name != "beta":
            _check_stride(name, tensor)

    if validate is not None and not isinstance(validate, int):  # 0 and 1 serve too
        raise TypeError(f"validate: expected True, False or None, got {type(validate).__name__}. Pass one of them.")
    _check_number("scale", scale)
    _check_number("lower_bound", lower_bound, MIN_LOWER_BOUND, 0.0)

    inputs = [_region(name, tensor) for name, tensor, _, _ in expected if name not in WRITTEN]
    offsets = {"cu_seqlens": cu_seqlens, "state_indices": state_indices, "checkpoint_offsets": checkpoint_offsets}
    inputs += [_region(name, x) for name, x in offsets.items() if x is not None]
    written = [_region("out", out)]
    _check_written(written[0], inputs)
    if final_state is not None:
        written.append(_region("final_state", final_state))
        in_place = initial_state is not None and _same_memory(final_state, initial_state)
        others = [x for x in inputs if x.name != "initial_state"] if in_place else inputs
        _check_written(written[1], others + written[:1])
    if checkpoint_state is not None:
        region = _region("checkpoint_state", checkpoint_state)
        _check_written(region, inputs + written)
        written.append(region)
    if workspace is not None:
        _check_workspace(workspace, get_workspace_size(q, k, v, g, out, initial_state, final_state), device)
        _check_written(_region("workspace", workspace), inputs + written)

    given = [name for name, x in offsets.items() if x is not None]
    if given and (device.type == "cpu" or wants_validation(validate)):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "validate: expected False while a CUDA graph is captured, got True or FLASH_KDA_VALIDATE=1. "
                f"A capture cannot wait for the contents of {' and '.join(given)}. Pass validate=False."
            )
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tokens)
        if state_indices is not None:
            states = (("initial_state", initial_state), ("final_state", final_state))
            check_state_indices(state_indices, {name: len(x) for name, x in states if x is not None})
        if checkpoint_offsets is not None:
            lengths = [tokens] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
            check_checkpoint_offsets(checkpoint_offsets, lengths)


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Raise ValueError naming the first wrong entry of `cu_seqlens` (`[N + 1]`) for `tokens` rows. Synchronises."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens: expected entry 0 to be 0, got {offsets[0]}. {_OFFSETS}")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(
                f"cu_seqlens: expected entry {i} to be at least entry {i - 1}, {offsets[i - 1]}, got {offsets[i]}. "
                f"{_OFFSETS}"
            )
        if offsets[i] > tokens:
            raise ValueError(f"cu_seqlens: expected entry {i} to be at most T = {tokens}, got {offsets[i]}. {_OFFSETS}")


def check_state_indices(state_indices: torch.Tensor, rows: dict[str, int]) -> None:
    """Raise ValueError naming the first wrong entry of `state_indices` (`[N]`). Synchronises.

    rows: how many each state has, by its name.
    """
    name, most = min(rows.items(), key=lambda item: item[1], default=("", 0))
    first: dict[int, int] = {}
    for n, row in enumerate(state_indices.tolist()):
        if row < 0:
            continue
        if rows and row >= most:
            raise ValueError(
                f"state_indices: expected entry {n} to be less than P = {most}, the rows of {name}, got {row}. "
                "Pass a row of the pool, or a negative index for none."
            )
        if first.setdefault(row, n) != n:
            raise ValueError(
                f"state_indices: expected a row of its own for each sequence, got row {row} at entries {first[row]} "
                f"and {n}. Pass other rows, or negative indices for none."
            )


def check_checkpoint_offsets(checkpoint_offsets: torch.Tensor, lengths: list[int]) -> None:
    """Raise ValueError naming the first wrong entry of `checkpoint_offsets` (`[N]` or `[N, C]`). Synchronises.

    lengths: of the sequences. An offset that lies outside its sequence is never wrong.
    """
    rows = checkpoint_offsets.tolist()
    for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        before = 0
        for c, offset in enumerate(row if checkpoint_offsets.dim() == 2 else [row]):
            if not 0 < offset <= length:
                continue
            entry = f"entry {[n, c]}" if checkpoint_offsets.dim() == 2 else f"entry {n}"
            if offset % CHECKPOINT_STEP:
                raise ValueError(
                    f"checkpoint_offsets: expected {entry} to be a multiple of {CHECKPOINT_STEP}, got {offset}. "
                    "Pass another offset, or 0 for none."
                )
            if offset <= before:
                raise ValueError(
                    f"checkpoint_offsets: expected {entry} to be above the offset before it, {before}, got {offset}. "
                    "Pass offsets that increase along C, or 0 for none."
                )
            before = offset


def wants_validation(validate: bool | None) -> bool:
    return os.environ.get("FLASH_KDA_VALIDATE", "0") not in ("", "0") if validate is None else bool(validate)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _check_tensor(name: str, value, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor of {_either(dtypes)}, got {type(value).__name__}. "
            f"{'Pass one' if value is None else 'Convert it'}."
        )
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_either(dtypes)}, got {value.dtype}. Convert it.")
    if value.layout != torch.strided or value.is_nested:
        given = "a nested tensor" if value.is_nested else f"{value.layout}"
        raise ValueError(f"{name}: expected layout torch.strided, got {given}. Convert it to a dense tensor.")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where q is, got one on {value.device}. Move it.")


def _is_plain(value, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether nothing can be wrong: the usual case, told in a fraction of the time of all the checks."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in dtypes
        and value.layout == torch.strided
        and not value.is_nested
        and value.device == device
        and value.shape == shape
        and value.is_contiguous()
    )


def _is_of_the_heads(name: str, tensor: torch.Tensor, heads: int) -> bool:
    """Whether it is `A_log` or `dt_bias` in another shape: as models keep them. Then a view has the usual shape."""
    if name == "dt_bias":
        return tensor.shape == (heads * HEAD_DIM,)
    return name == "A_log" and tensor.numel() == heads and tensor.is_contiguous()


def _accepted(name: str, shape: tuple[int, ...]) -> str:
    others = {"A_log": f" or any other with {shape[0]} elements, contiguous", "dt_bias": f" or {[math.prod(shape)]}"}
    return f"{list(shape)}{others.get(name, '')}"


def _given(name: str, tensor: torch.Tensor) -> str:
    strides = f" with strides {tensor.stride()}" if name == "A_log" and not tensor.is_contiguous() else ""
    return f"{_shape(tensor)}{strides}"


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def _check_stride(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(
            f"{name}: expected stride 1 in the last dimension, got stride {tensor.stride(-1)} of {tensor.stride()}. "
            "Pass a tensor whose last dimension is contiguous."
        )


def _check_workspace(workspace, needed: int, device: torch.device) -> None:
    _check_tensor("workspace", workspace, (torch.uint8,), device)
    if workspace.dim() != 1 or workspace.shape[0] < needed:
        raise ValueError(
            f"workspace: expected shape [n] with n at least {needed}, got {_shape(workspace)}. "
            "Call flash_kda.get_workspace_size with these tensors for n."
        )
    _check_stride("workspace", workspace)
    if workspace.data_ptr() % WORKSPACE_ALIGNMENT:
        raise ValueError(
            f"workspace: expected an address that is a multiple of {WORKSPACE_ALIGNMENT}, got "
            f"{workspace.data_ptr():#x}. Pass a tensor from torch.empty."
        )


def _check_number(name: str, value, low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX) -> None:
    accepted = "a number that is finite in fp32" if high == FLOAT32_MAX else f"a number in [{low:g}, {high:g}]"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {accepted}, got {type(value).__name__}. Pass a float.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not low <= number <= high:  # NaN fails too
        raise ValueError(f"{name}: expected {accepted}, got {number}. Pass another value.")


class _Region(NamedTuple):
    """The addresses from a tensor's first byte to one past its last; empty for a tensor without elements."""

    start: int
    end: int
    name: str
    tensor: torch.Tensor


def _region(name: str, tensor: torch.Tensor) -> _Region:
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return _Region(start, start + tensor.nbytes, name, tensor)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Region(start, start + (last + 1) * tensor.element_size() if tensor.numel() else start, name, tensor)


def _check_written(region: _Region, others: list[_Region]) -> None:
    """A tensor that is written may overlap neither another argument nor itself."""
    start, end, name, tensor = region
    if _overlaps_itself(tensor):
        raise ValueError(
            f"{name}: expected memory of its own for each element, got shape {_shape(tensor)} with strides "
            f"{tensor.stride()}, where elements share memory. Pass a tensor that is not expanded."
        )
    for other_start, other_end, other_name, other in others:
        if max(start, other_start) < min(end, other_end) and _share_elements(tensor, other):
            raise ValueError(
                f"{name}: expected memory of its own, got memory that overlaps {other_name}. Allocate {name} apart."
            )


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same elements in the same order."""
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether a step along a dimension can land inside what the dimensions of smaller stride cover."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _share_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors whose address ranges meet share an element: slices of one buffer may interleave and do not.

    NumPy decides that from addresses and strides alone (nothing is read, so GPU addresses serve as well).
    """
    try:
        return np.shares_memory(_as_addresses(a), _as_addresses(b), max_work=100_000)
    except np.exceptions.TooHardError:
        return True


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
