"""Saved findings and cases as tests of a suite of your own.

from fuzz.pytest_helper import replays

test_findings = replays("findings", target="mykernel:fwd")
"""

from __future__ import annotations

import atexit
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fuzz.campaign import findings
from fuzz.campaign.findings import SavedFinding
from fuzz.campaign.known import read
from fuzz.campaign.replay import job_of, outcome_of, target_of, times_of, together
from fuzz.campaign.worker import Worker, judge_job, wait_until_ready
from fuzz.reporting.display import describe_result


class KnownFailurePassed(UserWarning):
    """A finding passes although a line of the known failures covers it."""


WORKERS: dict[tuple[str, float], Worker] = {}  # by target and time limit, for as long as the suite runs


def replays(
    path: str | Path,
    *,
    target: str | None = None,
    repeat: int | None = None,
    time_limit: float = 60.0,
    known: str | Path | None = None,
) -> Callable[[SavedFinding], None]:
    """A test for each finding and case file at `path`, which is relative to the file that calls this function.

    Each is judged in a process of its own, so a crash or a hang fails one test. A case that the target does not support
    is skipped.

    target: built-in target or `package.module:function`. None: the target that the finding names.
    repeat: number of times that each is judged. None: once, and more often for an intermittent finding.
    time_limit: seconds for one call.
    known: file of known failures, as for `--known`, also relative to the file that calls this function. A failure in it
    is expected (xfail), with the reason. A finding that passes although a line covers it gives a warning.

    Raises FindingError where nothing is saved at `path`, and KnownError where `known` makes no sense.
    """
    here = Path(inspect.stack()[1].filename).parent
    folder = here / path
    saved = findings.find(folder)
    known_failures = read(None if known is None else here / known)

    @pytest.mark.parametrize("saved", saved, ids=[str(one.path.relative_to(folder.parent)) for one in saved])
    def replayed(saved: SavedFinding) -> None:
        worker = worker_of(target_of(saved, target), time_limit)
        job = job_of(saved, worker.descriptions[0]["name"])
        result = together([judge_job(worker, job)[0] for _ in range(times_of(saved, repeat))])
        if result.outcome == "skipped":
            pytest.skip(f"{result.target}: {result.reason}")
        if result.outcome == "passed" and saved.finding is not None:
            failure = replace(findings.load_failure(saved), target=result.target)
            for entry in known_failures.covering(failure):
                warnings.warn(entry.gone(known_failures.path), KnownFailurePassed, stacklevel=1)
        outcome, reason = outcome_of(result, known_failures)
        if outcome == "known":
            pytest.xfail(reason)
        if result.outcome == "failed":
            pytest.fail("\n".join(describe_result(saved.path, result)), pytrace=False)

    return replayed


def worker_of(target: str, time_limit: float) -> Worker:
    """The worker of a target: started once, because it imports PyTorch. Raises WorkerError where it cannot be had."""
    key = target, time_limit
    if key not in WORKERS:
        worker = Worker((target,), time_limit=time_limit)
        atexit.register(worker.close)
        wait_until_ready(worker)
        WORKERS[key] = worker
    return WORKERS[key]
