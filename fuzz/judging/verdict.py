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

    errors and bounds: by metric, relative to the RMS of the sequence and head (of the whole tensor for `out` and
    `state`); always finite. detail: for a person, what differs, by how much, where, and what was allowed.
    """

    name: str
    passed: bool
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    detail: str = ""


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


def share_of_bound(error: float, bound: float) -> float:
    """How much of the bound the error takes up; infinite where either is NaN."""
    share = error / bound if bound else math.inf if error else 0.0
    return math.inf if math.isnan(share) else share
