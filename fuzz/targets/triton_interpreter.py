"""fla's Triton kernels on a CPU, through Triton's interpreter.

Triton decides when it is imported whether its kernels are interpreted, so this is a property of the whole process.
fla-core 0.6.0 with Triton 3.9 then needs a few helps, which fill in what the interpreter lacks; the kernels' own
arithmetic is untouched.
"""

from __future__ import annotations

import builtins
import math
import os
import sys
import types

import numpy as np

# Where loops over `range` hand their index to code that calls its `.to`.
MODULES_WITH_RANGE = ("fla.ops.common.chunk_delta_h", "fla.ops.gla.chunk")


def interpret_triton() -> None:
    """Make the Triton of this process an interpreter; call it before anything imports Triton, or again later.

    Raises RuntimeError when Triton was already imported as a compiler.
    """
    if "triton" in sys.modules:
        import triton.language
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(triton.language.zeros, InterpretedFunction):
            raise RuntimeError(
                "TRITON_INTERPRET: expected 1 before Triton is imported, got a Triton that compiles. "
                "Set it before anything imports triton"
            )
    os.environ["TRITON_INTERPRET"] = "1"


def help_fla() -> None:
    """Apply the helps to the fla modules imported so far; a second time changes nothing."""
    _patch_language_once()
    _prefer_large_tiles()
    _look_up_triton_names_late()
    for name in MODULES_WITH_RANGE:
        sys.modules[name].range = _range


def ignore_overflow():
    """Silence NumPy, with which the interpreter computes: kernels overflow to infinity on purpose, as a GPU does."""
    return np.errstate(all="ignore")


def _patch_language_once() -> None:
    """The interpreter replaces the functions of `triton.language` anew in every call of every device function, which is
    half of its time. Replace them once for each module of kernels and leave them so."""
    from triton import language
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "patched"):
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patch(function)
            # As Triton 3.9 has it: NumPy 2.5 makes no number of an array of one element, which older ones ask of it.
            language.tensor.__index__ = lambda tensor: int(tensor.handle.data.item())
            patched.add(id(function.__globals__))
        return types.SimpleNamespace(restore=lambda: None)

    patch_once.patched = patched
    interpreter._patch_lang = patch_once


def _prefer_large_tiles() -> None:
    """An autotuner cannot time its configurations without a driver. In the interpreter the time goes with the number of
    programs, so let the one with the largest tiles count as the fastest, and the first of equals."""
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **meta: 1 / math.prod(config.kwargs.values())


def _look_up_triton_names_late() -> None:
    """The interpreter replaces the functions of `triton.language` while a kernel runs; fla's modules hold aliases of
    the ones from before. Replace each alias by a function that looks its name up when called."""
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("fla."):
            continue
        for alias, function in list(vars(module).items()):
            if isinstance(function, types.FunctionType) and function.__module__.startswith("triton.language"):
                setattr(module, alias, _late(function.__module__, function.__name__))


def _late(module_name: str, name: str):
    import triton.language

    home = triton.language if hasattr(triton.language, name) else sys.modules[module_name]
    return lambda *args, **kwargs: getattr(home, name)(*args, **kwargs)


class _Index(int):
    """A loop index with the conversion that kernels apply to it; Python's integers need none."""

    def to(self, dtype):
        return self


def _range(*arguments):
    return map(_Index, builtins.range(*map(int, arguments)))
