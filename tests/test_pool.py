"""Pools: batches become results, each once, and none of those that are known already."""

from __future__ import annotations

import subprocess
import sys

from fuzz.campaign import devices
from fuzz.campaign.devices import Gpu, Seat, default_jobs, seats
from fuzz.campaign.plan import Plan
from fuzz.campaign.pool import Assignment, Ended, Judged, Pool
from fuzz.campaign.progress import Progress
from fuzz.campaign.store import case_id
from fuzz.campaign.worker import BEGIN
from fuzz.cases.drawing import draw_batch
from fuzz.reporting.display import headline

TARGETS = ("flash_kda:fwd", "wrong_targets:raises")
SETTINGS = {"profile": "cpu", "seed": 9, "time_limit": 60.0}


def judge_all(pool: Pool) -> list:
    events = []
    while not pool.idle or not pool.descriptions:
        events += pool.advance(0.1)
    return events


def test_a_worker_whose_parent_is_gone_ends_before_it_imports_anything():
    """The parent is another process than the one that it was told of, as after `kill -9`."""
    code = BEGIN.format(parent=1, pipe=0) + "print('imported')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert "torch" not in done.stderr and "fuzz.campaign" not in done.stderr


def test_a_batch_is_judged_once_and_resumed_where_it_was_left():
    drawn = {case_id(case): case for case in draw_batch("cpu", 9, 1)}
    pool = Pool(TARGETS, [Seat()], **SETTINGS)
    try:
        pool.give(Assignment(1, most=3))
        while not pool.descriptions:
            pool.advance(0.1)
        first = judge_all(pool)
        results = [event.result for event in first if isinstance(event, Judged)]
        done = {(case_id(result.case), result.target) for result in results}
        assert len(done) == len(results) == 6 and {id for id, _ in done} == set(list(drawn)[:3])
        assert [event.ends for event in first if isinstance(event, Judged)] == [None, True] * 3
        assert first[-1] == Ended(1, whole=False)

        # One target of one case has its result still to come.
        left_out = (case_id(results[0].case), TARGETS[1])
        pool.give(Assignment(1, done - {left_out}, most=2))
        again = judge_all(pool)
        seconds = [(case_id(event.result.case), event.result.target) for event in again if isinstance(event, Judged)]
        assert seconds[0] == left_out and len(seconds) == 3
        assert seconds[1][0] == list(drawn)[3]
        assert {event.place for event in again if isinstance(event, Judged)} == {"cpu"}

        pool.retire(TARGETS[1], "tired")
        pool.give(Assignment(2, most=1))
        last = [event for event in judge_all(pool) if isinstance(event, Judged)]
        assert [(event.result.target, event.result.outcome, event.result.reason) for event in last] == [
            (TARGETS[1], "skipped", "tired"),
            (TARGETS[0], "passed", ""),
        ]
        pool.give(Assignment(3, [(case_id(case), name) for case in draw_batch("cpu", 9, 3) for name in TARGETS]))
        assert judge_all(pool) == [Ended(3, whole=True)]
    finally:
        pool.close()


def test_workers_are_spread_over_gpus():
    pair = [Gpu("4", 140.0), Gpu("GPU-1f", 140.0)]
    taken = seats(pair, 5)
    assert [seat.gpu for seat in taken] == ["4", "GPU-1f", "4", "GPU-1f", "4"]
    assert all(0.2 < seat.memory <= 0.9 / 2 for seat in taken)
    for jobs in (1, 14, 16):  # their contexts and those of the others fit in as well
        share = seats([Gpu("0", 79.6)], jobs)[0].memory
        assert jobs * share * 79.6 + (jobs + 2) * 0.5 < 0.95 * 79.6 and jobs * share > 0.5
    assert seats([], 2) == [Seat(), Seat()]
    assert default_jobs([], 5.0, 2) == 2
    assert default_jobs(pair[:1], 5.0, 16) == 14  # two cores are left to the campaign itself
    assert default_jobs(pair[:1], 28.0, 16) == 4  # long cases: as many as there is memory for
    assert default_jobs(pair, 28.0, 64) == 8
    assert default_jobs(pair, 5.0, 1) == 2  # one a GPU at least


def test_gpus_that_are_hidden_from_now_on_are_none(monkeypatch):
    """The driver, once started, does not look at the variable again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(devices.importlib.metadata, "version", lambda name: "2.11.0+cu130")

    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 1
            return 0

        def cuDeviceGet(self, device, index):
            return 0

        def cuDeviceTotalMem_v2(self, size, device):
            size._obj.value = 140 << 30
            return 0

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver())
    assert devices.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.gpus() == [Gpu("0", 140.0)]


def test_the_display_says_that_workers_wait_for_a_compiler(tmp_path):
    pool = Pool(TARGETS[:1], [Seat()] * 2, **SETTINGS)
    try:
        pool.workers[0]._receive("tuning", None)
        assert pool.compiling == 1
        progress = Progress(Plan(tmp_path, cases=5), status="running", compiling=pool.compiling)
        assert headline(progress).endswith(", 1 workers wait for kernels to be compiled")
        pool.workers[0]._receive("running", (TARGETS[0], ()))
        assert pool.compiling == 0
    finally:
        pool.close()
    progress.compiling = pool.compiling
    assert "compiled" not in headline(progress)
