"""The end of `ci/sanitize.py`: nothing that it started outlives it. Its cases and its reports: test_hopper.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "ci" / "sanitize.py"

# In the place of compute-sanitizer: a launcher whose child hangs.
LAUNCHER = """#!/bin/sh
sleep 600 &
echo $! > "{child}"
wait
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_ended_it_ends_what_its_tools_started(how, tmp_path):
    child = tmp_path / "child"
    stub = tmp_path / "bin" / "compute-sanitizer"
    stub.parent.mkdir()
    stub.write_text(LAUNCHER.format(child=child))
    stub.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "memcheck", "--logs", tmp_path / "logs"],
        env={**os.environ, "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}"},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (child.exists() and child.read_text().strip()) or process.poll() is not None)
        started = int(child.read_text())
        assert alive(started)
        process.send_signal(how)
        assert process.wait(timeout=30) != 0
        wait_for(lambda: not alive(started))
    finally:
        process.kill()
