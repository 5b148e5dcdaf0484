"""Campaigns: cases from Hypothesis, judged by workers for a time or a number, with everything kept in a run folder.

campaign.sqlite   configuration, every result, every finding (`fuzz.store`)
findings/         one folder for each group of failures (`fuzz.findings`)
report.html       written at the end (`fuzz.report`)
"""

from __future__ import annotations

import math
import queue
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given

from fuzz import findings, store
from fuzz.case import Case
from fuzz.findings import Failure
from fuzz.shrink import Shrunk, in_worker, shrink
from fuzz.strategies import PROFILES, cases
from fuzz.targets import BUILTIN
from fuzz.worker import FATAL, Job, Result, Worker, wait

BATCH = 100  # cases that Hypothesis draws at a time
PROPERTIES = 1  # checked on each case, besides accuracy; each is more calls of the target, and more cases show more
LIVES = 5  # processes a target may cost before it is retired
TIME_LIMIT = 60.0  # seconds for one target on one case
SHRINK_LIMIT = 30.0  # seconds for one finding
TICK = 0.2  # seconds between two looks at everything


class CampaignError(ValueError):
    """A campaign cannot be run as asked; the message is one line that says why."""


@dataclass(frozen=True)
class Plan:
    """What a campaign is asked to do.

    targets: names; empty means all built-in targets that can run here. budget: seconds, or None when `cases` ends it.
    time_limit: seconds for one target on one case.
    """

    out: Path
    targets: tuple[str, ...] = ()
    budget: float | None = None
    cases: int | None = None
    seed: int = 0
    jobs: int = 1
    profile: str = "cpu"
    time_limit: float | None = None

    @property
    def limit(self) -> float:
        """A hang has to show within the budget, so a short budget has a shorter limit."""
        if self.time_limit is not None:
            return self.time_limit
        return TIME_LIMIT if self.budget is None else min(TIME_LIMIT, max(5.0, self.budget / 4))

    @property
    def shrink_limit(self) -> float:
        return SHRINK_LIMIT if self.budget is None else min(SHRINK_LIMIT, max(5.0, self.budget / 4))


@dataclass
class Tally:
    """What became of the cases given to one target."""

    judged: int = 0
    failed: int = 0
    skipped: Counter = field(default_factory=Counter)  # reason -> cases
    worst: dict[str, float] = field(default_factory=dict)  # metric of the accuracy check -> greatest error
    deaths: int = 0
    retired: bool = False


@dataclass
class Finding:
    """The representative of a group of failures."""

    id: str
    folder: Path
    original: Case
    failure: Failure  # the smallest so far
    count: int = 1
    state: str = "waiting"  # "waiting" | "shrinking" | "shrunk" | "cut short"


@dataclass
class Progress:
    """A campaign as it stands; what the live display shows."""

    plan: Plan
    environment: dict = field(default_factory=dict)
    targets: list[dict] = field(default_factory=list)  # descriptions, those that cannot run here included
    tallies: dict[str, Tally] = field(default_factory=dict)
    findings: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    cases: int = 0  # judged on every target in reach, of which there was one at least
    elapsed: float = 0.0  # seconds since the first worker was ready
    seconds: Counter = field(default_factory=Counter)  # by stage, over all workers
    status: str = "starting"  # "starting" | "running" | "shrinking" | "finished" | "interrupted"

    @property
    def rate(self) -> float:
        """Judged cases a second."""
        return self.cases / self.elapsed if self.elapsed else 0.0


def draw_cases(profile: str, seed: int, count: int) -> list[Case]:
    """`count` cases, or a few less where Hypothesis finds no more. The same seed draws the same cases."""
    drawn: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        phases=(Phase.generate,),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(PROFILES[profile]))
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


def all_cases(profile: str, seed: int) -> Iterator[Case]:
    """Cases without end, none twice. Each batch has a seed of its own."""
    seen = set()
    batch = 0
    while True:
        for case in draw_cases(profile, (seed << 32) + batch, BATCH):
            if case not in seen:
                seen.add(case)
                yield case
        batch += 1


def run(plan: Plan, show: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Runs a campaign to its end, or until SIGINT or SIGTERM; `show` is called several times a second.

    Raises CampaignError or WorkerError when it cannot be run, and OSError or sqlite3.Error when the disk gives up; what
    is in the run folder by then stays there.
    """
    make_folder(plan.out)
    progress = Progress(plan)
    stop = threading.Event()
    names = plan.targets or tuple(BUILTIN)
    threads = 1 if plan.jobs > 1 else None
    workers: list[Worker] = []
    try:
        with interrupts(stop):
            for _ in range(plan.jobs):
                worker = Worker(names, time_limit=plan.limit, threads=threads, lenient=not plan.targets)
                workers.append(worker)
            first = wait_for_first(workers, progress, stop, show)
            if first is None:
                progress.status = "interrupted"
                return progress
            describe(progress, first)
            with keep(plan, progress) as db:
                judge_cases(progress, db, workers, stop, show)
    finally:
        for worker in workers:
            worker.close()
        remove_if_empty(plan.out)
    return progress


def make_folder(out: Path) -> None:
    """Makes the run folder. Raises CampaignError when something of a campaign is there, or nothing can be written."""
    for name in (store.FILE, "findings", "report.html"):
        if (out / name).exists():
            raise CampaignError(f"--out {out}: already holds a campaign ({name} is there); give another folder")
    try:
        (out / "findings").mkdir(parents=True)
    except OSError as error:
        raise CampaignError(f"--out {out}: cannot be written: {error.strerror}") from error


def remove_if_empty(out: Path) -> None:
    """Takes a run folder away again in which nothing was put."""
    if not (out / store.FILE).exists():
        for folder in (out / "findings", out):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def interrupts(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`; a second one acts as it would anywhere."""

    def handle(number: int, frame) -> None:
        if stop.is_set():
            signal.signal(number, before[number])
            signal.raise_signal(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def keep(plan: Plan, progress: Progress) -> Iterator[sqlite3.Connection]:
    """The store of the campaign, which also says how it began and how it ended."""
    db = store.create(plan.out)
    try:
        store.put(
            db,
            config={**asdict(plan), "out": str(plan.out), "time_limit": plan.limit},
            environment=progress.environment,
            seed=plan.seed,
            targets=[target for target in progress.targets if target["unavailable"] is None],
            unavailable=[target for target in progress.targets if target["unavailable"] is not None],
            started=time.time(),
            status="running",
        )
        progress.status = "running"
        yield db
        store.put(db, status=progress.status)
    except BaseException:
        with suppress(sqlite3.Error):  # the disk may be what failed
            store.put(db, status="failed")
        raise
    finally:
        with suppress(sqlite3.Error):
            summary = {"cases": progress.cases, "elapsed": progress.elapsed, "cases_per_second": progress.rate}
            store.put(db, ended=time.time(), seconds=progress.seconds, **summary)
        db.close()


def wait_for_first(workers: list[Worker], progress: Progress, stop: threading.Event, show) -> Worker | None:
    """The first worker that is ready; None when interrupted before. Raises WorkerError when one cannot start."""
    while not stop.is_set():
        show(progress)
        wait(workers, TICK)
        for worker in workers:
            worker.advance()
            if worker.ready:
                return worker
    return None


def describe(progress: Progress, worker: Worker) -> None:
    """Takes over what a worker found out about the targets and the machine."""
    progress.targets = worker.descriptions
    progress.environment = findings.environment(worker.devices)
    progress.tallies = {target["name"]: Tally() for target in worker.descriptions if target["unavailable"] is None}
    if not progress.tallies:
        reasons = "; ".join(target["unavailable"] for target in worker.descriptions)
        raise CampaignError(f"no target can run here: {reasons}")


def judge_cases(progress: Progress, db: sqlite3.Connection, workers: list[Worker], stop: threading.Event, show) -> None:
    """The campaign proper: keeps the workers busy, takes their results, and has findings shrunk beside it."""
    plan = progress.plan
    began = time.monotonic()
    drawn = all_cases(plan.profile, plan.seed)
    given = 0
    judged: dict[Worker, bool] = {}  # busy worker -> whether a target was in reach of its case
    with shrinking(progress, stop) as shrinker:
        while not stop.is_set():
            elapsed = time.monotonic() - began
            retired = all(tally.retired for tally in progress.tallies.values())
            over = (plan.budget is not None and elapsed >= plan.budget) or given == plan.cases or retired
            for worker in workers:
                for result in worker.advance():
                    judged[worker] |= result.outcome != "skipped"
                    account(progress, db, result, shrinker)
                if worker in judged and worker.job is None:
                    progress.cases += judged.pop(worker)
                if worker.ready and worker.job is None and not over:
                    case = next(drawn)
                    given += 1
                    judged[worker] = False
                    worker.submit(Job(case, in_service(progress, db, case, shrinker), PROPERTIES))
                    over = given == plan.cases
            take_shrunk(progress, db, shrinker)
            progress.elapsed = time.monotonic() - began
            show(progress)
            if over and not judged:
                break
            wait(workers, TICK)
        progress.status = "shrinking"
        end = time.monotonic() + 2 * plan.shrink_limit
        while not stop.is_set() and time.monotonic() < end and take_shrunk(progress, db, shrinker):
            show(progress)
            time.sleep(TICK)
    take_shrunk(progress, db, shrinker)
    progress.status = "interrupted" if stop.is_set() else "finished"
    show(progress)


def in_service(progress: Progress, db: sqlite3.Connection, case: Case, shrinker: Shrinker) -> tuple[str, ...]:
    """The targets that are given a case. Those retired are counted as skipped."""
    for name, tally in progress.tallies.items():
        if tally.retired:
            reason = f"retired after costing {tally.deaths} processes"
            account(progress, db, Result(case, name, "skipped", reason), shrinker)
    return tuple(name for name, tally in progress.tallies.items() if not tally.retired)


def account(progress: Progress, db: sqlite3.Connection, result: Result, shrinker: Shrinker) -> None:
    """Keeps a result, and makes a finding of a failure that is the first of its group."""
    store.add_result(db, result)
    progress.seconds.update(result.seconds)
    tally = progress.tallies[result.target]
    if result.outcome == "skipped":
        tally.skipped[result.reason] += 1
        return
    tally.judged += 1
    tally.failed += result.outcome == "failed"
    for check in result.verdict["checks"]:
        if check["name"] == "accuracy":
            for metric, error in check["errors"].items():
                tally.worst[metric] = _worse(tally.worst.get(metric, 0.0), error)
        if check["name"] in FATAL:
            tally.deaths += 1
            tally.retired = tally.deaths >= LIVES
    failure = findings.first_failure(result)
    if failure is None:
        return
    known = progress.findings.get(failure.group)
    if known is not None:
        known.count += 1
        store.count_again(db, known.id)
    else:
        finding = keep_finding(progress, db, failure)
        # Where each failure costs a process the search is slow, so it waits for the others.
        shrinker.todo.put((2 if failure.check["name"] in FATAL else 1, len(progress.findings), finding))


def _worse(one: float, other: float) -> float:
    return math.inf if math.isnan(one) or math.isnan(other) else max(one, other)


def keep_finding(progress: Progress, db: sqlite3.Connection, failure: Failure) -> Finding:
    id = findings.finding_id(failure, store.case_id(failure.case))
    finding = Finding(id, progress.plan.out / "findings" / id, failure.case, failure)
    findings.save(finding.folder, failure, failure.case, environment=progress.environment, shrunk=False)
    target, check, error_class = failure.group
    store.add_finding(
        db,
        id=id,
        target=target,
        check=check,
        error_class=error_class,
        case=failure.case,
        folder=f"findings/{id}",
        detail=failure.check["detail"],
    )
    progress.findings[failure.group] = finding
    return finding


@dataclass
class Shrinker:
    """A thread that shrinks findings one after another, in a worker of its own, while the campaign goes on."""

    todo: queue.PriorityQueue[tuple[int, int, Finding | None]] = field(default_factory=queue.PriorityQueue)
    done: queue.SimpleQueue[tuple[Finding, Shrunk | Exception]] = field(default_factory=queue.SimpleQueue)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def shrinking(progress: Progress, stop: threading.Event) -> Iterator[Shrinker]:
    shrinker = Shrinker()
    thread = threading.Thread(target=shrink_in_turn, args=(progress, shrinker, stop), name="shrinker")
    thread.start()
    try:
        yield shrinker
    finally:
        shrinker.ended.set()
        shrinker.todo.put((0, 0, None))
        thread.join()


def shrink_in_turn(progress: Progress, shrinker: Shrinker, stop: threading.Event) -> None:
    """The body of the thread. It touches neither the store nor the folder: results go back through `done`."""
    plan = progress.plan
    worker: Worker | None = None

    def stopped() -> bool:
        return stop.is_set() or shrinker.ended.is_set()

    while (finding := shrinker.todo.get()[2]) is not None and not stopped():
        failure = finding.failure
        finding.state = "shrinking"
        # What another finding of this target was shrunk to often shows this failure too, and saves most of the search.
        others = [other for other in list(progress.findings.values()) if other.failure.target == failure.target]
        starts = [other.failure.case for other in others if other.state == "shrunk"]
        # A case that hangs costs the time limit to judge, so a hang has time for a few.
        seconds = max(plan.shrink_limit, 4 * plan.limit) if failure.check["name"] == "timeout" else plan.shrink_limit
        try:
            if worker is not None and worker.targets != (failure.target,):
                worker.close()
                worker = None
            worker = worker or Worker((failure.target,), time_limit=plan.limit, threads=1)
            result = shrink(failure, in_worker(worker, failure, stopped), seconds=seconds, starts=starts, stop=stopped)
        except Exception as error:
            result = error
        shrinker.done.put((finding, result))
        if worker is not None and (worker.job is not None or isinstance(result, Exception)):
            worker.close()  # still busy with the case at which time ran out
            worker = None
    if worker is not None:
        worker.close()


def take_shrunk(progress: Progress, db: sqlite3.Connection, shrinker: Shrinker) -> bool:
    """Keeps what the shrinker has found; whether it has anything left to do."""
    while not shrinker.done.empty():
        finding, result = shrinker.done.get()
        if isinstance(result, Exception):
            raise result
        finding.failure = result.failure
        finding.state = "shrunk" if result.finished else "cut short"
        findings.save(
            finding.folder, result.failure, finding.original, environment=progress.environment, shrunk=result.finished
        )
        store.set_smallest(db, finding.id, result.failure.case, result.failure.check["detail"])
    return any(finding.state in ("waiting", "shrinking") for finding in progress.findings.values())
