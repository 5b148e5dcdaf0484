"""Refusals: bad arguments that docs/operator.md documents, each as a check of one target.

Each check calls the target with one argument of a legal call made wrong. It passes when the target raises what the
page documents, the message names the argument, and no byte of any argument has changed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fuzz.cases.inputs import TENSORS, TOKENS, Inputs, whole
from fuzz.judging.call import copy_inputs, differ, poisoned, takes, true_keys
from fuzz.judging.verdict import NOT_CHECKED, Check
from fuzz.text import first_line, text_of

PREFIX = "arguments."  # of the names of these checks

Arguments = dict[str, object]

STATE_NAMES = ("initial_state", "final_state")
ALLOWED = {
    **dict.fromkeys((*TOKENS, "out"), "bf16"),
    **dict.fromkeys(("A_log", "dt_bias"), "fp32"),
    **dict.fromkeys(STATE_NAMES, "bf16 or fp32"),
    "cu_seqlens": "int32 or int64",
}


@dataclass(frozen=True)
class Refusal:
    """One bad argument.

    name: name of the check, without `PREFIX`.
    error: documented class of the exception.
    named: names of arguments, of which the message has one.
    change: from the arguments of a legal call to those to replace.
    contents: whether the contents of a tensor are bad. On a GPU they are checked only with validation on.
    known: whether published kernels accept it ("Known failures" in docs/operator.md).
    later: whether a legal call with the same tensors comes first, and the bad contents are then written into them.
    """

    name: str
    title: str
    error: type[Exception]
    named: tuple[str, ...]
    change: Callable[[Arguments], Arguments]
    contents: bool = False
    known: bool = False
    later: bool = False

    def __call__(self, target, case, inputs: Inputs, outputs=None, reference=None) -> Check:
        arguments = legal_arguments(inputs.to(target.device), target.device)
        guards = arguments.pop("guards")
        changed = self.change(arguments)
        if missing := [name for name in changed if not takes(target.fwd, name)]:
            return self.check(True, f"{NOT_CHECKED}the target takes no {' and no '.join(missing)}")
        if self.later:
            target.fwd(**arguments)
            for name, x in changed.items():
                arguments[name].copy_(x)
        else:
            arguments |= changed
        memory = [(name, x) for name, x in arguments.items() if has_memory(x)]
        before = [whole(x).clone() for _, x in memory]
        raised = None
        try:
            with validation():
                target.fwd(**arguments)
                if torch.device(target.device).type == "cuda":
                    torch.cuda.synchronize(target.device)
        except Exception as error:
            raised = error
        found = true_keys({name: differ(whole(x), was) for (name, x), was in zip(memory, before, strict=True)})
        changed = [name for name, _ in memory if name in found]
        if raised is None and self.contents and torch.device(target.device).type == "cuda":
            inside = all(guard.isnan().all() for guard in guards) and not set(changed) - {
                "out",
                "final_state",
                "checkpoint_state",
            }
            detail = f"{NOT_CHECKED}contents on a GPU are checked where a target is told to, and no switch is known"
            return self.check(inside, detail if inside else "the call wrote outside of out and final_state")
        return self.check(*self.verdict(raised, changed))

    def check(self, passed: bool, detail: str) -> Check:
        return Check(PREFIX + self.name, passed, detail=detail)

    def verdict(self, raised: Exception | None, changed: list[str]) -> tuple[bool, str]:
        """Whether the call went as documented, and what is wrong with it."""
        wanted = f"{self.error.__name__} that names {' or '.join(self.named)}"
        if raised is None:
            return False, f"{self.title}: nothing was raised; documented is a {wanted}"
        said = first_line(raised)[:180]
        if changed:
            what = ", ".join(changed)
            return False, f"{self.title}: {said}, but only after {what} had changed; documented is nothing written"
        if not isinstance(raised, self.error):
            return False, f"{self.title}: {said}; documented is a {wanted}"
        if not any(re.search(rf"\b{name}\b", text_of(raised)) for name in self.named):
            return False, f"{self.title}: {said}; documented is a message that names {' or '.join(self.named)}"
        return True, ""


def legal_arguments(inputs: Inputs, device) -> Arguments:
    """A call that nothing is wrong with, outputs poisoned by NaN; and under "guards" what lies around the outputs."""
    copies = copy_inputs(inputs)
    out, around_out = poisoned(inputs.v.shape, torch.bfloat16, device)
    final_state, around_state = poisoned(inputs.state_shape, torch.float32, device)
    return {
        **{name: getattr(copies, name) for name in TENSORS},
        "scale": copies.scale,
        "lower_bound": copies.lower_bound,
        "out": out,
        "final_state": final_state,
        "guards": [around_out, around_state],
    }


def has_memory(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type != "meta"


@contextmanager
def validation() -> Iterator[None]:
    """The contents of `cu_seqlens` are checked on a GPU too, by `flash_kda.fwd`."""
    before = os.environ.get("FLASH_KDA_VALIDATE")
    os.environ["FLASH_KDA_VALIDATE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLASH_KDA_VALIDATE"]
        else:
            os.environ["FLASH_KDA_VALIDATE"] = before


# --------------------------------------------------------------------------------------------------- the bad arguments


def of_a_tensor(name: str) -> Iterator[Refusal]:
    """What can be wrong with any tensor argument."""

    def resized(given: Arguments) -> torch.Tensor:
        x = given[name]
        axis = {"q": -1, "cu_seqlens": 0}.get(name, 1 if x.dim() > 1 and name != "dt_bias" else 0)
        shape = list(x.shape)
        shape[axis] += 1
        return x.new_zeros(shape)

    def elsewhere(given: Arguments) -> torch.Tensor:
        return given[name].to("cpu" if given[name].is_cuda else "meta")

    def spread(given: Arguments) -> torch.Tensor:
        return torch.stack([given[name]] * 2, -1)[..., 0]

    # Where q has the wrong size, the others do not fit to it; and an offset too many asks for another state.
    sizes = {"q": ("q", "k", "v", "g"), "cu_seqlens": ("cu_seqlens", *STATE_NAMES)}.get(name, (name,))
    wrong_dtype = torch.int16 if name == "cu_seqlens" else torch.float64
    changes = {
        "type": (f"{name} is no tensor", TypeError, lambda given: given[name].float().cpu().numpy()),
        "dtype": (
            f"{name} is {wrong_dtype}, not {ALLOWED[name]}",
            TypeError,
            lambda given: given[name].to(wrong_dtype),
        ),
        "shape": (f"{name} has one element too many along an axis", ValueError, resized),
        "axes": (f"{name} has an axis too many", ValueError, lambda given: given[name][None]),
        "device": (f"{name} is on another device", ValueError, elsewhere),
        "stride": (f"{name} has a last stride of 2", ValueError, spread),
    }
    if name == "beta":  # may have any strides
        del changes["stride"]
    if name == "A_log":  # may have any shape
        del changes["axes"]
    for kind, (title, error, change) in changes.items():
        named = sizes if kind == "shape" else ("q", "k", "v", "g") if (name, kind) == ("q", "device") else (name,)
        yield Refusal(f"{name}-{kind}", title, error, named, lambda given, change=change: {name: change(given)})


def of_a_number(name: str, values: dict[str, float], *, known: bool) -> Iterator[Refusal]:
    yield Refusal(f"{name}-type", f"{name} is a string", TypeError, (name,), lambda given: {name: "0.5"})
    for what, value in values.items():
        title = f"{name} is {value:g}"
        yield Refusal(f"{name}-{what}", title, ValueError, (name,), lambda _, value=value: {name: value}, known=known)


def of_offsets(
    what: str, title: str, change: Callable[[list[int]], list[int]], *, known: bool = True, later: bool = False
) -> Refusal:
    """`change` is of the contents of `cu_seqlens`."""

    def changed(given: Arguments) -> Arguments:
        old = given["cu_seqlens"]
        return {"cu_seqlens": torch.tensor(change(old.tolist()), dtype=old.dtype, device=old.device)}

    name, title = f"cu_seqlens-{what}", f"cu_seqlens {title}"
    return Refusal(name, title, ValueError, ("cu_seqlens",), changed, contents=True, known=known, later=later)


def of_one_offset(given: Arguments) -> Arguments:
    return {"cu_seqlens": given["cu_seqlens"][:1].clone(), "initial_state": None, "final_state": None}


def of_a_batch(given: Arguments) -> Arguments:
    return {name: torch.cat([given[name]] * 2) for name in (*TOKENS, "out")}


def one_more(name: str) -> Callable[[Arguments], Arguments]:
    """A copy of the first sequence's at the end."""
    return lambda given: {name: torch.cat([given[name], given[name][:1]])}


def overlap(written: str, name: str) -> Refusal:
    """The last elements of the written tensor are the first of the other one."""

    def change(given: Arguments) -> Arguments:
        out, other = given[written], given[name]
        size, more = out.nbytes, other.nbytes
        buffer = torch.zeros(size + more, dtype=torch.uint8, device=out.device)
        start = size - 16  # of the other tensor, in bytes
        buffer[start : start + more] = other.contiguous().view(torch.uint8).flatten()
        return {
            written: buffer[:size].view(out.dtype).view(out.shape),
            name: buffer[start : start + more].view(other.dtype).view(other.shape),
        }

    named = (written,) if name not in ("out", "final_state") else (written, name)
    return Refusal(f"{written}-over-{name}", f"{written} overlaps {name}", ValueError, named, change)


def late_offset(given: Arguments) -> Arguments:
    """Forty sequences, of which the last one but one goes past the end."""
    old, tokens = given["cu_seqlens"], given["q"].shape[1]
    states = {name: given[name].new_zeros(40, *given[name].shape[1:]) for name in STATE_NAMES}
    offsets = [0] * 39 + [tokens + 1, tokens]
    return {"cu_seqlens": torch.tensor(offsets, dtype=old.dtype, device=old.device), **states}


def of_the_same_memory(what: str, title: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Refusal:
    """`change` makes the final state of the initial one, where that begins."""

    def changed(given: Arguments) -> Arguments:
        return {"final_state": change(given["initial_state"])}

    return Refusal(
        f"final_state-over-{what}", f"final_state is initial_state {title}", ValueError, STATE_NAMES, changed
    )


def of_serving() -> Iterator[Refusal]:
    """What can be wrong with state_indices, checkpoint_state and checkpoint_offsets; there are three sequences."""

    def pool(*rows: int, dtype: torch.dtype = torch.int32) -> Callable[[Arguments], Arguments]:
        return lambda given: {"state_indices": torch.tensor(rows, dtype=dtype, device=given["q"].device)}

    def checkpoints(*offsets, axes: int = 0, dtype=torch.int32, of=torch.float32) -> Callable[[Arguments], Arguments]:
        def change(given: Arguments) -> Arguments:
            where = torch.tensor(offsets, dtype=dtype, device=given["q"].device)
            states = given["final_state"].new_zeros(
                *where.shape, *[1] * axes, *given["final_state"].shape[1:], dtype=of
            )
            return {"checkpoint_state": states, "checkpoint_offsets": where}

        return change

    def without(name: str, change: Callable[[Arguments], Arguments]) -> Callable[[Arguments], Arguments]:
        return lambda given: {key: x for key, x in change(given).items() if key != name}

    def over_out(given: Arguments) -> Arguments:
        states = checkpoints(0, 0, 0)(given)["checkpoint_state"]
        return {
            **checkpoints(0, 0, 0)(given),
            **overlap("checkpoint_state", "out").change({**given, "checkpoint_state": states}),
        }

    rows, state, where = "state_indices", "checkpoint_state", "checkpoint_offsets"
    for name, title, error, named, change in (
        (f"{rows}-dtype", "has int16", TypeError, rows, pool(0, 1, 2, dtype=torch.int16)),
        (f"{rows}-shape", "has one entry too many", ValueError, rows, pool(0, 1, 2, -1)),
        (
            f"{rows}-axes",
            "has an axis too many",
            ValueError,
            rows,
            lambda given: {rows: pool(0, 1, 2)(given)[rows][None]},
        ),
        (f"{where}-dtype", "has int16", TypeError, where, checkpoints(0, 0, 0, dtype=torch.int16)),
        (f"{where}-shape", "has one entry too many", ValueError, where, checkpoints(0, 0, 0, 0)),
        (f"{where}-missing", "is missing", TypeError, where, without(where, checkpoints(0, 0, 0))),
        (f"{state}-missing", "is missing", TypeError, state, without(state, checkpoints(0, 0, 0))),
        (f"{state}-dtype", "has float16", TypeError, state, checkpoints(0, 0, 0, of=torch.float16)),
        (f"{state}-axes", "has an axis too many", ValueError, state, checkpoints(0, 0, 0, axes=1)),
        (f"{state}-over-out", "overlaps out", ValueError, state, over_out),
    ):
        yield Refusal(name, f"{named} {title}", error, (named,), change)
    for name, title, change in (
        (f"{rows}-past-the-end", f"{rows} goes past the pool", pool(0, 3, 1)),
        (f"{rows}-twice", f"{rows} names a row twice", pool(1, -1, 1)),
        (f"{where}-multiple", f"{where} has no multiple of 16", checkpoints(0, 0, 1)),
    ):
        yield Refusal(name, title, ValueError, (name.split("-")[0],), change, contents=True)


def every_refusal() -> Iterator[Refusal]:
    for name in ALLOWED:
        yield from of_a_tensor(name)
    yield from of_a_number("scale", {"nan": math.nan, "infinite": math.inf}, known=False)
    bad = {"nan": math.nan, "infinite": -math.inf, "too-low": -5.0001, "positive": 0.0001}
    yield from of_a_number("lower_bound", bad, known=True)
    one = "cu_seqlens has a single entry"
    yield Refusal("cu_seqlens-entries", one, ValueError, ("cu_seqlens",), of_one_offset)
    yield Refusal("cu_seqlens-batch", "cu_seqlens comes with B = 2", ValueError, ("cu_seqlens",), of_a_batch)
    yield of_offsets("start", "starts at 1", lambda offsets: [1, *offsets[1:]])
    yield of_offsets("negative", "has a negative entry", lambda offsets: [0, -1, *offsets[2:]])
    yield of_offsets("decreasing", "decreases", lambda offsets: [0, offsets[1], offsets[1] - 1, *offsets[3:]])
    yield of_offsets("past-the-end", "goes past the end", lambda offsets: [*offsets[:-1], offsets[-1] + 1])
    later = "goes past the end, after a legal call with the same tensor"
    yield of_offsets("later", later, lambda offsets: [*offsets[:-1], offsets[-1] + 1], known=False, later=True)
    late = "goes past the end in one of many entries"
    yield Refusal("cu_seqlens-late", f"cu_seqlens {late}", ValueError, ("cu_seqlens",), late_offset, True, True)
    for name in STATE_NAMES:
        yield Refusal(f"{name}-sequences", f"{name} has a sequence too many", ValueError, (name,), one_more(name))
    for name in (*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens"):
        yield overlap("out", name)
    for name in (*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens", "out"):
        yield overlap("final_state", name)
    other = torch.bfloat16  # of the initial state, which is fp32
    yield of_the_same_memory("its-dtype", "in another dtype", lambda x: x.view(other)[..., : x.shape[-1]])
    yield of_the_same_memory("its-strides", "with other strides", lambda x: x.transpose(0, 1))
    yield from of_serving()


REFUSALS: dict[str, Refusal] = {PREFIX + refusal.name: refusal for refusal in every_refusal()}
