"""Campaigns on a Ray cluster: of several processes on this machine, one of which is killed on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter

import pytest

from fuzz.campaign import campaign, run_folder, store
from fuzz.campaign.plan import Plan
from fuzz.campaign.progress import Progress

ray = pytest.importorskip("ray", reason="needs Ray (pip install 'flash-kda[ray]'), which is not installed here")

TARGETS = ("wrong_targets:raises",)
CASES = 60


@pytest.fixture
def cluster():
    """Two machines of one core each, besides the head, which has none."""
    from ray.cluster_utils import Cluster

    path = os.pathsep.join(place for place in sys.path if place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def test_a_lost_machine_costs_nothing_but_time(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "BATCH", 15)  # so that both machines have something to do
    folder = tmp_path / "run"
    killed = threading.Event()

    def kill_one(progress: Progress) -> None:
        """As soon as both have judged something."""
        if killed.is_set() or progress.cases < 4:
            return
        with contextlib.closing(store.open_for_reading(folder)) as db:
            places = {place for (place,) in db.execute("SELECT DISTINCT place FROM results")}
        if len(places) == 2:
            os.kill(int(sorted(places)[0].split()[1]), signal.SIGKILL)
            killed.set()

    plan = Plan(out=folder, targets=TARGETS, cases=CASES, seed=5, jobs=1, engine="ray")
    began = time.monotonic()
    progress = campaign.run_campaign(plan, kill_one)
    assert killed.is_set() and progress.status == "finished", time.monotonic() - began
    assert progress.cases == CASES
    with contextlib.closing(store.open_for_reading(folder)) as db:
        judged = Counter(db.execute("SELECT case_id, target FROM results"))
        counts = store.failures_by_finding(db)
        failed = db.execute("SELECT count(*) FROM results WHERE reason LIKE 'raised%'").fetchone()[0]
        places = {place for (place,) in db.execute("SELECT DISTINCT place FROM results")}
    assert len(judged) >= len(TARGETS) * CASES and set(judged.values()) == {1}
    found = {path.name: run_folder.load(path).failure.group for path in (folder / "findings").iterdir()}
    groups = {error_class: counts[id] for id, (_, check, error_class) in found.items() if check == "raised"}
    assert groups == {"RuntimeError": failed} and failed > 1
    assert len(places) == 3  # two, and the one that came in place of the lost one
