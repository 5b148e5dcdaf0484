"""A campaign as it stands: counts for each target, and the findings so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.campaign import findings
from fuzz.campaign.findings import Failure
from fuzz.campaign.job import FATAL
from fuzz.campaign.known import Known, names_of
from fuzz.campaign.plan import Plan
from fuzz.cases.case import Case
from fuzz.judging.verdict import NOT_PROMISED, SAME, shares_of_bounds


@dataclass
class Tally:
    """What became of the cases given to one target."""

    judged: int = 0
    failed: int = 0
    skipped: Counter = field(default_factory=Counter)  # reason -> cases
    worst: tuple[float, str] | None = None  # the greatest of the accuracy check's `shares_of_bounds`, and its metric
    deaths: int = 0
    retired: bool = False
    changed: Counter = field(default_factory=Counter)  # settings of the process that calls left changed -> cases
    measured: Counter = field(default_factory=Counter)  # bits that are not promised: check -> times measured
    other_bits: Counter = field(default_factory=Counter)  # check -> times that the bits were others


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
    known: str = ""  # the reason why it was known to fail

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
    known: Known = field(default_factory=Known)
    notes: list[str] = field(default_factory=list)  # what the user should know beside the results, a line each
    compiling: int = 0  # workers that wait for a kernel to be compiled or tuned
    cases: int = 0  # judged on every target that supports them, at least one
    given: int = 0  # the same, and the cases that no target supports
    elapsed: float = 0.0  # seconds since the first worker was ready, in earlier runs of the campaign too
    seconds: Counter = field(default_factory=Counter)  # by phase, over all workers
    write_inputs: Callable[[Case, Path], None] | None = None  # of a case to a file, by a worker
    status: str = "starting"  # "starting" | "replaying" | "running" | "shrinking" | "finished" | "interrupted"

    @property
    def tested(self) -> set[str]:
        """The names of the targets under test, which alone decide the verdict. All others are references."""
        return {target["name"] for target in self.targets if target["spec"] in self.plan.tested}

    @property
    def verdict(self) -> list[Finding]:
        """The findings that count: of targets under test, and not known."""
        tested = self.tested
        return [one for one in self.findings.values() if one.failure.target in tested and not one.known]

    @property
    def of_references(self) -> list[Finding]:
        tested = self.tested
        return [one for one in self.findings.values() if one.failure.target not in tested and not one.known]

    @property
    def known_to_fail(self) -> list[Finding]:
        return [one for one in self.findings.values() if one.known]

    def origin(self, target: str) -> dict[str, object]:
        """Of a target that failed, for its finding: its file, and the references beside it."""
        tested = self.tested
        return {
            "file": next((each.get("file", "") for each in self.targets if each["name"] == target), ""),
            "folder": str(Path.cwd()),
            "reference": target not in tested,
            "beside": [name for name in self.tallies if name not in tested and name != target],
        }

    @property
    def judged(self) -> int:
        """Cases judged on targets under test, and findings of earlier campaigns judged again."""
        tested = self.tested
        return sum(tally.judged for name, tally in self.tallies.items() if name in tested) + len(self.replays)

    def why_known(self, failure: Failure) -> str:
        """The reason why a failure was known; empty where it was not."""
        return self.known.reason(failure.target, names_of(failure), failure.case)

    @property
    def rate(self) -> float:
        """Judged cases a second."""
        return self.cases / self.elapsed if self.elapsed else 0.0

    @property
    def summary(self) -> dict:
        """For the store."""
        seconds, known = dict(self.seconds), {one.id: one.known for one in self.known_to_fail}
        return {
            "known": known,
            "cases": self.cases,
            "elapsed": self.elapsed,
            "cases_per_second": self.rate,
            "seconds": seconds,
        }


def count(tally: Tally, outcome: str, reason: str, verdict: dict | None) -> None:
    if outcome == "skipped":
        tally.skipped[reason] += 1
        return
    tally.judged += 1
    tally.failed += outcome == "failed"
    tally.changed.update((verdict or {}).get("changed", ()))
    for check in (verdict or {}).get("checks", ()):
        if check["name"] == "accuracy":
            for metric, share in shares_of_bounds(check).items():
                tally.worst = max(tally.worst or (share, metric), (share, metric))
        if check["detail"].startswith(NOT_PROMISED):
            tally.measured[check["name"]] += 1
            tally.other_bits[check["name"]] += check["detail"] != NOT_PROMISED + SAME
        tally.deaths += check["name"] in FATAL
