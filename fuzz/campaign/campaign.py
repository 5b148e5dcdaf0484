"""Campaigns: workers judge cases from Hypothesis until a time or a number is reached. A run folder keeps everything.

campaign.sqlite   configuration, and every result (`fuzz.campaign.store`)
findings/         one folder for each group of failures (`fuzz.campaign.findings`)
report.html       written at the end (`fuzz.reporting.report`)

An interrupted or killed campaign can be resumed. Unfinished batches of cases are then drawn again, and cases
that have a result are not judged twice.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fuzz.campaign import findings, store
from fuzz.campaign.devices import gpus, seats
from fuzz.campaign.findings import Failure, FindingError, SavedFinding
from fuzz.campaign.grouping import group_of, save_finding, write_finding
from fuzz.campaign.job import Result
from fuzz.campaign.known import read
from fuzz.campaign.plan import CampaignError, Plan
from fuzz.campaign.pool import Assignment, Ended, Event, Judged, Pool
from fuzz.campaign.progress import Progress, Tally, count
from fuzz.campaign.replay import replay
from fuzz.campaign.run_folder import disk_trouble, held_folder, keep
from fuzz.campaign.shrinker import Shrinker, shrinking, take_shrunk
from fuzz.campaign.worker import inputs_writer
from fuzz.cases.drawing import BATCH
from fuzz.processes import interrupts
from fuzz.targets.promises import bare
from fuzz.targets.registry import BUILTIN

LIVES = 5  # processes a target may cost before it is retired

TICK = 0.2  # seconds between two looks at everything

SAVED_EVERY = 2.0  # seconds between two notes in the store of how far it is


def run_campaign(plan: Plan, show: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Runs a campaign to its end, or until SIGINT or SIGTERM. `show` is called several times a second.

    Raises WorkerError when a target cannot run, and CampaignError when the plan or the disk does not allow it. The run
    folder keeps what it has by then.
    """
    progress = Progress(plan, known=read(plan.known))
    stop = threading.Event()
    with (
        interrupts(stop),
        held_folder(plan.out, resume=plan.resume),
        disk_trouble(plan),
        inputs_writer() as progress.write_inputs,
        start(plan) as engine,
    ):
        for folder in () if plan.resume else plan.previous:
            if not folder.exists():
                raise CampaignError(
                    f"--previous: expected a run folder or a finding, got {folder}, which does not exist"
                )
        if not wait_for_first(engine, progress, stop, show):
            progress.status = "interrupted"
            return progress
        describe(progress, engine)
        with keep(plan, progress) as db:
            replay_previous(progress, db, stop, show)
            judge_cases(progress, db, engine, stop, show)
    return progress


@contextmanager
def start(plan: Plan) -> Iterator[Pool]:
    """The engine: workers on this machine, or on all machines of a Ray cluster. Both have one interface."""
    settings = {
        "names": tuple(BUILTIN) if plan.whatever_can_run else tuple(dict.fromkeys((*plan.tested, *plan.references))),
        "profile": plan.profile,
        "seed": plan.seed,
        "time_limit": plan.limit,
        "lenient": plan.whatever_can_run,
    }
    if plan.engine == "ray":
        try:
            from fuzz.campaign.engines.ray import Cluster
        except ImportError as error:
            raise CampaignError(
                f"--engine: expected Ray to be installed, got {error}; pip install 'flash-kda[ray]' installs it"
            ) from error
        engine = Cluster(settings, plan.jobs)
    else:
        engine = Pool(seats=seats(gpus(), plan.jobs or 1), **settings)
    try:
        yield engine
    finally:
        engine.close()


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
    if not progress.tested & progress.tallies.keys():
        reasons = "; ".join(target["unavailable"] for target in progress.targets if target["unavailable"] is not None)
        raise CampaignError(f"--target: expected a target that can run here, got {reasons}; name another one")


def replay_previous(progress: Progress, db: sqlite3.Connection, stop: threading.Event, show) -> None:
    """Judges the findings of earlier campaigns, from their saved inputs; what fails again is a finding of this one."""
    saved = [one for one in previous_findings(progress) if str(one.path.resolve()) not in progress.replays]
    if not saved:
        return
    progress.status = "replaying"
    show(progress)
    for one, result in replay(saved, time_limit=progress.plan.limit, stop=stop.is_set):  # on this machine
        path = one.path.resolve()
        failure = failure_of(progress, result)
        if failure is not None and (known := group_of(progress, failure)) is None:
            write_finding(progress, failure, copied=one)
        elif failure is not None and str(path) not in known.previous:
            known.count += 1
            known.previous.append(str(path))
            save_finding(progress, known)
        store.add_replay(db, path, result)
        progress.replays[str(path)] = result.outcome
        show(progress)
    progress.status = "running"


def previous_findings(progress: Progress) -> list[SavedFinding]:
    """Of the targets of this campaign. Raises FindingError for a folder that was given and holds no finding."""
    plan = progress.plan
    found: list[SavedFinding] = []
    names = {bare(name): name for name in progress.tallies}

    def of(folder: Path) -> list[SavedFinding]:
        is_run = (folder / store.STORE_FILE).exists()
        if is_run and not any((folder / "findings").glob("*/finding.json")):
            return []
        saved = findings.find(folder / "findings" if is_run else folder)
        return [
            replace(one, finding={**one.finding, "target": names[bare(one.finding["target"])]})  # as it is judged now
            for one in saved
            if one.finding is not None and bare(one.finding["target"]) in names
        ]

    if plan.previous:
        for folder in plan.previous:
            if not (saved := of(folder)):
                judged = ", ".join(progress.tallies)
                progress.notes.append(f"--previous {folder}: holds no finding of {judged}; nothing of it is judged")
            found += saved
        return found
    runs = [] if plan.runs is None else [path.parent for path in plan.runs.glob(f"*/{store.STORE_FILE}")]
    for folder in sorted(runs, key=lambda folder: (folder / store.STORE_FILE).stat().st_mtime, reverse=True):
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
            retired = all(progress.tallies[name].retired for name in progress.tested & progress.tallies.keys())
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
            progress.compiling = engine.compiling
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
        """The first unfinished batch: where a campaign resumes."""
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


def failure_of(progress: Progress, result: Result) -> Failure | None:
    """What a result is counted under: its first failure that was not known, or else the first."""
    failures = findings.failures(result)
    return next((one for one in failures if not progress.why_known(one)), next(iter(failures), None))


def account(progress: Progress, db: sqlite3.Connection, event: Judged, shrinker: Shrinker) -> bool:
    """Keeps a result, and makes a finding of a failure that is the first of its group. False: it was there before."""
    result = event.result
    if store.has_result(db, result):
        return False
    failure = failure_of(progress, result)
    known = None
    if failure is not None:
        known = group_of(progress, failure)
        if known is None:  # the folder first, so that no failure is counted in a finding that is not there
            known = write_finding(progress, failure)
            shrinker.add(known)
        known.count += 1
    store.add_result(db, result, batch=event.batch, place=event.place, finding=None if known is None else known.id)
    progress.seconds.update(result.seconds)
    count(progress.tallies[result.target], result.outcome, result.reason, result.verdict)
    return True
