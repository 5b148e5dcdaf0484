"""Workers: processes that judge targets, so that a target which hangs or kills its process costs one worker.

The parent imports neither PyTorch nor a target. It sends one Job at a time over a pipe and is told which target is
running; so it knows whom to blame when the process dies or overruns its time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path

from fuzz.case import Case
from fuzz.targets import Target, TargetError, first_line, load_target

START_LIMIT = 300.0  # seconds until a process has imported its targets; the first import of PyTorch from a cold disk
ORACLE_LIMIT = 600.0  # seconds for the inputs and the oracle of one case, which no target is blamed for

SLOW_SHARE = 4  # one case in so many has a property checked on a slow target

FATAL = ("timeout", "died")  # checks that cost a process


class WorkerError(RuntimeError):
    """A worker cannot be started; the message is one line that says why."""


@dataclass(frozen=True)
class Job:
    """One case to be judged. `properties` is how many to choose, or their names. `inputs`: a file of saved inputs."""

    case: Case
    targets: tuple[str, ...]
    properties: int | tuple[str, ...] = 0
    inputs: str | None = None


@dataclass(frozen=True)
class Result:
    """What became of one (case, target). `verdict` is that of `fuzz.judge.Verdict.to_dict`; seconds by stage."""

    case: Case
    target: str
    outcome: str  # "passed" | "failed" | "skipped"
    reason: str = ""
    verdict: dict | None = None
    properties: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failed_checks(self) -> list[dict]:
        return [check for check in (self.verdict or {}).get("checks", ()) if not check["passed"]]


def failure(case: Case, target: str, properties: tuple[str, ...], check: str, detail: str) -> Result:
    """A Result for what the judge never saw: the target raised, hung or died. `detail` is 'class: explanation'."""
    verdict = {"checks": [{"name": check, "passed": False, "errors": {}, "bounds": {}, "detail": detail}]}
    return Result(case, target, "failed", check, verdict, properties)


# ---------------------------------------------------------------------------------------------------- the parent's side


class Worker:
    """A process that judges, replaced by a fresh one when it dies or has to be killed.

    targets: their names. lenient: a target which cannot be had is described with the reason, else WorkerError.
    """

    def __init__(self, targets: Sequence[str], *, time_limit: float, threads: int | None = None, lenient: bool = False):
        self.targets = tuple(targets)
        self.time_limit = time_limit
        self.threads = threads
        self.lenient = lenient
        self.descriptions: list[dict] = []
        self.devices: list[str] = []
        self.job: Job | None = None
        self.waiting: list[str] = []  # targets of the job without a result
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = connection.Pipe()
        self.connection = ours
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the workers.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from fuzz.worker import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self.ready = False
        self.taken = False  # whether it has begun with the job; if not, the job is not what ended it
        self.running: str | None = None  # the target at work, None for the oracle
        self.properties: tuple[str, ...] = ()  # that it is checked for
        self.since = time.monotonic()
        with contextlib.suppress(OSError):  # when it died already, which `advance` will see
            self.connection.send((self.targets, self.threads, self.lenient))

    def submit(self, job: Job) -> None:
        self.job, self.waiting = job, list(job.targets)
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
        if died:
            results += self._replace("died", f"{self._how_it_ended()}{self._last_words()}", waited)
        elif self.overdue():
            self._kill()
            limit = self.limit()
            results += self._replace("timeout", f"time limit: no answer within {limit:g} s", waited)
        return results

    def limit(self) -> float:
        if not self.ready:
            return START_LIMIT
        return ORACLE_LIMIT if self.running is None else self.time_limit

    def overdue(self) -> bool:
        return (self.job is not None or not self.ready) and time.monotonic() - self.since > self.limit()

    def _receive(self, kind: str, value) -> list[Result]:
        self.since = time.monotonic()
        if kind == "ready":
            self.ready, (self.descriptions, self.devices) = True, value
        elif kind == "error":
            raise WorkerError(value)
        elif kind == "running":
            self.taken = True
            self.running, self.properties = value
        elif kind == "result":
            self.running = None
            self.waiting.remove(value.target)
            if not self.waiting:
                self.job = None
            return [value]
        return []

    def _replace(self, check: str, detail: str, seconds: float) -> list[Result]:
        """Blames the target at work, and gives the rest of the job to a new process."""
        self.connection.close()
        if not self.ready:
            raise WorkerError(f"a worker could not start: {detail}")
        results = []
        job, running = self.job, self.running
        if job is not None and self.taken:
            if running is None:  # inputs or oracle: the harness's own failure, shown as one and never passed over
                detail = f"{detail} ({check} in the inputs or the oracle)"
                results = [failure(job.case, name, (), "harness", detail) for name in self.waiting]
                self.waiting = []
            else:
                result = failure(job.case, running, self.properties, check, detail)
                results = [replace(result, seconds={"target": seconds})]
                self.waiting.remove(running)
        self._spawn()
        if self.waiting:
            self._send(replace(job, targets=tuple(self.waiting)))
        else:
            self.job = None
        return results

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
        words = [line.strip() for line in (stack if crashed else log).splitlines() if line.strip()]
        words = words[:lines] if crashed else words[-lines:]
        return f"; it wrote: {' | '.join(words)}" if words else ""

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever the target started
        self.process.wait()

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


# --------------------------------------------------------------------------------------------------- the worker's side


def main(descriptor: int) -> None:
    pipe = connection.Connection(descriptor)
    os.set_inheritable(descriptor, False)
    faulthandler.enable(all_threads=False)
    _die_with_parent()
    names, threads, lenient = pipe.recv()
    import torch

    if threads:
        torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is first imported, by whatever target
    targets, descriptions = {}, []
    import fuzz.judge
    import fuzz.properties  # noqa: F401 - now, so that no target's time has these imports in it

    for name in names:
        try:
            target = load_target(name)
        except TargetError as error:
            if not lenient:
                pipe.send(("error", str(error)))
                return
            descriptions.append({"name": name, "unavailable": str(error)})
        else:
            targets[target.name] = target
            descriptions.append(describe(target))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    pipe.send(("ready", (descriptions, devices)))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        for message in carry_out(job, targets):
            pipe.send(message)


def describe(target: Target) -> dict:
    return {
        "name": target.name,
        "device": target.device,
        "note": target.note,
        "slow": target.slow,
        "exempt": dict(target.exempt),
        "unavailable": None,
    }


def carry_out(job: Job, targets: dict[str, Target]) -> Iterator[tuple[str, object]]:
    """Judges the job's case with each of its targets in turn, saying before each which one it is."""
    shared = Shared(job)
    for name in job.targets:
        target = targets[name]
        yield "running", (name, ())
        reason = target.reach(job.case)
        if reason is not None:
            yield "result", Result(job.case, name, "skipped", reason)
            continue
        yield "running", (None, ())
        try:
            shared.prepare(target.device)
        except Exception:
            yield "result", failure(job.case, name, (), "harness", _where("inputs or the oracle"))
            continue
        properties = chosen_properties(job, target)
        yield "running", (name, properties)
        yield "result", judge_one(job.case, target, properties, shared)


class Shared:
    """The inputs and the reference of one case, made once for each device and timed."""

    def __init__(self, job: Job):
        self.job = job
        self.inputs: dict[str, object] = {}
        self.references: dict[str, object] = {}
        self.seconds: dict[str, float] = {}

    def prepare(self, device: str) -> None:
        from fuzz.inputs import load_inputs, make_inputs
        from fuzz.judge import reference

        began = time.perf_counter()
        if not self.inputs:
            self.inputs["cpu"] = load_inputs(self.job.inputs) if self.job.inputs else make_inputs(self.job.case)
        if device not in self.inputs:
            self.inputs[device] = self.inputs["cpu"].to(device)
        made = time.perf_counter()
        if device not in self.references:
            self.references[device] = reference(self.inputs[device], device)
        self.seconds["generate"] = self.seconds.get("generate", 0.0) + made - began
        self.seconds["oracle"] = self.seconds.get("oracle", 0.0) + time.perf_counter() - made

    def take_seconds(self) -> dict[str, float]:
        """The time spent since it was last asked for: whoever comes first has it in its result."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def judge_one(case: Case, target: Target, properties: tuple[str, ...], shared: Shared) -> Result:
    from fuzz.judge import judge

    spent = 0.0
    raised: BaseException | None = None

    def timed(*args, **kwargs):
        nonlocal spent, raised
        began = time.perf_counter()
        try:
            return target.fwd(*args, **kwargs)
        except BaseException as error:
            raised = error
            raise
        finally:
            spent += time.perf_counter() - began

    began = time.perf_counter()
    inputs, reference = shared.inputs[target.device], shared.references[target.device]
    try:
        verdict = judge(replace(target, fwd=timed), case, inputs, reference, properties)
        outcome = "passed" if verdict.passed else "failed"
        failed = ", ".join(check.name for check in verdict.failed)
        result = Result(case, target.name, outcome, failed, verdict.to_dict(), properties)
    except BaseException as error:
        if raised is None:  # the judge's own error: a finding too, so that it cannot be overlooked
            result = failure(case, target.name, properties, "harness", _where("judge"))
        elif _out_of_memory(error):
            result = Result(case, target.name, "skipped", "out of memory")
        else:
            result = failure(case, target.name, properties, "raised", first_line(raised))
    seconds = {**shared.take_seconds(), "target": spent, "judge": time.perf_counter() - began - spent}
    return replace(result, seconds=seconds)


def chosen_properties(job: Job, target: Target) -> tuple[str, ...]:
    """The names of the properties to check: those asked for that apply, or some chosen by the case's seed."""
    from fuzz.properties import applicable, choose

    if isinstance(job.properties, tuple):
        names = tuple(name for name in job.properties if applicable(name, job.case))
    else:
        few = int(job.case.seed % SLOW_SHARE == 0)
        names = choose(job.case, min(job.properties, few) if target.slow else job.properties)
    return tuple(name for name in names if name not in target.exempt)


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _where(stage: str) -> str:
    """'class: explanation' of the exception being handled in the harness's own code."""
    error = sys.exc_info()[1]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} (in the {stage}, {Path(place.filename).name}:{place.lineno})"


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that `kill -9` of a campaign leaves no worker behind."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
