"""Comparisons of two calls, for the properties: the same bits, or closeness to the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fuzz.cases.case import Case
from fuzz.cases.inputs import Inputs
from fuzz.judging import bounds, errors
from fuzz.judging.accuracy import accuracy, written
from fuzz.judging.call import Outputs, bits, true_keys
from fuzz.judging.sensitivity import Reference
from fuzz.judging.sensitivity import reference as make_reference
from fuzz.judging.verdict import NOT_CHECKED, NOT_PROMISED, SAME, Check, told_apart


class Unsupported(Exception):
    """The target does not take the changed case, or the property says nothing about it. The message is the reason."""


@dataclass(frozen=True)
class Part:
    """The result of a changed call, and the part of the expected results whose bits it must have.

    what: words for the changed call.
    rows: index into `out` as [B * T, H, V].
    states: index into the final state.
    factor: power of two that the result is too large by.
    whole: the expected results; None for those of the case.
    inputs: inputs that `whole` was computed from; None for those of the case.
    """

    what: str
    result: Outputs
    rows: object = ...
    states: object = ...
    factor: float = 1.0
    whole: Outputs | None = None
    inputs: Inputs | None = None

    def pairs(self, outputs: Outputs) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """(what, result, expected) of each tensor."""
        whole = self.whole or outputs
        out = self.result.out
        pairs = [("out", out, whole.out.flatten(0, 1)[self.rows].view_as(out))]
        if self.result.final_state is not None and whole.final_state is not None:
            pairs.append(("final_state", self.result.final_state, whole.final_state[self.states]))
        pairs = [(f"{self.what} {name}".strip(), result, expected) for name, result, expected in pairs]
        return [(name, *scaled(result, expected, self.factor)) for name, result, expected in pairs]

    def in_place(self, outputs: Outputs) -> Outputs:
        """The results of the case with this part of them replaced."""
        whole = self.whole or outputs
        out = whole.out.clone(memory_format=torch.contiguous_format)
        state = None if whole.final_state is None else whole.final_state.clone()
        rows = out.flatten(0, 1)  # a view of it
        rows[self.rows] = (self.result.out.flatten(0, 1) / self.factor).view_as(rows[self.rows])
        if state is not None and self.result.final_state is not None:
            state[self.states] = self.result.final_state / self.factor
        return Outputs(out, state)


HIGHEST, LOWEST = 2.0**100, 2.0**-100  # between these, nothing on the way to a result over- or underflows


def scaled(result: torch.Tensor, expected: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and what it is to be; zero in both where both are so small that one may have underflowed."""
    if factor == 1:
        return result, expected
    expected = expected * factor
    keep = ~((result.abs() < LOWEST) & (expected.abs() < LOWEST))  # below, even the sign is open
    return result.where(keep, 0.0), expected.where(keep, 0.0)


def checked(function: Callable) -> Callable:
    """The check of a function that returns a Check, or Parts that are to have the bits of the case's results.

    It has the function's name. Unsupported becomes a passed check that says so. Of a target that does not promise these
    bits the check says how many differ, and fails only where results are not within tolerance.
    """
    name = function.__name__

    def check(target, case: Case, inputs: Inputs, outputs: Outputs, reference: Reference | None = None) -> Check:
        inputs = inputs.to(target.device)
        try:
            found = function(target, case, inputs, outputs, reference)
        except Unsupported as reason:
            return Check(name, True, detail=f"{NOT_CHECKED}{reason}")
        if not isinstance(found, Check):
            found = compared(target, name, inputs, outputs, reference, found)
        return replace(found, name=name)

    check.__name__, check.__doc__ = name, function.__doc__
    return check


def compared(target, name: str, inputs: Inputs, outputs: Outputs, reference, parts: Sequence[Part]) -> Check:
    """Whether the parts have the bits of `outputs`; of a target that does not promise this, whether they are close."""
    check = same_bits([pair for part in parts for pair in part.pairs(outputs)])
    if target.promises.keeps(name):
        return check
    for part in parts:
        against = reference
        if part.inputs is not None and reference is not None:
            against = make_reference(part.inputs, reference.out.device)
        near = close(target, part.in_place(outputs), part.whole or outputs, part.inputs or inputs, against)
        if not near.passed:
            return replace(near, detail=f"{part.what} {near.detail}; bits are not promised, agreement is".strip())
    return Check("", True, detail=NOT_PROMISED + (check.detail or SAME))


def named(what: str, result: Outputs, expected: Outputs) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    pairs = [(f"{what} out".strip(), result.out, expected.out)]
    if result.final_state is not None and expected.final_state is not None:
        pairs.append((f"{what} final_state".strip(), result.final_state, expected.final_state))
    return pairs


def same_bits(pairs) -> Check:
    """Passed when each pair (what, result, expected) has the same bits; NaN is the same as nothing."""
    pairs = [(what, result, expected.to(result.device)) for what, result, expected in pairs]
    differ = [(bits(result) != bits(expected)) | result.isnan() for _, result, expected in pairs]
    failed = true_keys({index: places.any() for index, places in enumerate(differ)})
    lines = []
    for index in sorted(failed):
        (what, result, expected), places = pairs[index], differ[index]
        count = int(places.sum())
        size = (result.double() - expected.double()).abs().where(places, -1.0).nan_to_num(nan=torch.inf)
        most = tuple(int(i) for i in torch.unravel_index(size.argmax().cpu(), size.shape))
        got, wanted = told_apart(result[most].item(), expected[most].item(), 6)
        lines.append(
            f"{what}: {count} of {places.numel()} elements differ ({count / places.numel():.1%}), most at {most}: "
            f"{got} instead of {wanted}; no bit may differ"
        )
    return Check("", not lines, detail="; ".join(lines))


def close(target, result: Outputs, whole: Outputs, inputs: Inputs, reference: Reference | None) -> Check:
    """Passed when `result` is as close to the reference as any result must be; without one, close to `whole`."""
    if reference is not None:
        finite = written(result, reference)
        check = accuracy(result, inputs, reference, operands=target.promises.operands, inverse=target.promises.inverse)
        return replace(
            check, passed=finite.passed and check.passed, detail="; ".join(filter(None, (finite.detail, check.detail)))
        )
    found = {}
    for what, a, b in named("", result, whole):
        found[what] = float(errors.rms(a.double() - b.double()) / errors.rms(b.double()).clamp_min(bounds.SMALLEST))
    allowed = bounds.WITHOUT_ORACLE
    failed = [
        "{}: {} relative RMS apart, at most {} allowed".format(what, *told_apart(error, allowed))
        for what, error in found.items()
        if not error <= allowed
    ]
    return Check("", not failed, found, dict.fromkeys(found, allowed), "; ".join(failed))


def shown(cuts) -> str:
    text = ", ".join(map(str, cuts[:8]))
    return f"({text}, ...)" if len(cuts) > 8 else f"({text})"
