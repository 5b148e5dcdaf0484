"""The compiled library behind its C interface (`csrc/flash_kda.h`), by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

ABI_VERSION = 1
_STATE_DTYPES = {torch.bfloat16: 1, torch.float32: 2}


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_batch", ctypes.c_int64),
        ("stride_token", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: torch.Tensor) -> _Tokens:
        return cls(x.data_ptr(), *x.stride()[:3])


class _State(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_sequence", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
        ("stride_value", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, x: torch.Tensor | None) -> _State:
        return cls() if x is None else cls(x.data_ptr(), *x.stride()[:3], _STATE_DTYPES[x.dtype])


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("abi_version", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("q", _Tokens),
        ("k", _Tokens),
        ("v", _Tokens),
        ("g", _Tokens),
        ("beta", _Tokens),
        ("out", _Tokens),
        ("A_log", ctypes.c_void_p),
        ("dt_bias", ctypes.c_void_p),
        ("dt_bias_stride", ctypes.c_int64),
        ("cu_seqlens", ctypes.c_void_p),
        ("cu_seqlens_is_64_bit", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("lower_bound", ctypes.c_float),
        ("initial_state", _State),
        ("final_state", _State),
    ]


def forward(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, sequences: int
) -> None:
    """Launch the kernel on the current stream of q's device. The arguments have been checked (`flash_kda.arguments`).

    Raises RuntimeError when the launch fails.
    """
    library = _library()
    batch, tokens, heads, _ = q.shape
    written = out if _aligned(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    q, k, v, g = (x if _aligned(x) else x.contiguous() for x in (q, k, v, g))
    arguments = _Arguments(
        abi_version=ABI_VERSION,
        heads=heads,
        batch=batch,
        tokens=tokens,
        sequences=sequences,
        q=_Tokens.of(q),
        k=_Tokens.of(k),
        v=_Tokens.of(v),
        g=_Tokens.of(g),
        beta=_Tokens.of(beta),
        out=_Tokens.of(written),
        A_log=A_log.contiguous().data_ptr(),
        dt_bias=dt_bias.data_ptr(),
        dt_bias_stride=dt_bias.stride(0),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.data_ptr(),
        cu_seqlens_is_64_bit=int(cu_seqlens is not None and cu_seqlens.dtype == torch.int64),
        scale=scale,
        lower_bound=lower_bound,
        initial_state=_State.of(initial_state),
        final_state=_State.of(final_state),
    )
    with torch.cuda.device(q.device):
        error = library.flash_kda_forward(ctypes.byref(arguments), torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"flash_kda: the launch failed: {library.flash_kda_error_string(error).decode()}")
    if written is not out:
        out.copy_(written)


def _aligned(x: torch.Tensor) -> bool:
    """Whether TMA and 16-byte stores can reach the tensor as it lies; otherwise it is copied."""
    return x.data_ptr() % 16 == 0 and all(
        stride % 8 == 0 and stride > 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1
    )


@functools.cache
def _library() -> ctypes.CDLL:
    path = os.environ.get("FLASH_KDA_LIBRARY") or Path(__file__).with_name("libflash_kda.so")
    library = ctypes.CDLL(str(path))
    library.flash_kda_forward.argtypes = [ctypes.POINTER(_Arguments), ctypes.c_void_p]
    library.flash_kda_forward.restype = ctypes.c_int
    library.flash_kda_error_string.argtypes = [ctypes.c_int]
    library.flash_kda_error_string.restype = ctypes.c_char_p
    return library
