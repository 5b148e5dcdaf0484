"""`python tests/kill_loop.py --kills 100`: kills a campaign with SIGKILL again and again, and counts what is lost.

Each time `--resume` continues the campaign, which is killed at a random moment; in between, the run folder is read.
Nothing may be lost: a result or a finding that was there stays, every failure is counted in a finding whose folder can
be replayed, no case is judged twice, and no process stays behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.campaign import findings, store

TESTS = Path(__file__).parent
TARGETS = ("wrong_targets:writes_zeros", "wrong_targets:raises")
FOREVER = 1_000_000  # cases


@dataclass
class Kills:
    """What was seen after each kill."""

    kills: int = 0
    results: list[int] = field(default_factory=list)
    findings: list[int] = field(default_factory=list)


def command(folder: Path, seed: int) -> list[str]:
    if (folder / store.STORE_FILE).exists():
        return [sys.executable, "-m", "fuzz", "run", "--resume", str(folder)]
    options = ["--cases", str(FOREVER), "--seed", str(seed), "--jobs", "1", "--out", str(folder)]
    return [sys.executable, "-m", "fuzz", "run", *(f"--target={target}" for target in TARGETS), *options]


def kill_again_and_again(folder: Path, kills: int, seed: int = 0, show=lambda kills: None) -> Kills:
    """Raises AssertionError as soon as anything is lost."""
    draw = random.Random(seed)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    seen = Kills()
    known: dict[str, set] = {"results": set(), "findings": set()}
    while seen.kills < kills:
        environment = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1")
        process = subprocess.Popen(
            command(folder, seed), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # Some are killed while they start, most after they have judged something new.
        before, end = len(known["results"]), time.monotonic() + 300
        while_it_starts = draw.random() < 0.2
        while not while_it_starts and process.poll() is None and rows(folder, "results") <= before:
            assert time.monotonic() < end, "nothing is judged any more"
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 3.0) if while_it_starts else draw.expovariate(1 / 0.3))
        children = descendants(process.pid)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.wait()
        seen.kills += 1
        until = time.monotonic() + 20
        while any(Path(f"/proc/{child}/stat").exists() and not zombie(child) for child in children):
            assert time.monotonic() < until, "processes stay behind"
            time.sleep(0.02)
        if (folder / store.STORE_FILE).exists():
            check(folder, known)
        seen.results.append(len(known["results"]))
        seen.findings.append(len(known["findings"]))
        show(seen)
    return seen


def check(folder: Path, known: dict[str, set]) -> None:
    """Nothing that was there is gone, and all of it fits together."""
    with contextlib.closing(store.open_for_reading(folder)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        results = db.execute("SELECT case_id, target, outcome, finding FROM results").fetchall()
    pairs = [row[:2] for row in results]
    assert len(set(pairs)) == len(pairs), "a case was judged twice"
    findings.recover(folder / "findings")
    saved = (
        {one.path.name: one for one in findings.find(folder / "findings")}
        if any((folder / "findings").iterdir())
        else {}
    )
    ids = set(saved)
    assert known["results"] <= set(pairs), "a result is lost"
    assert known["findings"] <= ids, "a finding is lost"
    known["results"], known["findings"] = set(pairs), ids
    failed = [finding for _, _, outcome, finding in results if outcome == "failed"]
    assert all(finding in ids for finding in failed), "a failure is counted nowhere"
    for one in saved.values():  # whose result may not be there yet
        findings.load_failure(one)
        findings.load_case_file(one.path / "original.json")


def rows(folder: Path, table: str) -> int:
    try:
        with contextlib.closing(store.open_for_reading(folder)) as db:
            return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except FileNotFoundError:
        return 0


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def show(seen: Kills) -> None:
        print(f"{seen.kills} kills survived: {seen.results[-1]} results, {seen.findings[-1]} findings", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        kill_again_and_again(Path(folder) / "run", arguments.kills, arguments.seed, show)


if __name__ == "__main__":
    main()
