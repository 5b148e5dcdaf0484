"""Verdicts: the checks of one target on one case, each with errors, bounds and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

NOT_CHECKED = "not checked: "  # how the detail of a check begins that had nothing to say about this target and case
NOT_PROMISED = "not promised: "  # and of one that measured bits which the target does not promise
SAME = "the same bits"  # what it may have found


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    errors, bounds: by metric, relative to the RMS of the sequence and head (of the whole tensor for `out` and `state`).
    They are finite.
    detail: text: what differs, by how much, where, and what was allowed.
    roundings: by metric, the part of error and bound that is the last rounding of the exact result.
    """

    name: str
    passed: bool
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    detail: str = ""
    roundings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict:
        """For JSON."""
        return {"checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_dict(cls, data: Mapping) -> Verdict:
        return cls(tuple(Check(**check) for check in data["checks"]))


def share_of_bound(error: float, bound: float, rounding: float = 0.0) -> float:
    """How much of the bound the error takes up, beyond the last rounding; infinite where one of them is NaN.

    One rounding of the exact result takes up most of a bound of bf16, whatever the kernel did before.
    """
    error, bound = error - rounding, bound - rounding
    if not (error <= 0 or error > 0) or not bound >= 0:
        return math.inf
    return error / bound if error > 0 and bound else math.inf if error > 0 else 0.0


def shares_of_bounds(check: Mapping) -> dict[str, float]:
    """By metric, of a check as in a verdict's dict: those of `share_of_bound`. Older verdicts have no roundings."""
    roundings = check.get("roundings") or {}
    return {
        metric: share_of_bound(error, check["bounds"][metric], roundings.get(metric) or 0.0)
        for metric, error in check["errors"].items()
        if metric in check["bounds"]
    }


def told_apart(a: float, b: float, digits: int = 3) -> tuple[str, str]:
    """Two numbers with as few digits as tell them apart, at least `digits`."""
    for count in range(digits, 18):
        shown = f"{a:.{count}g}", f"{b:.{count}g}"
        if shown[0] != shown[1] or a == b:
            break
    return shown
