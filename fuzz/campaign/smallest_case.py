"""Shrinking: the smallest case on which the same target fails the same check. Hypothesis does the search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import NoSuchExample

from fuzz.campaign.findings import UNJUDGED, Failure, failures
from fuzz.campaign.job import REPEATS, Job
from fuzz.campaign.worker import Worker, judge_job, wait_until_ready
from fuzz.cases.case import Case
from fuzz.cases.strategies import smaller


@dataclass(frozen=True)
class Shrunk:
    """The smallest failure found, how many cases were judged on the way, and whether the search came to its end."""

    failure: Failure
    judged: int
    finished: bool


class OutOfTime(BaseException):
    """Ends the search. Hypothesis takes an Exception for the failure that it looks for, so this is none."""


def shrink(
    failure: Failure,
    judge_again: Callable[[Case, float], Failure | None],
    *,
    seconds: float,
    starts: Iterable[Case] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Shrunk:
    """Looks for the smallest case that fails in the same way, for `seconds` at most or until `stop()`.

    judge_again: gives the failure of a case in the same group, or None. Its second argument is a time of
    `time.monotonic`, after which it raises OutOfTime.
    starts: cases to begin at, if they fail in the same way. They are usually the shrunk cases of other findings.
    """
    deadline = time.monotonic() + seconds
    seen: dict[Case, Failure | None] = {failure.case: failure}
    best = failure

    def fails(case: Case) -> bool:
        nonlocal best
        if case not in seen:
            if stop() or time.monotonic() > deadline:
                raise OutOfTime
            seen[case] = judge_again(case, deadline)
            best = seen[case] or best  # Hypothesis goes from larger to smaller
        return seen[case] is not None

    try:
        any(fails(case) for case in starts)
        while True:
            begun_at = best.case
            best = seen[_smallest(begun_at, fails)]
            if (
                best.case == begun_at
            ):  # what is simplified together may allow more to be simplified, so until it does not
                return Shrunk(best, len(seen) - 1, True)
    except OutOfTime:
        return Shrunk(best, len(seen) - 1, False)


def _smallest(case: Case, fails: Callable[[Case], bool]) -> Case:
    settings = hypothesis.settings(
        database=None,
        deadline=None,
        max_examples=500,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        return hypothesis.find(smaller(case), fails, settings=settings, random=Random(0))
    except NoSuchExample:
        return case


def in_worker(worker: Worker, failure: Failure, stop: Callable[[], bool] = lambda: False):
    """A `judge_again` that asks a worker, which has the failure's target among its own."""
    name = failure.check["name"]
    if name in UNJUDGED:
        properties = failure.properties  # it raised, hung or died in one of these, or in the first call
    else:
        properties = tuple(each for each in failure.properties if each == name)

    def judge_again(case: Case, deadline: float) -> Failure | None:
        def until() -> bool:
            return stop() or time.monotonic() > deadline

        wait_until_ready(worker, until)
        results = judge_job(worker, Job(case, (failure.target,), properties, error_map=True, repeats=REPEATS), until)
        if results is None:
            raise OutOfTime
        same = [found for result in results for found in failures(result) if found.group == failure.group]
        return same[0] if same else None

    return judge_again
