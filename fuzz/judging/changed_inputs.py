"""The inputs of a case with one thing changed, for the properties."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from fuzz.cases.case import Case
from fuzz.cases.inputs import TOKENS, Inputs, apart
from fuzz.judging.call import Outputs

SCRATCH = 2**21  # numbers of fp32, 8 MiB: more than a kernel needs of its own, whatever the case


def output_places(inputs: Inputs, draw: random.Random, beside: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """NaN, strided: where an output may be written. beside: a slice for `out` of the tensor that q is a slice of."""
    if beside is not None:
        places = {"out": inputs.q.as_strided(beside.shape, beside.stride(), beside.storage_offset())}
    else:
        out = {"out": torch.full_like(inputs.v, torch.nan, memory_format=torch.contiguous_format)}
        places = draw.choice((heads_first, partial(apart, aligned=True), partial(apart, aligned=False)))(out)
    if inputs.final_state_dtype is not None and not inputs.in_place:
        state = torch.full(inputs.state_shape, torch.nan, dtype=inputs.final_state_dtype, device=inputs.v.device)
        places |= apart({"final_state": state}, aligned=draw.random() < 0.5)
    return places


def heads_first(dense: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those with channels, as slices of `[B, H, T, K]`."""
    return {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in dense.items() if x.dim() == 4}


def expanded(dense: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """Some of them with all heads, tokens or sequences in the memory of the first one."""
    axis = draw.choice([axis for axis in (0, 1, 2) if dense["q"].shape[axis] > 1] or [2])
    names = [name for name, x in sorted(dense.items()) if axis < x.dim() - 1]  # the last stride stays 1
    names = draw.sample(names, draw.randint(1, len(names)))
    return {name: dense[name].narrow(axis, 0, 1).expand_as(dense[name]) for name in names}


def draws(case: Case, purpose: str) -> random.Random:
    """Numbers that depend on the case's seed and the purpose alone, the same on every machine."""
    return random.Random(f"{purpose} {case.seed}")


def generator(case: Case, inputs: Inputs) -> torch.Generator:
    return torch.Generator(inputs.q.device).manual_seed(case.seed % 2**63)


def permutation(case: Case, purpose: str, size: int) -> torch.Tensor:
    """Of `size` things, never the one that leaves all of them in place (if there are two)."""
    draw, order = draws(case, purpose), list(range(size))
    while size > 1 and order == list(range(size)):
        draw.shuffle(order)
    return torch.tensor(order)


def offsets(seq_lens, dtype: torch.dtype, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(seq_lens)], dtype=dtype, device=device)


def contiguous(case: Case, **changes) -> Case:
    return replace(case, layout="contiguous", **changes)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)


def one_sequence(inputs: Inputs, n: int, rows: tuple[int, int]) -> Inputs:
    """Sequence `n` alone, which has these rows, in the form (packed or batch) that it has now."""
    start, end = rows
    changed = {name: flat(getattr(inputs, name))[start:end][None] for name in TOKENS}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[n : n + 1]
    if inputs.cu_seqlens is not None:
        changed["cu_seqlens"] = offsets([end - start], inputs.cu_seqlens.dtype, inputs.q.device)
    return replace(inputs, **changed)


def of_sequences(outputs: Outputs, rows: torch.Tensor, chosen) -> Outputs:
    """These rows and the states of these sequences, one after the other."""
    state = None if outputs.final_state is None else outputs.final_state[chosen]
    return Outputs(flat(outputs.out)[rows][None], state)


def all_nan_but(case: Case, inputs: Inputs, sound) -> Inputs:
    """The inputs with every sequence that is not among these, and its state, NaN."""
    rows, changed = rows_of_chosen(case, sound).to(inputs.q.device), {}
    for name in TOKENS:
        x = getattr(inputs, name)
        changed[name] = x.where(rows.view(*x.shape[:2], *[1] * (x.dim() - 2)), torch.nan)
    if inputs.initial_state is not None:
        changed["initial_state"] = torch.full_like(inputs.initial_state, torch.nan)
        changed["initial_state"][sound] = inputs.initial_state[sound]
    return replace(inputs, **changed)


def rows_of_chosen(case: Case, chosen) -> torch.Tensor:
    """bool [B * T], on the CPU: the rows of these sequences."""
    return rows_before(case, [length if n in chosen else 0 for n, length in enumerate(case.seq_lens)])


def rows_before(case: Case, cuts) -> torch.Tensor:
    """bool [B * T], on the CPU: the rows of each sequence before its cut."""
    parts = torch.tensor([[cut, length - cut] for length, cut in zip(case.seq_lens, cuts, strict=True)])
    return torch.tensor([True, False]).repeat(len(parts)).repeat_interleave(parts.flatten())


def other_contents(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Of every argument that is a tensor other contents, legal ones, by name."""
    others = {"q": inputs.k, "k": inputs.q, "v": (inputs.v.float() * -0.5).to(inputs.v.dtype)}
    others |= {name: -getattr(inputs, name) for name in ("g", "beta", "dt_bias")}
    others["A_log"] = -20 - inputs.A_log  # so slow a rate that gates are half open, whatever g is while it is finite
    if inputs.initial_state is not None:
        others["initial_state"] = inputs.initial_state * -0.5
    if case.packed:  # the same sequences in the other order
        others["cu_seqlens"] = offsets(case.seq_lens[::-1], inputs.cu_seqlens.dtype, inputs.q.device)
    return others


def changed_later(case: Case, inputs: Inputs, cuts, kind: str) -> Inputs:
    """The inputs with all rows from each sequence's cut on replaced."""
    numbers = generator(case, inputs)
    later = (~rows_before(case, cuts)).to(inputs.q.device)
    starts, lens = offsets(case.seq_lens, torch.int64, "cpu")[:-1], torch.tensor(case.seq_lens)
    first = starts.repeat_interleave(lens).to(inputs.q.device)  # of the row's sequence

    def normal(x):
        return torch.randn(x.shape, generator=numbers, device=x.device, dtype=torch.float32)

    size = inputs.v.float().abs().amax().clamp(2.0**-100, 2.0**90) if inputs.v.numel() else 1.0
    new = {
        "loud": lambda x, name: {"v": normal(x) * size * 2.0**20, "g": normal(x) + 100, "beta": normal(x) + 8}.get(
            name, normal(x)
        ),
        "quiet": lambda x, name: torch.full_like(x, {"g": -torch.inf, "beta": -torch.inf}.get(name, 0.0)),
        "random": lambda x, name: normal(x) * (size if name == "v" else 1.0),
        "copies": lambda x, name: -x[first] if name == "v" else x[first],
    }[kind]
    changed = {}
    for name in TOKENS:
        x = flat(getattr(inputs, name))
        mask = later.view(-1, *[1] * (x.dim() - 1))
        changed[name] = torch.where(mask, new(x, name).to(x.dtype), x).view(getattr(inputs, name).shape)
    return replace(inputs, **changed)


def not_finite_at(case: Case, inputs: Inputs, n: int, t: int) -> tuple[Inputs, str]:
    """The inputs with one element in each head of token `t` of sequence `n` not finite, and what that is."""
    draw = draws(case, "not finite")
    name = draw.choice(TOKENS)
    value = draw.choice((math.nan, math.inf, -math.inf)) if name in ("q", "k", "v") else math.nan
    x = getattr(inputs, name).clone(memory_format=torch.contiguous_format)
    row = flat(x)[inputs.seq_ranges()[n][0] + t]  # of all heads
    if row.dim() > 1:
        row = row[:, draw.randrange(row.shape[-1])]
    row.fill_(value)
    return replace(inputs, **{name: x}), f"{name} {value:g}"


@contextmanager
def dirty_memory(inputs: Inputs) -> Iterator[None]:
    """Memory that a call allocates and does not initialise holds NaN. On a GPU the call also runs on another stream.

    On a CPU PyTorch itself fills new tensors. On a GPU that would change the algorithms it chooses. So memory full of
    NaN is freed there, in the sizes that a target may ask for, and the caching allocator hands it out again. It keeps
    blocks above 1 MiB apart. So one block is large even for a small case, for scratch memory of a fixed size.
    """
    if inputs.q.device.type == "cuda":
        tokens, states = inputs.v.numel(), math.prod(inputs.state_shape)
        torch.cuda.synchronize(inputs.q.device)
        with torch.cuda.stream(torch.cuda.Stream(inputs.q.device)):  # memory is handed out again by stream
            for size in (tokens, 2 * tokens, states, SCRATCH):
                torch.full((size,), torch.nan, device=inputs.q.device)
            yield
        return
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # fill_uninitialized_memory, which is the default, needs this. `torch.use_deterministic_algorithms` would import the
    # compiler of PyTorch first, which takes seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(modes[0], warn_only=modes[1])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As code that loads a model sets it, and forgets to set it back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def with_state(case: Case, inputs: Inputs) -> tuple[Case, Inputs]:
    """The same with an fp32 final state of its own."""
    changed = contiguous(case, in_place=False, final_state="fp32")
    return changed, replace(inputs, in_place=False, final_state_dtype=torch.float32)
