"""Replay and minimise: a worker judges saved findings and cases again, as in a campaign."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

from fuzz.campaign import findings
from fuzz.campaign.findings import Failure, FindingError, SavedFinding
from fuzz.campaign.job import RATE_OF, Job, Result
from fuzz.campaign.known import Known, names_of
from fuzz.campaign.plan import DEFAULT_TARGET
from fuzz.campaign.smallest_case import in_worker, shrink
from fuzz.campaign.worker import Worker, inputs_writer, judge_job, ready_worker, wait_until_ready
from fuzz.targets.promises import bare

SMALLER = "-smaller"  # in the name of what `minimize` makes of a finding, and a number after it
EVERY = 1000  # properties: more than there are, so all that apply


def replay(
    saved: Sequence[SavedFinding],
    *,
    target: str | None = None,
    time_limit: float = 60.0,
    repeat: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    describe: Callable[[dict], object] = lambda description: None,
) -> Iterator[tuple[SavedFinding, Result]]:
    """Judges each again. A finding is judged from its saved inputs alone, so its generator may have changed since.

    target: name of the target to judge, instead of the one in the finding.
    repeat: number of times that each is judged. None: once, and `RATE_OF` times for an intermittent finding. The result
    is one that failed, if any did, and its `repeats` counts all of them.
    stop: ends the replay early, between results or while one is awaited.
    describe: is called once with the description of each target.

    Raises WorkerError when a target cannot be loaded.
    """
    look_in_folders(saved, target)
    specs = tuple(dict.fromkeys(target_of(one, target) for one in saved))
    with ready_worker(specs, time_limit=time_limit, until=stop) as worker:
        for description in worker.descriptions:
            describe(description)
        for one in saved:
            job = job_of(one, worker.descriptions[worker.targets.index(target_of(one, target))]["name"])
            results: list[Result] = []
            while len(results) < times_of(one, repeat):
                judged = None if stop() else judge_job(worker, job, stop)
                if judged is None:
                    return
                results += judged
            yield one, together(results)


def replay_here(
    saved: Sequence[SavedFinding],
    *,
    target: str | None = None,
    repeat: int | None = None,
    describe: Callable[[dict], object] = lambda description: None,
) -> Iterator[tuple[SavedFinding, Result]]:
    """As `replay`, in this process: prints are seen, a debugger works, and there is no time limit.

    A target that ends its process ends this one. Raises TargetError when a target cannot be had.
    """
    from fuzz.campaign.worker_process import judge_here, load, prepare

    prepare()
    look_in_folders(saved, target)
    targets = {}
    for spec in dict.fromkeys(target_of(one, target) for one in saved):
        targets[spec], description = load(spec)
        describe(description)
    for one in saved:
        loaded = targets[target_of(one, target)]
        job = job_of(one, loaded.name)
        yield one, together([judge_here(job, loaded) for _ in range(times_of(one, repeat))])


def times_of(saved: SavedFinding, repeat: int | None) -> int:
    """How often a finding or a case is judged."""
    return repeat or (RATE_OF if findings.is_intermittent(saved) else 1)


def together(results: Sequence[Result]) -> Result:
    """One result of the same case, judged several times: one that failed where any did."""
    failed = [result for result in results if result.outcome == "failed"]
    result = next(iter(failed), results[-1])
    if len(results) == 1 or result.verdict is None:
        return result
    return replace(result, verdict={**result.verdict, "repeats": (len(failed), len(results))})


def outcome_of(result: Result, known: Known) -> tuple[str, str]:
    """The outcome of a replay, and the reason where every failed check was known: then it is "known"."""
    if any(check["name"] == "harness" for check in result.failed_checks):  # says nothing about the target
        return "not judged", ""
    reasons = [known.reason(one.target, names_of(one), one.case) for one in findings.failures(result)]
    if reasons and all(reasons):
        return "known", "; ".join(dict.fromkeys(reasons))
    return result.outcome, ""


def stand_apart(saved: Sequence[SavedFinding], target: str | None) -> list[SavedFinding]:
    """The findings that have no say: of what was a reference in its campaign, beside others.

    Older findings do not say what their targets were. There, built-in ones were references, beside flash_kda or one of
    a user.
    """
    from fuzz.targets.registry import BUILTIN

    def was_reference(one: SavedFinding) -> bool:
        name = bare(target_of(one, None))
        return (one.finding or {}).get("reference", name in BUILTIN and name != DEFAULT_TARGET)

    apart = [] if target is not None else [one for one in saved if was_reference(one)]
    return apart if len(apart) < len(saved) else []


def target_of(saved: SavedFinding, target: str | None) -> str:
    """The target to judge: the one that is given, or that of the finding. A file that a finding names relative to the
    working directory of its campaign is looked for there too.
    """
    finding = saved.finding or {}
    name = target or finding.get("target", DEFAULT_TARGET)
    place, _, attribute = name.rpartition(":")
    if target is None and place.endswith(".py") and not Path(place).is_file():
        there = Path(finding.get("folder", "")) / place
        return f"{there}:{attribute}" if there.is_file() else name
    return name


def look_in_folders(saved: Sequence[SavedFinding], target: str | None) -> None:
    """Has the modules of targets that are not found here looked for in the working directories of their campaigns."""
    for one in saved if target is None else ():
        place, colon, _ = target_of(one, None).rpartition(":")
        folder = (one.finding or {}).get("folder", "")
        module = place.partition(".")[0]
        if not colon or place.endswith(".py") or folder in ("", *sys.path):
            continue
        if importlib.util.find_spec(module) is None and PathFinder.find_spec(module, [folder]) is not None:
            sys.path.append(folder)


def other_file(saved: SavedFinding, description: dict) -> str:
    """The file that the target of a finding came from, where that is still there and is not the one described."""
    file = (saved.finding or {}).get("file", "")
    same = bare(saved.finding["target"]) == bare(description["name"]) if file else True
    return "" if not same or file == description["file"] or not Path(file.partition(" (")[0]).exists() else file


@contextmanager
def references(time_limit: float = 60.0) -> Iterator[Callable[[SavedFinding], list[Result]]]:
    """What judges the references of a finding on its inputs: those that were judged beside its target in its campaign.

    Their process starts when it is first asked for. One that cannot be had is left out.
    """
    workers: dict[tuple[str, ...], Worker] = {}

    def judged(one: SavedFinding) -> list[Result]:
        names = tuple((one.finding or {}).get("beside", ()))
        if not names:
            return []
        if names not in workers:
            workers[names] = Worker(names, time_limit=time_limit, lenient=True)
            wait_until_ready(workers[names])
        can_run = tuple(each["name"] for each in workers[names].descriptions if each["unavailable"] is None)
        return judge_job(workers[names], replace(job_of(one, ""), targets=can_run)) if can_run else []

    try:
        yield judged
    finally:
        for worker in workers.values():
            worker.close()


def job_of(saved: SavedFinding, name: str) -> Job:
    """The job that judges it on the target of that name."""
    properties = tuple(saved.finding["properties"]) if saved.finding else EVERY
    inputs = str(saved.inputs) if saved.inputs else None
    return Job(saved.case, (name,), properties, inputs)


def minimize(
    path: Path,
    *,
    target: str | None = None,
    seconds: float = 120.0,
    time_limit: float = 60.0,
    describe: Callable[[dict], object] = lambda description: None,
):
    """Shrinks a finding or a case file further; returns the Shrunk and the new finding folder beside it.

    describe: is told of the target.

    The folder is None when nothing smaller fails. Returns None when it does not fail (any more). Raises FindingError
    when only its saved inputs fail. The generator has changed since, and makes other inputs of the case.
    """
    saved = findings.load(path)
    original = findings.load_case_file(path / "original.json").case if saved.finding else saved.case
    look_in_folders([saved], target)
    with ready_worker((target_of(saved, target),), time_limit=time_limit) as worker:
        describe(worker.descriptions[0])
        result = judge_job(worker, job_of(saved, worker.descriptions[0]["name"]))[0]
        failed = findings.failures(result)
        if not failed:
            return None
        failure = same_check(failed, saved)
        if saved.inputs and in_worker(worker, failure)(saved.case, float("inf")) is None:
            raise FindingError(
                f"{path}: expected a failure on the inputs that its case gives now, got none. Only its saved inputs "
                "fail, so it cannot be shrunk"
            )
        shrunk = shrink(failure, in_worker(worker, failure), seconds=seconds)
        environment, file = findings.environment(worker.devices), worker.descriptions[0]["file"]
    if shrunk.failure.case == saved.case:
        return shrunk, None
    folder = free_name(path)
    with inputs_writer() as write:
        findings.save(
            folder,
            shrunk.failure,
            original,
            environment=environment,
            write_inputs=partial(write, shrunk.failure.case),
            state="shrunk" if shrunk.finished else "cut short",
            origin={**findings.origin_of(saved), "file": file, "folder": str(Path.cwd())},
        )
    return shrunk, folder


def same_check(failed: list[Failure], saved: SavedFinding) -> Failure:
    """The failure that the finding was saved for, or the first."""
    wanted = (saved.finding or {}).get("check")
    return next((failure for failure in failed if failure.check["name"] == wanted), failed[0])


def free_name(path: Path) -> Path:
    """A name beside `path` that is not taken."""
    path = path.resolve()
    stem = path.name if path.is_dir() else path.stem
    number = 1
    while (folder := path.with_name(f"{stem}{SMALLER}{number}")).exists():
        number += 1
    return folder


def is_smaller(path: Path) -> bool:
    """Whether `minimize` made this finding, of another one beside it."""
    return bool(re.search(rf"{SMALLER}\d+$", path.name))
