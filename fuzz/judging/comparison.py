"""Comparisons of two calls, for the properties: the same bits, or closeness to the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fuzz.cases.case import Case
from fuzz.cases.inputs import Inputs
from fuzz.judging import bounds, errors
from fuzz.judging.accuracy import accuracy, written
from fuzz.judging.call import Outputs, bits, true_keys
from fuzz.judging.sensitivity import Reference
from fuzz.judging.verdict import NOT_CHECKED, Check


class Unsupported(Exception):
    """The target does not take the changed case, or the property says nothing about it. The message is the reason."""


def checked(function: Callable) -> Callable:
    """Turns Unsupported into a passed check that says so, and names the check after the function."""
    name = function.__name__

    def check(target, case: Case, inputs: Inputs, outputs: Outputs, reference: Reference | None = None) -> Check:
        inputs = inputs.to(target.device)
        try:
            return replace(function(target, case, inputs, outputs, reference), name=name)
        except Unsupported as reason:
            return Check(name, True, detail=f"{NOT_CHECKED}{reason}")

    check.__name__, check.__doc__ = name, function.__doc__
    return check


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
        lines.append(
            f"{what}: {count} of {places.numel()} elements differ ({count / places.numel():.1%}), most at {most}: "
            f"{result[most].item():.6g} instead of {expected[most].item():.6g}; no bit may differ"
        )
    return Check("", not lines, detail="; ".join(lines))


def close(result: Outputs, whole: Outputs, inputs: Inputs, reference: Reference | None) -> Check:
    """Passed when `result` is as close to the reference as any result must be; without one, close to `whole`."""
    if reference is not None:
        finite, check = written(result, reference), accuracy(result, inputs, reference)
        return replace(
            check, passed=finite.passed and check.passed, detail="; ".join(filter(None, (finite.detail, check.detail)))
        )
    found = {}
    for what, a, b in named("", result, whole):
        found[what] = float(errors.rms(a.double() - b.double()) / errors.rms(b.double()).clamp_min(bounds.SMALLEST))
    allowed = bounds.WITHOUT_ORACLE
    failed = [
        f"{what}: {error:.3g} relative RMS apart, at most {allowed:.3g} allowed"
        for what, error in found.items()
        if not error <= allowed
    ]
    return Check("", not failed, found, dict.fromkeys(found, allowed), "; ".join(failed))


def shown(cuts) -> str:
    text = ", ".join(map(str, cuts[:8]))
    return f"({text}, ...)" if len(cuts) > 8 else f"({text})"
