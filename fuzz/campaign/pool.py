"""A pool: the workers of one machine. It takes batches of cases, and gives each worker one case at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field

from fuzz.campaign.devices import Seat
from fuzz.campaign.job import REPEATS, Job, Result
from fuzz.campaign.store import case_id
from fuzz.campaign.worker import Worker, wait
from fuzz.cases.case import Case
from fuzz.cases.drawing import BATCH, SIMPLE, draw_batch, prepare_process

JOBS_A_DRAWER = 8  # workers that one process draws cases for; Hypothesis draws some 400 a second
PROPERTIES_A_CASE = (
    1  # checked on each case, besides accuracy; each is more calls of the target, and more cases show more
)


@dataclass(frozen=True)
class Assignment:
    """A batch to be judged: without the (case id, target) that are done, and no more than `most` cases of it."""

    batch: int
    done: Collection[tuple[str, str]] = ()
    most: int = BATCH


@dataclass(frozen=True)
class Judged:
    """A result. ends: None while other targets have yet to judge the case, else whether one supports it."""

    batch: int
    result: Result
    place: str
    ends: bool | None


@dataclass(frozen=True)
class Ended:
    """All cases of an assignment are judged. whole: it was not cut off by `most`."""

    batch: int
    whole: bool


Event = Judged | Ended


@dataclass
class Open:
    """A batch being judged."""

    left: int  # cases without all their results
    whole: bool


@dataclass
class Task:
    """A case being judged by a worker."""

    batch: int
    case: Case
    reached: bool = False


@dataclass
class Pool:
    """Workers in their seats, and the cases they are to judge. Closing it ends them."""

    names: tuple[str, ...]
    seats: Sequence[Seat]
    profile: str
    seed: int
    time_limit: float
    lenient: bool = False
    place: str = ""  # put before that of a seat
    workers: list[Worker] = field(default_factory=list)
    drawing: deque[tuple[Assignment, Future]] = field(default_factory=deque)
    queue: deque[tuple[int, Case, tuple[str, ...]]] = field(default_factory=deque)
    open: dict[int, Open] = field(default_factory=dict)
    busy: dict[Worker, Task] = field(default_factory=dict)
    retired: dict[str, str] = field(default_factory=dict)  # target -> reason
    seen: set[int] = field(default_factory=set)  # hashes of what batches began with

    def __post_init__(self) -> None:
        threads = 1 if len(self.seats) > 1 else None
        try:
            for seat in self.seats:
                options = {"threads": threads, "lenient": self.lenient, "gpu": seat.gpu, "memory": seat.memory}
                self.workers.append(Worker(self.names, time_limit=self.time_limit, **options))
        except BaseException:
            for worker in self.workers:
                worker.close()
            raise
        self.executor: Executor
        if len(self.seats) <= JOBS_A_DRAWER // 2:
            self.executor = ThreadPoolExecutor(1, "drawing")
        else:
            spawn = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(
                -(-len(self.seats) // JOBS_A_DRAWER), spawn, prepare_process, (os.getpid(),)
            )

    @property
    def descriptions(self) -> list[dict]:
        """Of the targets, those that cannot run here included; empty until a worker is ready for the first time."""
        return next((worker.descriptions for worker in self.workers if worker.descriptions), [])

    @property
    def devices(self) -> list[str]:
        return sorted({device for worker in self.workers for device in worker.devices})

    @property
    def compiling(self) -> int:
        """How many workers wait for a kernel to be compiled or tuned."""
        return sum(worker.compiling for worker in self.workers)

    @property
    def wants(self) -> bool:
        """Whether another batch should be on its way."""
        return len(self.queue) + BATCH * len(self.drawing) < max(BATCH // 2, 2 * len(self.workers))

    @property
    def idle(self) -> bool:
        return not (self.busy or self.queue or self.drawing)

    def give(self, assignment: Assignment) -> None:
        future = self.executor.submit(draw_batch, self.profile, self.seed, assignment.batch)
        self.drawing.append((assignment, future))

    def retire(self, target: str, reason: str) -> None:
        """From now on its cases are skipped for that reason."""
        self.retired[target] = reason

    def stop(self) -> None:
        """Gives no case any more to a worker; those that are being judged go on."""
        for _, future in self.drawing:
            future.cancel()
        self.drawing.clear()
        self.queue.clear()

    def lost(self) -> list[int]:
        """Batches that have to be given again: on one machine none is ever lost."""
        return []

    def advance(self, timeout: float) -> list[Event]:
        """What has come of it by now, after waiting for `timeout` seconds at most."""
        events = self._take_drawn()
        waiting = self.queue and any(worker.ready and worker not in self.busy for worker in self.workers)
        if not (events or waiting):
            hungry = self.drawing and len(self.busy) < len(self.workers)
            wait(self.workers, min(timeout, 0.02) if hungry else timeout)
        for worker, seat in zip(self.workers, self.seats, strict=True):
            events += self._results_of(worker, f"{self.place} {seat.place}".strip())
            while self.queue and worker.ready and worker not in self.busy:
                events += self._submit(worker)
        return events

    def _take_drawn(self) -> list[Event]:
        names = [target["name"] for target in self.descriptions if target["unavailable"] is None]
        while names and self.drawing and self.drawing[0][1].done():
            assignment, future = self.drawing.popleft()
            fresh = []
            drawn = future.result()
            for number, case in enumerate(drawn):
                if number < SIMPLE:
                    if hash(case) in self.seen and not assignment.done:
                        continue
                    self.seen.add(hash(case))
                id = case_id(case)
                targets = tuple(name for name in names if (id, name) not in assignment.done)
                if targets:
                    fresh.append((assignment.batch, case, targets))
            given = fresh[: assignment.most]
            whole = len(given) == len(fresh)
            if not given:
                return [Ended(assignment.batch, whole)]
            self.open[assignment.batch] = Open(len(given), whole)
            self.queue.extend(given)
        return []

    def _submit(self, worker: Worker) -> list[Event]:
        batch, case, targets = self.queue.popleft()
        serving = tuple(name for name in targets if name not in self.retired)
        task = Task(batch, case)
        skipped = [Result(case, name, "skipped", self.retired[name]) for name in targets if name in self.retired]
        events: list[Event] = [
            Judged(batch, result, "", False if not serving and result is skipped[-1] else None) for result in skipped
        ]
        if serving:
            self.busy[worker] = task
            worker.submit(Job(case, serving, PROPERTIES_A_CASE, repeats=REPEATS))
            return events
        return events + self._end(batch)

    def _results_of(self, worker: Worker, place: str) -> list[Event]:
        results = worker.advance()
        task = self.busy.get(worker)
        if task is None:
            return []
        events: list[Event] = []
        for result in results:
            task.reached |= result.outcome != "skipped"
            last = worker.job is None and result is results[-1]
            events.append(Judged(task.batch, result, place, task.reached if last else None))
        if worker.job is None:
            del self.busy[worker]
            events += self._end(task.batch)
        return events

    def _end(self, batch: int) -> list[Event]:
        entry = self.open[batch]
        entry.left -= 1
        if entry.left:
            return []
        del self.open[batch]
        return [Ended(batch, entry.whole)]

    def close(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()
