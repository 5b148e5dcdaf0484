"""The compiled library behind its C interface (`csrc/flash_kda.h`), by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from flash_kda.workspace import Workspace, bytes_of, is_reachable

WAY_OUT = "For a call through fla, FLA_FLASH_KDA=0 selects fla's own kernels."
NAME = "libflash_kda.so"
ABI_VERSION = 4
NEEDS_SCRATCH = 100006  # the library keeps no scratch memory for this stream
HEAD_DIM = 128
CAPABILITY = (9, 0)  # the library holds code for sm_90a alone
_STATE_DTYPES = {torch.bfloat16: 1, torch.float32: 2}


class Tokens(ctypes.Structure):
    """`flash_kda_tokens`"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_batch", ctypes.c_int64),
        ("stride_token", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
    ]


class State(ctypes.Structure):
    """`flash_kda_state`"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_sequence", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
        ("stride_value", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class Integers(ctypes.Structure):
    """`flash_kda_integers`"""

    _fields_ = [("data", ctypes.c_void_p), ("stride_sequence", ctypes.c_int64), ("is_64_bit", ctypes.c_int32)]


class Serving(ctypes.Structure):
    """`flash_kda_serving`"""

    _fields_ = [
        ("state_indices", Integers),
        ("initial_rows", ctypes.c_int64),
        ("final_rows", ctypes.c_int64),
        ("checkpoint_offsets", Integers),
        ("checkpoint_offsets_stride", ctypes.c_int64),
        ("checkpoint_state", State),
        ("checkpoint_state_stride", ctypes.c_int64),
        ("checkpoints", ctypes.c_int64),
    ]


class Arguments(ctypes.Structure):
    """`flash_kda_arguments`"""

    _fields_ = [
        ("abi_version", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("q", Tokens),
        ("k", Tokens),
        ("v", Tokens),
        ("g", Tokens),
        ("beta", Tokens),
        ("out", Tokens),
        ("A_log", ctypes.c_void_p),
        ("dt_bias", ctypes.c_void_p),
        ("dt_bias_stride", ctypes.c_int64),
        ("cu_seqlens", ctypes.c_void_p),
        ("cu_seqlens_is_64_bit", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("lower_bound", ctypes.c_float),
        ("device", ctypes.c_int32),
        ("initial_state", State),
        ("final_state", State),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("serving", Serving),
    ]


def _codes(structure: type[ctypes.Structure]) -> Iterator[str]:
    """What the fields are to the `struct` module, those of nested structs in line."""
    codes = {ctypes.c_void_p: "P", ctypes.c_int64: "q", ctypes.c_int32: "i", ctypes.c_float: "f"}
    for _, kind in structure._fields_:
        yield from [codes[kind]] if kind in codes else _codes(kind)


# `Arguments` from a flat row of numbers, in a fraction of the time of ctypes. "@" pads as the C compiler does.
PACKED = struct.Struct("@" + "".join(_codes(Arguments)))

# The functions of C++ that those of torch.cuda wrap, where this PyTorch has them.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)


def launch(fields: tuple, serving: tuple, device: torch.device, workspace: torch.Tensor | None) -> None:
    """Launch the kernel on the current stream of `device`.

    `fields` are those of `Arguments` before `scratch`, `serving` those behind it; nested ones in line.

    Raises RuntimeError as `forward` does.
    """
    index = device.index
    check_capability(index)
    if index != current_device():
        with torch.cuda.device(index):
            return launch(fields, serving, device, workspace)
    forward, stream = load().flash_kda_forward, current_stream(index)
    size = scratch_bytes(index)
    error = forward(PACKED.pack(*fields, 0 if workspace is None else workspace.data_ptr(), size, *serving), stream)
    if error == NEEDS_SCRATCH:
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        error = forward(PACKED.pack(*fields, scratch.data_ptr(), size, *serving), stream)
    if error:
        fail(error)


def fail(error: int) -> None:
    """Raise RuntimeError for what a function of the library returned."""
    reason = load().flash_kda_error_string(error).decode()
    raise RuntimeError(f"flash_kda: the launch failed: {reason}. {WAY_OUT}")


def forward(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, workspace,
    state_indices=None, checkpoint_state=None, checkpoint_offsets=None
) -> None:  # fmt: skip
    """Launch the kernel on the current stream of q's device. The arguments have been checked (`flash_kda.arguments`).

    Raises RuntimeError when there is no library, when it holds no code for the device, and when the launch fails.
    """
    device = q.device
    check_capability(device.index)
    library = load()
    with torch.cuda.device(device):
        scratch = Workspace(workspace)
        q, k, v, g = (scratch.reachable(x) for x in (q, k, v, g))
        o = out
        if not is_reachable(out):
            o = scratch.like(out)
            if cu_seqlens is not None:  # which may end before T
                o.copy_(out)
        handover = scratch.bytes(scratch_bytes(device.index), device)
        arguments = pack(
            q, k, v, g, beta, scale, o, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, handover,
            state_indices, checkpoint_state, checkpoint_offsets
        )  # fmt: skip
        error = library.flash_kda_forward(ctypes.byref(arguments), torch.cuda.current_stream(device).cuda_stream)
        if error:
            fail(error)
        if o is not out:
            with torch.inference_mode():  # tensors that were made in it, too
                out.copy_(o)


def pack(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, scratch,
    state_indices=None, checkpoint_state=None, checkpoint_offsets=None
) -> Arguments:  # fmt: skip
    """The arguments as the C interface takes them. They hold addresses: the tensors must outlive them."""
    batch, tokens, heads, _ = q.shape
    # In the order of the fields. A tuple stands for a nested struct: ctypes fills it several times faster than by name.
    return Arguments(
        ABI_VERSION,
        heads,
        batch,
        tokens,
        batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        *((x.data_ptr(), *x.stride()[:3]) for x in (q, k, v, g, beta, out)),
        A_log.data_ptr(),
        dt_bias.data_ptr(),
        dt_bias.stride(0) if dt_bias.dim() == 2 else HEAD_DIM,
        None if cu_seqlens is None else cu_seqlens.data_ptr(),
        cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        scale,
        lower_bound,
        q.device.index or 0,
        _state(initial_state),
        _state(final_state),
        scratch.data_ptr(),
        scratch.nbytes,
        (
            _integers(state_indices),
            *(0 if x is None or state_indices is None else x.shape[0] for x in (initial_state, final_state)),
            *_checkpoints(checkpoint_state, checkpoint_offsets),
        ),
    )


def _state(x: torch.Tensor | None) -> tuple:
    return () if x is None else (x.data_ptr(), x.stride(0), *x.stride()[-3:-1], _STATE_DTYPES[x.dtype])


def _integers(x: torch.Tensor | None) -> tuple:
    return () if x is None else (x.data_ptr(), x.stride(0), x.dtype == torch.int64)


def _checkpoints(states: torch.Tensor | None, offsets: torch.Tensor | None) -> tuple:
    if states is None or offsets is None:
        return ()
    several = offsets.dim() == 2
    step = (offsets.stride(1), states.stride(1)) if several else (0, 0)
    return _integers(offsets), step[0], _state(states), step[1], offsets.shape[1] if several else 1


def get_workspace_size(*arguments, **named) -> int:
    """The bytes of scratch memory that `flash_kda.fwd` needs: the least size of its `workspace`.

    Two forms: `get_workspace_size(q, k, v, g, out, initial_state=None, final_state=None)` for these tensors, and
    `get_workspace_size(T_total, H, N=1)` for any contiguous ones of up to T_total tokens, H heads and N sequences.

    On a GPU the kernel needs 10.7 MB for prepared chunks and 64 KiB for each multiprocessor, whatever the sizes:
    19.3 MB on an H200. On a CPU it is 0. With integers, the GPU is the current one, and without any GPU the size is 0.

    The kernel reads and writes q, k, v, g and out in place if addresses and strides are positive multiples of 8
    elements. Contiguous tensors from PyTorch's allocator are so, and slices of fused projections at multiples of 8.
    Every other one of them is copied, and takes the bytes of a contiguous tensor. States are never copied.

    Raises TypeError or ValueError for a size that is no integer or is negative; RuntimeError as `flash_kda.fwd` does.
    """
    if "T_total" in named or (arguments and not hasattr(arguments[0], "device")):
        return _size_for_contiguous(*arguments, **named)
    return _size_for_tensors(*arguments, **named)


def _size_for_contiguous(T_total: int, H: int, N: int = 1) -> int:
    for name, value in (("T_total", T_total), ("H", H), ("N", N)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}. Pass a number.")
        if value < 0:
            raise ValueError(f"{name}: expected a number that is not negative, got {value}. Pass another one.")
    return scratch_bytes(current_device()) if torch.cuda.is_available() else 0


def _size_for_tensors(q, k, v, g, out, initial_state=None, final_state=None) -> int:
    if q.device.type == "cpu":
        return 0
    copied = (x for x in (q, k, v, g, out) if not is_reachable(x))
    return scratch_bytes(q.device.index) + sum(map(bytes_of, copied))


@functools.cache
def scratch_bytes(index: int) -> int:
    """Bytes through which the kernel passes states and prepared chunks between multiprocessors, on that CUDA device."""
    return load().flash_kda_scratch_bytes(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def check_capability(index: int) -> None:
    """Raise RuntimeError if the library holds no code for that CUDA device."""
    capability = torch.cuda.get_device_capability(index)
    if capability != CAPABILITY:
        raise RuntimeError(
            f"flash_kda: expected compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (Hopper: H100, H200, GH200), got "
            f"{capability[0]}.{capability[1]} (cuda:{index}, {torch.cuda.get_device_name(index)}). "
            f"Move the tensors to a Hopper GPU or to the CPU. {WAY_OUT}"
        )


@functools.cache
def load() -> ctypes.CDLL:
    """The library: the file that `FLASH_KDA_LIBRARY` names, else the one installed with the package.

    Raises RuntimeError if there is none, or if it is not this library.
    """
    try:
        return declared(ctypes.CDLL(str(path())))
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"flash_kda: expected the library of this version at {path()}, got: {error}. Install flash_kda again, or "
            f"correct FLASH_KDA_LIBRARY. {WAY_OUT}"
        ) from error


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions."""
    library.flash_kda_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]  # the bytes of Arguments, or a reference
    library.flash_kda_forward.restype = ctypes.c_int
    library.flash_kda_scratch_bytes.argtypes = [ctypes.c_int]
    library.flash_kda_scratch_bytes.restype = ctypes.c_int64
    library.flash_kda_use_way.argtypes = [ctypes.c_int32]
    library.flash_kda_use_way.restype = None
    library.flash_kda_error_string.argtypes = [ctypes.c_int]
    library.flash_kda_error_string.restype = ctypes.c_char_p
    return library


def path() -> Path:
    """Where the library is. Raises RuntimeError if it is nowhere."""
    named = os.environ.get("FLASH_KDA_LIBRARY")
    if named:
        return Path(named)
    found = installed(NAME)
    if found is None:
        raise RuntimeError(
            f"flash_kda: expected {NAME} in {' or '.join(_folders())}, got none. This is a pure Python installation, "
            "which runs CPU tensors only, or a checkout that hides the installed package. On Linux `pip install .` "
            "compiles the library, and `pip install -e .` does so for a checkout. Both need FLASH_KDA_BUILD unset. "
            f"{WAY_OUT}"
        )
    return found


def installed(name: str) -> Path | None:
    """The file of that name in the package."""
    return next((file for folder in _folders() if (file := Path(folder) / name).exists()), None)


def _folders() -> list[str]:
    return sys.modules[__package__].__path__  # an editable installation spreads the package over two
