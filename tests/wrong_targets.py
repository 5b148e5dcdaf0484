"""Targets that are wrong on purpose, each in one way: the model, and something done to it or in its place."""

from __future__ import annotations

import ctypes
import inspect
import os
import random
import signal
import time

import torch

import flash_kda
from fuzz.cases.inputs import sequence_ranges

SIGNATURE = inspect.signature(flash_kda.fwd)


def arguments(args, kwargs) -> dict:
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def state_transposed(*args, **kwargs):
    """Reads the initial state as [K, V]."""
    given = arguments(args, kwargs)
    if given["initial_state"] is not None and given["final_state"] is not given["initial_state"]:
        given["initial_state"] = given["initial_state"].mT.contiguous()
    flash_kda.fwd(**given)


def last_row_dropped(*args, **kwargs):
    """Forgets the last row of each sequence whose length is odd and more than 2."""
    given = arguments(args, kwargs)
    flash_kda.fwd(**given)
    for start, end in sequence_ranges(given["q"], given["cu_seqlens"]):
        if end - start > 2 and (end - start) % 2:
            given["out"].flatten(0, 1)[end - 1] = 0


def raises(*args, **kwargs):
    """Refuses more than 20 tokens of sequences; rows of none may lie behind them."""
    given = arguments(args, kwargs)
    if given["q"].shape[:2].numel() > 20 and (given["cu_seqlens"] is None or given["cu_seqlens"][-1] > 20):
        raise RuntimeError("no more than 20 tokens, please")
    flash_kda.fwd(*args, **kwargs)


def gives_nan(*args, **kwargs):
    """Leaves one element of out as it was when there are several heads."""
    given = arguments(args, kwargs)
    out = given["out"]
    before = out.clone() if isinstance(out, torch.Tensor) else out
    flash_kda.fwd(**given)
    if out.shape[2] > 1 and out.numel():
        out[-1, -1, -1, -1] = before[-1, -1, -1, -1]


CHANCE = random.Random(5)


def wobbles(*args, **kwargs):
    """Zeroes the last row of out in one call of four, whatever the inputs are."""
    given = arguments(args, kwargs)
    flash_kda.fwd(**given)
    if given["out"].numel() and CHANCE.random() < 0.25:
        given["out"].flatten(0, 1)[-1] = 0


def talks(*args, **kwargs):
    """Prints, and stops at a breakpoint."""
    print("the target speaks")
    breakpoint()
    flash_kda.fwd(*args, **kwargs)


def needs_fp32(*args, **kwargs):
    """Raises where PyTorch's default dtype is another."""
    if torch.get_default_dtype() != torch.float32:
        raise RuntimeError("the default dtype has to be fp32")
    flash_kda.fwd(*args, **kwargs)


def hangs(*args, **kwargs):
    """Never returns from a packed call."""
    while arguments(args, kwargs)["cu_seqlens"] is not None:
        time.sleep(0.1)
    flash_kda.fwd(*args, **kwargs)


def exits(*args, **kwargs):
    """Ends its process when a final state is asked for."""
    if arguments(args, kwargs)["final_state"] is not None:
        os._exit(3)
    flash_kda.fwd(*args, **kwargs)


def segfaults(*args, **kwargs):
    """Reads address 0 when there is no state to read."""
    if arguments(args, kwargs)["initial_state"] is None:
        ctypes.string_at(0)
    flash_kda.fwd(*args, **kwargs)


def writes_zeros(*args, **kwargs):
    """Writes zeros, and calls nothing."""
    given = arguments(args, kwargs)
    given["out"].zero_()
    if given["final_state"] is not None:
        given["final_state"].zero_()


def two_mistakes(*args, **kwargs):
    """Refuses huge keys, and huge queries in the same words."""
    given = arguments(args, kwargs)
    for x in (given["q"], given["k"]):
        if isinstance(x, torch.Tensor) and x.numel() and x.abs().max() > 2.0**38:
            raise RuntimeError("smaller, please")
    flash_kda.fwd(*args, **kwargs)


def aborts(*args, **kwargs):
    """Ends as a failed assertion in C++ does."""
    os.abort()


def spins(*args, **kwargs):
    """Is busy for ever, and lets no signal through."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    while True:
        pass


def kills_itself(*args, **kwargs):
    """Ends as a process does that the kernel kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def wants_too_much(*args, **kwargs):
    """Asks for more memory than any machine has."""
    torch.empty(1 << 50, dtype=torch.float64, device=arguments(args, kwargs)["q"].device)


def is_refused_memory(*args, **kwargs):
    """Raises what PyTorch raises when a GPU has no memory left."""
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 PiB.")


def writes_anywhere(*args, **kwargs):
    """An illegal memory access: a kernel that writes to an address nobody has."""
    import wrong_kernels

    wrong_kernels.write_to(1 << 44, arguments(args, kwargs)["q"].device)


def fails_on_the_device(*args, **kwargs):
    """An assertion that fails in a kernel: an index beyond its tensor."""
    q = arguments(args, kwargs)["q"]
    q.flatten()[torch.tensor([1 << 40], device=q.device)]


def never_ends_on_the_device(*args, **kwargs):
    """A kernel that runs for ever."""
    torch.cuda._sleep(1 << 62)


def wrong_names(query, key, value, gate, beta, scale, out, A_log, dt_bias, lower_bound, *states):
    """Has another signature."""


not_a_function = 3
