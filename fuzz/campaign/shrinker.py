"""The shrinker of a campaign: a thread that makes findings smaller while workers judge."""

from __future__ import annotations

import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fuzz.campaign import store
from fuzz.campaign.findings import INTERMITTENT, Failure
from fuzz.campaign.grouping import FAMILIES_APART, group_of, save_finding, write_finding
from fuzz.campaign.job import FATAL, REPEATS, WorkerError
from fuzz.campaign.progress import Finding, Progress
from fuzz.campaign.smallest_case import OutOfTime, Shrunk, in_worker, shrink
from fuzz.campaign.worker import Worker


@dataclass
class Shrinker:
    """A thread that shrinks findings one after another, in a worker of its own, beside the campaign."""

    todo: queue.PriorityQueue[tuple[int, int, Finding | None]] = field(default_factory=queue.PriorityQueue)
    done: queue.SimpleQueue[tuple[Finding, Shrunk | Exception]] = field(default_factory=queue.SimpleQueue)
    ended: threading.Event = field(default_factory=threading.Event)
    added: int = 0

    def add(self, finding: Finding) -> None:
        if finding.state != "waiting":
            return  # what does not repeat cannot be shrunk
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
            judge_again = in_worker(worker, failure, stopped)
            result = None
            if failure.check["name"] in FATAL:  # the worker that judged it was lost, and could not judge it again
                result = without_repeat(failure, judge_again, seconds)
            result = result or shrink(failure, judge_again, seconds=seconds, starts=starts, stop=stopped)
        except Exception as error:
            result = error
        shrinker.done.put((finding, result))
        if worker is not None and (worker.job is not None or isinstance(result, Exception)):
            worker.close()  # still busy with the case at which time ran out
            worker = None
    if worker is not None:
        worker.close()


def without_repeat(failure: Failure, judge_again, seconds: float) -> Shrunk | None:
    """The failure with its rate where it does not repeat on the same inputs; None where it repeats at once."""
    deadline = time.monotonic() + seconds
    try:
        if judge_again(failure.case, deadline) is not None:
            return None
        failed, judged = 0, 1
        while judged < REPEATS:
            failed += judge_again(failure.case, deadline) is not None
            judged += 1
    except OutOfTime:
        return None
    return Shrunk(replace(failure, repeats=(failed, judged)), judged, False)


def take_shrunk(progress: Progress, db: sqlite3.Connection, shrinker: Shrinker) -> bool:
    """Keeps what the shrinker has found; whether it has anything left to do."""
    while not shrinker.done.empty():
        finding, result = shrinker.done.get()
        if isinstance(result, WorkerError):  # this machine of a cluster cannot run the target
            result = Shrunk(finding.failure, 0, False)
        elif isinstance(result, Exception):
            raise result
        finding.failure = result.failure
        if finding.failure.intermittent:
            finding.state = INTERMITTENT
            other = group_of(progress, finding.failure, apart_from=finding)
            if other is not None:
                merge(progress, db, finding, other)
            else:
                save_finding(progress, finding)
            continue
        interrupted = not result.finished and shrinker.ended.is_set()
        finding.state = "shrunk" if result.finished else "waiting" if interrupted else "cut short"
        save_finding(progress, finding)
        if finding.state == "shrunk":
            tell_apart(progress, db, finding, shrinker)
    return any(finding.state in ("waiting", "shrinking") for finding in progress.findings.values())


def merge(progress: Progress, db: sqlite3.Connection, finding: Finding, other: Finding) -> None:
    """Counts all failures of a finding in another one, and removes it."""
    for id, _ in store.failures_of(db, finding.id):
        store.move_result(db, id, other.id)
    other.count += finding.count
    other.previous += finding.previous
    save_finding(progress, other)
    del progress.findings[finding.id]
    shutil.rmtree(finding.folder)


def tell_apart(progress: Progress, db: sqlite3.Connection, finding: Finding, shrinker: Shrinker) -> None:
    """Takes out of a group what waited in it and, now that its families are known, turns out to be another's."""
    if not finding.needs:
        return
    for id, failure in store.failures_of(db, finding.id):
        if finding.explains(failure.case) or failure.case == finding.original:
            continue
        other = group_of(progress, failure, apart_from=finding)
        if other is None:
            if sum(one.failure.group == failure.group for one in progress.findings.values()) >= FAMILIES_APART:
                return
            other = write_finding(progress, failure)
            shrinker.add(other)
        store.move_result(db, id, other.id)
        finding.count -= 1
        other.count += 1
