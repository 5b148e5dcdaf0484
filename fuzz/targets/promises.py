"""Promises: what a target says of itself, and is therefore held to.

What a target does not promise is measured and reported. It does not fail, as long as results agree within tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fuzz.cases.case import CU_SEQLENS_DTYPES, LAYOUTS, STATE_DTYPES, Case
from fuzz.cases.families import FAMILIES

BITS = ("packing", "heads", "batch_form", "causality", "scaling", "value_columns", "layout")
"""Properties of docs/operator.md that ask for the same bits, and that a target may not promise."""

OPERAND_FORMATS = ("bf16", "fp16", "fp32")
STATE_FORMATS = ("float32", "float64")
LONGEST_CHUNK = 1024

Reach = Callable[[Case], str | None]

POSSIBLE_VALUES: dict[str, tuple] = {
    **dict.fromkeys(("packed", "in_place"), (True, False)),
    **dict.fromkeys(("initial_state", "final_state"), (None, *STATE_DTYPES)),
    "cu_seqlens_dtype": CU_SEQLENS_DTYPES,
    "layout": LAYOUTS,
    **{kind: tuple(names) for kind, names in FAMILIES.items()},
}
"""The fields of a case that have few values, with these."""


class PromiseError(ValueError):
    """A promise makes no sense; the message names the field, what was given and what is expected."""


@dataclass(frozen=True)
class Promises:
    """What a target promises. The defaults promise everything. Raises PromiseError, naming the field.

    packing, heads, batch_form, causality, scaling, value_columns, layout: the same bits, as docs/operator.md has it.
    arguments: bad arguments raise the documented errors.
    chunk: tokens at whose multiples a run continued from its final state has the same bits; None: nowhere.
    state: "float32" or "float64", of the state between chunks. With "float64", continuation is within tolerance only,
        because the state that is handed over is fp32.
    operands: "bf16", "fp16" (as tf32) or "fp32" (or finer), the coarsest format of any operand. Bounds follow it.
    inverse: the same, of X = (I + L)^-1 of a chunk and of the products that merge its blocks. Bounds follow it.
    reach: which cases are taken: None for a supported case, else the reason. Or a mapping from fields of `Case` to the
        values that are taken, as {"packed": True, "cu_seqlens_dtype": "int64", "final_state": (None, "fp32")}.
    """

    packing: bool = True
    heads: bool = True
    batch_form: bool = True
    causality: bool = True
    scaling: bool = True
    value_columns: bool = True
    layout: bool = True
    arguments: bool = True
    chunk: int | None = 64
    state: str = "float32"
    operands: str = "bf16"
    inverse: str = "fp32"
    reach: Reach | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in (*BITS, "arguments"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "True or False", getattr(self, name))
        for name, names in (("operands", OPERAND_FORMATS), ("inverse", OPERAND_FORMATS), ("state", STATE_FORMATS)):
            if getattr(self, name) not in names:
                refuse(name, f"one of {', '.join(names)}", getattr(self, name))
        whole = isinstance(self.chunk, int) and not isinstance(self.chunk, bool)
        if self.chunk is not None and not (whole and 1 <= self.chunk <= LONGEST_CHUNK):
            refuse("chunk", f"a number of tokens from 1 to {LONGEST_CHUNK}, or None", self.chunk)
        if isinstance(self.reach, Mapping):
            object.__setattr__(self, "reach", Within.of(self.reach))
        elif self.reach is not None and not callable(self.reach):
            refuse("reach", "a function of a Case, or a mapping from its fields to values", self.reach)

    @classmethod
    def of(cls, given: object) -> Promises:
        """Promises as a target may declare them: themselves, or a mapping from their fields."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise PromiseError(f"promises: expected Promises or a mapping from their names, got {shown(given)}")
        names = [field.name for field in fields(cls)]
        if unknown := [str(name) for name in given if name not in names]:
            raise PromiseError(f"promises: expected names among {', '.join(names)}, got {', '.join(unknown)}")
        return cls(**given)

    def with_words(self, words: Mapping[str, str]) -> Promises:
        """These, with some replaced by words of a command line: "no", "none", "128", "fp32"."""
        values: dict[str, object] = {}
        for name, word in words.items():
            if name in (*BITS, "arguments"):
                values[name] = {"yes": True, "no": False}.get(word)
                if values[name] is None:
                    refuse(name, "yes or no", word)
            elif name == "chunk":
                values[name] = None if word == "none" else int(word) if word.isdecimal() else word
            elif name == "reach":
                raise PromiseError("promises: reach: expected a function or a mapping in the source, got a word")
            else:
                values[name] = word
        # Not `dataclasses.replace`, which would take an unknown name for an error of this program
        return Promises.of({field.name: getattr(self, field.name) for field in fields(self)} | values)

    @property
    def bitwise_chunk(self) -> int | None:
        """Tokens at whose multiples continuation is bitwise; None where it is nowhere."""
        return None if self.state == "float64" else self.chunk

    def keeps(self, check: str) -> bool:
        """Whether the bits that a check asks for are promised. True for a check that nobody is excused from."""
        if check == "chunk_continuation":
            return self.bitwise_chunk is not None
        return getattr(self, check) if check in BITS else True

    def to_dict(self) -> dict[str, object]:
        """For JSON: all but the reach."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "reach"}

    def describe(self) -> list[str]:
        """What differs from promising everything, in words."""
        formats = {name: getattr(self, name) for name in ("operands", "inverse", "state")}
        words = [f"{name} {format}" for name, format in formats.items() if format != getattr(type(self)(), name)]
        if self.bitwise_chunk != type(self)().chunk:
            words.append(f"chunk {self.bitwise_chunk or 'none'}")
        not_kept = [name for name in BITS if not getattr(self, name)]
        if not_kept:
            words.append(f"not bitwise: {', '.join(not_kept)}")
        return words


def bare(name: str) -> str:
    """The name of a target without the promises that may follow it, and whatever the device it runs on."""
    return name.partition(",")[0].removesuffix(".fp32")


@dataclass(frozen=True)
class Within:
    """A reach by fields of a case: the values that each of them may have."""

    values: Mapping[str, tuple]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Within:
        names = [field.name for field in dataclasses.fields(Case)]
        if unknown := [str(name) for name in given if name not in names]:
            raise PromiseError(f"promises: reach: expected fields of a case, got {', '.join(unknown)}: {names}")
        values = {name: tuple(x) if isinstance(x, (tuple, list, set)) else (x,) for name, x in given.items()}
        for name, accepted in values.items():
            possible = POSSIBLE_VALUES.get(name)
            if not accepted or (possible is not None and not all(value in possible for value in accepted)):
                words = "one value or more" if possible is None else f"among {', '.join(map(repr, possible))}"
                raise PromiseError(f"promises: reach: {name}: expected {words}, got {shown(given[name])}")
        return cls(values)

    def __call__(self, case: Case) -> str | None:
        for name, accepted in self.values.items():
            if getattr(case, name) not in accepted:
                words = " or ".join(map(str, accepted))
                return f"takes {name} {words} only"
        return None

    def __hash__(self) -> int:
        return hash(tuple(self.values.items()))


def answer(reach: Reach, case: Case) -> str | None:
    """What a reach says of a case. Raises PromiseError when that is neither None nor a reason."""
    reason = reach(case)
    if reason is not None and not (isinstance(reason, str) and reason.strip()):
        raise PromiseError(f"reach: expected None for a supported case or a reason (text), got {shown(reason)}")
    return reason


def refuse(name: str, expected: str, got: object) -> None:
    raise PromiseError(f"promises: {name}: expected {expected}, got {shown(got)}")


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
