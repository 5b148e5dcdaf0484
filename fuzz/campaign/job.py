"""Jobs and results: the messages between a campaign and its workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuzz.cases.case import Case

REPEATS = 8  # times that a failure has to repeat on the same inputs to be taken for one that always does
RATE_OF = 24  # times that one is judged again which does not, for its rate

SLOW_SHARE = 4  # one case in so many has a property checked on a slow target

FATAL = ("timeout", "died")  # checks that cost a process


class WorkerError(RuntimeError):
    """A worker cannot do what it is asked; the message is one line that says why."""


@dataclass(frozen=True)
class Job:
    """One case to be judged.

    properties: number of properties to choose, or their names.
    inputs: file of saved inputs.
    error_map: whether an error map is drawn of a failure.
    repeats: number of times that the worker judges a failure again on the same inputs, to tell whether it repeats.
    save: file to which the inputs are written. Then nothing is judged, and there are no targets.
    """

    case: Case
    targets: tuple[str, ...]
    properties: int | tuple[str, ...] = 0
    inputs: str | None = None
    error_map: bool = False
    repeats: int = 0
    save: str | None = None


@dataclass(frozen=True)
class Result:
    """The result of one (case, target). `verdict` is from `fuzz.judging.verdict.Verdict.to_dict`; seconds by phase."""

    case: Case
    target: str
    outcome: str  # "passed" | "failed" | "skipped"
    reason: str = ""
    verdict: dict | None = None
    properties: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    error_map: dict | None = None  # of `fuzz.judging.error_map`
    context: dict | None = None  # of a target that raised: its traceback, lines, and the settings of the process

    @property
    def repeats(self) -> tuple[int, int] | None:
        """How often the failure came again on the same inputs, and of how many times; None where none was counted."""
        repeats = (self.verdict or {}).get("repeats")
        return None if repeats is None else (repeats[0], repeats[1])

    @property
    def failed_checks(self) -> list[dict]:
        return [check for check in (self.verdict or {}).get("checks", ()) if not check["passed"]]


def unjudged(case: Case, target: str, properties: tuple[str, ...], check: str, detail: str) -> Result:
    """The Result of a target that raised, hung or died before the judge. `detail` is 'class: explanation'."""
    verdict = {"checks": [{"name": check, "passed": False, "errors": {}, "bounds": {}, "detail": detail}]}
    return Result(case, target, "failed", check, verdict, properties)
