"""Workers: what a target does to its process is its result, and the next job finds a process that works."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest

from fuzz.case import Case
from fuzz.worker import Job, Worker, WorkerError, judge_job, wait_until_ready

CASE = Case(
    seq_lens=(5,),
    heads=1,
    packed=True,
    cu_seqlens_dtype="int32",
    lower_bound=-1.0,
    scale=1.0,
    initial_state=None,
    final_state="fp32",
    in_place=False,
    layout="contiguous",
    queries="random",
    keys="random",
    values="random",
    gates="centred",
    betas="random",
    states="random",
    seed=1,
)
SPECS = (
    "wrong_targets:hangs",
    "wrong_targets:exits",
    "wrong_targets:segfaults",
    "wrong_targets:raises",
    "flash_kda:fwd",
)


@pytest.fixture(scope="module")
def worker():
    worker = Worker(SPECS, time_limit=2.0, threads=1)
    wait_until_ready(worker)
    yield worker
    worker.close()


def outcomes(results):
    return {result.target.partition(":")[2]: (result.outcome, result.reason) for result in results}


def test_each_target_is_blamed_for_its_own_fault_and_the_rest_of_the_job_goes_on(worker):
    results = judge_job(worker, Job(replace(CASE, layout="strided", seq_lens=(21,)), SPECS))
    assert outcomes(results) == {
        "hangs": ("failed", "timeout"),
        "exits": ("failed", "died"),
        "segfaults": ("failed", "died"),
        "raises": ("failed", "raised"),
        "fwd": ("passed", ""),
    }
    details = {result.target.partition(":")[2]: result.failed_checks[0]["detail"] for result in results[:-1]}
    assert details["hangs"] == "time limit: no answer within 2 s"
    assert details["exits"].startswith("exit status 3: ")
    assert details["segfaults"].startswith("SIGSEGV: ") and "string_at" in details["segfaults"]
    assert details["raises"] == "RuntimeError: no more than 20 tokens, please"


def test_time_is_told_by_stage(worker):
    (result,) = judge_job(worker, Job(CASE, ("flash_kda:fwd",)))
    assert set(result.seconds) == {"generate", "oracle", "target", "judge"}
    assert all(0 < spent < 60 for spent in result.seconds.values())


def test_a_worker_killed_while_idle_is_replaced_and_nobody_blamed(worker):
    os.kill(worker.process.pid, signal.SIGKILL)
    while worker.process.poll() is None:
        time.sleep(0.01)
    (result,) = judge_job(worker, Job(CASE, ("flash_kda:fwd",)))
    assert result.outcome == "passed"


def test_out_of_reach_is_skipped_and_no_memory_too(tmp_path, monkeypatch):
    source = """
from fuzz.targets import Target
import flash_kda
def fwd(*args, **kwargs):
    raise MemoryError("no room")
picky = Target("", flash_kda.fwd, "cpu", reach=lambda case: "too long" if case.tokens > 9 else None)
greedy = Target("", fwd, "cpu")
"""
    (tmp_path / "their_targets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker(("their_targets:picky", "their_targets:greedy"), time_limit=10.0, threads=1)
    try:
        wait_until_ready(worker)
        results = judge_job(worker, Job(replace(CASE, seq_lens=(10,)), worker.targets))
    finally:
        worker.close()
    assert outcomes(results) == {"picky": ("skipped", "too long"), "greedy": ("skipped", "out of memory")}


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0", "cannot import their_module: ZeroDivisionError"), ("import os; os._exit(7)", "exit status 7")],
)
def test_a_target_that_cannot_be_had_is_one_line(source, message, tmp_path, monkeypatch):
    (tmp_path / "their_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker(("their_module:fwd",), time_limit=10.0)
    try:
        with pytest.raises(WorkerError, match=message) as caught:
            wait_until_ready(worker)
    finally:
        worker.close()
    assert "\n" not in str(caught.value)
