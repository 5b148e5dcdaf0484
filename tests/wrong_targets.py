"""Targets that are wrong on purpose, each in one way: the model, and something done to it or in its place."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import time

import flash_kda

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
    out, cu_seqlens = given["out"], given["cu_seqlens"]
    if cu_seqlens is None:
        if out.shape[1] > 2 and out.shape[1] % 2:
            out[:, -1] = 0
        return
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if end - start > 2 and (end - start) % 2:
            out[:, end - 1] = 0


def raises(*args, **kwargs):
    """Refuses more than 20 tokens."""
    if arguments(args, kwargs)["q"].shape[:2].numel() > 20:
        raise RuntimeError("no more than 20 tokens, please")
    flash_kda.fwd(*args, **kwargs)


def gives_nan(*args, **kwargs):
    """Leaves one element of out as it was when there are several heads."""
    given = arguments(args, kwargs)
    out = given["out"]
    before = out.clone()
    flash_kda.fwd(**given)
    if out.shape[2] > 1 and out.numel():
        out[-1, -1, -1, -1] = before[-1, -1, -1, -1]


def hangs(*args, **kwargs):
    """Never returns from a packed call."""
    while arguments(args, kwargs)["cu_seqlens"] is not None:
        time.sleep(0.1)
    flash_kda.fwd(*args, **kwargs)


def exits(*args, **kwargs):
    """Ends its process when the layout is strided."""
    if not arguments(args, kwargs)["q"].is_contiguous():
        os._exit(3)
    flash_kda.fwd(*args, **kwargs)


def segfaults(*args, **kwargs):
    """Reads address 0 when there is no state to read."""
    if arguments(args, kwargs)["initial_state"] is None:
        ctypes.string_at(0)
    flash_kda.fwd(*args, **kwargs)


def wrong_names(query, key, value, gate, beta, scale, out, A_log, dt_bias, lower_bound, *states):
    """Has another signature."""


not_a_function = 3
