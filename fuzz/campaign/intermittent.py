"""Failures judged again on the same inputs: whether they repeat, and how often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from fuzz.campaign import findings
from fuzz.campaign.job import RATE_OF, Result

REPEAT_LIMIT = 30.0  # seconds for judging one failure again

MEASURED: set[str] = set()  # targets with a failure that did not repeat, and whose rate is known

REPEATING: set[tuple[str, str, str]] = set()  # groups of failures that repeated each time in this process


def repeat(
    result: Result, times: int, again: Callable[[], Result], lost: Callable[[], object] = lambda: None
) -> Iterator[tuple[int, int]]:
    """Judges a failure again on the same inputs: yields how often it failed again, and of how many times, after each.

    A failure that came each of `times` is taken for one that always does, and so are those of its group from then on.
    Of the first of a target that did not the rate is measured. lost: what says, by anything but None, that this process
    cannot judge.
    """
    groups = {failure.group for failure in findings.failures(result)}
    if groups & REPEATING or any(check["name"] == "harness" for check in result.failed_checks):
        return
    failed, judged, began = 0, 0, time.monotonic()
    while failed < judged < RATE_OF or (failed == judged and judged < times):
        if failed < judged and result.target in MEASURED:
            return
        one = again()
        if one.outcome == "skipped":  # out of memory, which says nothing
            return
        judged += 1
        failed += one.outcome == "failed"
        yield failed, judged
        if lost() is not None or (judged > 1 and time.monotonic() - began > REPEAT_LIMIT):
            return
    if failed == judged:
        REPEATING.update(groups)
    else:
        MEASURED.add(result.target)
