"""Case: a frozen description of one input, small enough to read, without tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fuzz.cases.families import FAMILIES

CASE_VERSION = 1
"""Of the JSON form. A case of another version is refused, as its families may mean something else."""

STATE_DTYPES = ("bf16", "fp32")
CU_SEQLENS_DTYPES = ("int32", "int64")
LAYOUTS = ("contiguous", "strided")
LOWEST_BOUND = -5.0


@dataclass(frozen=True)
class Case:
    """One input of the operator. K = V = 128.

    Raises ValueError, naming the field, where a value is not accepted. Names of families are not looked up here but
    where inputs are made of them: a finding keeps its inputs, and outlives its families.
    """

    seq_lens: tuple[int, ...]
    """Tokens of each sequence, at least one sequence. Packed: any lengths, 0 included; otherwise all equal."""
    heads: int
    packed: bool
    """cu_seqlens is given and B = 1; otherwise B = len(seq_lens)."""
    cu_seqlens_dtype: str
    """"int32" or "int64"; without effect unless packed."""
    lower_bound: float
    """Of the log-decay, in [-5, 0]."""
    scale: float
    initial_state: str | None
    """None, "bf16" or "fp32"."""
    final_state: str | None
    """None, "bf16" or "fp32"."""
    in_place: bool
    """final_state is initial_state: both are given, of one dtype."""
    layout: str
    """"contiguous", or "strided": q, k, v, g and beta are slices of one fused projection."""
    queries: str
    keys: str
    values: str
    gates: str
    betas: str
    states: str
    seed: int
    """In [0, 2^64): fills the structure with numbers."""

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return sum(self.seq_lens)

    @property
    def n_seqs(self) -> int:
        return len(self.seq_lens)

    def __post_init__(self) -> None:
        lens = self.seq_lens
        if not isinstance(lens, tuple) or not lens or not all(_is_int(n) and n >= 0 for n in lens):
            _refuse("seq_lens", lens, "a tuple of one or more integers, none negative")
        if not _is_int(self.heads) or self.heads < 1:
            _refuse("heads", self.heads, "an integer, at least 1")
        for name in ("packed", "in_place"):
            _one_of(name, getattr(self, name), (True, False), bool)
        if not self.packed and len(set(lens)) > 1:
            _refuse("seq_lens", lens, "equal lengths, unless packed is true")
        _one_of("cu_seqlens_dtype", self.cu_seqlens_dtype, CU_SEQLENS_DTYPES)
        if not isinstance(self.lower_bound, float) or not LOWEST_BOUND <= self.lower_bound <= 0:
            _refuse("lower_bound", self.lower_bound, "a float in [-5, 0]")
        if not isinstance(self.scale, float) or not math.isfinite(self.scale):
            _refuse("scale", self.scale, "a finite float")
        for name in ("initial_state", "final_state"):
            _one_of(name, getattr(self, name), (None, *STATE_DTYPES))
        if self.in_place and (self.initial_state is None or self.initial_state != self.final_state):
            given = f"True with initial_state={self.initial_state!r} and final_state={self.final_state!r}"
            raise ValueError(f"case: in_place: expected two states of one dtype, got {given}")
        _one_of("layout", self.layout, LAYOUTS)
        for name in FAMILIES:
            if not isinstance(getattr(self, name), str):
                _refuse(name, getattr(self, name), "the name of a family")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**64:
            _refuse("seed", self.seed, "an integer in [0, 2^64)")

    def check_families(self) -> None:
        """ValueError where a family is not known."""
        for name, families in FAMILIES.items():
            _one_of(name, getattr(self, name), families)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields in order, and the version of the form."""
        return {"version": CASE_VERSION, **asdict(self), "seq_lens": list(self.seq_lens)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, inputs_saved: bool = False) -> Case:
        """The case of `to_dict`, read back from JSON. Whole numbers pass for floats, as JSON may write 0.0 as 0.

        inputs_saved: nothing is to be generated, so version and families may be those of another generator.

        ValueError: not a mapping, another version, unknown or missing fields, values of the wrong type or range.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"case: expected a JSON object, got a {type(data).__name__}")
        if data.get("version") != CASE_VERSION and not inputs_saved:
            raise ValueError(f"case: version: expected {CASE_VERSION}, got {data.get('version')!r}")
        given = {key: value for key, value in data.items() if key != "version"}
        names = [field.name for field in fields(cls)]
        if unknown := [str(name) for name in given if name not in names]:
            raise ValueError(f"case: expected the fields {', '.join(names)}, got {', '.join(unknown)}")
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"case: expected the fields {', '.join(names)}, got none for {', '.join(missing)}")
        if isinstance(given["seq_lens"], list):
            given["seq_lens"] = tuple(given["seq_lens"])
        for name in ("lower_bound", "scale"):
            if _is_int(given[name]) and abs(given[name]) < 2**53:
                given[name] = float(given[name])
        case = cls(**given)
        if not inputs_saved:
            case.check_families()
        return case


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(name: str, value: Any, accepted: tuple, kind: type = object) -> None:
    if not isinstance(value, kind) or not any(value is option or value == option for option in accepted):
        _refuse(name, value, ", ".join(repr(option) for option in accepted))


def _refuse(name: str, value: Any, accepted: str) -> None:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    raise ValueError(f"case: {name}: expected {accepted}, got {shown}")
