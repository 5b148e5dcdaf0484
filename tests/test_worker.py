"""Workers: what a target does to its process is its result, and the next job finds a process that works."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest

import fuzz.campaign.worker
import fuzz.judging.judge
import fuzz.judging.sensitivity
from fuzz.campaign.job import Job, WorkerError
from fuzz.campaign.worker import WARM_CALLS, Worker, judge_job, ready_worker, wait_until_ready
from fuzz.campaign.worker_process import Shared, _lost_device, judge_one
from fuzz.cases.plain import PLAIN
from fuzz.targets.registry import load_target

CASE = replace(
    PLAIN,
    seq_lens=(5,),
    packed=True,
    cu_seqlens_dtype="int32",
    lower_bound=-1.0,
    scale=1.0,
    initial_state=None,
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
    with ready_worker(SPECS, time_limit=2.0, threads=1) as worker:
        yield worker


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
from fuzz.targets.registry import Target
import flash_kda
def fwd(*args, **kwargs):
    raise MemoryError("no room")
picky = Target("", flash_kda.fwd, "cpu", reach=lambda case: "too long" if case.tokens > 9 else None)
greedy = Target("", fwd, "cpu")
"""
    (tmp_path / "their_targets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with ready_worker(("their_targets:picky", "their_targets:greedy"), time_limit=10.0, threads=1) as worker:
        results = judge_job(worker, Job(replace(CASE, seq_lens=(10,)), worker.targets))
    assert outcomes(results) == {"picky": ("skipped", "too long"), "greedy": ("skipped", "out of memory")}


FATAL = {
    "aborts": ("died", "SIGABRT: the process was killed"),
    "spins": ("timeout", "time limit: no answer within 2 s"),
    "kills_itself": ("died", "SIGKILL: the process was killed"),
}
WITHOUT_MEMORY = ("wants_too_much", "is_refused_memory")


def test_whatever_a_target_does_to_its_process_the_next_one_is_judged():
    names = tuple(f"wrong_targets:{name}" for name in (*FATAL, *WITHOUT_MEMORY))
    with ready_worker((*names, "flash_kda:fwd"), time_limit=2.0, threads=1) as worker:
        results = judge_job(worker, Job(CASE, worker.targets))
    found = {result.target.partition(":")[2]: result for result in results}
    for name, (check, detail) in FATAL.items():
        assert found[name].reason == check and found[name].failed_checks[0]["detail"].startswith(detail)
    for name in WITHOUT_MEMORY:
        assert (found[name].outcome, found[name].reason) == ("skipped", "out of memory")
    assert found["fwd"].outcome == "passed"


ODD = """
import os, tempfile
import flash_kda
os.fork()
def forks(*args, **kwargs):
    flash_kda.fwd(*args, **kwargs)
    os.fork()
def forks_and_raises(*args, **kwargs):
    flash_kda.fwd(*args, **kwargs)
    if os.fork() == 0:
        raise SystemExit(0)
class Mute(Exception):
    def __str__(self):
        raise LookupError
def mute(*args, **kwargs):
    raise Mute
def unprintable(*args, **kwargs):
    raise ValueError("half \\udce4 of a \\x1b[31mcharacter")
def nowhere(*args, **kwargs):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    raise ValueError("no directory")
"""


def test_copies_of_the_process_have_no_say_and_odd_exceptions_are_told(tmp_path, monkeypatch):
    """A process that a target forks comes back from the call too, and would judge and answer beside the worker."""
    (tmp_path / "odd_targets.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("forks", "forks_and_raises", "mute", "unprintable", "nowhere")
    worker = Worker((*[f"odd_targets:{name}" for name in names], "flash_kda:fwd"), time_limit=20.0, threads=1)
    try:
        wait_until_ready(worker)
        results = judge_job(worker, Job(CASE, worker.targets, ("determinism", "gate_off")))
        process = worker.process
        again = judge_job(worker, Job(CASE, worker.targets))
    finally:
        worker.close()
    assert worker.process is process and len(results) == len(again) == len(names) + 1
    found = outcomes(results)
    assert [found[name] for name in ("forks", "forks_and_raises", "fwd")] == [("passed", "")] * 3
    details = {result.target.partition(":")[2]: result.failed_checks[0]["detail"] for result in results[2:-1]}
    assert details == {
        "mute": "Mute: no text, because str() raised LookupError",
        "unprintable": r"ValueError: half \udce4 of a \x1b[31mcharacter",
        "nowhere": "ValueError: no directory",
    }
    assert all(found[name] == ("failed", "raised") for name in details)


def test_a_target_whose_import_ends_the_process_is_named(tmp_path, monkeypatch):
    (tmp_path / "ends_at_import.py").write_text("import os\nos._exit(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker(("flash_kda:fwd", "ends_at_import:fwd", "model"), time_limit=10.0, threads=1)
    try:
        with pytest.raises(WorkerError, match=r"\(at the import of target 'ends_at_import:fwd'\): exit status 5"):
            wait_until_ready(worker)
    finally:
        worker.close()


@pytest.mark.gpu
def test_whatever_a_target_does_to_its_gpu_the_next_one_is_judged():
    """The illegal access and the failed assertion spoil the process for good; the kernel that never ends is killed."""
    names = ("writes_anywhere", "fails_on_the_device", "wants_too_much", "never_ends_on_the_device")
    specs = tuple(f"wrong_targets:{name}" for name in names)
    with ready_worker((*specs, "wrong_targets:writes_zeros"), time_limit=5.0, threads=1) as worker:
        results = judge_job(worker, Job(CASE, worker.targets))
    found = {result.target.partition(":")[2]: result for result in results}
    illegal, assertion, greedy, endless = (found[name] for name in names)
    assert illegal.reason == "died" and "illegal memory access" in illegal.failed_checks[0]["detail"]
    assert assertion.reason == "died" and "assert" in assertion.failed_checks[0]["detail"]
    assert (greedy.outcome, greedy.reason) == ("skipped", "out of memory")
    assert endless.reason == "timeout"
    assert found["writes_zeros"].reason.startswith("accuracy")


def test_no_memory_for_the_oracle_is_nobodys_fault(tmp_path, monkeypatch):
    source = """
import fuzz.judging.judge
import fuzz.judging.sensitivity
import flash_kda
def reference(inputs, device):
    raise MemoryError("no room")
fuzz.judging.sensitivity.reference = reference
fwd = flash_kda.fwd
"""
    (tmp_path / "full_machine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with ready_worker(("full_machine:fwd",), time_limit=10.0, threads=1) as worker:
        (result,) = judge_job(worker, Job(CASE, worker.targets))
    assert (result.outcome, result.reason) == ("skipped", "out of memory in the inputs or the oracle")


def test_a_target_that_compiles_has_time_for_it(tmp_path, monkeypatch):
    source = """
import time
from fuzz.targets.registry import Target
import flash_kda
calls = []
def fwd(*args, **kwargs):
    calls.append(1)
    if len(calls) == 1:
        time.sleep(2.5)
    flash_kda.fwd(*args, **kwargs)
compiled = Target("", fwd, "cpu", warm_up=30.0)
hasty = Target("", fwd, "cpu")
"""
    (tmp_path / "slow_start.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name, outcome in (("compiled", "passed"), ("hasty", "failed")):
        with ready_worker((f"slow_start:{name}",), time_limit=2.0, threads=1) as worker:
            (result,) = judge_job(worker, Job(CASE, worker.targets))
        assert result.outcome == outcome


def test_a_warm_up_is_for_calls_that_were_made_and_not_for_every_hang(tmp_path, monkeypatch):
    source = """
import time
from fuzz.targets.registry import Target
import flash_kda
calls = []
def fwd(q, *args, **kwargs):
    calls.append(1)
    if len(calls) == 1 and q.shape[1] == 5:
        time.sleep(2.5)
    if q.shape[1] == 6:
        time.sleep(1000)
    flash_kda.fwd(q, *args, **kwargs)
target = Target("", fwd, "cpu", reach=lambda case: "too long" if case.tokens > 9 else None, warm_up=30.0)
"""
    (tmp_path / "slow_once.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fuzz.campaign.worker, "REWARM", 1.0)
    skipped, good, hanging = (replace(CASE, seq_lens=(tokens,)) for tokens in (10, 5, 6))
    with ready_worker(("slow_once:target",), time_limit=2.0, threads=1) as worker:
        results = [
            result
            for case in [skipped] * WARM_CALLS + [good] * WARM_CALLS + [hanging] * 2
            for result in judge_job(worker, Job(case, worker.targets))
        ]
    assert [result.outcome for result in results] == ["skipped"] * WARM_CALLS + ["passed"] * WARM_CALLS + ["failed"] * 2
    assert [result.reason for result in results[-2:]] == ["timeout"] * 2
    warm, cold = (result.seconds["target"] for result in results[-2:])
    assert warm < 5 and cold < 6  # and not 30 more


def test_what_a_check_expects_of_a_target_is_not_the_cause_of_what_comes_after(monkeypatch):
    def judge(target, *given):
        with pytest.raises(TypeError):
            target.fwd("no tensor")
        raise ZeroDivisionError("in a check")

    monkeypatch.setattr(fuzz.judging.judge, "judge", judge)
    shared = Shared(Job(CASE, ("flash_kda",)))
    shared.prepare("cpu")
    (check,) = judge_one(CASE, load_target("flash_kda"), (), shared).failed_checks
    assert check["name"] == "harness" and check["detail"].startswith("ZeroDivisionError: in a check (in the judge")


def test_a_lost_gpu_is_told_by_what_became_of_it_not_by_who_noticed():
    lost = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    for noticed in (lost, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")):
        assert _lost_device(lost, noticed) == "an illegal memory access was encountered: CUDA error, RuntimeError"


def test_time_spent_on_tuning_is_no_hang_and_not_the_targets(tmp_path, monkeypatch):
    """With an autotuner in place of Triton's: a GPU is needed to tune anything, and not to watch over it."""
    source = """
import time
import triton.runtime.autotuner as autotuner
import flash_kda
from fuzz.campaign.worker_process import watch_tuning
def bench(self, *args, config, **meta):
    time.sleep(1.5)
autotuner.Autotuner._bench = bench
watch_tuning()
def fwd(*args, **kwargs):
    for config in range(3):
        autotuner.Autotuner._bench(None, config=config)
    flash_kda.fwd(*args, **kwargs)
"""
    pytest.importorskip("triton", reason="needs Triton, which is not installed here")
    (tmp_path / "tuned.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with ready_worker(("tuned:fwd",), time_limit=3.0, threads=1) as worker:
        (result,) = judge_job(worker, Job(CASE, worker.targets))
    assert result.outcome == "passed"
    assert result.seconds["tune"] > 4.4 and result.seconds["target"] < 3.0


def test_an_error_map_shows_where_it_is_wrong():
    case = replace(CASE, seq_lens=(2, 299), heads=2)
    targets = ("wrong_targets:last_row_dropped", "wrong_targets:gives_nan")
    with ready_worker(targets, time_limit=30.0, threads=1) as worker:
        dropped, with_nan = judge_job(worker, Job(case, worker.targets, error_map=True))
    shown = dropped.error_map
    assert (shown["of"], shown["sequence"], shown["first_token"], shown["tokens_per_row"]) == ("out", 1, 0, 3)
    assert len(shown["values"]) == 100 and {len(row) for row in shown["values"]} == {128}
    assert max(shown["values"][98]) < 0.1 < max(shown["values"][99])
    assert with_nan.error_map["head"] == 1 and with_nan.error_map["values"][99][127] is None


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0", "cannot import their_module: ZeroDivisionError"), ("import os; os._exit(7)", "exit status 7")],
)
def test_a_target_that_cannot_be_had_is_one_line(source, message, tmp_path, monkeypatch):
    (tmp_path / "their_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerError, match=message) as caught, ready_worker(("their_module:fwd",), time_limit=10.0):
        pass
    assert "\n" not in str(caught.value)
