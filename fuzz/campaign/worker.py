"""Workers: processes that judge targets, so that a target which hangs or kills its process costs one worker.

The parent imports neither PyTorch nor a target. It sends one Job at a time over a pipe and is told which target is
running; so it knows whom to blame when the process dies or overruns its time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path

from fuzz.cases.case import Case
from fuzz.targets.registry import REQUIRED, Target, TargetError, first_line, load_target

START_LIMIT = 300.0  # seconds until a process has imported its targets; the first import of PyTorch from a cold disk
ORACLE_LIMIT = 600.0  # seconds for the inputs and the oracle of one case, which no target is blamed for

KILL_LIMIT = 30.0  # seconds that the end of a killed process is waited for
RESTARTS = 3  # processes in a row that may fail to start where one has started before
WARM_CALLS = 5  # answers of a target until it is taken to have compiled what it needs (`Target.warm_up`)
REWARM = 30.0  # seconds of that for the first call in a further process: what was compiled is in caches on disk

SLOW_SHARE = 4  # one case in so many has a property checked on a slow target

FATAL = ("timeout", "died")  # checks that cost a process


class WorkerError(RuntimeError):
    """A worker cannot be started; the message is one line that says why."""


@dataclass(frozen=True)
class Job:
    """One case to be judged.

    properties: how many to choose, or their names. inputs: a file of saved inputs. error_map: draw one where it failed.
    """

    case: Case
    targets: tuple[str, ...]
    properties: int | tuple[str, ...] = 0
    inputs: str | None = None
    error_map: bool = False


@dataclass(frozen=True)
class Result:
    """What became of one (case, target). `verdict` is from `fuzz.judging.verdict.Verdict.to_dict`; seconds by stage."""

    case: Case
    target: str
    outcome: str  # "passed" | "failed" | "skipped"
    reason: str = ""
    verdict: dict | None = None
    properties: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    error_map: dict | None = None  # of `fuzz.judging.error_map`

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
    gpu: what CUDA_VISIBLE_DEVICES is to be, as it is where None. memory: the share of that GPU's memory it may take.
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
        self.waiting: list[str] = []  # targets of the job without a result
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = connection.Pipe()
        self.connection = ours
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
        # What one worker finds out about a kernel's configurations, the others and its successors need not.
        environment.setdefault("TRITON_CACHE_AUTOTUNING", "1")
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the workers.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from fuzz.campaign.worker import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self.ready = False
        self.spent = False  # whether it asked to be replaced
        self.warm: set[str] = set()  # targets that have answered in this process
        self.taken = False  # whether it has begun with the job; if not, the job is not what ended it
        self.running: str | None = None  # the target at work, None for the oracle
        self.properties: tuple[str, ...] = ()  # that it is checked for
        self.since = time.monotonic()
        with contextlib.suppress(OSError):  # when it died already, which `advance` will see
            self.connection.send((self.targets, self.threads, self.lenient, self.memory))

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
        if kind == "ready":
            self.ready, (self.descriptions, self.devices) = True, value
            self.failed_starts = 0
        elif kind == "error":
            raise WorkerError(value)
        elif kind == "running":
            self.taken = True
            self.running, self.properties = value
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
                raise WorkerError(f"a worker could not start: {detail}")
            self._renew()
            return []
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
        self._renew()
        return results

    def _renew(self) -> None:
        """A new process, which goes on with the job."""
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
        words = [line.strip() for line in (stack if crashed else log).splitlines() if line.strip()]
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
    die_with_parent()
    names, threads, lenient, memory = pipe.recv()
    TELL.append(pipe.send)
    import torch

    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        if memory is not None:
            torch.cuda.set_per_process_memory_fraction(memory)
        watch_tuning()
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is first imported, by whatever target
    targets, descriptions = {}, []
    import fuzz.judging.judge
    import fuzz.judging.properties  # noqa: F401 - now, so that no target's time has these imports in it

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
            if message[0] == "spent":
                return


TELL: list[Callable[[tuple[str, object]], None]] = []  # how this process speaks to its parent
TUNING: Counter[str] = Counter()  # "seconds" that Triton spent on choosing among configurations in this process


def tell_of_tuning() -> None:
    for tell in TELL:
        tell(("tuning", None))


def watch_tuning() -> None:
    """Tells the parent of each kernel that Triton compiles and each configuration that it tries; TUNING has the time of
    the latter.

    Both may take minutes, and come again with other shapes. A kernel that hangs while it is tuned shows all the same.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from triton.compiler import ASTSource  # one is made for each compilation, before it

        made = ASTSource.__init__

        def told(*args, **kwargs):
            tell_of_tuning()
            made(*args, **kwargs)

        ASTSource.__init__ = told
    try:
        from triton.runtime.autotuner import Autotuner

        bench = Autotuner._bench
    except (ImportError, AttributeError):
        return

    def watched(*args, **kwargs):
        tell_of_tuning()
        began = time.perf_counter()
        try:
            return bench(*args, **kwargs)
        finally:
            TUNING["seconds"] += time.perf_counter() - began
            tell_of_tuning()

    Autotuner._bench = watched


def describe(target: Target) -> dict:
    return {
        "name": target.name,
        "device": target.device,
        "note": target.note,
        "slow": target.slow,
        "warm_up": target.warm_up,
        "exempt": dict(target.exempt),
        "unavailable": None,
    }


def carry_out(job: Job, targets: dict[str, Target]) -> Iterator[tuple[str, object]]:
    """Judges the job's case with each of its targets in turn, saying before each which one it is."""
    from fuzz.judging.call import out_of_memory

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
        except Exception as error:
            if out_of_memory(error):
                yield "result", Result(job.case, name, "skipped", "out of memory in the inputs or the oracle")
                free_memory(shared)
            else:
                yield "result", failure(job.case, name, (), "harness", _where("inputs or the oracle"))
        else:
            properties = chosen_properties(job, target)
            yield "running", (name, properties)
            result = judge_one(job.case, target, properties, shared)
            yield "result", result
            if result.reason.startswith("out of memory"):
                free_memory(shared)
        if device_error() is not None:
            yield "spent", None
            return


def device_error() -> Exception | None:
    """Why the GPU no longer answers this process, as after an illegal access it never does again; None if it does."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return error
    return None


def free_memory(shared: Shared) -> None:
    """Gives back what this process has no more use for, so that the other workers of a GPU have it."""
    import torch

    shared.forget()
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


class Shared:
    """The inputs of one case on each device, and its reference, on the GPU where there is one; made once, and timed."""

    def __init__(self, job: Job):
        self.job = job
        self.inputs: dict[str, object] = {}
        self.reference = None
        self.seconds: dict[str, float] = {}

    def forget(self) -> None:
        """What was made can be made again."""
        self.inputs, self.reference = {}, None

    def prepare(self, device: str) -> None:
        from fuzz.cases.inputs import load_inputs, make_inputs
        from fuzz.judging.sensitivity import reference
        from fuzz.targets.registry import default_device

        began = time.perf_counter()
        if not self.inputs:
            self.inputs["cpu"] = load_inputs(self.job.inputs) if self.job.inputs else make_inputs(self.job.case)
        for each in (device, default_device()):
            if each not in self.inputs:
                self.inputs[each] = self.inputs["cpu"].to(each)
        finish()
        made = time.perf_counter()
        if self.reference is None:
            self.reference = reference(self.inputs[default_device()], default_device())
            finish()
        self.seconds["generate"] = self.seconds.get("generate", 0.0) + made - began
        self.seconds["oracle"] = self.seconds.get("oracle", 0.0) + time.perf_counter() - made

    def take_seconds(self) -> dict[str, float]:
        """The time spent since it was last asked for: whoever comes first has it in its result."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def finish() -> None:
    """Waits for the GPU, so that its time is counted where it was spent."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def judge_one(case: Case, target: Target, properties: tuple[str, ...], shared: Shared) -> Result:
    from fuzz.judging.call import out_of_memory
    from fuzz.judging.judge import judge

    spent = 0.0
    raised: BaseException | None = None  # by the target, at last; what a check expects of it goes no further
    written: list[tuple] = []  # out and final_state of the first call, the one that is compared with the oracle

    def timed(*args, **kwargs):
        nonlocal spent, raised
        began, tuning = time.perf_counter(), TUNING["seconds"]
        try:
            target.fwd(*args, **kwargs)
            finish()  # what a kernel did wrong shows here, and not in whoever asks the GPU for something next
        except BaseException as error:
            raised = error
            raise
        finally:
            spent += time.perf_counter() - began - (TUNING["seconds"] - tuning)
        if job.error_map and not written:
            given = dict(zip(REQUIRED, args, strict=False)) | kwargs
            written.append((given["out"], given.get("final_state")))

    job = shared.job
    began, tuning = time.perf_counter(), TUNING["seconds"]
    inputs, reference = shared.inputs[target.device], shared.reference
    try:
        verdict = judge(replace(target, fwd=timed), case, inputs, reference, properties)
        outcome = "passed" if verdict.passed else "failed"
        failed = ", ".join(check.name for check in verdict.failed)
        result = Result(case, target.name, outcome, failed, verdict.to_dict(), properties)
        if written and reference is not None:
            result = replace(result, error_map=_error_map(result, *written[0], reference, inputs))
        finish()
    except BaseException as error:
        if out_of_memory(error):
            reason = "out of memory" if error is raised else "out of memory in the judge"
            result = Result(case, target.name, "skipped", reason)
        elif (lost := device_error()) is not None:
            result = failure(case, target.name, properties, "died", _lost_device(lost, error))
        elif error is raised:
            result = failure(case, target.name, properties, "raised", first_line(error))
        else:  # the judge's own error: a finding too, so that it cannot be overlooked
            result = failure(case, target.name, properties, "harness", _where("judge"))
    tuned = TUNING["seconds"] - tuning
    seconds = {**shared.take_seconds(), "target": spent, "judge": time.perf_counter() - began - spent - tuned}
    return replace(result, seconds={**seconds, "tune": tuned} if tuned else seconds)


def _error_map(result: Result, out, final_state, reference, inputs) -> dict | None:
    """Where the error sits that the oracle found; None where it is not the oracle that found one."""
    from fuzz.judging.error_map import error_map

    failed = {check["name"]: check for check in result.failed_checks}
    if not failed.keys() & {"accuracy", "written"}:
        return None
    check = failed.get("accuracy")
    only_state = check is not None and all(
        error <= check["bounds"][name] for name, error in check["errors"].items() if name.startswith("out")
    )
    of = "state" if only_state and "written" not in failed and final_state is not None else "out"
    return error_map(out, final_state, reference, inputs.seq_bounds(), of) or None


def _lost_device(lost: Exception, error: BaseException) -> str:
    """'class: explanation' of a GPU that has stopped answering this process: the same whoever noticed it first."""
    return f"{first_line(lost).rpartition('CUDA error: ')[2]}: CUDA error, {type(error).__name__}"


def chosen_properties(job: Job, target: Target) -> tuple[str, ...]:
    """The names of the properties to check: those asked for that apply, or some chosen by the case's seed."""
    from fuzz.judging.checks import applicable
    from fuzz.judging.properties import choose

    if isinstance(job.properties, tuple):
        names = tuple(name for name in job.properties if applicable(name, job.case))
    else:
        few = int(job.case.seed % SLOW_SHARE == 0)
        names = choose(job.case, min(job.properties, few) if target.slow else job.properties)
    return tuple(name for name in names if name not in target.exempt)


def _where(stage: str) -> str:
    """'class: explanation' of the exception being handled in the harness's own code."""
    error = sys.exc_info()[1]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} (in the {stage}, {Path(place.filename).name}:{place.lineno})"


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that `kill -9` of a campaign leaves no worker behind."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
