"""Workers: processes that judge targets. A target that hangs or kills its process costs one worker.

The parent imports neither PyTorch nor a target. It sends one Job at a time over a pipe, and learns which target is
running. So it knows the culprit when the process dies or exceeds its time.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path

from fuzz.campaign.job import Job, Result, WorkerError, unjudged
from fuzz.cases.case import Case
from fuzz.text import printable

START_LIMIT = 300.0  # seconds until a process has imported its targets; the first import of PyTorch from a cold disk

ORACLE_LIMIT = 600.0  # seconds for the inputs and the oracle of one case, which no target is blamed for

KILL_LIMIT = 30.0  # seconds that the end of a killed process is waited for

RESTARTS = 3  # processes in a row that may fail to start where one has started before

WARM_CALLS = 5  # answers of a target until it is taken to have compiled what it needs (`Target.warm_up`)

REWARM = 30.0  # seconds of that for the first call in a further process: what was compiled is in caches on disk

BEGIN = """
from fuzz.processes import die_with_parent
die_with_parent({parent})  # before anything slow is imported
from fuzz.campaign.worker_process import main
main({pipe})
"""


class Worker:
    """A process that judges. A fresh one replaces it when it dies or has to be killed.

    targets: names of targets.
    time_limit: seconds for one target on one case.
    threads: of PyTorch; None for its default.
    lenient: whether a target that cannot be loaded is described with the reason. Otherwise it is a WorkerError.
    gpu: value of CUDA_VISIBLE_DEVICES; None leaves it as it is.
    memory: share of the GPU's memory that the process may take.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        time_limit: float,
        threads: int | None = None,
        lenient: bool = False,
        gpu: str | None = None,
        memory: float | None = None,
    ):
        self.targets = tuple(targets)
        self.time_limit = time_limit
        self.threads = threads
        self.lenient = lenient
        self.gpu = gpu
        self.memory = memory
        self.failed_starts = 0  # in a row
        self.answered: Counter[str] = Counter()  # calls that ended, by target, in all processes
        self.descriptions: list[dict] = []
        self.devices: list[str] = []
        self.job: Job | None = None
        self.not_saved: Exception | None = None  # why the last job that saves inputs did not
        self.waiting: list[str] = []  # targets of the job without a result
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = connection.Pipe()
        self.connection = ours
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
        # What one worker finds out about a kernel's configurations, the others and its successors need not.
        environment.setdefault("TRITON_CACHE_AUTOTUNING", "1")
        environment.setdefault("PYTHONBREAKPOINT", "0")  # nobody is at the keyboard of a worker
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from other workers
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the workers.
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN.format(parent=os.getpid(), pipe=theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self.ready = False
        self.loading: str | None = None  # the target that it imports
        self.spent = False  # whether it asked to be replaced
        self.warm: set[str] = set()  # targets that have answered in this process
        self.compiling = False  # whether the target at work has a kernel compiled or tuned
        self.taken = False  # whether it has begun with the job; if not, the job is not what ended it
        self.running: str | None = None  # the target at work, None for the oracle
        self.properties: tuple[str, ...] = ()  # that it is checked for
        self.since = time.monotonic()
        with contextlib.suppress(OSError):  # when it died already, which `advance` will see
            self.connection.send((self.targets, self.threads, self.lenient, self.memory))

    def submit(self, job: Job) -> None:
        self.job, self.waiting = job, list(job.targets)
        self.not_saved = WorkerError("a worker ended while it saved inputs") if job.save else None
        self._send(job)

    def _send(self, job: Job) -> None:
        self.running, self.taken, self.since = None, False, time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(job)

    def advance(self) -> list[Result]:
        """The results there are by now; never blocks for long. A process that died or overran is replaced."""
        results = []
        died = self.process.poll() is not None  # looked at before the pipe is emptied, so that no last word is missed
        try:
            while self.connection.poll():
                results += self._receive(*self.connection.recv())
        except (EOFError, OSError, pickle.UnpicklingError):
            died = True
        waited = time.monotonic() - self.since
        if self.spent:
            self._kill()
            self._renew()
        elif died:
            results += self._replace("died", f"{self._how_it_ended()}{self._last_words()}", waited)
        elif self.overdue():
            self._kill()
            limit = self.limit()
            results += self._replace("timeout", f"time limit: no answer within {limit:g} s", waited)
        return results

    def limit(self) -> float:
        if not self.ready:
            return START_LIMIT
        if self.running is None:
            return ORACLE_LIMIT
        warm_up = self.warm_up(self.running)
        if self.answered[self.running] >= WARM_CALLS:
            warm_up = 0.0 if self.running in self.warm else min(warm_up, REWARM)
        return self.time_limit + warm_up

    def warm_up(self, target: str) -> float:
        return next((each.get("warm_up", 0.0) for each in self.descriptions if each["name"] == target), 0.0)

    def overdue(self) -> bool:
        return (self.job is not None or not self.ready) and time.monotonic() - self.since > self.limit()

    def _receive(self, kind: str, value) -> list[Result]:
        self.since = time.monotonic()
        self.compiling = kind == "tuning"
        if kind == "loading":
            self.loading = value
        elif kind == "ready":
            self.ready, (self.descriptions, self.devices) = True, value
            self.failed_starts = 0
        elif kind == "error":
            raise WorkerError(value)
        elif kind == "running":
            self.taken = True
            self.running, self.properties = value
        elif kind == "saved":
            self.job, self.not_saved = None, value
        elif kind == "spent":
            self.spent = True
        elif kind == "result":
            self.running = None
            if value.outcome != "skipped":
                self.answered[value.target] += 1
                self.warm.add(value.target)
            self.waiting.remove(value.target)
            if not self.waiting:
                self.job = None
            return [value]
        return []

    def _replace(self, check: str, detail: str, seconds: float) -> list[Result]:
        """Blames the target at work, and gives the rest of the job to a new process."""
        if not self.ready:
            self.failed_starts += 1
            if not self.descriptions or self.failed_starts > RESTARTS:
                self.connection.close()
                at = f" (at the import of target {self.loading!r})" if self.loading else ""
                raise WorkerError(f"a worker could not start{at}: {detail}")
            self._renew()
            return []
        results = []
        job, running = self.job, self.running
        if job is not None and self.taken:
            if running is None:  # inputs or oracle: the harness's own failure, shown as one and never passed over
                detail = f"{detail} ({check} in the inputs or the oracle)"
                results = [unjudged(job.case, name, (), "harness", detail) for name in self.waiting]
                self.waiting = []
            else:
                result = unjudged(job.case, running, self.properties, check, detail)
                results = [replace(result, seconds={"target": seconds})]
                self.waiting.remove(running)
        self._renew()
        return results

    def _renew(self) -> None:
        """Starts a new process, which continues the job."""
        self.connection.close()
        self.log.close()
        self._spawn()
        if self.job is not None and self.waiting:
            self._send(replace(self.job, targets=tuple(self.waiting)))
        else:
            self.job = None

    def _how_it_ended(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"exit status {code}: the process ended"
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return f"{name}: the process was killed"

    def _last_words(self, lines: int = 3) -> str:
        """What the process wrote at the end: of a crash the innermost calls, else its last lines."""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 16384))
        log = self.log.read().decode(errors="replace")
        _, crashed, stack = log.rpartition("(most recent call first):")
        words = [printable(line.strip()) for line in (stack if crashed else log).splitlines() if line.strip()]
        words = words[:lines] if crashed else words[-lines:]
        return f"; it wrote: {' | '.join(words)}" if words else ""

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever the target started
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep hold of a process whose kernel hangs
            self.process.wait(timeout=KILL_LIMIT)

    def close(self) -> None:
        self._kill()
        self.connection.close()
        self.log.close()


def wait(workers: Sequence[Worker], timeout: float) -> None:
    """Sleeps until one of the workers has something to say, `timeout` seconds at most."""
    connection.wait([worker.connection for worker in workers], timeout)


def wait_until_ready(worker: Worker, until: Callable[[], bool] = lambda: False) -> None:
    while not (worker.ready or until()):
        wait([worker], 0.1)
        worker.advance()


@contextmanager
def ready_worker(targets: Sequence[str], *, until: Callable[[], bool] = lambda: False, **options) -> Iterator[Worker]:
    """A worker that has imported its targets, unless `until()` came first; closed at the end. options: of `Worker`.

    Raises WorkerError where a target cannot be imported.
    """
    worker = Worker(targets, **options)
    try:
        wait_until_ready(worker, until)
        yield worker
    finally:
        worker.close()


def judge_job(worker: Worker, job: Job, until: Callable[[], bool] = lambda: False) -> list[Result] | None:
    """All results of one job; None when `until()` came first, which leaves the worker busy."""
    worker.submit(job)
    results: list[Result] = []
    while worker.job is not None:
        if until():
            return None
        wait([worker], 0.1)
        results += worker.advance()
    return results


def save_inputs(worker: Worker, case: Case, path: Path) -> None:
    """Has a worker save the inputs of a case. Raises OSError where the disk gives up, WorkerError where it cannot."""
    wait_until_ready(worker)
    judge_job(worker, Job(case, (), save=str(path)))
    if worker.not_saved is not None:
        raise worker.not_saved


@contextmanager
def inputs_writer() -> Iterator[Callable[[Case, Path], None]]:
    """`save_inputs` of a worker of its own, which starts when it is first asked for anything, and needs no GPU."""
    with ExitStack() as stack:

        def write(case: Case, path: Path) -> None:
            if not workers:
                workers.append(stack.enter_context(closing(Worker((), time_limit=0.0, threads=1, gpu=""))))
            save_inputs(workers[0], case, path)

        workers: list[Worker] = []
        yield write
