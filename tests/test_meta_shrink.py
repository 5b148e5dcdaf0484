"""Tests of the tests: shrinking keeps the failure. What it ends with fails the same check, in the same way."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from judged_targets import random_case

from fuzz.campaign import findings, smallest_case
from fuzz.campaign.findings import Failure
from fuzz.campaign.job import Job
from fuzz.campaign.worker import judge_job, ready_worker
from fuzz.cases.case import Case
from fuzz.cases.plain import PLAIN

SIZES = ("tokens", "n_seqs", "heads")


def failing(case: Case, name: str, kind: str) -> Failure:
    errors = {"out": 1.0} if kind == "out" else {"state": 1.0}
    check = {
        "name": name,
        "passed": False,
        "errors": errors,
        "bounds": dict.fromkeys(errors, 0.1),
        "detail": f"{kind}: ",
    }
    return Failure(case, "theirs", check, ())


def some_rule(draw: random.Random, case: Case):
    """A rule which holds for `case`, and on what it depends: it may hold for smaller cases, larger ones, or neither."""
    longest = max(case.seq_lens)
    rules = [
        lambda c: max(c.seq_lens) >= min(longest, 2),
        lambda c: any(length % 16 == longest % 16 for length in c.seq_lens),
        lambda c: c.keys == case.keys or c.betas == case.betas,
        lambda c: c.heads == case.heads,
        lambda c: (c.initial_state, c.final_state) == (case.initial_state, case.final_state),
        lambda c: c.gates == case.gates and c.layout == case.layout,
        lambda c: c.seed % 3 == case.seed % 3,
    ]
    chosen = draw.sample(rules, 2)
    return lambda c: all(rule(c) for rule in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_case_still_fails_in_the_same_way(seed):
    draw = random.Random(seed)
    start = random_case(draw)
    fails = some_rule(draw, start)
    judged: dict[Case, bool] = {}

    def judge_again(case: Case, deadline: float) -> Failure | None:
        judged[case] = fails(case)
        return failing(case, "accuracy", "out") if judged[case] else None

    found = smallest_case.shrink(failing(start, "accuracy", "out"), judge_again, seconds=60.0)
    smallest = found.failure.case
    assert found.failure.group == ("theirs", "accuracy", "out")
    assert fails(smallest) and (smallest == start or judged[smallest])
    assert all(getattr(smallest, size) <= getattr(start, size) for size in SIZES)
    assert found.judged == len(set(judged) - {start})


def test_a_search_that_is_cut_short_ends_with_a_case_that_was_seen_to_fail():
    start = replace(random_case(random.Random(3)), seq_lens=(60,), heads=3, packed=True)
    judged = {}

    def judge_again(case: Case, deadline: float) -> Failure | None:
        if len(judged) == 25:
            raise smallest_case.OutOfTime
        judged[case] = case.tokens > 7
        return failing(case, "accuracy", "out") if judged[case] else None

    found = smallest_case.shrink(failing(start, "accuracy", "out"), judge_again, seconds=60.0)
    assert not found.finished and judged[found.failure.case] and found.failure.case.tokens > 7


TWO_FAULTS = """
import flash_kda
import wrong_targets

def fwd(*args, **kwargs):
    \"\"\"Wrong in the output beyond 20 tokens, wrong in the state up to 20, and refuses no tokens at all.\"\"\"
    given = wrong_targets.arguments(args, kwargs)
    flash_kda.fwd(**given)
    tokens = given["q"].shape[:2].numel()
    if tokens == 0:
        raise ValueError("no tokens")
    if tokens > 20:
        given["out"].mul_(1.5)
    elif given["final_state"] is not None:
        given["final_state"].mul_(1.5)
"""


def test_it_does_not_slip_into_another_fault_of_the_same_target(tmp_path, monkeypatch):
    """Nearly every case fails somehow, and the smaller ones fail in another way."""
    (tmp_path / "two_faults.py").write_text(TWO_FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    start = replace(PLAIN, seq_lens=(23,), initial_state=None, scale=1.0, lower_bound=-1.0)
    with ready_worker(("two_faults:fwd",), time_limit=30.0, threads=1) as worker:
        (result,) = judge_job(worker, Job(start, worker.targets))
        (failure,) = findings.failures(result)
        assert failure.group == ("two_faults:fwd", "accuracy", "out")
        found = smallest_case.shrink(failure, smallest_case.in_worker(worker, failure), seconds=60.0)
        (again,) = judge_job(worker, Job(found.failure.case, worker.targets))
    assert found.failure.group == failure.group
    assert found.failure.case.tokens == 21 and found.failure.case.final_state is None
    assert [each.group for each in findings.failures(again)] == [failure.group]
    assert again.failed_checks[0]["errors"] == found.failure.check["errors"]
