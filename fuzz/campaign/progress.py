"""A campaign as it stands: counts for each target, and the findings so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.campaign import findings
from fuzz.campaign.findings import Failure
from fuzz.campaign.job import FATAL
from fuzz.campaign.plan import Plan
from fuzz.cases.case import Case
from fuzz.judging.verdict import shares_of_bounds


@dataclass
class Tally:
    """What became of the cases given to one target."""

    judged: int = 0
    failed: int = 0
    skipped: Counter = field(default_factory=Counter)  # reason -> cases
    worst: tuple[float, str] | None = None  # the greatest of the accuracy check's `shares_of_bounds`, and its metric
    deaths: int = 0
    retired: bool = False


@dataclass
class Finding:
    """The representative of a group of failures: alike in target, check, error class, and in the families they need."""

    id: str
    folder: Path
    original: Case
    failure: Failure  # the smallest so far
    count: int = 0  # results of this campaign, and findings of earlier ones that failed again
    state: str = "waiting"  # "waiting" | "shrinking" | "shrunk" | "cut short" | "intermittent"
    previous: list[str] = field(default_factory=list)  # folders of the findings that failed again

    @property
    def needs(self) -> dict[str, str]:
        """The families without which it does not fail, known when it was shrunk to the end."""
        return findings.needs(self.failure.case) if self.state == "shrunk" else {}

    def explains(self, case: Case) -> bool:
        """Whether a case that fails alike has what this one needs to fail."""
        return all(getattr(case, name) == value for name, value in self.needs.items())


@dataclass
class Progress:
    """A campaign as it stands; what the live display shows."""

    plan: Plan
    environment: dict = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)  # descriptions, those that cannot run here included
    tallies: dict[str, Tally] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)  # by id
    replays: dict[str, str] = field(default_factory=dict)  # finding of an earlier campaign -> outcome
    notes: list[str] = field(default_factory=list)  # what the user should know beside the results, a line each
    compiling: int = 0  # workers that wait for a kernel to be compiled or tuned
    cases: int = 0  # judged on every target that supports them, at least one
    given: int = 0  # the same, and the cases that no target supports
    elapsed: float = 0.0  # seconds since the first worker was ready, in earlier runs of the campaign too
    seconds: Counter = field(default_factory=Counter)  # by stage, over all workers
    write_inputs: Callable[[Case, Path], None] | None = None  # of a case to a file, by a worker
    status: str = "starting"  # "starting" | "replaying" | "running" | "shrinking" | "finished" | "interrupted"

    @property
    def rate(self) -> float:
        """Judged cases a second."""
        return self.cases / self.elapsed if self.elapsed else 0.0

    @property
    def summary(self) -> dict:
        """For the store."""
        seconds = dict(self.seconds)
        return {"cases": self.cases, "elapsed": self.elapsed, "cases_per_second": self.rate, "seconds": seconds}


def count(tally: Tally, outcome: str, reason: str, checks: list[dict]) -> None:
    if outcome == "skipped":
        tally.skipped[reason] += 1
        return
    tally.judged += 1
    tally.failed += outcome == "failed"
    for check in checks:
        if check["name"] == "accuracy":
            for metric, share in shares_of_bounds(check).items():
                tally.worst = max(tally.worst or (share, metric), (share, metric))
        tally.deaths += check["name"] in FATAL
