"""Replay and minimise: a worker judges saved findings and cases again, as in a campaign."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from fuzz.campaign import findings
from fuzz.campaign.findings import Failure, FindingError, Saved
from fuzz.campaign.job import Job, Result
from fuzz.campaign.shrink import in_worker, shrink
from fuzz.campaign.worker import Worker, inputs_writer, judge_job, wait_until_ready

DEFAULT_TARGET = "flash_kda"  # of a case file, which names none
SMALLER = "-smaller"  # in the name of what `minimize` makes of a finding, and a number after it
EVERY = 1000  # properties: more than there are, so all that apply


def replay(
    saved: Sequence[Saved],
    *,
    target: str | None = None,
    time_limit: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Saved, Result]]:
    """Judges each again. A finding is judged from its saved inputs alone, so its generator may have changed since.

    target: instead of the one that a finding names. stop: ends it early, between results or while one is awaited.
    Raises WorkerError when a target cannot be had.
    """
    specs = tuple(dict.fromkeys(target_of(one, target) for one in saved))
    worker = Worker(specs, time_limit=time_limit)
    try:
        wait_until_ready(worker, stop)
        for one in saved:
            results = None if stop() else judge_job(worker, job_of(one, worker, target), stop)
            if results is None:
                return
            yield one, results[0]
    finally:
        worker.close()


def target_of(saved: Saved, target: str | None) -> str:
    return target or (saved.finding or {}).get("target", DEFAULT_TARGET)


def job_of(saved: Saved, worker: Worker, target: str | None) -> Job:
    name = worker.descriptions[worker.targets.index(target_of(saved, target))]["name"]
    properties = tuple(saved.finding["properties"]) if saved.finding else EVERY
    inputs = str(saved.inputs) if saved.inputs else None
    return Job(saved.case, (name,), properties, inputs)


def minimize(path: Path, *, target: str | None = None, seconds: float = 120.0, time_limit: float = 60.0):
    """Shrinks a finding or a case file further; returns the Shrunk and the new finding folder beside it.

    The folder is None when nothing smaller fails. Returns None when it does not fail (any more). Raises FindingError
    when it fails from its saved inputs only: the generator has changed since and makes other inputs of the case, so
    there is nothing to shrink by.
    """
    saved = findings.load(path)
    original = findings.load_case_file(path / "original.json").case if saved.finding else saved.case
    worker = Worker((target_of(saved, target),), time_limit=time_limit)
    try:
        wait_until_ready(worker)
        result = judge_job(worker, job_of(saved, worker, target))[0]
        failed = findings.failures(result)
        if not failed:
            return None
        failure = same_check(failed, saved)
        if saved.inputs and in_worker(worker, failure)(saved.case, float("inf")) is None:
            raise FindingError(
                f"{path}: fails from its saved inputs, but not from those its case now gives; not shrunk"
            )
        shrunk = shrink(failure, in_worker(worker, failure), seconds=seconds)
        environment = findings.environment(worker.devices)
    finally:
        worker.close()
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
        )
    return shrunk, folder


def same_check(failed: list[Failure], saved: Saved) -> Failure:
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
