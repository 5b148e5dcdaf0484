"""The short way of an ordinary call: each property of each tensor is read once, and the kernel is launched.

A call is ordinary if nothing is wrong with it, its tensors are plain ones on one GPU, and none has to be copied. All
other calls go the long way: `arguments.check_arguments`, then `flash_kda.torch_operator`, which calls
`library.forward`. Both ways give the kernel the same arguments. `native.cpp` does what `run` does, where it can.
"""

from __future__ import annotations

import torch
from torch import Tensor, bfloat16, float32, int32, int64, uint8
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from flash_kda import library
from flash_kda.arguments import (
    FLOAT32_MAX,
    HEAD_DIM,
    MAX_CHECKPOINTS,
    MIN_LOWER_BOUND,
    WORKSPACE_ALIGNMENT,
    wants_validation,
)
from flash_kda.workspace import TOKENS_ALIGNMENT

_BF16, _FP32 = 2, 4  # bytes
_NO_STATE = (0, 0, 0, 0, 0)
_NO_INTEGERS = (0, 0, False)
_NO_CHECKPOINTS = (*_NO_INTEGERS, 0, *_NO_STATE, 0, 0)


def run(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
    workspace, state_indices=None, checkpoint_state=None, checkpoint_offsets=None
) -> bool:  # fmt: skip
    """Launch the kernel if this call of `flash_kda.fwd` is ordinary. Returns False, with nothing done, if it is not.

    Raises RuntimeError as `library.forward` does.
    """
    if type(q) is not Tensor or not q.is_cuda:
        return False
    has_contents = cu_seqlens is not None or state_indices is not None or checkpoint_offsets is not None
    if has_contents and wants_validation(validate):
        return False
    examined = examine(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, workspace,
        state_indices, checkpoint_state, checkpoint_offsets
    )  # fmt: skip
    if examined is None:
        return False
    library.launch(*examined, q.device, workspace)
    note_writes(out, final_state, checkpoint_state)
    return True


def note_writes(*tensors: Tensor | None) -> None:
    """Tell autograd, which did not see the kernel write."""
    _note(tuple(x for x in tensors if x is not None))


def _note(written: tuple[Tensor, ...]) -> None:
    for x in written:
        if not x.is_inference():  # which has no version
            increment_version(x)


try:  # a newer PyTorch does just that, in a fraction of the time
    with torch.inference_mode():
        torch._C._increment_version((torch.empty(0),))
    _note = torch._C._increment_version
except (AttributeError, TypeError, RuntimeError):
    pass


def examine(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None,
    workspace=None, state_indices=None, checkpoint_state=None, checkpoint_offsets=None
) -> tuple[tuple, tuple] | None:  # fmt: skip
    """The fields of `library.Arguments` before `scratch` and `serving`, nested ones in line. None: it is not ordinary.

    It takes nothing that `check_arguments` refuses. The contents of tensors are not looked at.
    """
    try:
        if type(scale) is int:
            scale = float(scale)
        if type(lower_bound) is int:
            lower_bound = float(lower_bound)
        if not (
            type(scale) is type(lower_bound) is float
            and -FLOAT32_MAX <= scale <= FLOAT32_MAX
            and MIN_LOWER_BOUND <= lower_bound <= 0.0
            and type(q) is Tensor
        ):
            return None
        device, shape = q.device, q.shape
        batch, tokens, heads, channels = shape
        of_token = heads * HEAD_DIM  # the strides of a contiguous tensor
        of_batch = tokens * of_token
        size = batch * of_batch * _BF16
        if channels != HEAD_DIM or not size:
            return None

        rows = []  # the fields of each of these tensors: its address and three strides
        read = []  # the first address of each tensor that is read, and the one past its last
        for x in (q, k, v, g, out):
            if (
                type(x) is not Tensor
                or x.dtype is not bfloat16
                or x.shape != shape
                or x.device != device
                or x.is_neg()
                or (start := x.data_ptr()) % (TOKENS_ALIGNMENT * _BF16)
            ):
                return None
            if x.is_contiguous():
                rows += (start, of_batch, of_token, HEAD_DIM)
                read.append((start, start + size))
            else:
                a, b, c, d = x.stride()  # of batch, token, head and channel
                if batch == 1:
                    a = of_batch  # whatever it is: there is no second one
                if x is out or d != 1 or not (a and b and c) or (a | b | c) % TOKENS_ALIGNMENT:
                    return None
                last = (batch - 1) * a + (tokens - 1) * b + (heads - 1) * c
                rows += (start, a, b, c)
                read.append((start, start + (last + HEAD_DIM) * _BF16))
        out_start, out_end = read.pop()

        if type(beta) is not Tensor or beta.dtype is not bfloat16 or beta.device != device or beta.is_neg():
            return None
        if beta.shape != shape[:3]:
            return None
        start = beta.data_ptr()
        a, b, c = beta.stride()
        rows[16:16] = (start, a, b, c)  # between g and out
        read.append((start, start + ((batch - 1) * a + (tokens - 1) * b + (heads - 1) * c + 1) * _BF16))

        for x, is_accepted in (
            (A_log, A_log.numel() == heads),
            (dt_bias, dt_bias.shape in ((heads, HEAD_DIM), (of_token,))),
        ):
            if (
                not (type(x) is Tensor or type(x) is Parameter)
                or x.dtype is not float32
                or not is_accepted
                or x.device != device
                or x.is_neg()
                or not x.is_contiguous()
            ):
                return None
        rates, biases = A_log.data_ptr(), dt_bias.data_ptr()
        read += (rates, rates + heads * _FP32), (biases, biases + of_token * _FP32)

        sequences, offsets, wide = batch, 0, False
        if cu_seqlens is not None:
            if batch != 1 or not cu_seqlens.is_contiguous():
                return None
            (entries,) = cu_seqlens.shape
            sequences = entries - 1
            if sequences < 1:
                return None
            (offsets, _, wide), addresses = _integers(cu_seqlens, device)
            read.append(addresses)

        of_state, is_pool = (heads, HEAD_DIM, HEAD_DIM), state_indices is not None
        indices = _NO_INTEGERS
        if is_pool:
            if state_indices.shape != (sequences,):
                return None
            indices, addresses = _integers(state_indices, device)
            read.append(addresses)
        states, pool_rows, written = [], [], [(out_start, out_end)]
        for x in (initial_state, final_state):
            if x is None:
                states += _NO_STATE
                pool_rows.append(0)
                continue
            count = x.shape[0] if is_pool else sequences
            fields, addresses = _states(x, (count, *of_state), device)
            states += fields
            pool_rows.append(count if is_pool else 0)
            if len(pool_rows) == 2:
                written.append(addresses)
            elif x is not final_state:
                read.append(addresses)

        checkpoints = _NO_CHECKPOINTS
        if checkpoint_state is not None:
            shape = checkpoint_offsets.shape
            several = len(shape) == 2
            if shape[0] != sequences or len(shape) > 2 or (several and shape[1] > MAX_CHECKPOINTS):
                return None
            integers, addresses = _integers(checkpoint_offsets, device)
            read.append(addresses)
            fields, addresses = _states(checkpoint_state, (*shape, *of_state), device)
            written.append(addresses)
            steps = (checkpoint_offsets.stride(1), checkpoint_state.stride(1)) if several else (0, 0)
            checkpoints = (*integers, steps[0], *fields, steps[1], shape[1] if several else 1)
        elif checkpoint_offsets is not None:
            return None

        # Ranges of addresses that meet may still share no element, which the full checks find out.
        for i, (start, end) in enumerate(written):
            if not start:
                return None
            for other, other_end in (*read, *written[:i]):
                if not other or (start < other_end and other < end):
                    return None
        if workspace is not None:
            if type(workspace) is not Tensor or workspace.dtype is not uint8 or workspace.device != device:
                return None
            needed = library.scratch_bytes(device.index) if workspace.is_cuda else 0
            (size,) = workspace.shape
            start = workspace.data_ptr()
            if (
                size < needed
                or not start
                or start % WORKSPACE_ALIGNMENT
                or workspace.is_neg()
                or not workspace.is_contiguous()
            ):
                return None
            end = start + size
            for other, other_end in (*read, *written):
                if start < other_end and other < end:
                    return None
    except (RuntimeError, ValueError, OverflowError, AttributeError, IndexError):
        # No address, no strides, no sizes, another number of dimensions; no tensor, or a number that no float holds.
        return None
    return (
        library.ABI_VERSION, heads, batch, tokens, sequences, *rows, rates, biases, HEAD_DIM, offsets, wide, scale,
        lower_bound, device.index or 0, *states
    ), (*indices, *pool_rows, *checkpoints)  # fmt: skip


def _integers(x: Tensor, device: torch.device) -> tuple[tuple, tuple[int, int]]:
    """The fields of `library.Integers`, and the first address with the one past the last. ValueError: not ordinary."""
    if type(x) is not Tensor or not ((wide := x.dtype is int64) or x.dtype is int32) or x.device != device:
        raise ValueError
    if x.is_neg():
        raise ValueError
    start, strides = x.data_ptr(), x.stride()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return (start, strides[0], wide), (start, start + (last + 1) * (8 if wide else 4))


def _states(x: Tensor, shape: tuple[int, ...], device: torch.device) -> tuple[tuple, tuple[int, int]]:
    """The same of `library.State`. Each axis steps over all that the axes behind it cover."""
    if type(x) is not Tensor or not ((full := x.dtype is float32) or x.dtype is bfloat16):
        raise ValueError
    if x.shape != shape or x.device != device or x.is_neg():
        raise ValueError
    start, strides, covered = x.data_ptr(), x.stride(), 1
    if strides[-1] != 1:
        raise ValueError
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride < covered:
            raise ValueError
        covered += (size - 1) * stride
    width = _FP32 if full else _BF16
    return (start, strides[0], *strides[-3:-1], width // 2), (start, start + covered * width)
