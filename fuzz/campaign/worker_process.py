"""A worker's own process: it loads the targets, and judges the jobs that come over the pipe."""

from __future__ import annotations

import bdb
import contextlib
import faulthandler
import functools
import gc
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from pathlib import Path

from fuzz.campaign.exceptions import process_settings, traceback_of
from fuzz.campaign.intermittent import repeat
from fuzz.campaign.job import SLOW_SHARE, Job, Result, WorkerError, unjudged
from fuzz.cases.case import Case
from fuzz.targets.registry import REQUIRED, Target, TargetError, load_target
from fuzz.text import first_line


def main(descriptor: int) -> None:
    pipe = connection.Connection(descriptor)
    os.set_inheritable(descriptor, False)
    faulthandler.enable(all_threads=False)
    names, threads, lenient, memory = pipe.recv()
    TELL.append(pipe.send)
    prepare(threads, memory)
    import torch

    targets, descriptions = {}, []
    for name in names:
        pipe.send(("loading", name))  # so that it is known whose import ended the process
        try:
            target, description = load(name)
        except TargetError as error:
            if not lenient:
                pipe.send(("error", str(error)))
                return
            descriptions.append({"name": name, "spec": name, "unavailable": str(error)})
        else:
            targets[target.name] = target
            descriptions.append(description)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    pipe.send(("ready", (descriptions, devices)))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            for message in carry_out(job, targets):
                pipe.send(message)
                if message[0] == "spent":
                    return
        except TargetError as error:  # of a reach whose answer makes no sense
            pipe.send(("error", str(error)))
            return


def prepare(threads: int | None = None, memory: float | None = None) -> None:
    """Makes this process one that judges. memory: the share of the GPU's memory that it may take."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        if memory is not None:
            torch.cuda.set_per_process_memory_fraction(memory)
        watch_tuning()
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is first imported, by whatever target
    import fuzz.judging.judge
    import fuzz.judging.properties  # noqa: F401 - now, so that no target's time has these imports in it


def judge_here(job: Job, target: Target) -> Result:
    """The result of a job of one target, judged in this process. What interrupts or ends a debugger passes through."""
    return next(value for kind, value in carry_out(job, {target.name: target}) if kind == "result")


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


def load(spec: str) -> tuple[Target, dict]:
    """The target, and what the parent is told of it. What its import changes in the process is put back."""
    from fuzz.targets.process_state import put_back  # imports torch, which the choice of a GPU comes before

    changed: set[str] = set()
    process = os.getpid()
    with put_back(changed):
        try:
            target = load_target(spec)
        finally:
            end_if_forked(process)
    return target, {**describe(target), "spec": spec, "changed": sorted(changed)}


def end_if_forked(process: int) -> None:
    """Ends a process that a target made as a copy of this one, and that comes back from it: only one may answer."""
    if os.getpid() != process:
        os._exit(0)


def describe(target: Target) -> dict:
    return {
        "name": target.name,
        "file": target.file,
        "device": target.device,
        "note": target.note,
        "slow": target.slow,
        "warm_up": target.warm_up,
        "exempt": dict(target.exempt),
        "promises": target.promises.to_dict(),
        "limits": target.promises.describe(),
        "unavailable": None,
    }


def carry_out(job: Job, targets: dict[str, Target]) -> Iterator[tuple[str, object]]:
    """Judges the job's case with each of its targets in turn, saying before each which one it is."""
    from fuzz.judging.call import out_of_memory

    if job.save is not None:
        yield "saved", save(job)
        return
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
                yield "result", unjudged(job.case, name, (), "harness", _where("inputs or the oracle"))
        else:
            properties = chosen_properties(job, target)
            yield "running", (name, properties)
            result = judge_one(job.case, target, properties, shared)
            if job.repeats and result.outcome == "failed" and device_error() is None:
                again = partial(judge_one, job.case, target, properties, shared)
                for rate in repeat(result, job.repeats, again, device_error):
                    yield "running", (name, properties)
                    result = replace(result, verdict={**result.verdict, "repeats": rate})
            yield "result", result
            if result.reason.startswith("out of memory"):
                free_memory(shared)
        if device_error() is not None:
            yield "spent", None
            return


def save(job: Job) -> Exception | None:
    """Writes the inputs of the job's case to its file; what went wrong, if anything did."""
    from fuzz.cases.inputs import make_inputs, save_inputs

    try:
        save_inputs(job.save, make_inputs(job.case))
    except OSError as error:
        return error
    except Exception:
        return WorkerError(_where("inputs"))
    return None


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
    from fuzz.targets.process_state import put_back

    process, spent = os.getpid(), 0.0
    settings: dict = {}  # of the process, when it raised
    raised: BaseException | None = None  # by the target, at last; what a check expects of it goes no further
    changed: set[str] = set()  # by the target, in the process
    written: list[tuple] = []  # out and final_state of the first call, the one that is compared with the oracle

    @functools.wraps(target.fwd)  # for the signature
    def timed(*args, **kwargs):
        nonlocal spent, raised, settings
        with put_back(changed):
            began, tuning = time.perf_counter(), TUNING["seconds"]
            try:
                target.fwd(*args, **kwargs)
                finish()  # what a kernel did wrong shows here, and not in whoever asks the GPU for something next
            except BaseException as error:
                raised, settings = error, process_settings()
                raise
            finally:
                end_if_forked(process)
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
        if isinstance(error, TargetError) and error is not raised:
            raise
        if isinstance(error, (KeyboardInterrupt, bdb.BdbQuit)) and not TELL:
            raise  # by a person at the keyboard
        if out_of_memory(error):
            reason = "out of memory" if error is raised else "out of memory in the judge"
            result = Result(case, target.name, "skipped", reason)
        elif (lost := device_error()) is not None:
            result = unjudged(case, target.name, properties, "died", _lost_device(lost, error))
        elif error is raised:
            context = {"traceback": traceback_of(error), "settings": settings}
            result = replace(unjudged(case, target.name, properties, "raised", first_line(error)), context=context)
        else:  # the judge's own error: a finding too, so that it cannot be overlooked
            result = unjudged(case, target.name, properties, "harness", _where("judge"))
    if changed and result.verdict is not None:
        result = replace(result, verdict={**result.verdict, "changed": sorted(changed)})
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
    return error_map(out, final_state, reference, inputs.seq_ranges(), of) or None


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
