"""Conformance: a target climbs the ladder (`fuzz.conformance.ladder`) and gets a grade for each row.

pass          Every supported case of the row agreed, and there was at least one.
fail          A case disagreed, raised, hung or killed its process. A finding has the smallest such case.
unreachable   No case of the row is supported here. The row has the reason, and is never a pass.

The target runs in a worker process, as in a campaign. So a crash is a grade, too.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from fuzz.campaign import findings, store
from fuzz.campaign.campaign import LIVES
from fuzz.campaign.findings import UNJUDGED, Failure
from fuzz.campaign.job import FATAL, REPEATS, Job, Result
from fuzz.campaign.known import names_of, read
from fuzz.campaign.smallest_case import in_worker, shrink
from fuzz.campaign.worker import Worker, inputs_writer, judge_job, wait_until_ready
from fuzz.cases.drawing import all_cases
from fuzz.conformance.ladder import ARGUMENTS, LADDER_VERSION, RUNGS, Row, ladder
from fuzz.judging.checks import reason_not_checked
from fuzz.judging.refusals import PREFIX
from fuzz.judging.verdict import shares_of_bounds
from fuzz.processes import interrupts
from fuzz.reporting.display import check_text, describe_case

PASS, FAIL, UNREACHABLE = GRADES = ("pass", "fail", "unreachable")
TIME_LIMIT = 60.0  # seconds for one case
SHRINK_LIMIT = 10.0  # seconds for one finding; `python -m fuzz minimize` continues
SHRINK_TOTAL = 180.0  # seconds for all of them
GROUPS_SAVED = 8  # kinds of failure that one row saves
PROFILE_OF_DEVICE = {"cpu": "cpu", "cuda": "gpu"}  # device -> profile of the random cases
NOT_INSTALLED = ("ImportError", "ModuleNotFoundError")


@dataclass(frozen=True)
class CardPlan:
    """What is asked. fuzz_cases: random ones of the rung "fuzz", drawn from `seed`. time_limit: seconds for one case.

    rungs: names of `RUNGS`; empty means all. known: a file of known failures, see `fuzz.campaign.known`.
    """

    target: str
    out: Path
    seed: int = 0
    fuzz_cases: int = 200
    time_limit: float = TIME_LIMIT
    rungs: tuple[str, ...] = ()
    known: Path | None = None


@dataclass
class CardFinding:
    """A failure in the words of a person, and how to see it again. folder: relative to the card's."""

    check: str
    detail: str
    case: str
    case_json: dict
    folder: str
    replay: str
    shrunk: bool
    repeats: tuple[int, int] | None = None  # of an intermittent failure: how often it failed again, and of how many
    known: str = ""  # the reason why it was known to fail


@dataclass
class Grade:
    """What became of one row.

    score: the worst error over its bound, at most 1 where it passed; None where the row measures none.
    judged, failed: of the `cases`. reason: why it failed, could not be reached, or was reached in part only.
    """

    id: str
    title: str
    grade: str
    score: float | None = None
    judged: int = 0
    cases: int = 0
    failed: int = 0
    reason: str = ""
    note: str = ""
    findings: list[CardFinding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rung(self) -> str:
        return self.id.partition("/")[0]

    @property
    def unexpected(self) -> bool:
        """Whether it fails, and by more than known failures."""
        return self.grade == FAIL and not all(saved.known for saved in self.findings)


@dataclass
class Card:
    """The report card. status: "running", "complete", "interrupted" or "broken" (the harness itself failed)."""

    plan: CardPlan
    target: dict = field(default_factory=dict)  # as `fuzz.campaign.worker_process.describe` has it
    environment: dict = field(default_factory=dict)
    version: int = LADDER_VERSION
    profile: str = ""
    status: str = "running"
    rows: list[Grade] = field(default_factory=list)
    total: int = 0  # rows of the ladder
    started: float = 0.0  # seconds since the epoch
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # known failures that did not come again

    def count(self, grade: str, rung: str | None = None) -> int:
        return sum(row.grade == grade and rung in (None, row.rung) for row in self.rows)

    @property
    def failed(self) -> bool:
        return any(row.unexpected for row in self.rows)

    @property
    def reached(self) -> bool:
        """Whether the whole ladder was gone through, and something of it could be judged."""
        return self.status == "complete" and self.count(PASS) + self.count(FAIL) > 0

    def to_dict(self) -> dict:
        """For JSON; an error that is not finite is the string "not finite"."""
        rows = [{**asdict(row), "rung": row.rung, "score": _json_score(row.score)} for row in self.rows]
        return {
            "ladder_version": self.version,
            "status": self.status,
            "summary": {grade: self.count(grade) for grade in GRADES},
            "target": self.target,
            "seed": self.plan.seed,
            "fuzz_cases": self.plan.fuzz_cases,
            "rungs": list(self.plan.rungs or RUNGS),
            "profile": self.profile,
            "started": self.started,
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "rows": rows,
        }


def _json_score(score: float | None) -> float | str | None:
    return score if score is None or math.isfinite(score) else "not finite"


def conform(plan: CardPlan, show: Callable[[Card, str], None] = lambda card, what: None) -> Card:
    """Climbs the ladder to its end, or until SIGINT or SIGTERM. `show` is told before each case what comes.

    Raises WorkerError when the target cannot be had, and OSError when findings cannot be written.
    """
    with inputs_writer() as write_inputs:
        climb = Climb(plan, Card(plan), show, write_inputs)
        with interrupts(climb.stop):
            try:
                climb.run()
            finally:
                climb.close()
    return climb.card


class Climb:
    """One target on its way up: the worker it runs in, and what has to be remembered from row to row."""

    def __init__(self, plan: CardPlan, card: Card, show: Callable[[Card, str], None], write_inputs):
        self.plan, self.card, self.show, self.write_inputs = plan, card, show, write_inputs
        self.known = read(plan.known)
        self.stop = threading.Event()
        self.worker: Worker | None = None
        self.deaths = 0  # on this rung
        self.shrinking = SHRINK_TOTAL  # seconds left
        self.shrunk: dict[tuple[str, str, str], list] = {}  # group -> the smallest cases found so far

    def run(self) -> None:
        card = self.card
        card.started, began = time.time(), time.monotonic()
        self.show(card, "the target is imported")
        self.start()
        if self.stop.is_set():
            card.status = "interrupted"
            return
        card.target = self.worker.descriptions[0]
        card.environment = findings.environment(self.worker.devices)
        card.profile = PROFILE_OF_DEVICE[card.target["device"].partition(":")[0]]
        drawn = tuple(itertools.islice(all_cases(card.profile, self.plan.seed), self.plan.fuzz_cases))
        rows = ladder(card.target["device"].partition(":")[0], drawn, card.profile)
        rows = [row for row in rows if not self.plan.rungs or row.rung in self.plan.rungs]
        card.total = len(rows)
        rung = None
        for row in rows:
            if row.rung != rung:
                rung, self.deaths = row.rung, 0
            began_row = time.monotonic()
            grade = self.climb(row)
            if self.stop.is_set():
                card.status = "interrupted"
                break
            grade.seconds = round(time.monotonic() - began_row, 2)
            card.rows.append(grade)
            card.seconds = time.monotonic() - began
        if card.status == "running":
            card.status = "complete"
            rungs = self.plan.rungs or RUNGS
            card.notes = list(self.known.gone({card.target["name"]}, rungs=rungs, alone=bool(self.plan.rungs)))

    def climb(self, row: Row) -> Grade:
        """The grade of one row."""
        grade = Grade(row.id, row.title, UNREACHABLE, cases=len(row.cases), note=row.note)
        exempt = self.card.target["exempt"]
        for name in (ARGUMENTS,) if row.rung == ARGUMENTS and not row.known else row.checks:
            if name in exempt:
                grade.reason = exempt[name]
                return grade
        scores: list[float] = []
        reasons: list[str] = []  # why a case was not judged
        failed: dict[tuple[tuple[str, str, str], str], Failure] = {}  # by the group and the reason why it is known
        for number, case in enumerate(row.cases):
            if self.deaths >= LIVES:
                reasons.append(f"not run, after {self.deaths} hangs or crashes on this rung")
                continue
            self.show(self.card, f"{row.id}, case {number + 1} of {len(row.cases)}")
            result = self.judge(Job(case, (self.card.target["name"],), row.properties, repeats=REPEATS))
            if self.stop.is_set():
                return grade
            outcome, reason = outcome_of(row, result)
            if outcome == "broken":
                self.card.status = "broken"
            if outcome == UNREACHABLE or outcome == "broken":
                reasons.append(reason)
                continue
            grade.judged += 1
            scores += share_of_bounds(row, result)
            if outcome == FAIL:
                grade.failed += 1
                deciding = [f for f in findings.failures(result) if decides(row, f.check["name"])]
                failure = next((f for f in deciding if not self.why_known(row, f)), deciding[0])
                failed.setdefault((failure.group, self.why_known(row, failure)), failure)
        grade.score = max(scores, default=None)
        if failed:
            grade.grade = FAIL
            unknown_first = sorted(failed.items(), key=lambda item: bool(item[0][1]))
            grade.findings = [self.save(failure, known) for (_, known), failure in unknown_first[:GROUPS_SAVED]]
            grade.reason = "; ".join(dict.fromkeys(saved.detail for saved in grade.findings))
        elif grade.judged:
            grade.grade = PASS
        if grade.judged < grade.cases and not failed:
            grade.reason = "; ".join(dict.fromkeys(reasons))
        return grade

    def why_known(self, row: Row, failure: Failure) -> str:
        """The reason why a failure of a row was known, by its check or by the row; empty where it was not."""
        return self.known.reason(failure.target, (*names_of(failure), row.id), failure.case)

    # ------------------------------------------------------------------------------------------------------ the worker

    def start(self) -> None:
        self.close()
        # One thread: the tensors are small, and a machine that tests has other things to do.
        self.worker = Worker((self.plan.target,), time_limit=self.plan.time_limit, threads=1)
        wait_until_ready(self.worker, self.stop.is_set)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def judge(self, job: Job) -> Result | None:
        """The result of a job of one target; None when interrupted."""
        if self.worker is None:
            self.start()
        results = judge_job(self.worker, job, self.stop.is_set)
        if results is None:
            return None
        (result,) = results
        self.deaths += any(check["name"] in FATAL for check in result.failed_checks)
        return result

    def save(self, failure: Failure, known: str) -> CardFinding:
        """Shrinks a failure as far as time allows, and saves it as a finding."""
        original, finished = failure.case, False
        fixed = failure.check["name"].startswith(PREFIX) or failure.check["name"] in FATAL or failure.intermittent
        seconds = min(SHRINK_LIMIT, self.shrinking)
        if fixed:
            # A bad argument is bad in any case
            finished = failure.check["name"] not in FATAL and not failure.intermittent
        elif seconds > 0:
            self.show(self.card, f"shrinking {failure.check['name']}")
            if self.worker is None:
                self.start()
            began = time.monotonic()
            found = shrink(
                failure,
                in_worker(self.worker, failure, self.stop.is_set),
                seconds=seconds,
                starts=self.shrunk.get(failure.group, ()),
                stop=self.stop.is_set,
            )
            self.shrinking -= time.monotonic() - began
            failure, finished = found.failure, found.finished
            self.shrunk.setdefault(failure.group, []).append(failure.case)
            if self.worker.job is not None:
                self.close()  # still busy with the case at which time ran out
        name = findings.finding_id(failure, store.case_id(failure.case))
        folder = self.plan.out / "findings" / name
        if not folder.exists():
            findings.save(
                folder,
                failure,
                original,
                environment=self.card.environment,
                write_inputs=partial(self.write_inputs, failure.case),
                state=findings.INTERMITTENT if failure.intermittent else "shrunk" if finished else "cut short",
                origin={"file": self.card.target.get("file", ""), "folder": str(Path.cwd()), "reference": False},
            )
        return CardFinding(
            failure.check["name"],
            check_text(failure.check),
            describe_case(failure.case),
            failure.case.to_dict(),
            f"findings/{name}",
            f"python -m fuzz replay {folder}",
            finished,
            failure.repeats if failure.intermittent else None,
            known,
        )


# ------------------------------------------------------------------------------------------------------------- grading


def decides(row: Row, check: str) -> bool:
    """Whether a check has a say in the grade of a row."""
    return not row.checks or check in row.checks or check in UNJUDGED


def outcome_of(row: Row, result: Result) -> tuple[str, str]:
    """What one case says about its row: a grade, or "broken", and the reason where it is not `PASS` or `FAIL`."""
    if result.outcome == "skipped":
        return UNREACHABLE, result.reason
    checks = [check for check in result.verdict["checks"] if decides(row, check["name"])]
    for check in checks:
        if check["name"] == "harness":
            return "broken", f"the harness failed: {check['detail']}"
        if check["name"] == "raised" and check["detail"].startswith(NOT_INSTALLED):
            return UNREACHABLE, check["detail"]
    if not all(check["passed"] for check in checks):
        return FAIL, ""
    reasons = [reason for check in checks if (reason := reason_not_checked(check))]
    if row.checks and len(reasons) == len(checks):
        return UNREACHABLE, "; ".join(reasons) or "not checked on this target"
    return PASS, ""


def share_of_bounds(row: Row, result: Result) -> list[float]:
    """Every error that has a say, over its bound, both beyond the last rounding."""
    shares = []
    for check in result.verdict["checks"]:
        if decides(row, check["name"]):
            shares += shares_of_bounds(check).values()
    return shares


def summary_by_rung(card: Card) -> list[tuple[str, dict[str, int], float | None]]:
    """Of each rung that was begun: its name, how many rows have each grade, and the worst score."""
    lines = []
    for rung in RUNGS:
        rows = [row for row in card.rows if row.rung == rung]
        if rows:
            worst = max((row.score for row in rows if row.score is not None), default=None)
            lines.append((rung, {grade: card.count(grade, rung) for grade in GRADES}, worst))
    return lines
