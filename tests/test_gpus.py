"""The workers of pytest-xdist spread over the GPUs and wait for memory; shown with names and numbers, without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gpus
import pytest
import torch

TESTS = Path(__file__).resolve().parent


def environment(**variables: str) -> dict[str, str]:
    """Without what this process itself has decided."""
    own = ("CUDA_VISIBLE_DEVICES", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", gpus.KNOWN, "PYTEST_ADDOPTS")
    return {**{name: x for name, x in os.environ.items() if name not in own}, **variables}


@pytest.mark.parametrize(
    ("worker", "given", "seen"),
    [
        ("gw0", "0,1,2", "0,1,2"),
        ("gw1", "0,1,2", "1,2,0"),
        ("gw5", "4,6,7", "7,4,6"),
        ("gw5", "GPU-a,GPU-b", "GPU-b,GPU-a"),
        ("gw5", "3", "3"),
        ("gw5", "", ""),
        ("master", "0,1", "0,1"),
    ],
)
def test_each_worker_has_a_gpu_in_front(worker, given, seen, monkeypatch):
    monkeypatch.delenv(gpus.KNOWN, raising=False)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    gpus.take_turn()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_gpus_are_counted_where_nobody_named_them(tmp_path, monkeypatch):
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-2)'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(gpus.KNOWN, raising=False)
    assert gpus.visible() == ["0", "1"]
    stub.unlink()
    assert gpus.visible() == ["0", "1"]  # a worker is told
    monkeypatch.delenv(gpus.KNOWN)
    assert gpus.visible() == []


@pytest.mark.parametrize(
    ("given", "cores", "workers"), [("", 200, 200), ("0", 16, 16), ("0", 200, 16), ("0,1", 64, 32)]
)
def test_no_more_workers_than_fit(given, cores, workers, monkeypatch):
    monkeypatch.setenv(gpus.KNOWN, given)
    assert gpus.most_workers(cores) == workers


def test_workers_of_a_run_spread_over_the_gpus(tmp_path):
    """Three workers and two GPUs, through pytest-xdist itself."""
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\nimport gpus; gpus.take_turn()\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('i', range(6))\n"
        "def test(i, tmp_path_factory):\n"
        "    time.sleep(0.2)\n"
        "    seen = os.environ['PYTEST_XDIST_WORKER'] + ' ' + os.environ['CUDA_VISIBLE_DEVICES']\n"
        f"    open({str(tmp_path)!r} + f'/seen{{i}}', 'w').write(seen)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES="0,1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    seen = {(tmp_path / f"seen{i}").read_text() for i in range(6)}
    assert seen == {"gw0 0,1", "gw1 1,0", "gw2 0,1"}


def test_the_choice_is_made_before_pytorch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, types\nprint('visible:', os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "cuda = types.SimpleNamespace(is_available=lambda: False)\n"
    )
    variables = {"CUDA_VISIBLE_DEVICES": "0,1", "PYTEST_XDIST_WORKER": "gw1", "PYTHONPATH": f"{tmp_path}:{TESTS}"}
    command = [sys.executable, "-c", "import conftest"]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "visible: 1,0\n", done.stderr


def test_hidden_gpus_are_seen_by_nobody(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = [sys.executable, "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    with gpus.hidden():
        assert not torch.cuda.is_available()
        assert subprocess.run(asked, capture_output=True, text=True).stdout == "''\n"
    assert torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1" and "TRITON_INTERPRET" not in os.environ


GPU_MACHINE = """
import os, pytest, torch
import torch.utils._triton
torch.cuda.is_available = lambda: True  # as the conftest finds it
torch.utils._triton.has_triton = lambda: True
from conftest_of_the_project import *
"""


def test_only_tests_marked_gpu_see_one(tmp_path):
    """The project's own conftest, on a machine with a GPU as far as PyTorch says."""
    shutil.copy(TESTS / "conftest.py", tmp_path / "conftest_of_the_project.py")
    (tmp_path / "conftest.py").write_text(GPU_MACHINE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_it.py").write_text(
        "import os, pytest, torch\n"
        "@pytest.fixture(scope='module')\n"
        "def seen(): return torch.cuda.is_available(), os.environ.get('CUDA_VISIBLE_DEVICES')\n"
        "def test_unmarked(seen): assert seen == (False, '')\n"
        "@pytest.mark.gpu\n"
        "def test_marked(monkeypatch):\n"
        "    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)\n"
        "    assert torch.cuda.is_available() and os.environ['CUDA_VISIBLE_DEVICES'] == '0'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    variables = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, cwd=tmp_path)
    assert "2 passed" in done.stdout, done.stdout


def test_memory_is_waited_for_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the locks are
    free = {"bytes": 10 * 2**30}
    order, inside = [], []

    def free_bytes() -> int:
        seen = free["bytes"]
        time.sleep(0.1)  # time for another to see as much
        return seen

    def take() -> None:
        with gpus.memory(8, free_bytes) as enough:
            order.append(enough and not inside)
            inside.append(1)
            free["bytes"] = 2**30
            time.sleep(0.3)
            inside.pop()
            free["bytes"] = 10 * 2**30

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [True] * 3  # the later ones waited until the memory was back
    monkeypatch.setattr(gpus, "PATIENCE", 0.1)
    with gpus.memory(20, lambda: free["bytes"]) as enough:
        assert not enough


def test_a_lost_context_is_noticed_in_a_worker_only(monkeypatch):
    def failing():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(initialized, synchronize) -> bool:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        return gpus.context_is_lost()

    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert [lost(True, failing), lost(True, lambda: None), lost(False, failing)] == [True, False, False]
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    assert not lost(True, failing)
