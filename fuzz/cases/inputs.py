"""Inputs: the tensors that a case stands for, the same bits everywhere, and how they are saved and read back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fuzz.cases.case import Case
from fuzz.cases.families import BETAS, GATES, KEYS, QUERIES, STATES, VALUES
from fuzz.cases.noise import Noise
from fuzz.text import first_line

TOKENS = ("q", "k", "v", "g", "beta")
"""The inputs with a row for each token."""

TENSORS = (*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int32": torch.int32, "int64": torch.int64}
"""From the word of a case to PyTorch's dtype."""

WORDS = {dtype: word for word, dtype in DTYPES.items()}

FORMAT = "flash-kda inputs"
INPUTS_VERSION = "1"


def sequence_ranges(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int]]:
    """First row and last row + 1 of each sequence, in the B * T rows of the flattened token axis of x [B, T, ...]."""
    batch, tokens = x.shape[:2]
    return list(pairwise([row * tokens for row in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()))


@dataclass
class Inputs:
    """Arguments of one call of `flash_kda.fwd`, except the tensors that it writes. N sequences, K = V = 128."""

    q: torch.Tensor
    """bf16 `[B, T, H, K]`, and so are k and g."""
    k: torch.Tensor
    v: torch.Tensor
    """bf16 `[B, T, H, V]`."""
    g: torch.Tensor
    beta: torch.Tensor
    """bf16 `[B, T, H]`."""
    A_log: torch.Tensor
    """fp32 `[H]`."""
    dt_bias: torch.Tensor
    """fp32 `[H, K]`."""
    initial_state: torch.Tensor | None
    """bf16 or fp32 `[N, H, V, K]`."""
    cu_seqlens: torch.Tensor | None
    """int32 or int64 `[N + 1]`; then B = 1."""
    scale: float
    lower_bound: float
    final_state_dtype: torch.dtype | None
    """None: no final state is asked for."""
    in_place: bool
    """final_state is initial_state."""
    known: tuple[torch.Tensor, list[tuple[int, int]]] | None = field(default=None, repr=False, compare=False)
    """A `cu_seqlens` whose contents the host has read, and what they say, so that a GPU is not waited for again."""

    def to(self, device: torch.device | str) -> Inputs:
        """On the device; slices of one tensor stay slices of one tensor, with their strides and offsets."""
        device = torch.empty(0, device=device).device  # "cuda" is "cuda:0", where tensors may be already
        moved: dict[tuple, torch.Tensor] = {}
        tensors = {}
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel() and tensor.device != device:
                key = storage(tensor)
                if key not in moved:
                    moved[key] = whole(tensor).to(device)
                tensor = moved[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            tensors[name] = None if tensor is None else tensor.to(device)
        known = None if self.cu_seqlens is None else (tensors["cu_seqlens"], self.seq_ranges())
        return Inputs(**tensors, **self._scalars(), known=known)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """`[N, H, V, K]`. The device is not asked."""
        sequences = len(self.v) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return sequences, self.v.shape[2], self.v.shape[3], self.k.shape[3]

    def seq_ranges(self) -> list[tuple[int, int]]:
        """First row and last row + 1 of each sequence, in the B * T rows of the flattened token axis.

        The contents of one `cu_seqlens` tensor are read once: nobody may change them.
        """
        if self.cu_seqlens is None:
            return sequence_ranges(self.q, None)
        if self.known is None or self.known[0] is not self.cu_seqlens:
            self.known = self.cu_seqlens, sequence_ranges(self.q, self.cu_seqlens)
        return list(self.known[1])

    def digest(self) -> str:
        """SHA-256 of the values of everything, whatever the layout and the device: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is None:
                digest.update(f"{name} none\n".encode())
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        digest.update(json.dumps(_scalars_to_json(self)).encode())
        return digest.hexdigest()

    def _scalars(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("scale", "lower_bound", "final_state_dtype", "in_place")}


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The case's tensors, formed on the host and then moved, so that they have the same bits on every device.

    ValueError: a family is not known.
    """
    case.check_families()
    noise = Noise(case.seed, case.seq_lens, case.heads)
    keys = KEYS[case.keys](noise)
    gate = GATES[case.gates](noise)
    batch = (1, case.tokens) if case.packed else (case.n_seqs, case.seq_lens[0])

    def tokens(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).reshape(*batch, *values.shape[1:])

    projected = {
        "q": tokens(QUERIES[case.queries](noise, keys)),
        "k": tokens(keys),
        "v": tokens(VALUES[case.values](noise)),
        "g": tokens(gate.g),
        "beta": tokens(BETAS[case.betas](noise)),
    }
    others = {"A_log": torch.from_numpy(gate.A_log), "dt_bias": torch.from_numpy(gate.dt_bias)}
    if case.initial_state is not None:
        others["initial_state"] = torch.from_numpy(STATES[case.states](noise)).to(DTYPES[case.initial_state])
    if case.packed:
        ends = np.cumsum((0, *case.seq_lens), dtype=np.int64)
        others["cu_seqlens"] = torch.from_numpy(ends).to(DTYPES[case.cu_seqlens_dtype])
    if case.layout == "strided":
        aligned = case.seed // 2 % 2 == 0
        if case.seed % 3:
            projected = fuse(projected, interleaved=case.seed % 2 == 0, aligned=aligned)
        else:
            projected = apart(projected, aligned=aligned)
        others = apart(others, aligned=aligned)
    return Inputs(
        **projected,
        A_log=others["A_log"],
        dt_bias=others["dt_bias"],
        initial_state=others.get("initial_state"),
        cu_seqlens=others.get("cu_seqlens"),
        scale=case.scale,
        lower_bound=case.lower_bound,
        final_state_dtype=None if case.final_state is None else DTYPES[case.final_state],
        in_place=case.in_place,
    ).to(device)


def fuse(projected: Mapping[str, torch.Tensor], interleaved: bool, aligned: bool) -> dict[str, torch.Tensor]:
    """Copies of q, k, v, g, beta and, if it is given, out: slices of one projection `[B, T, width]`, last stride 1.

    interleaved: whether a token's row holds head after head, each with its q, k, v and g, then the betas. Otherwise it
    holds all heads of q, then of k and so on.
    aligned: whether strides and offsets (except beta's) are multiples of 16 bytes, as bulk copies of the hardware need.
    Otherwise one element pads each row and, interleaved, each head, and rows begin at an odd element.

    A row between two batches belongs to nobody. Elements that no slice covers are NaN, so that reading them shows.
    """
    batch, tokens, heads, width = projected["q"].shape
    names = tuple(name for name in ("q", "k", "v", "g", "out") if name in projected)
    pad = 8 if aligned else 1
    head = len(names) * width + pad if interleaved else width
    betas = heads * head if interleaved else len(names) * heads * width
    row = betas + heads + pad
    row += -row % 8 if aligned else 1 - row % 2
    offset = pad
    step = (tokens + 1) * row
    projection = torch.full((offset + batch * step,), math.nan, dtype=torch.bfloat16)

    sliced = {}
    for index, name in enumerate(names):
        first = offset + index * (width if interleaved else heads * width)
        sliced[name] = projection.as_strided((batch, tokens, heads, width), (step, row, head, 1), first)
    sliced["beta"] = projection.as_strided((batch, tokens, heads), (step, row, 1), offset + betas)
    for name, tensor in sliced.items():
        tensor.copy_(projected[name])
    return sliced


def apart(tensors: Mapping[str, torch.Tensor], aligned: bool) -> dict[str, torch.Tensor]:
    """Copies that are each the end of a larger tensor: no stride or offset follows from a shape or another tensor.

    Every axis is longer, and the last one longer in each tensor than in the one before.
    aligned: whether the last axis grows by multiples of 8 elements, instead of 1.

    Elements that a copy does not cover are NaN, or -1 among integers.
    """
    slices = {}
    for index, (name, x) in enumerate(tensors.items()):
        pad = (8 if aligned else 1) * (index + 1)
        fill = math.nan if x.is_floating_point() else -1
        larger = x.new_full([size + 1 for size in x.shape[:-1]] + [x.shape[-1] + pad], fill)
        slices[name] = larger[(slice(1, None),) * (x.dim() - 1) + (slice(pad, None),)].copy_(x)
    return slices


def save_inputs(path: str | PathLike[str], inputs: Inputs) -> None:
    """Write the exact values as safetensors; scalars, strides and a digest go into its metadata.

    The tensors are stored contiguous, so that any reader of safetensors can use them.
    """
    tensors = {name: getattr(inputs, name) for name in TENSORS if getattr(inputs, name) is not None}
    storages: dict[tuple, int] = {}
    layout = {}
    for name, tensor in tensors.items():
        size = len(whole(tensor))
        # A single row of a larger tensor counts as contiguous, and still has an offset that matters for alignment.
        if tensor.numel() and not (tensor.is_contiguous() and tensor.numel() == size):
            base = storages.setdefault(storage(tensor), len(storages))
            layout[name] = {"base": base, "size": size, "stride": tensor.stride(), "offset": tensor.storage_offset()}
    metadata = {
        "format": FORMAT,
        "version": INPUTS_VERSION,
        "scalars": json.dumps(_scalars_to_json(inputs)),
        "layout": json.dumps(layout),
        "sha256": inputs.digest(),
    }
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(stored, path, metadata)
    path.chmod(mode)  # that of any file made there; save_file lets only its owner read it


def load_inputs(path: str | PathLike[str]) -> Inputs:
    """The inputs of `save_inputs`: the same bits, strides and offsets, on the CPU; what lies between slices is NaN.

    ValueError: the file is damaged or holds something else. OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got another one: {first_line(error)}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected saved inputs, got a safetensors file without the format {FORMAT!r} in its metadata"
        )
    if metadata.get("version") != INPUTS_VERSION:
        raise ValueError(
            f"{path}: expected saved inputs of version {INPUTS_VERSION!r}, got {metadata.get('version')!r}"
        )
    try:
        scalars = json.loads(metadata["scalars"])
        dtype = scalars["final_state_dtype"]
        inputs = Inputs(
            **{name: tensors.pop(name, None) for name in TENSORS},
            scale=scalars["scale"],
            lower_bound=scalars["lower_bound"],
            final_state_dtype=None if dtype is None else DTYPES[dtype],
            in_place=scalars["in_place"],
        )
        if tensors or inputs.digest() != metadata["sha256"]:
            raise ValueError("its contents do not have the digest that was saved with them")
        _restore_layout(inputs, json.loads(metadata["layout"]))
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected saved inputs, got damaged ones: {first_line(error)}") from error
    return inputs


def _restore_layout(inputs: Inputs, layout: Mapping[str, Mapping[str, Any]]) -> None:
    bases: dict[int, torch.Tensor] = {}
    for name, place in layout.items():
        values = getattr(inputs, name)
        fill = math.nan if values.is_floating_point() else -1
        base = bases.setdefault(place["base"], torch.full((place["size"],), fill, dtype=values.dtype))
        tensor = base.as_strided(values.shape, place["stride"], place["offset"])
        setattr(inputs, name, tensor.copy_(values))


def _scalars_to_json(inputs: Inputs) -> dict[str, Any]:
    dtype = WORDS.get(inputs.final_state_dtype)
    return {**inputs._scalars(), "final_state_dtype": dtype}


def storage(x: torch.Tensor) -> tuple:
    """What tensors have in common that are slices of one tensor."""
    return x.untyped_storage().data_ptr(), x.dtype, x.numel() == 0


def whole(x: torch.Tensor) -> torch.Tensor:
    """The whole storage that a tensor is part of, in one dimension."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
