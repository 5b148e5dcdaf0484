"""Campaigns: cases from Hypothesis, judged by workers for a time or a number, with everything kept in a run folder.

campaign.sqlite   configuration, every result, every finding (`fuzz.campaign.store`)
findings/         one folder for each group of failures (`fuzz.campaign.findings`)
report.html       written at the end (`fuzz.reporting.report`)

A campaign that was interrupted or killed is gone on with from there: batches of cases that were not judged to their
end are drawn again, and judged without what has a result.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import queue
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from fuzz.campaign import findings, store
from fuzz.campaign.devices import gpus, seats
from fuzz.campaign.findings import Failure, FindingError, Saved
from fuzz.campaign.pool import Assignment, Ended, Event, Judged, Pool
from fuzz.campaign.replay import is_smaller, replay
from fuzz.campaign.shrink import Shrunk, in_worker, shrink
from fuzz.campaign.worker import FATAL, Worker, WorkerError
from fuzz.cases.case import Case
from fuzz.cases.drawing import BATCH, all_cases, draw_cases
from fuzz.targets.registry import BUILTIN

__all__ = [
    "BATCH",
    "LIVES",
    "CampaignError",
    "Plan",
    "Progress",
    "all_cases",
    "draw_cases",
    "interrupts",
    "resumed",
    "run",
]

LIVES = 5  # processes a target may cost before it is retired
TIME_LIMIT = 60.0  # seconds for one target on one case
SHRINK_LIMIT = 30.0  # seconds for one finding
TICK = 0.2  # seconds between two looks at everything
SAVED_EVERY = 2.0  # seconds between two notes in the store of how far it is
FAMILIES_APART = 8  # groups into which failures of one target, check and error class are told apart by their families
ENGINES = ("local", "ray")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # gave up


class CampaignError(ValueError):
    """A campaign cannot be run as asked; the message is one line that says why."""


@dataclass(frozen=True)
class Plan:
    """What a campaign is asked to do.

    targets: names; empty means all built-in targets that can run here. budget: seconds, or None when `cases` ends it.
    jobs: worker processes, with the engine "ray" on each machine, where None means what fits it.
    time_limit: seconds for one target on one case.
    previous: run folders or findings that are judged before any new case. runs: a folder of run folders, where the
    newest with a finding of one of the targets is taken when no previous one is given.
    resume: go on with what is in `out`.
    """

    out: Path
    targets: tuple[str, ...] = ()
    budget: float | None = None
    cases: int | None = None
    seed: int = 0
    jobs: int | None = 1
    profile: str = "cpu"
    time_limit: float | None = None
    engine: str = "local"
    previous: tuple[Path, ...] = ()
    runs: Path | None = None
    resume: bool = False

    @property
    def limit(self) -> float:
        """A hang has to show within the budget, so a short budget has a shorter limit."""
        if self.time_limit is not None:
            return self.time_limit
        return TIME_LIMIT if self.budget is None else min(TIME_LIMIT, max(5.0, self.budget / 4))

    @property
    def shrink_limit(self) -> float:
        return SHRINK_LIMIT if self.budget is None else min(SHRINK_LIMIT, max(5.0, self.budget / 4))

    def to_dict(self) -> dict:
        """For JSON: all but what is of one run of it only."""
        fields = asdict(self)
        del fields["resume"], fields["runs"]
        return {**fields, "out": str(self.out), "previous": [str(path) for path in self.previous]}


def resumed(folder: Path, *, budget: float | None = None, cases: int | None = None, jobs: int | None = None) -> Plan:
    """The plan of the campaign in `folder`, gone on with; with another end or other jobs where these are given."""
    db = store.open_for_reading(folder)
    try:
        config = store.get(db, "config")
    except sqlite3.Error as error:
        raise CampaignError(f"--resume {folder}: cannot be read as a campaign: {error}") from error
    finally:
        db.close()
    if config is None or "engine" not in config:
        raise CampaignError(f"--resume {folder}: of an earlier version, which cannot be gone on with")
    previous = tuple(Path(path) for path in config.pop("previous"))
    plan = Plan(**{**config, "out": folder, "targets": tuple(config["targets"]), "previous": previous, "resume": True})
    if budget is not None or cases is not None:
        plan = replace(plan, budget=budget, cases=cases)
    return plan if jobs is None else replace(plan, jobs=jobs)


@dataclass
class Tally:
    """What became of the cases given to one target."""

    judged: int = 0
    failed: int = 0
    skipped: Counter = field(default_factory=Counter)  # reason -> cases
    worst: tuple[float, str] | None = None  # the greatest error over its bound of the accuracy check, and its metric
    deaths: int = 0
    retired: bool = False


@dataclass
class Finding:
    """The representative of a group of failures: alike in target, check, error class, and in the families they need."""

    id: str
    folder: Path
    original: Case
    failure: Failure  # the smallest so far
    count: int = 1
    state: str = "waiting"  # "waiting" | "shrinking" | "shrunk" | "cut short"
    inputs: Path | None = None  # those of the original, where they are not what its case gives (any more)
    found_again: bool = False  # its folder was there without its result, which is still to come and is counted already

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
    cases: int = 0  # judged on every target in reach, of which there was one at least
    given: int = 0  # those, and the ones that no target had in reach
    elapsed: float = 0.0  # seconds since the first worker was ready, in earlier runs of the campaign too
    seconds: Counter = field(default_factory=Counter)  # by stage, over all workers
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


def run(plan: Plan, show: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Runs a campaign to its end, or until SIGINT or SIGTERM; `show` is called several times a second.

    Raises CampaignError or WorkerError when it cannot be run, CampaignError too when the disk gives up; what is in the
    run folder by then stays there.
    """
    for folder in () if plan.resume else plan.previous:
        if not folder.exists():
            raise CampaignError(f"--previous {folder}: no such file or folder")
    make_folder(plan)
    progress = Progress(plan)
    stop = threading.Event()
    try:
        with interrupts(stop), hold(plan.out), disk_trouble(plan), start(plan) as engine:
            if not wait_for_first(engine, progress, stop, show):
                progress.status = "interrupted"
                return progress
            describe(progress, engine)
            with keep(plan, progress) as db:
                replay_previous(progress, db, stop, show)
                judge_cases(progress, db, engine, stop, show)
    finally:
        remove_if_empty(plan.out)
    return progress


# ------------------------------------------------------------------------------------------------ the folder, the store


def make_folder(plan: Plan) -> None:
    """Makes the run folder. Raises CampaignError when something of a campaign is there, or nothing can be written."""
    out = plan.out
    if plan.resume:
        return
    for name in (store.FILE, "findings/*", "report.html"):
        if found := next(out.glob(name), None):
            there = found.relative_to(out)
            raise CampaignError(f"--out {out}: already holds a campaign ({there} is there); give another folder")
    try:
        (out / "findings").mkdir(parents=True, exist_ok=True)
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
def hold(out: Path) -> Iterator[None]:
    """Keeps a second campaign out of the folder for as long as this process lives."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CampaignError(f"{out}: another campaign is running in it") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_trouble(plan: Plan) -> Iterator[None]:
    """Says what went wrong with the run folder, and that it can be gone on with."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        reason = getattr(error, "strerror", None) or error
        what = f"{plan.out}: cannot be written: {reason}"
        if (plan.out / store.FILE).exists():
            what += f"; what is there is whole, and python -m fuzz run --resume {plan.out} goes on"
        raise CampaignError(what) from error


@contextmanager
def start(plan: Plan) -> Iterator[Pool]:
    """The engine: workers on this machine, or on all machines of a Ray cluster, which have the same interface."""
    settings = {
        "names": plan.targets or tuple(BUILTIN),
        "profile": plan.profile,
        "seed": plan.seed,
        "time_limit": plan.limit,
        "lenient": not plan.targets,
    }
    if plan.engine == "ray":
        try:
            from fuzz.campaign.engines.ray import Cluster
        except ImportError as error:
            raise CampaignError(f"--engine ray: {error}; pip install 'flash-kda[ray]' brings it") from error
        engine = Cluster(settings, plan.jobs)
    else:
        engine = Pool(seats=seats(gpus(), plan.jobs or 1), **settings)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def keep(plan: Plan, progress: Progress) -> Iterator[sqlite3.Connection]:
    """The store of the campaign, which also says how it began and how it ended."""
    db = store.open_for_writing(plan.out) if plan.resume else store.create(plan.out)
    try:
        if plan.resume:
            restore(progress, db)
        else:
            store.put(db, started=time.time(), seed=plan.seed, batch=0)
        store.put(
            db,
            config={**plan.to_dict(), "time_limit": plan.limit},
            environment=progress.environment,
            targets=[target for target in progress.targets if target["unavailable"] is None],
            unavailable=[target for target in progress.targets if target["unavailable"] is not None],
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
            store.put(db, ended=time.time(), **progress.summary)
        db.close()


def restore(progress: Progress, db: sqlite3.Connection) -> None:
    """Takes over what an earlier run of the campaign left in its folder, however that ended."""
    names = tuple(progress.tallies)
    marks = ", ".join("?" * len(names))
    query = f"""SELECT count(*), sum(judged) FROM (
        SELECT max(outcome != 'skipped') AS judged FROM results WHERE target IN ({marks})
        GROUP BY case_id HAVING count(*) = {len(names)})"""
    given, judged = db.execute(query, names).fetchone()
    progress.given, progress.cases = given, judged or 0
    progress.elapsed = store.get(db, "elapsed") or 0.0
    sums = ", ".join(f"total(seconds_{stage})" for stage in store.STAGES)
    for stage, spent in zip(store.STAGES, db.execute(f"SELECT {sums} FROM results").fetchone(), strict=True):
        if spent:
            progress.seconds[stage] = spent
    for target, outcome, reason, verdict in db.execute("SELECT target, outcome, reason, verdict_json FROM results"):
        if target in progress.tallies:
            checks = json.loads(verdict)["checks"] if verdict else []
            count(progress.tallies[target], outcome, reason, checks)
    progress.replays = dict(db.execute("SELECT path, outcome FROM replays"))
    folder = progress.plan.out / "findings"
    folder.mkdir(exist_ok=True)
    findings.recover(folder, tidy=True)
    rows = db.execute("SELECT id, target, check_name, detail, case_json, folder, count, state, previous FROM findings")
    for id, target, check, detail, case, place, number, state, previous in rows.fetchall():
        original = Case.from_dict(json.loads(case), inputs_saved=True)
        place = progress.plan.out / place
        try:
            failure = findings.load_failure(findings.load_finding(place))
        except FindingError:  # somebody took it away
            failure = Failure(original, target, {"name": check, "errors": {}, "bounds": {}, "detail": detail}, ())
            if previous is None:
                findings.save(place, failure, original, environment=progress.environment, shrunk=False)
        finding = Finding(id, place, original, failure, number, state)
        if previous is not None and failure.case == original:
            finding.inputs = place / "inputs.safetensors"
        progress.findings[id] = finding
        # A kill may have come between the folder and the row.
        needed = findings.family(finding.needs)
        store.set_smallest(db, id, failure.case, failure.check["detail"], family=needed, state=state)
    for place in sorted(folder.iterdir()):
        if place.name in progress.findings or is_smaller(place):
            continue
        if (place / "finding.json").exists():
            adopt(progress, db, place)


def adopt(progress: Progress, db: sqlite3.Connection, place: Path) -> None:
    """Makes a finding known whose folder was written when a kill came, before its result was."""
    saved = findings.load_finding(place)
    failure = findings.load_failure(saved)
    original = findings.load_case_file(place / "original.json", inputs_saved=True).case
    finding = Finding(place.name, place, original, failure, found_again=True)
    add_row(db, finding)
    progress.findings[finding.id] = finding


# -------------------------------------------------------------------------------------------------------- the campaign


def wait_for_first(engine: Pool, progress: Progress, stop: threading.Event, show) -> bool:
    """Whether a worker is ready; False when interrupted before. Raises WorkerError when one cannot start."""
    while not stop.is_set():
        show(progress)
        engine.advance(TICK)
        if engine.descriptions:
            return True
    return False


def describe(progress: Progress, engine: Pool) -> None:
    """Takes over what a worker found out about the targets and the machine."""
    progress.targets = engine.descriptions
    progress.environment = findings.environment(engine.devices)
    progress.tallies = {target["name"]: Tally() for target in progress.targets if target["unavailable"] is None}
    if not progress.tallies:
        reasons = "; ".join(target["unavailable"] for target in progress.targets)
        raise CampaignError(f"no target can run here: {reasons}")


def replay_previous(progress: Progress, db: sqlite3.Connection, stop: threading.Event, show) -> None:
    """Judges the findings of earlier campaigns, from their saved inputs; what fails again is a finding of this one."""
    saved = [one for one in previous_findings(progress) if str(one.path.resolve()) not in progress.replays]
    if not saved:
        return
    progress.status = "replaying"
    show(progress)
    for one, result in replay(saved, time_limit=progress.plan.limit, stop=stop.is_set):  # on this machine
        path = one.path.resolve()
        failure = findings.first_failure(result)
        if failure is not None and (known := group_of(progress, failure)) is None:
            keep_finding(progress, db, failure, inputs=one.inputs, previous=path)
        elif failure is not None:
            known.count += 1
            store.count_again(db, known.id)
        store.add_replay(db, path, result)
        progress.replays[str(path)] = result.outcome
        show(progress)
    progress.status = "running"


def previous_findings(progress: Progress) -> list[Saved]:
    """Of the targets of this campaign. Raises FindingError for a folder that was given and holds no finding."""
    plan = progress.plan

    def of(folder: Path) -> list[Saved]:
        is_run = (folder / store.FILE).exists()
        if is_run and not any((folder / "findings").glob("*/finding.json")):
            return []
        saved = findings.find(folder / "findings" if is_run else folder)
        return [one for one in saved if one.finding is not None and one.finding["target"] in progress.tallies]

    if plan.previous:
        return [one for folder in plan.previous for one in of(folder)]
    runs = [] if plan.runs is None else [path.parent for path in plan.runs.glob(f"*/{store.FILE}")]
    for folder in sorted(runs, key=lambda folder: (folder / store.FILE).stat().st_mtime, reverse=True):
        with suppress(FindingError):  # nobody asked for that one
            if folder.resolve() != plan.out.resolve() and (saved := of(folder)):
                return saved
    return []


def judge_cases(progress: Progress, db: sqlite3.Connection, engine: Pool, stop: threading.Event, show) -> None:
    """The campaign proper: keeps the engine busy, takes its results, and has findings shrunk beside it."""
    plan = progress.plan
    before, began, saved_at = progress.elapsed, time.monotonic(), 0.0
    batches = Batches(store.get(db, "batch"), plan.cases)
    retire(progress, engine)
    with shrinking(progress, stop) as shrinker:
        for finding in progress.findings.values():
            if finding.state == "waiting":
                shrinker.add(finding)
        stopped = False
        while not stop.is_set():
            progress.elapsed = before + time.monotonic() - began
            retired = all(tally.retired for tally in progress.tallies.values())
            over = (plan.budget is not None and progress.elapsed >= plan.budget) or retired
            over = over or (plan.cases is not None and progress.given >= plan.cases)
            if over and not stopped:
                engine.stop()
                stopped = True
            while not over and engine.wants and (most := batches.room(progress.given)) > 0:
                batch = batches.take(most)
                engine.give(Assignment(batch, store.judged_pairs(db, batch) | batches.elsewhere, most))
            for event in engine.advance(TICK):
                take(progress, db, engine, batches, event, shrinker)
            for batch in engine.lost():
                batches.give_back(batch)
            take_shrunk(progress, db, shrinker)
            progress.elapsed = before + time.monotonic() - began
            if time.monotonic() - saved_at > SAVED_EVERY:
                saved_at = time.monotonic()
                store.put(db, batch=batches.first, **progress.summary)
            show(progress)
            if over and engine.idle:
                break
        store.put(db, batch=batches.first, **progress.summary)
        progress.status = "shrinking"
        end = time.monotonic() + 2 * plan.shrink_limit
        while not stop.is_set() and time.monotonic() < end and take_shrunk(progress, db, shrinker):
            show(progress)
            time.sleep(TICK)
    take_shrunk(progress, db, shrinker)
    progress.status = "interrupted" if stop.is_set() else "finished"
    show(progress)


@dataclass
class Batches:
    """Which batches are being judged and which comes next, so that `cases` are judged in all, if that is a number."""

    next: int
    cases: int | None
    open: dict[int, int] = field(default_factory=dict)  # batch -> cases of it that may still come
    again: list[int] = field(default_factory=list)  # cut off, or lost on the way
    elsewhere: set[tuple[str, str]] = field(default_factory=set)  # (case id, target) of more than one batch

    @property
    def first(self) -> int:
        """The first one that is not judged to its end: where a campaign is gone on with."""
        return min([self.next, *self.open, *self.again])

    def room(self, given: int) -> int:
        """How many cases the next batch may have."""
        return BATCH if self.cases is None else min(BATCH, self.cases - given - sum(self.open.values()))

    def take(self, most: int) -> int:
        if self.again:
            self.again.sort()
            batch = self.again.pop(0)
        else:
            batch, self.next = self.next, self.next + 1
        self.open[batch] = most
        return batch

    def give_back(self, batch: int) -> None:
        if self.open.pop(batch, None) is not None:
            self.again.append(batch)


def take(progress: Progress, db, engine: Pool, batches: Batches, event: Event, shrinker: Shrinker) -> None:
    """Keeps what an event of the engine says."""
    if isinstance(event, Ended):
        if event.whole:
            batches.open.pop(event.batch, None)
        else:
            batches.give_back(event.batch)
        return
    if not account(progress, db, event, shrinker):
        batches.elsewhere.add((store.case_id(event.result.case), event.result.target))
        return
    retire(progress, engine)
    if event.ends is not None:
        progress.given += 1
        progress.cases += event.ends
        batches.open[event.batch] = max(0, batches.open.get(event.batch, 0) - 1)


def retire(progress: Progress, engine: Pool) -> None:
    """Takes targets that have cost too many processes out of service."""
    for name, tally in progress.tallies.items():
        if tally.deaths >= LIVES and not tally.retired:
            tally.retired = True
            engine.retire(name, f"retired after costing {tally.deaths} processes")


def account(progress: Progress, db: sqlite3.Connection, event: Judged, shrinker: Shrinker) -> bool:
    """Keeps a result, and makes a finding of a failure that is the first of its group. False: it was there before."""
    result = event.result
    if store.has_result(db, result):
        return False
    failure = findings.first_failure(result)
    known = new = None
    if failure is not None:
        known = group_of(progress, failure)
        if known is None:
            known = new = write_finding(progress, failure)
    with store.transaction(db):
        finding = None if known is None else known.id
        store.add_result(db, result, batch=event.batch, place=event.place, finding=finding)
        if new is not None:
            add_row(db, new)
        elif known is not None:
            if known.found_again and known.original == failure.case:
                known.found_again = False
            else:
                store.count_again(db, known.id)
                known.count += 1
    if new is not None:
        progress.findings[new.id] = new
        shrinker.add(new)
    progress.seconds.update(result.seconds)
    checks = result.verdict["checks"] if result.verdict else []
    count(progress.tallies[result.target], result.outcome, result.reason, checks)
    return True


def count(tally: Tally, outcome: str, reason: str, checks: list[dict]) -> None:
    if outcome == "skipped":
        tally.skipped[reason] += 1
        return
    tally.judged += 1
    tally.failed += outcome == "failed"
    for check in checks:
        if check["name"] == "accuracy":
            for metric, error in check["errors"].items():
                if metric in check["bounds"]:
                    here = share_of_bound(error, check["bounds"][metric]), metric
                    # Rounding a single number takes up nearly all of its bound, always
                    if here[0] > 1 or not metric.endswith("_element"):
                        tally.worst = max(tally.worst or here, here)
        tally.deaths += check["name"] in FATAL


def share_of_bound(error: float, bound: float) -> float:
    """How much of the bound the error takes up; infinite where either is NaN."""
    share = error / bound if bound else math.inf if error else 0.0
    return math.inf if math.isnan(share) else share


# ------------------------------------------------------------------------------------------------------------ findings


def group_of(progress: Progress, failure: Failure, apart_from: Finding | None = None) -> Finding | None:
    """The finding that a failure is counted in, or None when it is the first of its group.

    Alike in target, check and error class, it belongs to a finding without whose families it would not fail either.
    While one is not shrunk yet, what it needs is not known, and the failure waits with it.
    """
    alike = [one for one in progress.findings.values() if one.failure.group == failure.group and one is not apart_from]
    small = [one for one in alike if one.state in ("shrunk", "cut short")]
    for finding in small:
        if finding.explains(failure.case):
            return finding
    waiting = next((one for one in alike if one not in small), None)
    if waiting is not None:
        return waiting
    return alike[0] if len(alike) >= FAMILIES_APART else None


def write_finding(progress: Progress, failure: Failure, inputs: Path | None = None) -> Finding:
    id = findings.finding_id(failure, store.case_id(failure.case))
    finding = Finding(id, progress.plan.out / "findings" / id, failure.case, failure, inputs=inputs)
    save_finding(progress, finding)
    return finding


def save_finding(progress: Progress, finding: Finding) -> None:
    """Writes its folder, with the saved inputs where the case alone may not give them."""
    same = finding.failure.case == finding.original
    write_inputs = partial(shutil.copyfile, finding.inputs) if finding.inputs and same else None
    shrunk = finding.state == "shrunk"
    options = {"environment": progress.environment, "shrunk": shrunk, "write_inputs": write_inputs}
    findings.save(finding.folder, finding.failure, finding.original, **options)
    if finding.inputs is not None:
        finding.inputs = finding.folder / "inputs.safetensors" if same else None


def add_row(db: sqlite3.Connection, finding: Finding, previous: Path | None = None) -> None:
    target, check, error_class = finding.failure.group
    store.add_finding(
        db,
        id=finding.id,
        target=target,
        check=check,
        error_class=error_class,
        case=finding.original,
        smallest=finding.failure.case,
        folder=f"findings/{finding.id}",
        detail=finding.failure.check["detail"],
        previous=None if previous is None else str(previous),
    )


def keep_finding(progress: Progress, db, failure: Failure, *, inputs: Path | None = None, previous=None) -> Finding:
    """A finding without a result of this campaign."""
    finding = write_finding(progress, failure, inputs)
    add_row(db, finding, previous)
    progress.findings[finding.id] = finding
    return finding


@dataclass
class Shrinker:
    """A thread that shrinks findings one after another, in a worker of its own, while the campaign goes on."""

    todo: queue.PriorityQueue[tuple[int, int, Finding | None]] = field(default_factory=queue.PriorityQueue)
    done: queue.SimpleQueue[tuple[Finding, Shrunk | Exception]] = field(default_factory=queue.SimpleQueue)
    ended: threading.Event = field(default_factory=threading.Event)
    added: int = 0

    def add(self, finding: Finding) -> None:
        # Where each failure costs a process the search is slow, so it waits for the others.
        self.added += 1
        self.todo.put((2 if finding.failure.check["name"] in FATAL else 1, self.added, finding))


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
        others = [other for other in others if other.state == "shrunk" and other.explains(failure.case)]
        # A case that hangs costs the time limit to judge, and one that kills its process a new one: time for a few.
        seconds = max(plan.shrink_limit, 4 * plan.limit) if failure.check["name"] in FATAL else plan.shrink_limit
        try:
            if worker is not None and worker.targets != (failure.target,):
                worker.close()
                worker = None
            worker = worker or Worker((failure.target,), time_limit=plan.limit, threads=1)
            starts = [other.failure.case for other in others]
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
        if isinstance(result, WorkerError):  # this machine of a cluster cannot run the target
            result = Shrunk(finding.failure, 0, False)
        elif isinstance(result, Exception):
            raise result
        finding.failure = result.failure
        interrupted = not result.finished and shrinker.ended.is_set()
        finding.state = "shrunk" if result.finished else "waiting" if interrupted else "cut short"
        save_finding(progress, finding)
        family = findings.family(finding.needs)
        smallest, detail = result.failure.case, result.failure.check["detail"]
        store.set_smallest(db, finding.id, smallest, detail, family=family, state=finding.state)
        if finding.state == "shrunk":
            tell_apart(progress, db, finding, shrinker)
    return any(finding.state in ("waiting", "shrinking") for finding in progress.findings.values())


def tell_apart(progress: Progress, db: sqlite3.Connection, finding: Finding, shrinker: Shrinker) -> None:
    """Takes out of a group what waited in it and, now that its families are known, turns out to be another's."""
    if not finding.needs:
        return
    for id, failure in store.failures_of(db, finding.id):
        if finding.explains(failure.case) or failure.case == finding.original:
            continue
        other = group_of(progress, failure, apart_from=finding)
        new = None
        if other is None:
            if sum(one.failure.group == failure.group for one in progress.findings.values()) >= FAMILIES_APART:
                return
            other = new = write_finding(progress, failure)
        with store.transaction(db):
            if new is not None:
                add_row(db, new)
            store.move_result(db, id, finding.id, other.id, counted=new is not None)
        finding.count -= 1
        if new is None:
            other.count += 1
        else:
            progress.findings[new.id] = new
            shrinker.add(new)
