"""Campaigns that are interrupted, killed or short of disk, and resumed: nothing is lost or judged twice."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import kill_loop
import pytest
from test_campaign import CORRECT, TESTS

from fuzz.__main__ import main
from fuzz.campaign import campaign, findings, run_folder, store
from fuzz.campaign.plan import CampaignError, Plan, resumed
from fuzz.cases import drawing
from fuzz.cases.case import Case


def start(folder: Path, target: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "fuzz",
        "run",
        "--budget",
        "10m",
        "--jobs",
        "1",
        "--target",
        target,
        "--out",
        folder,
    ]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(folder: Path, table: str) -> int:
    try:
        with contextlib.closing(store.open_for_reading(folder)) as db:
            return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except (FileNotFoundError, sqlite3.OperationalError):
        return 0  # not there yet


def failures(folder: Path) -> int:
    """That are counted in a finding."""
    try:
        with contextlib.closing(store.open_for_reading(folder)) as db:
            return sum(store.failures_by_finding(db).values())
    except (FileNotFoundError, sqlite3.OperationalError):
        return 0  # not there yet


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_cleanly(number, tmp_path):
    folder = tmp_path / "run"
    wrong = number == signal.SIGINT
    process = start(folder, "wrong_targets:raises" if wrong else CORRECT)
    wait_for(lambda: failures(folder) > 0 if wrong else rows(folder, "results") > 0)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == (1 if wrong else 2), printed
    assert f"python -m fuzz run --resume {folder} continues" in printed
    assert "interrupted: " in printed and f"report: {folder / 'report.html'}" in printed
    with contextlib.closing(store.open_for_reading(folder)) as db:
        assert store.get(db, "status") == "interrupted"
        assert {path.name for path in (folder / "findings").iterdir()} == set(store.failures_by_finding(db))


def test_kill_9_leaves_all_results_and_no_process(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "wrong_targets:raises")
    wait_for(lambda: failures(folder) > 0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs the list of child processes in /proc")
    workers = children.read_text().split()
    process.kill()
    process.communicate()
    assert workers
    wait_for(lambda: not any(is_alive(worker) for worker in workers), 20.0)
    with contextlib.closing(store.open_for_reading(folder)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counted = store.failures_by_finding(db)
    findings.recover(folder / "findings")
    for name in counted:
        assert findings.load_finding(folder / "findings" / name).inputs
    assert main(["report", str(folder)]) == 0


def is_alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_campaign_resumes_and_loses_nothing(tmp_path):
    """`tests/kill_loop.py` is the same with a hundred kills, which take many minutes."""
    seen = kill_loop.kill_again_and_again(tmp_path / "run", 3, seed=2)
    assert seen.results[-1] > 0 and seen.findings[-1] > 0


def test_a_campaign_resumes_with_the_cases_that_it_would_have_had(tmp_path):
    """Interrupted and resumed: no case is missing, judged twice, or another one."""

    class Stop(Exception):
        pass

    def show(progress):
        if progress.cases >= 7:
            raise Stop

    plan = Plan(tmp_path / "run", (CORRECT,), cases=16, seed=4)
    with pytest.raises(Stop):
        campaign.run_campaign(plan, show)
    begun = rows(plan.out, "results")
    done = campaign.run_campaign(resumed(plan.out))
    expected = list(dict.fromkeys(drawing.draw_cases("cpu", 4 << 32, drawing.BATCH)))[:16]
    with contextlib.closing(store.open_for_reading(plan.out)) as db:
        judged = [Case.from_dict(json.loads(case)) for (case,) in db.execute("SELECT case_json FROM results")]
        assert (store.get(db, "status"), store.get(db, "cases")) == ("finished", 16)
    assert 7 <= begun < 16 == len(judged) and set(judged) == set(expected)
    assert done.cases == done.tallies[CORRECT].judged == 16


def test_a_full_disk_is_reported_and_what_is_there_is_whole(tmp_path):
    """No file may grow beyond some size, which is how a disk is full for one process alone."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fuzz",
        "run",
        "--cases",
        "500",
        "--jobs",
        "1",
        "--seed",
        "6",
        "--out",
        str(folder),
    ]
    limited = ["bash", "-c", 'ulimit -f 150; exec "$@"', "bash", *command, "--target", CORRECT]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"python -m fuzz: {folder}: cannot be written: " in done.stderr
    assert f"python -m fuzz run --resume {folder} continues" in done.stderr and done.stderr.count("\n") == 1
    before = rows(folder, "results")
    assert before > 0
    with contextlib.closing(store.open_for_reading(folder)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    campaign.run_campaign(resumed(folder, cases=before + 2))
    assert rows(folder, "results") == before + 2


@pytest.fixture
def begun(tmp_path) -> Path:
    """The folder of a campaign that has judged nothing yet."""
    plan = Plan(tmp_path / "run", (CORRECT,), cases=2)
    (plan.out / "findings").mkdir(parents=True)
    with contextlib.closing(store.create(plan.out)) as db:
        store.put(db, config=plan.to_dict(), batch=0, started=time.time())
    return plan.out


def test_a_folder_that_became_read_only_is_left_as_it_is(begun, monkeypatch, capsys):
    """Root may write anywhere, so SQLite is told that it may not."""
    connect = store._connect

    def read_only(path):
        db = connect(path)
        db.execute("PRAGMA query_only = ON")
        return db

    monkeypatch.setattr(store, "_connect", read_only)
    before = (begun / store.STORE_FILE).read_bytes()
    assert main(["run", "--resume", str(begun)]) == 2
    assert f"{begun}: cannot be written: attempt to write a readonly database" in capsys.readouterr().err
    assert (begun / store.STORE_FILE).read_bytes() == before


def test_two_campaigns_do_not_share_a_folder(begun, capsys):
    with run_folder.hold(begun):
        assert main(["run", "--resume", str(begun)]) == 2
    assert "expected a folder that no command uses" in capsys.readouterr().err


def test_the_campaign_that_is_refused_leaves_the_folder_of_the_other_alone(tmp_path, capsys):
    """The other one has made its folder, and put nothing into it yet."""
    folder = tmp_path / "run"
    with run_folder.held_folder(folder):
        assert main(["run", "--cases", "1", "--out", str(folder)]) == 2
        assert "expected a folder that no command uses" in capsys.readouterr().err
        assert main(["conform", "--target", CORRECT, "--out", str(folder)]) == 2
        assert "expected a folder that no command uses" in capsys.readouterr().err
        assert (folder / "findings").is_dir()
        (folder / store.STORE_FILE).touch()
    assert (folder / store.STORE_FILE).exists()


def test_a_folder_that_another_command_removed_is_not_held(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    lock = run_folder.fcntl.flock

    def late(descriptor, how):
        (tmp_path / "run").rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with pytest.raises(CampaignError, match="has just removed it"), run_folder.hold(tmp_path / "run"):
        pass


def test_default_folders_of_one_second_are_two(tmp_path):
    folders = [run_folder.new_folder(tmp_path, "conform-") for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finding of several failures, in a finished campaign."""
    plan = Plan(tmp_path_factory.mktemp("finished") / "run", ("wrong_targets:raises",), cases=20, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuzz.campaign.plan.SHRINK_LIMIT", 0.0)
        done = campaign.run_campaign(plan)
    (finding,) = [one for one in done.findings.values() if one.failure.check["name"] == "raised"]
    assert finding.count > 1
    return finding.folder


@pytest.fixture
def failing(finished, tmp_path) -> Path:
    """The same in a copy of that campaign."""
    run = shutil.copytree(finished.parent.parent, tmp_path / "run")
    return run / "findings" / finished.name


def failed_in(folder: Path) -> int:
    with contextlib.closing(store.open_for_reading(folder.parent.parent)) as db:
        return store.failures_by_finding(db)[folder.name]


def test_a_finding_whose_folder_was_taken_away_is_written_again(failing):
    count = failed_in(failing)
    shutil.rmtree(failing)
    done = campaign.run_campaign(resumed(failing.parent.parent, cases=20))
    assert done.findings[failing.name].count == failed_in(failing) == count
    assert findings.load_finding(failing).inputs.stat().st_size > 0


def test_a_folder_without_its_result_is_the_same_finding_when_the_case_is_judged_again(failing):
    """What a kill between the two leaves behind: the result is still to come."""
    count, run = failed_in(failing), failing.parent.parent
    original = findings.load_case_file(failing / "original.json").case
    with contextlib.closing(store.open_for_writing(run)) as db:
        db.execute("DELETE FROM results WHERE case_id = ?", (store.case_id(original),))
        store.put(db, batch=0)
    folders = sorted(path.name for path in failing.parent.iterdir())
    done = campaign.run_campaign(resumed(run, cases=20))
    assert done.findings[failing.name].count == failed_in(failing) == count
    assert sorted(path.name for path in failing.parent.iterdir()) == folders


def test_a_store_of_the_version_before_is_resumed(failing):
    count, run = failed_in(failing), failing.parent.parent
    with contextlib.closing(store.open_for_writing(run)) as db:
        db.execute("CREATE TABLE findings (id TEXT PRIMARY KEY, count INTEGER)")
        db.execute("PRAGMA user_version = 2")
    saved = json.loads((failing / "finding.json").read_text())
    (failing / "finding.json").write_text(json.dumps({key: saved[key] for key in saved.keys() - {"state", "previous"}}))
    done = campaign.run_campaign(resumed(run, cases=21))
    assert done.findings[failing.name].count == failed_in(failing) >= count and done.given == 21
    with contextlib.closing(store.open_for_writing(run)) as db:
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(store.StoreError, match="expected a store of version 2 or 3, got 1"):
        campaign.run_campaign(resumed(run, cases=22))
