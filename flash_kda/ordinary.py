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
from flash_kda.arguments import FLOAT32_MAX, HEAD_DIM, MIN_LOWER_BOUND, WORKSPACE_ALIGNMENT, wants_validation
from flash_kda.workspace import STATE_ALIGNMENT, TOKENS_ALIGNMENT

_BF16, _FP32 = 2, 4  # bytes
_STATE = HEAD_DIM * HEAD_DIM  # elements of the state of one head
_NO_STATE = (0, 0, 0, 0, 0)


def run(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
    workspace, state_indices=None, checkpoint_state=None, checkpoint_offsets=None
) -> bool:  # fmt: skip
    """Launch the kernel if this call of `flash_kda.fwd` is ordinary. Returns False, with nothing done, if it is not.

    Raises RuntimeError as `library.forward` does.
    """
    if type(q) is not Tensor or not q.is_cuda or (cu_seqlens is not None and wants_validation(validate)):
        return False
    if state_indices is not None or checkpoint_state is not None or checkpoint_offsets is not None:
        return False
    fields = examine(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, workspace
    )
    if fields is None:
        return False
    library.launch(fields, q.device, workspace)
    note_writes(out, final_state)
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
    workspace=None
) -> tuple | None:  # fmt: skip
    """The fields of `library.Arguments` before `scratch`, nested ones in line. None if the call is not ordinary.

    It takes nothing that `check_arguments` refuses. The contents of `cu_seqlens` are not looked at.
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
        if c != 1 and heads != 1:
            return None
        rows[16:16] = (start, a, b, c)  # between g and out
        read.append((start, start + ((batch - 1) * a + (tokens - 1) * b + heads) * _BF16))

        for x, accepted in (A_log, (heads,)), (dt_bias, (heads, HEAD_DIM)):
            if (
                not (type(x) is Tensor or type(x) is Parameter)
                or x.dtype is not float32
                or x.shape != accepted
                or x.device != device
                or x.is_neg()
                or not x.is_contiguous()
            ):
                return None
        rates, biases = A_log.data_ptr(), dt_bias.data_ptr()
        read += (rates, rates + heads * _FP32), (biases, biases + of_token * _FP32)

        sequences, offsets, wide = batch, 0, False
        if cu_seqlens is not None:
            if (
                type(cu_seqlens) is not Tensor
                or not ((wide := cu_seqlens.dtype is int64) or cu_seqlens.dtype is int32)
                or cu_seqlens.device != device
                or cu_seqlens.is_neg()
                or not cu_seqlens.is_contiguous()
                or batch != 1
            ):
                return None
            (entries,) = cu_seqlens.shape
            sequences = entries - 1
            if sequences < 1:
                return None
            offsets = cu_seqlens.data_ptr()
            read.append((offsets, offsets + entries * (8 if wide else 4)))

        states = []
        final_start = final_end = 0  # while there is none
        accepted = (sequences, heads, HEAD_DIM, HEAD_DIM)
        for x in (initial_state, final_state):
            if x is None:
                states += _NO_STATE
                continue
            if (
                type(x) is not Tensor
                or not ((full := x.dtype is float32) or x.dtype is bfloat16)
                or x.shape != accepted
                or x.device != device
                or x.is_neg()
                or not x.is_contiguous()
            ):
                return None
            start, width = x.data_ptr(), _FP32 if full else _BF16
            if start % (STATE_ALIGNMENT * width):
                return None
            states += (start, heads * _STATE, _STATE, HEAD_DIM, width // 2)
            end = start + sequences * heads * _STATE * width
            if x is final_state:
                final_start, final_end = start, end
            else:
                read.append((start, end))

        if not out_start or (final_state is not None and not final_start):
            return None
        # Ranges of addresses that meet may still share no element, which the full checks find out.
        if final_start < out_end and out_start < final_end:
            return None
        for start, end in read:
            if not start or (start < out_end and out_start < end) or (start < final_end and final_start < end):
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
            for other, other_end in (*read, (out_start, out_end), (final_start, final_end)):
                if start < other_end and other < end:
                    return None
    except (RuntimeError, ValueError, OverflowError):
        # No address, no strides, no sizes, another number of dimensions; or a number that no float holds.
        return None
    return (
        library.ABI_VERSION, heads, batch, tokens, sequences, *rows, rates, biases, HEAD_DIM, offsets, wide, scale,
        lower_bound, device.index or 0, *states
    )  # fmt: skip
