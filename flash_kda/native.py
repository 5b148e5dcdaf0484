"""The short way of `flash_kda.ordinary` in C++ (`native.cpp`), where this Python and this PyTorch have what it needs.

It needs CPython with its lock, and a PyTorch whose tensors have `__dlpack_c_exchange_api__` (2.11 has). Elsewhere `run`
takes no call, and the Python of `flash_kda.ordinary` does the same in more time.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from flash_kda import library

NAME = "libflash_kda_native.so"
DLPACK_MAJOR_VERSION = 1


def _never(*arguments) -> bool:
    return False


def load(file: Path | None, api: int | None = None) -> tuple[Callable[..., bool], Callable[..., bytes | None]] | None:
    """`run` and `examined` of the compiled file. None if it cannot serve here.

    run: launches the kernel if the call of `flash_kda.fwd` is ordinary, all its arguments by position. Returns whether
        it did. Raises RuntimeError if the launch failed.
    examined: the bytes of `library.Arguments` of an ordinary call, on any device, with zeros for scratch memory that is
        not given. None of any other call. It takes the arguments of `run`, and is for tests.

    api: the address of the table to read tensors through, PyTorch's if it is None.
    """
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    has_lock = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
    if file is None or capsule is None or not has_lock:
        return None
    try:
        api = api or address(capsule)
        native = ctypes.PyDLL(str(file))
    except (OSError, ValueError, TypeError):
        return None
    if ctypes.c_uint32.from_address(api).value != DLPACK_MAJOR_VERSION:
        return None

    def prepare(index: int) -> int:
        library.check_capability(index)
        forward = library.load().flash_kda_forward
        native.flash_kda_native_set_forward(ctypes.cast(forward, ctypes.c_void_p))
        return library.scratch_bytes(index)

    objects = (None, True, False, float, int, torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg,
               library.current_stream, prepare, library.fail)  # fmt: skip
    _kept.append(objects)
    native.flash_kda_native_set_up((ctypes.py_object * len(objects))(*objects), ctypes.c_void_p(api))
    for function in (native.flash_kda_native_run, native.flash_kda_native_examined):
        function.restype = ctypes.py_object
    return native.flash_kda_native_run(), native.flash_kda_native_examined()


def address(capsule) -> int:
    """Of the table in PyTorch's capsule. Raises ValueError if it is another capsule, TypeError if it is none."""
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    return prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")


_kept: list[tuple] = []  # what the C++ side holds without counting references
run, examined = load(library.installed(NAME)) or (_never, None)
